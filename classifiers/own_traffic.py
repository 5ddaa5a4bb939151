"""Learning from an installation's own labels: what to believe, what to hold out, what the heads are worth there.

Routing policies are compared by a doubly robust estimate (Dudik, Langford and Li, "Doubly Robust Policy Evaluation
and Learning", 2011): the mean score of a model in its class, plus, where the policy's choice is labelled, what the
label says beyond that, divided by how often that model is labelled in that class. Labels of every model on every
prompt make it exact; for models that never answer it is no more than their mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.floor import Calibration, Comparisons
from classifiers.head import CLASSES
from classifiers.success import TREES, Labels, SuccessHeads
from classifiers.success_features import PromptFeatures

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
Priors = Mapping[str, Mapping[str, float]]

MIN_PROMPTS = 100
"""Labelled prompts below which nothing is learned: a prior is better than so few."""
HELD_OUT = 0.25
MIN_NEWER = 30
"""Held-out labels newer than the active heads, below which the two are not compared: it knows the older ones."""
NOTICED = 0.1
"""A key whose labels are so many beside all others' is compared with these."""
CONTRADICTS = 0.35
"""Mean squared error of a key's labels to heads of all others, above which they do not describe the same traffic."""
LEAST_GAIN = 0.005
"""Share of the prior's squared error that heads must take away: heads of noise, being shrunk, take less by luck."""
QUICK_TREES = 30
_LEAST_SHARE = 0.05
_THRESHOLDS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, slots=True)
class Examples:
    """Labels by row: `prompt` and `model` index `prompts` and `models`; `score` 0..1, `weight` > 0, `at` seconds
    since the epoch. `strong`: somebody judged the answer; else it is an automatic signal, which only speaks
    against.
    By prompt: `classes`, and `costs` (prompts, models) in USD, NaN where the price is unknown.
    """

    models: tuple[str, ...]
    prompts: Sequence[PromptFeatures]
    classes: Sequence[str]
    costs: Floats
    prompt: Integers
    model: Integers
    score: Floats
    weight: Floats
    at: Floats
    strong: Flags
    key: NDArray[np.str_]

    def rows(self, kept: Flags) -> Examples:
        """These rows alone; the prompts stay."""
        return replace(
            self,
            **{
                name: getattr(self, name)[kept]
                for name in ("prompt", "model", "score", "weight", "at", "strong", "key")
            },
        )

    @property
    def labelled_prompts(self) -> int:
        """Prompts with an answer that somebody judged."""
        return len(np.unique(self.prompt[self.strong]))

    def labels(self) -> Labels:
        return Labels(self.prompt, self.model, self.score, self.weight)


def fit(
    examples: Examples, priors: Priors, encoder_id: str, seed: int, trees: int | None = None
) -> SuccessHeads:
    """Heads of all rows. `priors` names the models in the order of `examples.models`. Needs scikit-learn."""
    at = np.full(len(examples.prompts), -np.inf)
    np.maximum.at(at, examples.prompt, examples.at)
    return SuccessHeads.fit(
        examples.prompts,
        examples.classes,
        examples.labels(),
        priors,
        encoder_id=encoder_id,
        seed=seed,
        trees=TREES if trees is None else trees,
        at=at,
    )


# ---- what to believe ----


def limit_signals(examples: Examples, served: Mapping[str, int]) -> Examples:
    """Automatic signals only speak against an answer; were they all counted, a model would look the worse the more it
    serves. So those of a model weigh at most what its judged answers would hold of them: their number times the share
    of `served` requests that were flagged. Without judged answers they weigh nothing.
    """
    weight = examples.weight.copy()
    for index, name in enumerate(examples.models):
        mine = examples.model == index
        flagged, judged = mine & ~examples.strong, int((mine & examples.strong).sum())
        total = float(weight[flagged].sum())
        if total <= 0:
            continue
        share = min(1.0, int(flagged.sum()) / max(served.get(name, 0), 1))
        weight[flagged] *= min(1.0, share * judged / total)
    return replace(examples, weight=weight).rows(weight > 0)


@dataclass(frozen=True, slots=True)
class Doubt:
    """What was done about a key with more labels than all others together: `left_out`, or counted for as much as
    they. `error`: the mean squared error of its labels to heads learned from the others.
    """

    key: str
    labels: int
    error: float
    left_out: bool


