"""How well the quality floor keeps its promise, and what it leaves on the table.

    python -m benchmarks.floor [--data DIR/llmrouter] [--runs 100] [--json]

Each run draws requests and compares a cheaper model with the reference on them, computes certificates
(`classifiers/floor.py`), takes the model that saves most as the gateway does, and looks up its excess failure rate in
a population where that is known exactly. Three cases:

- *judged*: so many comparisons of each cheaper model, held out from fitting, every one with a verdict.
- *agreement*: no judge. The same answer twice shows that neither is worse; two right ones differ in every fifth case,
  two wrong ones in four of five. What differs counts as harm.
- *loop*: the gateway's own round. Requests are answered by what is certified, drawn by `draw_comparison`, a predictor
  is fitted on three quarters of all comparisons so far and certificates are computed on the rest; then the next
  requests are answered by these. Labels are comparisons in all, of every model and the fitted ones too.
- *blind*: a control, the loop as it must not be: once something is certified, only requests that it lets the cheaper
  model answer are compared. Its bound does not hold.

*Oracle*: a router that knows every prompt's success probabilities (of recorded scores: the scores themselves, which
nobody can predict) and sends as much to one cheaper model as the same bound allows. *Same scores*: one that has the
floor's predictor (of the loop: none is known) and knows the true excess of every threshold. Both are given the best
single cheaper model.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers import features
from classifiers.classifier import Classifier
from classifiers.floor import Calibration, Certificate, draw_comparison
from classifiers.head import CLASSES

Floats = NDArray[np.float64]
DELTA = 0.05
LABELS = (100, 300, 1000, 3000)
BOUNDS = (0.10, 0.05)
ROUNDS = (750, 3000, 6000, 12000)
"""Comparisons of the loop so far when it is learned again."""
SHARE = 0.5
HELD_OUT = 0.25
REPEATED = 100
OUTPUT_TOKENS = 200


@dataclass(frozen=True)
class World:
    """A population of one class. By prompt and model, (n, m): `success`, true probability or recorded score,
    `predicted`, what the predictor says, and `cost`. `reference` is a column. `draw`: a label is a coin thrown with
    `success`, else it is the score.
    """

    name: str
    success: Floats
    predicted: Floats
    cost: Floats
    reference: int
    draw: bool

    @property
    def cheaper(self) -> list[int]:
        mean = self.cost.mean(axis=0)
        return [m for m in range(len(mean)) if mean[m] < mean[self.reference]]


@dataclass(frozen=True)
class Outcome:
    """Over all runs: `held`, share of runs in which the true excess failure rate was at most the bound; `certified`,
    those with a certificate; `saving`, mean share of the reference's cost saved, beside what the oracles save.
    """

    world: str
    case: str
    max_excess: float
    labels: int
    runs: int
    held: float
    worst_excess: float
    certified: float
    saving: float
    oracle: float
    same_scores: float

    @property
    def of_oracle(self) -> float:
        return self.saving / self.oracle


def synthetic(seed: int, prompts: int = 200_000) -> World:
    """Success of a reference and two cheaper models falls with a hidden difficulty, each in its own way. The
    predictor sees it through noise, squeezed and off by a constant: it is neither sharp nor calibrated.
    """
    draws = np.random.default_rng(seed)
    difficulty, taste = draws.normal(size=prompts), draws.normal(size=(prompts, 3))
    success = _sigmoid(
        np.array([1.1, 1.9, 2.8])
        - np.array([1.9, 1.6, 0.8]) * difficulty[:, None]
        + np.array([0.8, 0.8, 0.3]) * taste
    )
    seen = 0.6 * np.log(success / (1 - success)) + 0.3 + 0.7 * draws.normal(size=(prompts, 3))
    cost = np.exp(0.4 * difficulty)[:, None] * np.array([0.05, 0.2, 1.0])
    return World("synthetic", success, _sigmoid(seen), cost, 2, draw=True)


def two_kinds(seed: int, prompts: int = 200_000) -> World:
    """Three fifths of the prompts are easy for the cheaper model, the others it mostly fails; the reference never
    does. The predictor tells the two kinds apart.
    """
    draws = np.random.default_rng(seed)
    easy = draws.random(prompts) < 0.6
    success = np.where(easy, 0.95, 0.30) + 0.02 * draws.random(prompts)
    both = np.stack([success, np.ones(prompts)], axis=1)
    seen = np.stack([success, np.full(prompts, 0.95)], axis=1)
    return World("two kinds", both, seen, np.tile([0.05, 1.0], (prompts, 1)), 1, draw=True)


def replays(folder: Path, seed: int) -> list[World]:
    """LLMRouter's nine models: heads fitted on a quarter of the prompts, the other three quarters are the population,
    by class of the shipped classifier. The reference is the best single model of the first quarter.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows: list[dict[str, Any]] = []
    for name in ("train", "test"):
        with gzip.open(folder / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            rows += json.load(file)
    prices = json.loads((folder / "prices.json").read_text(encoding="utf-8"))
    models = sorted(prices)
    texts = [row["question"] for row in rows]
    scores = np.array([[row["scores"][m] for m in models] for row in rows], dtype=float)
    classifier = Classifier.load()
    vectors = np.stack(
        [
            np.concatenate((classifier.static.encode((features.focus(t),))[0], features.structure(t)))
            for t in texts
        ]
    )
    classes = np.array([CLASSES.index(classifier.classify(t).prompt_class) for t in texts])
    cost = np.array(
        [
            [len(t) / 4 * prices[m]["input"] + OUTPUT_TOKENS * prices[m]["output"] for m in models]
            for t in texts
        ]
    )
    order = np.random.default_rng(seed).permutation(len(texts))
    fit, rest = order[: len(texts) // 4], order[len(texts) // 4 :]
    scaler = StandardScaler().fit(vectors[fit])
    predicted = np.stack(
        [
            LogisticRegression(C=0.01, max_iter=2000)
            .fit(scaler.transform(vectors[fit]), scores[fit, m] >= 0.5)
            .predict_proba(scaler.transform(vectors[rest]))[:, 1]
            for m in range(len(models))
        ],
        axis=1,
    )
    reference = int(scores[fit].mean(axis=0).argmax())
    worlds = []
    for index, name in ((None, "all"), *enumerate(CLASSES)):
        mine = np.ones(len(rest), bool) if index is None else classes[rest] == index
        if mine.sum() >= 200:
            kept = rest[mine]
            worlds.append(
                World(f"llmrouter {name}", scores[kept], predicted[mine], cost[kept], reference, draw=False)
            )
    return worlds


@dataclass(frozen=True)
class Compared:
    """Requests drawn from a world. By row: `at`, which prompt; `model`, which cheaper one; `excess` and `sure`."""

    at: NDArray[np.int64]
    model: NDArray[np.int64]
    excess: Floats
    sure: NDArray[np.bool_]

    def rows(self, kept: NDArray[np.bool_]) -> Compared:
        return Compared(self.at[kept], self.model[kept], self.excess[kept], self.sure[kept])

    def and_then(self, more: Compared) -> Compared:
        return Compared(
            *(np.concatenate((mine, other)) for mine, other in zip(self._all(), more._all(), strict=True))
        )

    def _all(self) -> tuple[NDArray[Any], ...]:
        return self.at, self.model, self.excess, self.sure


def measure(world: World, max_excess: float, labels: int, runs: int, *, judge: bool = True) -> Outcome:
    """`labels` comparisons of each cheaper model; without a `judge` by agreement."""
    tally = _Tally(world, "judged" if judge else "agreement", max_excess, labels, runs)
    models = np.repeat(world.cheaper, labels)
    for run in range(runs):
        draws = np.random.default_rng((run, labels))
        found = _compared(world, draws.integers(0, len(world.success), len(models)), models, draws, judge)
        tally.add(world.predicted, _certificate(world, found, world.predicted, max_excess))
    return tally.outcome()


def loop(world: World, max_excess: float, runs: int, *, blind: bool = False) -> Iterator[Outcome]:
    """One outcome for each time it is learned."""
    case = "blind" if blind else "loop"
    tallies = [_Tally(world, case, max_excess, labels, runs) for labels in ROUNDS]
    features = np.concatenate(
        (np.ones((len(world.predicted), 1)), _logit(world.predicted)), axis=1, dtype=np.float64
    )
    names = tuple(str(model) for model in world.cheaper)
    for run in range(runs):
        draws = np.random.default_rng((run, 7))
        none = np.empty(0, np.int64)
        known, held = Compared(none, none, np.empty(0), np.empty(0, bool)), np.empty(0, bool)
        answered = np.ones(len(features), bool)
        for labels, tally in zip(ROUNDS, tallies, strict=True):
            at: list[int] = []
            model: list[int] = []
            while len(known.at) + len(at) < labels:
                request = int(draws.integers(len(features)))
                drawn = draw_comparison(names, SHARE, draws.random())
                if drawn is not None and (answered[request] or not blind):
                    at.append(request)
                    model.append(int(drawn[0]))
            known = known.and_then(_compared(world, np.array(at), np.array(model), draws, judge=True))
            held = np.concatenate((held, draws.random(len(at)) < HELD_OUT))
            predicted = _fitted(features, known.rows(~held), world)
            chosen = _certificate(world, known.rows(held), predicted, max_excess)
            if chosen is not None and chosen[1].threshold is not None:
                answered = predicted[:, chosen[0]] >= chosen[1].threshold
            tally.add(predicted, chosen)
    yield from (tally.outcome() for tally in tallies)


class _Tally:
    """What became of the runs of one case."""

    def __init__(self, world: World, case: str, max_excess: float, labels: int, runs: int) -> None:
        self._world, self._case, self._max_excess = world, case, max_excess
        self._labels, self._runs = labels, runs
        self._excesses: list[float] = []
        self._savings: list[float] = []
        self._certified = 0

    def add(self, predicted: Floats, chosen: tuple[int, Certificate] | None) -> None:
        if chosen is None:
            self._excesses.append(0.0)
            self._savings.append(0.0)
            return
        self._certified += 1
        model, certificate = chosen
        assert certificate.threshold is not None
        success = self._world.success
        routed = predicted[:, model] >= certificate.threshold
        excess = success[:, self._world.reference] - success[:, model]
        self._excesses.append(float((excess * routed).mean()))
        self._savings.append(_saved(self._world, model, routed))

    def outcome(self) -> Outcome:
        return Outcome(
            world=self._world.name,
            case=self._case,
            max_excess=self._max_excess,
            labels=self._labels,
            runs=self._runs,
            held=float(np.mean(np.array(self._excesses) <= self._max_excess)),
            worst_excess=max(self._excesses),
            certified=self._certified / self._runs,
            saving=float(np.mean(self._savings)),
            oracle=_oracle(self._world, self._max_excess),
            same_scores=_same_scores(self._world, self._max_excess),
        )


def _compared(
    world: World,
    at: NDArray[np.int64],
    model: NDArray[np.int64],
    draws: np.random.Generator,
    judge: bool,
) -> Compared:
    cheap, reference = world.success[at, model], world.success[at, world.reference]
    if world.draw:
        cheap, reference = (
            (draws.random(len(at)) < chance).astype(np.float64) for chance in (cheap, reference)
        )
    if judge:
        return Compared(at, model, reference - cheap, np.ones(len(at), bool))
    good = (cheap >= 0.5), (reference >= 0.5)
    same = (good[0] == good[1]) & (draws.random(len(at)) < np.where(good[0], 0.8, 0.2))
    return Compared(at, model, np.zeros(len(at)), same)


def _fitted(features: Floats, known: Compared, world: World) -> Floats:
    """Success by logistic regression on the world's predictions, of each cheaper model from its own comparisons."""
    predicted = np.full((len(features), world.success.shape[1]), np.nan)
    for model in world.cheaper:
        mine = known.model == model
        x, y = features[known.at[mine]], np.clip(1 - known.excess[mine], 0, 1)
        weights, ridge = np.zeros(x.shape[1]), 0.1 * np.eye(x.shape[1])
        for _ in range(20):  # Newton's method
            p = _sigmoid(x @ weights)
            step = np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge, x.T @ (y - p) - ridge @ weights)
            weights = weights + step
            if np.abs(step).max() < 1e-6:
                break
        predicted[:, model] = _sigmoid(features @ weights)
    return predicted


def _certificate(
    world: World, found: Compared, predicted: Floats, max_excess: float
) -> tuple[int, Certificate] | None:
    """As the gateway does it: certificates for every cheaper model, and the one that saves most."""
    names = [str(m) for m in range(world.success.shape[1])]
    rows = np.arange(len(found.at))
    labels = np.full((len(rows), len(names)), np.nan, np.float32)
    labels[rows, found.model] = np.minimum(1.0, 1.0 - found.excess)
    labels[rows, world.reference] = np.minimum(1.0, 1.0 + found.excess)
    calibration = Calibration(
        tuple(names),
        np.zeros(len(rows), np.int8),
        predicted[found.at].astype(np.float32),
        labels,
        np.full(len(rows), SHARE, np.float32),
        found.sure,
    )
    certificates = calibration.certificates(
        "simple", [names[m] for m in world.cheaper], names[world.reference], max_excess, DELTA
    )
    mean = world.cost.mean(axis=0)
    usable = [(int(m), c) for m, c in certificates.items() if c.threshold is not None]
    return max(usable, key=lambda pair: pair[1].share * (mean[world.reference] - mean[pair[0]]), default=None)


def _saved(world: World, model: int, routed: NDArray[np.bool_]) -> float:
    reference = world.cost[:, world.reference]
    return float(((reference - world.cost[:, model]) * routed).sum() / reference.sum())


def _oracle(world: World, max_excess: float) -> float:
    """Each prompt's success is known; the best single cheaper model is used within the bound."""
    best = 0.0
    for model in world.cheaper:
        excess = world.success[:, world.reference] - world.success[:, model]
        best = max(best, _greedy(world, model, np.argsort(excess, kind="stable"), excess, max_excess))
    return best


def _same_scores(world: World, max_excess: float) -> float:
    best = 0.0
    for model in world.cheaper:
        excess = world.success[:, world.reference] - world.success[:, model]
        order = np.argsort(-world.predicted[:, model], kind="stable")
        best = max(best, _greedy(world, model, order, excess, max_excess))
    return best


def _greedy(world: World, model: int, order: NDArray[np.int64], excess: Floats, max_excess: float) -> float:
    within = np.cumsum(excess[order]) / len(order) <= max_excess
    routed = np.zeros(len(order), bool)
    if within.any():
        routed[order[: int(np.flatnonzero(within).max()) + 1]] = True
    return _saved(world, model, routed)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _logit(x: Floats) -> Floats:
    cut = np.clip(x, 0.001, 0.999)
    return np.asarray(np.log(cut / (1 - cut)))


def outcomes(data: Path | None, runs: int, seed: int) -> Iterator[Outcome]:
    worlds = [synthetic(seed), *(replays(data, seed) if data is not None else ())]
    for world in worlds:
        for bound in BOUNDS:
            yield from (measure(world, bound, labels, runs) for labels in LABELS)
    for world in worlds:
        yield measure(world, BOUNDS[0], LABELS[-1], runs, judge=False)
    yield measure(two_kinds(seed), BOUNDS[0], LABELS[-1], runs, judge=False)
    for world in (two_kinds(seed), *worlds):
        yield from loop(world, BOUNDS[0], runs)
    yield from loop(two_kinds(seed), BOUNDS[0], runs, blind=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with train.json.gz, test.json.gz and prices.json of LLMRouter"
    )
    parser.add_argument("--runs", type=int, default=REPEATED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = outcomes(given.data, given.runs, given.seed)
    if given.json:
        print(json.dumps([{**asdict(o), "of_oracle": o.of_oracle} for o in found], indent=1))
        return
    print(f"{given.runs} runs, delta {DELTA:.0%}; saving as share of the reference's cost")
    print(
        f"{'world':18} {'case':9} {'bound':>5} {'labels':>6} {'held':>5} {'worst':>6} "
        f"{'certified':>9} {'saving':>7} "
        f"{'oracle':>7} {'of it':>6} {'same scores':>11} {'of it':>6}"
    )
    for o in found:
        print(
            f"{o.world:18} {o.case:9} {o.max_excess:5.0%} {o.labels:6} {o.held:5.0%} "
            f"{o.worst_excess:6.3f} {o.certified:9.0%} {o.saving:7.1%} {o.oracle:7.1%} {o.of_oracle:6.0%} "
            f"{o.same_scores:11.1%} {o.saving / max(o.same_scores, 1e-9):6.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
