"""The likeness that ships: whom it asks, and that looking first loses nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers.classifier import Classifier
from classifiers.pairs import data, guard
from router.stages import likeness
from router.stages.likeness import ShippedLikeness, Stored
from router.stages.semantic import FLOOR

PROMPT = "How do I reset my password?"


@pytest.fixture(scope="module")
def shipped() -> ShippedLikeness:
    made = ShippedLikeness(Classifier.load())
    assert not made.ready
    made.load()
    assert made.ready
    return made


def test_what_cannot_be_loaded_is_told_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no file")

    monkeypatch.setattr(likeness.Verifier, "load", missing)
    made = ShippedLikeness(Classifier.load())
    made.load()
    assert not made.ready
    assert "nothing is answered by likeness" in caplog.text


def stored(shipped: ShippedLikeness, text: str, prompt: str, vector: bytes = b"") -> Stored:
    return Stored(prompt, float(shipped.sketch(text) @ shipped.sketch(prompt)), vector)


def test_its_id_names_both_encoders_and_the_verifier(shipped: ShippedLikeness) -> None:
    static, minilm, verifier, reading = shipped.id.split("/")
    assert ShippedLikeness(Classifier.load()).id == shipped.id
    assert len(reading) == 12
    assert static.startswith("static-")
    assert minilm == shipped.verifier.encoder_id
    assert shipped.verifier.id.endswith(verifier)
    assert shipped.dimensions == shipped.vector("x").size


def test_another_guard_is_another_likeness(
    shipped: ShippedLikeness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    changed = tmp_path / "guard.py"
    changed.write_bytes(Path(guard.__file__).read_bytes() + b"LONG = 31\n")
    monkeypatch.setattr(guard, "__file__", str(changed))
    made = ShippedLikeness(Classifier.load())
    assert made.id != shipped.id
    assert made.id.rpartition("/")[0] == shipped.id.rpartition("/")[0]


def test_rewordings_come_first_and_traps_not_at_all(shipped: ShippedLikeness) -> None:
    prompts = (
        "how can I reset my password?",
        "How do I reset my username?",
        "Where is Riga?",
        "Reset it in 3 days",
    )
    ranking = shipped.rank(PROMPT, [stored(shipped, PROMPT, one) for one in prompts], 0.05)
    assert [one.index for one in ranking.judged] == [0]
    assert ranking.judged[0].probability >= ranking.threshold
    loose = shipped.rank(PROMPT, [stored(shipped, PROMPT, one) for one in prompts], 0.05, 0.0)
    assert [one.probability for one in loose.judged] == sorted(
        (one.probability for one in loose.judged), reverse=True
    )
    number = shipped.rank("Wait 3 days", [stored(shipped, "Wait 3 days", "Wait 4 days")], 0.05)
    assert (number.judged, number.refused) == ((), 1)


def test_the_transformer_is_asked_only_where_it_matters(
    shipped: ShippedLikeness, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encoder = shipped._classifier.minilm
    plain = encoder.encode

    def counting(texts: Sequence[str]) -> Any:
        asked.extend(texts)
        return plain(texts)

    monkeypatch.setattr(encoder, "encode", counting)
    mine = "Where can I see my invoices of last month?"
    far = stored(shipped, mine, "Write a poem about the sea at night")
    assert shipped.rank(mine, [far], 0.01).judged == ()
    assert asked == []
    other = "Where do I find my invoices of last month?"
    made = plain([other])[0].astype("<f2").tobytes()
    first = shipped.rank(mine, [stored(shipped, mine, other, made)], 0.05)
    assert asked == [mine], "the stored prompt brought its vector"
    zeros = bytes(2 * shipped.dimensions)
    again = shipped.rank(mine, [stored(shipped, mine, other, zeros)], 0.05)
    assert asked == [mine, other], "and is read where it brought none"
    shipped.rank(mine, [stored(shipped, mine, other, made)], 0.05, owner="another tenant")
    shipped.vector(other, "another tenant")
    assert asked == [mine, other] * 2, "what others asked makes nothing quicker"
    assert again.judged[0].probability == pytest.approx(first.judged[0].probability, abs=0.02)


def test_looking_first_loses_nothing_that_could_be_a_candidate(shipped: ShippedLikeness) -> None:
    """Of what the verifier makes a candidate (0.5) the ceiling keeps all, the floor of the sketches 99 % (docs/)."""
    pairs = random.Random(5).sample(data.read_pairs(), 400)
    candidates = below = 0
    for pair in pairs:
        cosine = float(shipped.vector(pair.a) @ shipped.vector(pair.b))
        (opinion,) = shipped.verifier.opinions(pair.a, [(pair.b, cosine)])
        near = float(shipped.sketch(pair.a) @ shipped.sketch(pair.b))
        (ceiling,) = shipped.verifier.ceilings(pair.a, [(pair.b, near)])
        assert (ceiling is None) == opinion.refused
        if ceiling is None or opinion.probability < 0.5:
            continue
        candidates += 1
        below += near < FLOOR
        assert ceiling >= 0.5
    assert candidates > 100
    assert below <= 0.03 * candidates


def test_it_may_be_asked_from_several_threads(
    shipped: ShippedLikeness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped.verifier, "_remembered", 3)
    monkeypatch.setattr(likeness, "REMEMBERED", 3)
    pairs = [(pair.a, pair.b) for pair in islice(data.read_pairs(), 0, 400, 20)]

    def probability(pair: tuple[str, str]) -> float:
        ranking = shipped.rank(pair[0], [stored(shipped, *pair)], 0.05, 0.0)
        return ranking.judged[0].probability if ranking.judged else -1.0

    alone = [probability(pair) for pair in pairs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert np.allclose(list(pool.map(probability, pairs)), alone)