def limit_keys(
    examples: Examples,
    priors: Priors,
    encoder_id: str,
    seed: int,
    trusted: frozenset[str] = frozenset(),
    unlimited: Flags | None = None,
) -> tuple[Examples, list[Doubt]]:
    """No key counts for more than all others together, and one that is noticed and contradicts them not at all.

    Only where the others are enough to learn from; a key's labels are all there is otherwise. `unlimited` rows (the
    gateway's own: shadow answers and judges) are believed as they are.
    """
    own = np.zeros(len(examples.key), dtype=bool) if unlimited is None else unlimited
    weight, left_out = examples.weight.copy(), np.zeros(len(own), dtype=bool)
    doubts = []
    keys = sorted(set(examples.key[~own].tolist()) - trusted)
    sums = {key: float(examples.weight[(examples.key == key) & ~own].sum()) for key in keys}
    for key in sorted(keys, key=lambda name: -sums[name]):
        mine = (examples.key == key) & ~own
        others = ~mine & ~left_out
        rest = float(examples.weight[others].sum())
        if sums[key] <= NOTICED * rest or examples.rows(others).labelled_prompts < MIN_PROMPTS:
            continue
        heads = fit(examples.rows(others), priors, encoder_id, seed, QUICK_TREES)
        judged = examples.rows(mine)
        error = float(np.average((judged.score - predictions(heads, judged)) ** 2, weights=judged.weight))
        left_out |= mine & (error > CONTRADICTS)
        weight[mine] *= min(rest / sums[key], 1.0)
        if error > CONTRADICTS or sums[key] > rest:
            doubts.append(Doubt(key, int(mine.sum()), error, error > CONTRADICTS))
    return replace(examples, weight=weight).rows(~left_out), doubts


def predictions(heads: SuccessHeads, examples: Examples) -> Floats:
    """Predicted success of every row."""
    table = success_table(heads, examples)
    return table[examples.prompt, examples.model]


def success_table(heads: SuccessHeads, examples: Examples) -> Floats:
    """(prompts, models) in the order of `examples.models`; the prior's mean where the heads do not know a model."""
    wanted = np.unique(examples.prompt)
    table = np.full((len(examples.prompts), len(examples.models)), np.nan)
    batch = heads.predict_many([examples.prompts[i] for i in wanted], [examples.classes[i] for i in wanted])
    for column, name in enumerate(examples.models):
        if name in heads.models:
            table[wanted, column] = batch.probability[:, heads.models.index(name)]
    return table


def prior_table(examples: Examples, priors: Priors) -> Floats:
    """The same of the priors."""
    return np.array([[priors[model][name] for model in examples.models] for name in examples.classes])


def known_or(table: Floats, prior: Floats) -> Floats:
    return np.where(np.isnan(table), prior, table)


# ---- what to hold out ----


def held_out(examples: Examples, seed: int, compared: Comparisons | None = None) -> Flags:
    """By prompt, whether it is held out: a quarter, drawn by `seed`, equal ones together. Requests that were compared
    each by a lot of its own, so that what is held out of them is distributed as the traffic is: a prompt that is
    every fifth request is every fifth held-out one as well.
    """
    same: dict[bytes, int] = {}
    groups = np.array(
        [same.setdefault(p.vector.tobytes() + p.grams.tobytes(), len(same)) for p in examples.prompts],
        dtype=np.int64,
    )
    held = (np.random.default_rng(seed).random(len(same)) < HELD_OUT)[groups]
    if compared is not None:
        held[compared.prompt] = compared.lot < HELD_OUT
    return held


def split(examples: Examples, seed: int, compared: Comparisons | None = None) -> tuple[Examples, Examples]:
    """(to learn from, held out) by `held_out`."""
    held = held_out(examples, seed, compared)[examples.prompt]
    return examples.rows(~held), examples.rows(held)


def calibration(
    heads: SuccessHeads, prompts: Sequence[PromptFeatures], classes: Sequence[str], held: Comparisons
) -> Calibration:
    """The held-out rows an artefact carries, from which a policy's bound is computed. `held.prompt` indexes `prompts`
    and `classes`, `held.models` the heads' models.
    """
    rows = len(held.prompt)
    labels = np.full((rows, len(heads.models)), np.nan, dtype=np.float32)
    np.put_along_axis(labels, held.models, held.scores.astype(np.float32), axis=1)
    predicted = np.empty((rows, len(heads.models)), dtype=np.float32)
    names = [classes[i] for i in held.prompt]
    if rows:
        batch = heads.predict_many([prompts[i] for i in held.prompt], names)
        alone = (batch.familiarity[:, None] <= 0) | (heads.arrays["labels"] == 0)[None, :]
        predicted = np.where(alone, np.nan, batch.probability).astype(np.float32)
    return Calibration(
        models=heads.models,
        classes=np.array([CLASSES.index(name) for name in names], dtype=np.int8),
        predicted=predicted,
        labels=labels,
        propensities=held.propensity.astype(np.float32),
        sure=held.sure,
    )


