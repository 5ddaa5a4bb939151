"""Learning from one's own labels: whom to believe, what to hold out, and how the heads are judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers import own_traffic
from classifiers.floor import Calibration
from classifiers.own_traffic import Value, auroc, cost_on_line, ece, judge, limit_keys, limit_signals, split
from classifiers.success import SuccessHeads
from tests.contracts.own_traffic_parts import (
    COSTS,
    MODELS,
    PRIORS,
    SUCCESS,
    compared,
    encoder,
    examples,
    fitted,
    good_heads,
    joined,
    predicted,
)

QUALITY = {"simple": 0.75, "medium": 0.75, "complex": 0.75}


def test_heads_of_own_labels_know_what_each_model_is_good_at() -> None:
    for kind in ("sum", "greet"):
        found = predicted(good_heads(), kind)
        for model in MODELS:
            assert abs(found[model] - SUCCESS[model, kind]) < 0.2, (kind, model, found)


# ---- floods ----


def heads_of(rows: own_traffic.Examples) -> tuple[SuccessHeads, list[own_traffic.Doubt]]:
    believed, doubts = limit_keys(rows, PRIORS, encoder().id, 0)
    return own_traffic.fit(believed, PRIORS, encoder().id, 0, 20), doubts


def test_five_thousand_adversarial_labels_of_one_key_move_nothing() -> None:
    honest = examples(200)
    flood = examples(2500, seed=3, keys=1, first=1000, flip=True)
    flood = replace(flood, key=np.full(len(flood.key), "key_flood"))
    assert len(flood.score) == 5000
    without, _ = heads_of(honest)
    with_flood, doubts = heads_of(joined(honest, flood))
    assert [(doubt.key, doubt.labels, doubt.left_out) for doubt in doubts] == [("key_flood", 5000, True)]
    for kind in ("sum", "greet"):
        before, after = predicted(without, kind), predicted(with_flood, kind)
        assert all(abs(before[model] - after[model]) < 0.02 for model in MODELS), (before, after)


def test_a_flood_of_zeros_for_one_model_moves_nothing() -> None:
    honest = examples(200)
    flood = examples(2500, seed=3, keys=1, first=1000)
    flood = replace(
        flood, key=np.full(len(flood.key), "key_flood"), score=np.where(flood.model == 0, 0.0, 1.0)
    )
    heads, doubts = heads_of(joined(honest, flood))
    assert [doubt.left_out for doubt in doubts] == [True]
    assert predicted(heads, "sum")["large"] > 0.8


@pytest.mark.parametrize("count", [60, 110, 190])
def test_a_flood_that_stays_below_half_is_noticed(count: int) -> None:
    flood = examples(count, seed=3, keys=1, first=1000, flip=True)
    flood = replace(flood, key=np.full(len(flood.key), "key_flood"))
    _, doubts = limit_keys(joined(examples(200), flood), PRIORS, encoder().id, 0)
    assert [(doubt.key, doubt.left_out) for doubt in doubts] == [("key_flood", True)]


def test_many_honest_labels_of_one_key_are_believed_as_much_as_all_others() -> None:
    honest = examples(120)
    large = examples(400, seed=3, keys=1, first=1000)
    large = replace(large, key=np.full(len(large.key), "key_large"))
    believed, doubts = limit_keys(joined(honest, large), PRIORS, encoder().id, 0)
    assert [(doubt.key, doubt.left_out) for doubt in doubts] == [("key_large", False)]
    mine = believed.key == "key_large"
    assert mine.sum() == 800
    assert believed.weight[mine].sum() == pytest.approx(believed.weight[~mine].sum())


def test_one_key_alone_and_a_trusted_one_are_believed() -> None:
    alone = examples(120, keys=1)
    believed, doubts = limit_keys(alone, PRIORS, encoder().id, 0)
    assert (doubts, believed.weight.sum()) == ([], alone.weight.sum())
    flood = examples(400, seed=3, keys=1, first=1000, flip=True)
    flood = replace(flood, key=np.full(len(flood.key), "key_flood"))
    both = joined(examples(120), flood)
    believed, doubts = limit_keys(both, PRIORS, encoder().id, 0, frozenset({"key_flood"}))
    assert (doubts, believed.weight.sum()) == ([], both.weight.sum())


# ---- signals ----


def test_signals_weigh_what_they_are_of_the_traffic() -> None:
    rows = examples(100, both=False)
    strong = np.arange(100) >= 20  # the first twenty labels are signals
    rows = replace(
        rows, strong=strong, score=np.where(strong, rows.score, 0.0), weight=np.where(strong, 1.0, 0.5)
    )
    limited = limit_signals(rows, {"large": 1000, "small": 1000})
    for index in range(2):
        mine = limited.model == index
        flagged, judged = mine & ~limited.strong, int((mine & limited.strong).sum())
        number = int(((rows.model == index) & ~rows.strong).sum())
        assert limited.weight[flagged].sum() == pytest.approx(number / 1000 * judged)
        assert (limited.weight[mine & limited.strong] == 1.0).all()
    nobody = limit_signals(replace(rows, strong=np.zeros(100, dtype=bool)), {"large": 10, "small": 10})
    assert len(nobody.score) == 0


# ---- holding out ----


def test_equal_prompts_are_held_out_together_and_the_draw_repeats() -> None:
    rows = joined(examples(100), examples(100, seed=2))
    inside, held = split(rows, 5)
    assert 0.1 < len(held.score) / len(rows.score) < 0.4
    assert len(inside.score) + len(held.score) == len(rows.score)
    assert not set(inside.prompt % 100) & set(held.prompt % 100)
    assert (split(rows, 5)[1].prompt == held.prompt).all()
    assert (
        len(split(rows, 6)[1].prompt) != len(held.prompt) or (split(rows, 6)[1].prompt != held.prompt).any()
    )


def test_the_held_out_rows_travel_with_the_heads() -> None:
    heads = good_heads()
    carried = Calibration.of(heads.models, heads.arrays)
    assert carried.models == MODELS
    assert carried.labels.shape[0] == carried.predicted.shape[0] > 20
    rows = carried.rows("medium", "small", "large")
    assert len(rows.excess) == carried.labels.shape[0]
    assert set(np.unique(rows.excess)) == {-1.0, 0.0, 1.0}
    assert np.isnan(rows.predicted).mean() < 0.2
    assert len(carried.rows("simple", "small", "large").excess) == 0


def test_requests_drawn_for_a_floor_are_held_out_one_by_one() -> None:
    rows = examples(100)
    copies = replace(rows, prompts=[rows.prompts[number % 4] for number in range(100)])
    together = own_traffic.held_out(copies, 1)
    assert all(len(set(together[number::4].tolist())) == 1 for number in range(4))
    drawn = replace(compared(copies), lot=np.linspace(0, 0.99, 100)).rows(np.arange(100) % 2 == 0)
    apart = own_traffic.held_out(copies, 1, drawn)
    assert (np.flatnonzero(apart[::2]) == np.arange(13)).all(), "by each one's lot"
    assert (apart[1::2] == together[1::2]).all()


# ---- judging ----


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.4, 0.7]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=12
    )
)
def test_auroc_is_the_share_of_pairs_in_order(rows: list[tuple[float, float]]) -> None:
    predicted, score = np.array([p for p, _ in rows]), np.array([y for _, y in rows])
    found = auroc(predicted, score, np.ones(len(rows)))
    good, bad = predicted[score == 1], predicted[score == 0]
    if not len(good) or not len(bad):
        assert found is None
        return
    pairs = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_error() -> None:
    score = np.array([0.0, 1.0] * 50)
    assert ece(np.full(100, 0.5), score, np.ones(100)) == pytest.approx(0.0)
    assert ece(np.full(100, 0.9), score, np.ones(100)) == pytest.approx(0.4)
    assert ece(score * 0.8 + 0.1, score, np.ones(100), bins=2) == pytest.approx(0.1)


def test_what_a_mix_of_two_models_costs() -> None:
    points = [(0.5, 1.0), (0.9, 5.0), (0.8, 4.9)]
    assert cost_on_line(points, 0.7) == pytest.approx(3.0)
    assert cost_on_line(points, 0.5) == 1.0
    assert cost_on_line(points, 0.95) is None


def test_the_value_of_a_policy_is_exact_where_every_answer_is_labelled() -> None:
    rows = examples(200, seed=4)
    value = Value(rows)
    score = np.zeros((200, 2))
    score[rows.prompt, rows.model] = rows.score
    choice = np.arange(200) % 2
    assert value.of(choice) == pytest.approx((score[np.arange(200), choice].mean(), np.mean(COSTS)))
    assert value.singles()[0] == pytest.approx((score[:, 0].mean(), COSTS[0]))


def test_the_value_of_a_policy_is_near_where_one_answer_each_is_labelled() -> None:
    rows = examples(2000, seed=4, both=False)
    # The small model for greetings alone: what the labels are blind to is corrected where the choice is labelled.
    choice = np.array([1 if number % 2 == 0 else 0 for number in range(2000)])
    success, _ = Value(rows).of(choice)
    expected = (SUCCESS["small", "greet"] + SUCCESS["large", "sum"]) / 2
    assert abs(success - expected) < 0.04


def test_good_heads_pass_and_cost_less_at_equal_success() -> None:
    rows = examples(400, seed=11)
    inside, held = split(rows, 0)
    heads = own_traffic.fit(inside, PRIORS, encoder().id, 0, 20)
    judgement = judge(heads, held, PRIORS, QUALITY, None, 0.0)
    assert judgement.refusal is None
    card = judgement.card
    assert card["auroc"] > 0.8 > card["auroc_prior"]
    assert card["ece"] < card["ece_prior"] + 0.1
    today = card["routing"]["usd_per_1000_at_this_success"]
    # By equal priors everything goes to the cheapest; the learned routing gets there at no more.
    assert today["learned"] <= today["prior_only"] * 1.01
    assert card["routing"]["learned_at_min_quality"]["success"] > card["routing"]["success"] + 0.2
    assert today["version_before"] is None


def test_heads_of_noise_are_refused() -> None:
    rows = examples(300, seed=11)
    noise = np.random.default_rng(0).random(len(rows.score)) < 0.8  # as the priors say, whatever the prompt
    rows = replace(rows, score=noise.astype(float))
    inside, held = split(rows, 0)
    heads = own_traffic.fit(inside, PRIORS, encoder().id, 0, 20)
    refusal = judge(heads, held, PRIORS, QUALITY, None, 0.0).refusal
    assert refusal is not None
    assert "no better than the priors" in refusal


def test_heads_worse_than_those_in_use_are_refused() -> None:
    held = examples(120, seed=12)
    worse = fitted(replace(examples(120, seed=13), score=np.full(240, 0.6)))
    judgement = judge(
        worse, held, {m: dict.fromkeys(QUALITY, 0.1) for m in MODELS}, QUALITY, good_heads(), 0.5
    )
    assert judgement.refusal is not None
    assert "worse than the active one on 240 newer labels" in judgement.refusal
    # With nothing newer than the active heads there is nothing to tell the two apart by.
    older = judge(worse, held, {m: dict.fromkeys(QUALITY, 0.1) for m in MODELS}, QUALITY, good_heads(), 2.0)
    assert older.card["newer_than_active"] == 0
