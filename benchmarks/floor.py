"""How well the quality floor keeps its promise, and what it leaves on the table.

    python -m benchmarks.floor [--data DIR/llmrouter] [--runs 100] [--json]

Each run draws labels, computes certificates (`classifiers/floor.py`), takes the model that saves most as the gateway
does, and looks up its excess failure rate in a population where that is known exactly. *Oracle*: a router that knows
every prompt's success probabilities (of recorded scores: the scores themselves, which nobody can predict) and sends
as much to one cheaper model as the same bound allows. *Same scores*: one that has the floor's predictor and knows the
true excess of every threshold. Both are given the best single cheaper model.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers import features
from classifiers.classifier import Classifier
from classifiers.floor import Calibration, Certificate
from classifiers.head import CLASSES

Floats = NDArray[np.float64]
DELTA = 0.05
LABELS = (100, 300, 1000, 3000)
BOUNDS = (0.10, 0.05)
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
    max_excess: float
    labels: int
    reference_labelled: float
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


def measure(world: World, max_excess: float, labels: int, runs: int, *, paired: float = 1.0) -> Outcome:
    """`paired`: share of the labelled rows on which the reference was labelled too."""
    oracle, same = _oracle(world, max_excess), _same_scores(world, max_excess)
    excesses, savings, certified = [], [], 0
    for run in range(runs):
        chosen = _certificate(world, max_excess, labels, paired, np.random.default_rng((run, labels)))
        if chosen is None:
            excesses.append(0.0)
            savings.append(0.0)
            continue
        certified += 1
        model, certificate = chosen
        assert certificate.threshold is not None
        routed = world.predicted[:, model] >= certificate.threshold
        excess = world.success[:, world.reference] - world.success[:, model]
        excesses.append(float((excess * routed).mean()))
        savings.append(_saved(world, model, routed))
    return Outcome(
        world=world.name,
        max_excess=max_excess,
        labels=labels,
        reference_labelled=paired,
        runs=runs,
        held=float(np.mean(np.array(excesses) <= max_excess)),
        worst_excess=max(excesses),
        certified=certified / runs,
        saving=float(np.mean(savings)),
        oracle=oracle,
        same_scores=same,
    )


def _certificate(
    world: World, max_excess: float, labels: int, paired: float, draws: np.random.Generator
) -> tuple[int, Certificate] | None:
    """As the gateway does it: certificates for every cheaper model, and the one that saves most."""
    drawn = draws.integers(0, len(world.success), labels)
    score = world.success[drawn]
    label = (draws.random(score.shape) < score).astype(float) if world.draw else score.copy()
    label[draws.random(labels) >= paired, world.reference] = np.nan
    names = [str(m) for m in range(world.success.shape[1])]
    calibration = Calibration(
        tuple(names),
        np.zeros(labels, np.int8),
        world.predicted[drawn].astype(np.float32),
        label.astype(np.float32),
        np.ones(label.shape, np.float32),
    )
    found = calibration.certificates(
        "simple", [names[m] for m in world.cheaper], names[world.reference], max_excess, DELTA
    )
    mean = world.cost.mean(axis=0)
    usable = [(int(m), c) for m, c in found.items() if c.threshold is not None]
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


def outcomes(data: Path | None, runs: int, seed: int) -> list[Outcome]:
    worlds = [synthetic(seed), *(replays(data, seed) if data is not None else ())]
    found = [measure(w, bound, labels, runs) for w in worlds for bound in BOUNDS for labels in LABELS]
    # Where the reference's own answer is often not labelled, it is taken as good: sound, and less is saved.
    found += [measure(w, BOUNDS[0], LABELS[-1], runs, paired=0.3) for w in worlds]
    return found


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
        f"{'world':18} {'bound':>5} {'labels':>6} {'paired':>6} {'held':>5} {'worst':>6} "
        f"{'certified':>9} {'saving':>7} "
        f"{'oracle':>7} {'of it':>6} {'same scores':>11} {'of it':>6}"
    )
    for o in found:
        print(
            f"{o.world:18} {o.max_excess:5.0%} {o.labels:6} {o.reference_labelled:6.0%} {o.held:5.0%} "
            f"{o.worst_excess:6.3f} {o.certified:9.0%} {o.saving:7.1%} {o.oracle:7.1%} {o.of_oracle:6.0%} "
            f"{o.same_scores:11.1%} {o.saving / max(o.same_scores, 1e-9):6.0%}"
        )


if __name__ == "__main__":
    main()