# ---- what the heads are worth ----


def auroc(predicted: Floats, score: Floats, weight: Floats) -> float | None:
    """Weighted area under the ROC curve of scores cut at 0.5; None where all are good or all bad."""
    good = score >= 0.5
    if good.all() or not good.any():
        return None
    _, inverse = np.unique(predicted, return_inverse=True)
    positive = np.bincount(inverse, weights=weight * good)
    negative = np.bincount(inverse, weights=weight * ~good)
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def ece(predicted: Floats, score: Floats, weight: Floats, bins: int = 10) -> float:
    """Expected calibration error over bins of equal weight."""
    order = np.argsort(predicted, kind="stable")
    edges = np.cumsum(weight[order]) / weight.sum()
    which = np.minimum((edges * bins - 1e-9).astype(int), bins - 1)
    error = 0.0
    for number in range(bins):
        rows = order[which == number]
        if len(rows):
            error += abs(float((weight[rows] * (predicted[rows] - score[rows])).sum()))
    return error / float(weight.sum())


def excess_loss(predicted: Floats, other: Floats, score: Floats, weight: Floats) -> tuple[float, float]:
    """(mean, standard error) of the squared error of `predicted` beyond that of `other`."""
    difference = (predicted - score) ** 2 - (other - score) ** 2
    mean = float(np.average(difference, weights=weight))
    spread = float((weight**2 * (difference - mean) ** 2).sum()) ** 0.5 / float(weight.sum())
    return mean, spread


