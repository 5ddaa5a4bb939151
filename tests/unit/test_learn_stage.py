"""What is kept of a request to learn from, and when: only where the policy has `learn`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers import prompt_features
from classifiers.encoder import DATA_DIRECTORY, StaticEncoder
from router.core.types import RequestRecord
from tests.unit.pipeline_parts import GOOD_ANSWER, GOOD_STREAM, POLICY, Rig, Script, chunk

LEARN = POLICY + "learn: {}\n"
KEEP = POLICY + "learn: { keep_prompts: true }\n"
PROMPT = "Please explain how the tides come about."
REFUSED = json.loads(GOOD_ANSWER)
REFUSED["choices"][0]["message"]["content"] = "I'm sorry, but I can't help with that."
CUT = (*GOOD_STREAM[:2], chunk(finish="length"), *GOOD_STREAM[3:])


@pytest.fixture(scope="module")
def encoder() -> StaticEncoder:
    return StaticEncoder.load(Path(DATA_DIRECTORY))


async def settle(rig: Rig, prompt: str = PROMPT, **fields: Any) -> RequestRecord:
    await rig.ask(messages=[{"role": "user", "content": prompt}], **fields)
    return rig.journal.settled[-1]


async def test_nothing_is_kept_without_learn() -> None:
    rig = Rig()  # its encoder is None: using it would fail
    rig.wire.scripts["first"] = [Script(json.dumps(REFUSED).encode())]
    record = await settle(rig)
    assert (record.features, record.features_encoder, record.prompt, record.labels) == (None, None, None, ())


async def test_features_travel_with_the_record_and_the_prompt_only_when_asked(encoder: StaticEncoder) -> None:
    record = await settle(Rig(policy=LEARN, encoder=encoder))
    assert record.features is not None
    assert (record.features_encoder, record.prompt, record.labels) == (encoder.id, None, ())
    found, expected = prompt_features.unpack(record.features), prompt_features.read(PROMPT, encoder)
    assert np.allclose(found.vector, encoder.encode((PROMPT,))[0], atol=1e-3)
    assert np.allclose(found.structure, expected.structure, atol=0.01)
    assert np.array_equal(found.grams, expected.grams)
    assert np.array_equal(found.counts, expected.counts)
    assert PROMPT.encode() not in record.features
    assert (await settle(Rig(policy=KEEP, encoder=encoder))).prompt == PROMPT


@pytest.mark.parametrize(
    "place",
    [
        "  search: { learn: none }",
        "unlisted_teams: { learn: none }",
        "rules: [{ name: r, when: { team: [search] }, then: { learn: none } }]",
    ],
)
async def test_nothing_is_kept_where_the_policy_says_none(place: str) -> None:
    rig = Rig(
        policy=KEEP.replace("learn: {", place + "\nlearn: {")
    )  # its encoder is None: using it would fail
    rig.wire.scripts["first"] = [Script(json.dumps(REFUSED).encode())]
    record = await settle(rig)
    assert (record.features, record.features_encoder, record.prompt, record.labels) == (None, None, None, ())


@pytest.mark.parametrize("header", [{"cache-control": "no-store"}, {"x-farthing-cache": "off"}])
async def test_the_prompt_of_who_wants_nothing_stored_is_not_kept(
    encoder: StaticEncoder, header: dict[str, str]
) -> None:
    record = await settle(Rig(policy=KEEP, encoder=encoder), headers=header)
    assert record.features is not None
    assert record.prompt is None


@pytest.mark.parametrize("text", ["", "hi", "the " * 3000, "\ud800 \0 \u6f22", "1e999 " * 50])
def test_features_of_any_text_come_back(encoder: StaticEncoder, text: str) -> None:
    packed = prompt_features.pack(prompt_features.read(text, encoder))
    found = prompt_features.unpack(packed)
    assert np.isfinite(found.vector).all()
    assert found.counts.shape == found.grams.shape
    assert prompt_features.pack(found) == packed


def test_packed_features_that_are_not_ours_are_refused(encoder: StaticEncoder) -> None:
    packed = prompt_features.pack(prompt_features.read(PROMPT, encoder))
    for broken in (b"", b"\x02" + packed[1:], packed[:-1], packed + b"x", packed[:1] + b"\x01" + packed[2:]):
        with pytest.raises(ValueError, match="packed features"):
            prompt_features.unpack(broken)


@pytest.mark.parametrize("stream", [False, True])
async def test_signals_become_labels_of_the_model_that_answered(encoder: StaticEncoder, stream: bool) -> None:
    rig = Rig(policy=LEARN, encoder=encoder)
    rig.wire.scripts["first"] = [Script(*CUT) if stream else Script(json.dumps(REFUSED).encode())]
    record = await settle(rig, stream=stream)
    [label] = record.labels
    assert (label.source, label.score, label.weight) == (
        ("truncated", 0.0, 0.3) if stream else ("refusal", 0.0, 0.5)
    )
    assert (label.request_id, label.model, label.team) == (record.id, "first", "search")
    assert (label.key_id, label.propensity, label.at) == (record.key_id, record.propensity, rig.clock.now())


async def test_an_answer_that_failed_is_not_judged(encoder: StaticEncoder) -> None:
    rig = Rig(policy=LEARN, encoder=encoder)
    rig.wire.scripts["first"] = [Script(*GOOD_STREAM[:2])]
    record = await settle(rig, stream=True)
    assert record.status == "cut"
    assert record.features is not None
    assert record.labels == ()


FRESH = {"cache-control": "no-cache"}


async def test_the_same_prompt_again_labels_the_earlier_answer(encoder: StaticEncoder) -> None:
    rig = Rig(policy=LEARN, encoder=encoder)
    first = await settle(rig)
    hit = await settle(rig)
    assert (hit.cache, hit.labels, hit.features) == ("exact", (), None)
    rig.clock.advance(599)
    again = await settle(rig, headers=FRESH)
    [label] = again.labels
    assert (label.request_id, label.model, label.source, label.score) == (first.id, "first", "repeated", 0.0)
    assert label.weight < 0.3
    rig.clock.advance(601)
    assert (await settle(rig, headers=FRESH)).labels == ()


async def test_other_people_and_short_words_are_no_repetition(encoder: StaticEncoder) -> None:
    rig = Rig(policy=LEARN, encoder=encoder)
    for changes in (
        {"user": "ann"},
        {"user": "bob"},
        {"team": "alone"},
        {"prompt": "yes"},
        {"prompt": "yes"},
    ):
        assert (await settle(rig, headers=FRESH, **changes)).labels == ()
