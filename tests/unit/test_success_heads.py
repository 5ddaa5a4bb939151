"""Success heads: shrunk to priors, quiet on what they do not know, equal for equal input, refused when damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers import artefact, success_features
from classifiers.encoder import ArtefactError
from classifiers.success import Labels, SuccessHeads, calibrate, wilson
from classifiers.success_features import PromptFeatures, read

pytest.importorskip("sklearn", reason="learning needs the extra `train`")

DIMENSIONS = 16
MODELS = ("cheap", "dear", "unlabelled")
PRIORS = {
    "cheap": {"simple": 0.8, "complex": 0.5},
    "dear": {"simple": 0.9, "complex": 0.8},
    "unlabelled": {"simple": 0.7, "complex": 0.6},
}
NOW = {model: row["simple"] for model, row in PRIORS.items()}
ENCODER = "static-test"


def prompts(count: int, seed: int) -> tuple[list[PromptFeatures], np.ndarray]:
    """Two topics as two directions of the vector and two vocabularies; True where the topic is the hard one."""
    rng = np.random.default_rng(seed)
    hard = rng.random(count) < 0.5
    made = []
    for row in range(count):
        vector = rng.normal(0, 0.15, DIMENSIONS)
        vector[int(hard[row])] += 1.0
        topic = "prove the theorem" if hard[row] else "name the capital"
        text = f"{topic} of number {rng.integers(1000)}"
        made.append(read(text, (vector / np.linalg.norm(vector)).astype(np.float32)))
    return made, hard


def labels(hard: np.ndarray, seed: int) -> Labels:
    rng = np.random.default_rng(seed)
    p = np.stack((np.where(hard, 0.2, 0.95), np.where(hard, 0.8, 0.95)), axis=1)
    scores = np.full((len(hard), 3), np.nan)
    scores[:, :2] = rng.random(p.shape) < p
    return Labels.dense(scores)


def learn(
    count: int = 400, seed: int = 0, trees: int = 20
) -> tuple[SuccessHeads, list[PromptFeatures], np.ndarray]:
    made, hard = prompts(count, 1)
    heads = SuccessHeads.fit(
        made, ["simple"] * count, labels(hard, 2), PRIORS, encoder_id=ENCODER, seed=seed, trees=trees
    )
    return heads, made, hard


@pytest.fixture(scope="module")
def heads() -> SuccessHeads:
    return learn()[0]


def test_learned_probabilities_follow_the_labels(heads: SuccessHeads) -> None:
    unseen, hard = prompts(300, 9)
    batch = heads.predict_many(unseen, ["simple"] * 300)
    assert batch.probability[hard, 0].mean() == pytest.approx(0.2, abs=0.08)
    assert batch.probability[~hard, 0].mean() == pytest.approx(0.95, abs=0.06)
    assert batch.probability[hard, 1].mean() == pytest.approx(0.8, abs=0.08)


def test_one_prompt_is_estimated_as_in_a_batch(heads: SuccessHeads) -> None:
    unseen, _ = prompts(20, 9)
    batch = heads.predict_many(unseen, ["simple"] * 20)
    for row, prompt in enumerate(unseen):
        one = heads.predict(prompt, "simple", NOW)
        if one["cheap"].source == "learned":
            assert one["cheap"].probability == pytest.approx(batch.probability[row, 0], abs=1e-5)


def test_models_without_labels_work_from_their_prior_of_now(heads: SuccessHeads) -> None:
    prompt = prompts(1, 9)[0][0]
    estimates = heads.predict(prompt, "simple", {"unlabelled": 0.33, "brand-new": 0.44, "cheap": 0.8})
    for model, prior in (("unlabelled", 0.33), ("brand-new", 0.44)):
        assert estimates[model].probability == prior
        assert estimates[model].source == "prior"
        assert estimates[model].evidence == 0.0
        assert estimates[model].lower < prior < estimates[model].upper
    assert estimates["cheap"].source == "learned"


def test_an_unlike_prompt_falls_back_to_the_prior_and_says_so(heads: SuccessHeads) -> None:
    vector = np.zeros(DIMENSIONS, dtype=np.float32)
    vector[-1] = -1.0
    estimate = heads.predict(read("全く違う質問", vector), "simple", NOW)["cheap"]
    assert (estimate.probability, estimate.source, estimate.familiarity) == (0.8, "unfamiliar", 0.0)


def test_more_evidence_narrows_the_interval(heads: SuccessHeads) -> None:
    estimates = heads.predict(prompts(1, 9)[0][0], "simple", NOW)
    width = {model: e.upper - e.lower for model, e in estimates.items()}
    assert width["dear"] < width["unlabelled"]


def test_few_labels_stay_nearer_to_the_prior_than_many() -> None:
    unseen, hard = prompts(200, 9)
    distance = []
    for count in (30, 400):
        fitted, _, _ = learn(count)
        batch = fitted.predict_many(unseen, ["simple"] * 200)
        distance.append(abs(batch.probability[hard, 0] - PRIORS["cheap"]["simple"]).mean())
    assert distance[0] < distance[1]


def test_labels_at_random_teach_nothing() -> None:
    made, _ = prompts(400, 1)
    scores = (np.random.default_rng(3).random((400, 3)) < 0.6).astype(float)
    fitted = SuccessHeads.fit(
        made, ["simple"] * 400, Labels.dense(scores), PRIORS, encoder_id=ENCODER, seed=0, trees=20
    )
    unseen, _ = prompts(200, 9)
    assert fitted.predict_many(unseen, ["simple"] * 200).probability.std(axis=0).max() < 0.06


def test_equal_input_gives_equal_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    ids = [
        learn(80, seed, trees=5)[0].save(tmp_path / f"{number}.json") for number, seed in enumerate((0, 0, 1))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_saved_heads_predict_the_same(heads: SuccessHeads, tmp_path: Path) -> None:
    heads.save(tmp_path / "heads.json")
    again = SuccessHeads.load(tmp_path / "heads.json", encoder_id=ENCODER)
    unseen, _ = prompts(30, 9)
    before, after = (h.predict_many(unseen, ["complex"] * 30).probability for h in (heads, again))
    assert np.array_equal(before, after)
    assert again.models == MODELS


def test_damaged_or_foreign_heads_are_refused(heads: SuccessHeads, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    heads.save(path)
    with pytest.raises(ArtefactError, match="made for encoder static-test"):
        SuccessHeads.load(path, encoder_id="static-other")
    arrays = path.with_suffix(".npz")
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtefactError, match="do not match the hash"):
        SuccessHeads.load(path, encoder_id=ENCODER)


def with_arrays(heads: SuccessHeads, arrays: dict[str, Any]) -> SuccessHeads:
    return SuccessHeads(
        models=heads.models,
        classes=heads.classes,
        encoder_id=ENCODER,
        arrays=arrays,
        metadata=heads.metadata,
    )


@pytest.mark.parametrize(
    ("array", "value"),
    [("children", 10**6), ("leaf", 10**6), ("feature", 10**4), ("roots", -1)],
)
def test_trees_that_point_outside_are_refused(heads: SuccessHeads, array: str, value: int) -> None:
    arrays = {name: stored.copy() for name, stored in heads.arrays.items()}
    arrays[array].reshape(-1)[0] = value
    with pytest.raises(ArtefactError, match="outside"):
        with_arrays(heads, arrays)


def test_trees_that_run_in_a_circle_are_refused(heads: SuccessHeads) -> None:
    arrays = {name: stored.copy() for name, stored in heads.arrays.items()}
    root = int(arrays["roots"][0])
    arrays["children"][arrays["children"][root, 0]] = root
    with pytest.raises(ArtefactError, match="two parents"):
        with_arrays(heads, arrays)


def test_arrays_of_the_wrong_shape_or_other_features_are_refused(heads: SuccessHeads) -> None:
    with pytest.raises(ArtefactError, match="base has shape"):
        SuccessHeads(
            models=heads.models,
            classes=heads.classes,
            encoder_id=ENCODER,
            arrays={**heads.arrays, "base": heads.arrays["base"][:1]},
            metadata=heads.metadata,
        )
    with pytest.raises(ArtefactError, match="other features"):
        SuccessHeads(
            models=heads.models,
            classes=heads.classes,
            encoder_id=ENCODER,
            arrays=heads.arrays,
            metadata={**heads.metadata, "features": ["a"]},
        )


def test_a_vector_of_another_encoder_is_refused(heads: SuccessHeads) -> None:
    with pytest.raises(ArtefactError, match="16 numbers, got 3"):
        heads.predict(read("hello", np.ones(3, dtype=np.float32)), "simple", NOW)


@pytest.mark.parametrize(
    ("score", "weight", "problem"),
    [(1.5, 1.0, "between 0 and 1"), (0.5, 0.0, "above 0"), (math.nan, 1.0, "between 0 and 1")],
)
def test_bad_labels_are_refused(score: float, weight: float, problem: str) -> None:
    made, hard = prompts(40, 1)
    good = labels(hard, 2)
    bad = Labels(good.prompt, good.model, np.full(len(good.score), score), np.full(len(good.score), weight))
    with pytest.raises(ValueError, match=problem):
        SuccessHeads.fit(made, ["simple"] * 40, bad, PRIORS, encoder_id=ENCODER, seed=0)


def test_too_few_prompts_and_unknown_classes_are_refused() -> None:
    made, hard = prompts(40, 1)
    with pytest.raises(ValueError, match="at least 30 prompts"):
        SuccessHeads.fit(made[:20], ["simple"] * 20, labels(hard[:20], 2), PRIORS, encoder_id=ENCODER, seed=0)
    with pytest.raises(ValueError, match="no prior for class 'odd'"):
        SuccessHeads.fit(made, ["odd"] * 40, labels(hard, 2), PRIORS, encoder_id=ENCODER, seed=0)


def test_wilson_interval_of_a_textbook_case() -> None:
    # 81 of 263: Newcombe (1998), table I, 95 % score interval .2553 to .3662; here 90 %, so inside of it.
    lower, upper = wilson(81 / 263, 263)
    assert 0.2553 < lower < 81 / 263 < upper < 0.3662
    assert wilson(0.0, 5)[0] == 0.0
    assert wilson(1.0, 5)[1] == 1.0


def test_identity_calibration_changes_nothing() -> None:
    raw, prior = np.array([[0.02, 0.5], [0.4, 0.98]]), np.array([[0.7, 0.6], [0.7, 1.0]])
    identity = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert calibrate(prior, raw, np.ones(2), identity) == pytest.approx(raw)
    assert np.array_equal(calibrate(prior, raw, np.zeros(2), np.array([[2.0, 1.0], [2.0, -1.0]])), prior)
    between = calibrate(prior, raw, np.full(2, 0.5), identity)
    assert bool((((between - raw) * (between - prior)) < 0).all())


def test_caution_brings_models_together_and_keeps_the_level() -> None:
    made, hard = prompts(200, 1)
    heads = SuccessHeads.fit(
        made, ["simple"] * 200, labels(hard, 2), PRIORS, encoder_id=ENCODER, seed=0, trees=5
    )
    unseen, _ = prompts(50, 9)
    bold, careful = (
        SuccessHeads(
            models=heads.models,
            classes=heads.classes,
            encoder_id=ENCODER,
            arrays=heads.arrays,
            metadata={**heads.metadata, "carry": carry},
        )
        .predict_many(unseen, ["simple"] * 50)
        .probability
        for carry in (1.0, 0.4)
    )
    prior = np.array([PRIORS[model]["simple"] for model in MODELS])
    before, after = bold - prior, careful - prior
    inside = (careful > 0.0).all(axis=1) & (careful < 1.0).all(axis=1)
    assert inside.any()
    assert (after[:, 0] - after[:, 1])[inside] == pytest.approx(0.4 * (before[:, 0] - before[:, 1])[inside])
    assert after[inside, :2].mean(axis=1) == pytest.approx(before[inside, :2].mean(axis=1))


KINDS = 8


def carried(at: np.ndarray | None) -> tuple[float, float]:
    """(moved, carry) of eight kinds of prompts; which model is better on one says nothing about another."""
    rng = np.random.default_rng(4)
    kind = np.arange(400) % KINDS
    vector = np.eye(DIMENSIONS)[kind] + rng.normal(0, 0.1, (400, DIMENSIONS))
    vector /= np.linalg.norm(vector, axis=1, keepdims=True)
    made = [
        read(f"kind{'abcdefgh'[k]} of work", v.astype(np.float32)) for k, v in zip(kind, vector, strict=True)
    ]
    good = np.where(kind % 2 == 0, 0.95, 0.05)
    scores = (rng.random((400, 3)) < np.stack((good, 1.0 - good, good), axis=1)).astype(float)
    fitted = SuccessHeads.fit(
        made, ["simple"] * 400, Labels.dense(scores), PRIORS, encoder_id=ENCODER, seed=0, trees=5, at=at
    )
    return fitted.metadata["moved"], fitted.metadata["carry"]


def test_differences_are_believed_in_full_where_the_same_kinds_come_at_all_times() -> None:
    assert carried(None) == carried(np.full(400, 7.0)) == (0.0, 1.0)
    moved, carry = carried(np.arange(400.0))
    assert moved < 0.05
    assert carry > 0.9


def test_differences_are_doubted_where_one_kind_comes_after_another() -> None:
    moved, carry = carried(np.arange(400) % KINDS * 1000.0)
    assert moved > 0.5
    assert carry == pytest.approx(0.3)
    # Neither the unit of time nor its direction matters.
    assert carried(np.arange(400) % KINDS * -2.5) == pytest.approx((moved, carry), abs=0.1)


def test_one_prompt_is_estimated_as_many_with_and_without_caution(heads: SuccessHeads) -> None:
    unseen, _ = prompts(50, 9)
    for carry in (1.0, 0.4):
        careful = SuccessHeads(
            models=heads.models,
            classes=heads.classes,
            encoder_id=ENCODER,
            arrays=heads.arrays,
            metadata={**heads.metadata, "carry": carry},
        )
        for name in heads.classes:
            batch = careful.predict_many(unseen, [name] * 50)
            for row, prompt in enumerate(unseen):
                for model, one in careful.predict(prompt, name, NOW).items():
                    if one.source == "learned":
                        column = MODELS.index(model)
                        worth = batch.evidence[row, column] * batch.familiarity[row]
                        assert one.probability == pytest.approx(batch.probability[row, column], abs=1e-4)
                        assert one.evidence == pytest.approx(worth, abs=1e-3)
                        bounds = wilson(one.probability, one.evidence + 4.0)
                        assert (one.lower, one.upper) == pytest.approx(bounds)


def test_heads_of_an_older_format_are_refused_with_the_remedy(heads: SuccessHeads, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    artefact.save(path, name="success", version="1", encoder_id=ENCODER, metadata={}, arrays=heads.arrays)
    with pytest.raises(
        ArtefactError, match=r"success-1, this version reads success-2: run farthing learn again"
    ):
        SuccessHeads.load(path, encoder_id=ENCODER)


def test_one_slope_serves_all_models(heads: SuccessHeads) -> None:
    slopes = heads.arrays["calibration"][:, 0]
    assert np.ptp(slopes) == 0.0
    assert slopes[0] > 0.5


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=400))
def test_any_text_has_finite_features(text: str) -> None:
    found = read(text, np.zeros(2, dtype=np.float32))
    assert found.structure.shape == (len(success_features.NAMES),)
    assert np.isfinite(found.structure).all()
    assert (np.diff(found.grams) > 0).all()
    assert found.grams.shape == found.counts.shape
    assert bool(((found.grams >= 0) & (found.grams < success_features.BUCKETS)).all())


def test_features_of_a_hostile_text_are_bounded() -> None:
    for text in (
        "9," * 500_000,
        "A. " * 300_000,
        "a " * 500_000,
        "\n" * 1_000_000,
        "9" * 1_000_000,
        "\ud800 x",
    ):
        assert np.isfinite(read(text, np.zeros(2, dtype=np.float32)).structure).all()


def test_metadata_is_json(heads: SuccessHeads) -> None:
    assert json.loads(json.dumps(heads.metadata))["prompts"] == 400