class Value:
    """What policies would have been worth on the held-out prompts: doubly robust success, and cost in USD."""

    def __init__(self, held: Examples) -> None:
        judged = held.rows(held.strong)
        self.prompts = np.unique(judged.prompt)
        shape = (len(held.prompts), len(held.models))
        sums, weights = np.zeros(shape), np.zeros(shape)
        np.add.at(sums, (judged.prompt, judged.model), judged.score * judged.weight)
        np.add.at(weights, (judged.prompt, judged.model), judged.weight)
        seen = weights[self.prompts] > 0
        score = np.divide(sums, weights, out=np.zeros(shape), where=weights > 0)[self.prompts]
        self.costs = held.costs[self.prompts]
        classes = np.array([held.classes[i] for i in self.prompts])
        self.success = np.zeros(score.shape)
        overall = (score * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
        for name in set(classes.tolist()):
            rows = classes == name
            share = seen[rows].mean(axis=0)
            count = seen[rows].sum(axis=0)
            # The class's mean, shrunk to the model's.
            mean = ((score[rows] * seen[rows]).sum(axis=0) + 5 * overall) / (count + 5)
            correction = seen[rows] * (score[rows] - mean) / np.maximum(share, _LEAST_SHARE)
            self.success[rows] = mean + correction
        self.usable = seen.any(axis=0) & ~np.isnan(self.costs).any(axis=0)
        """Models that some held-out label speaks of and whose price is known."""

    def of(self, choice: Integers) -> tuple[float, float]:
        """(success, mean cost) of a choice of model for every held-out prompt."""
        rows = np.arange(len(self.prompts))
        return float(self.success[rows, choice].mean()), float(self.costs[rows, choice].mean())

    def cheapest_above(self, table: Floats, threshold: Floats | float) -> Integers:
        """The cheapest usable model predicted at `threshold` at least, else the one predicted best."""
        predicted = np.where(self.usable, table[self.prompts], -1.0)
        enough = predicted >= (threshold if np.isscalar(threshold) else np.asarray(threshold)[:, None])
        cost = np.where(enough & self.usable, self.costs, np.inf)
        found: Integers = np.where(
            np.isfinite(cost).any(axis=1), cost.argmin(axis=1), predicted.argmax(axis=1)
        )
        return found

    def cost_at(self, table: Floats, target: float) -> float | None:
        """The least cost at which routing by `table` reaches `target`; None: at no threshold."""
        curve = [self.of(self.cheapest_above(table, float(threshold))) for threshold in _THRESHOLDS]
        return min((cost for success, cost in curve if success >= target - 1e-9), default=None)

    def singles(self) -> dict[int, tuple[float, float]]:
        """(success, cost) of always the same model."""
        return {
            int(model): self.of(np.full(len(self.prompts), model)) for model in np.flatnonzero(self.usable)
        }


def cost_on_line(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """The least cost at which a random mix of two of the (success, cost) points reaches `target`."""
    reached = [cost for success, cost in points if success >= target - 1e-9]
    for low_success, low_cost in points:
        for high_success, high_cost in points:
            if low_success < target <= high_success:
                share = (target - low_success) / (high_success - low_success)
                reached.append(low_cost + share * (high_cost - low_cost))
    return min(reached, default=None)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Figures of held-out rows for the model card, and `refusal`: why the heads should not be used."""

    card: Mapping[str, Any]
    refusal: str | None


def judge(
    heads: SuccessHeads,
    held: Examples,
    priors: Priors,
    min_quality: Mapping[str, float],
    before: SuccessHeads | None,
    before_at: float,
) -> Judgement:
    """Compare the heads with the prior, and with those in use (`before`, made at `before_at`), on what they have not
    seen. `min_quality` by class is the policy's: routing the priors by it is what happens without heads.
    """
    judged = held.rows(held.strong)
    score, weight = judged.score, judged.weight
    prior = prior_table(held, priors)
    table = known_or(success_table(heads, held), prior)
    at = (judged.prompt, judged.model)
    gain, spread = excess_loss(table[at], prior[at], score, weight)
    card: dict[str, Any] = {
        "held_out_labels": len(score),
        "held_out_prompts": len(np.unique(judged.prompt)),
        "auroc": auroc(table[at], score, weight),
        "auroc_prior": auroc(prior[at], score, weight),
        "ece": ece(table[at], score, weight),
        "ece_prior": ece(prior[at], score, weight),
        "squared_error": float(np.average((table[at] - score) ** 2, weights=weight)),
        "squared_error_prior": float(np.average((prior[at] - score) ** 2, weights=weight)),
    }
    refusal = None
    if gain > -LEAST_GAIN * card["squared_error_prior"]:
        refusal = (
            f"it is no better than the priors on held-out labels (squared error {card['squared_error']:.4f} against "
            f"{card['squared_error_prior']:.4f}, standard error {spread:.4f})"
        )
    old = None if before is None else known_or(success_table(before, held), prior)
    if old is not None:
        newer = judged.at > before_at
        card["newer_than_active"] = int(newer.sum())
        if newer.sum() >= MIN_NEWER:
            loss, spread = excess_loss(table[at][newer], old[at][newer], score[newer], weight[newer])
            card["squared_error_beyond_active"] = loss
            if refusal is None and loss > spread:
                refusal = (
                    f"it is worse than the active one on {int(newer.sum())} newer labels (squared error "
                    f"{loss:+.4f}, standard error {spread:.4f})"
                )
    card["routing"] = _routing(Value(held), held, table, prior, old, min_quality)
    return Judgement(card, refusal)


def _routing(
    value: Value,
    held: Examples,
    table: Floats,
    prior: Floats,
    old: Floats | None,
    min_quality: Mapping[str, float],
) -> dict[str, Any] | None:
    """Cost per 1,000 requests at the success that routing by the priors has today; None: nothing to compare."""
    singles = value.singles()
    if len(singles) < 2:
        return None
    wanted = np.array([min_quality[held.classes[i]] for i in value.prompts])
    target, today = value.of(value.cheapest_above(prior, wanted))
    best = max(singles, key=lambda model: (singles[model][0], -singles[model][1]))
    cheapest = min(singles, key=lambda model: singles[model][1])
    equal: dict[str, float | None] = {
        "learned": value.cost_at(table, target),
        "prior_only": today,
        "random": cost_on_line([singles[cheapest], singles[best]], target),
        "best_single": min(
            (cost for success, cost in singles.values() if success >= target - 1e-9), default=None
        ),
        "zero_router": cost_on_line(list(singles.values()), target),
        "version_before": None if old is None else value.cost_at(old, target),
    }
    success, cost = value.of(value.cheapest_above(table, wanted))
    return {
        "success": target,
        "usd_per_1000_at_this_success": {
            name: None if cost is None else round(1000 * cost, 6) for name, cost in equal.items()
        },
        "learned_at_min_quality": {"success": success, "usd_per_1000": round(1000 * cost, 6)},
        "best_single": {
            "model": held.models[best],
            "success": singles[best][0],
            "usd_per_1000": round(1000 * singles[best][1], 6),
        },
    }
