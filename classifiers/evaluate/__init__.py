"""How well the success heads route: RouteLLM's and LLMRouter's protocols on recorded answers.

    farthing evaluate --data DIR [--json] [--predictions FILE] [--plot FILE]

needs scikit-learn (the extra `train`), no configuration and no database. The data stays outside of this package.
docs/evaluation.md describes protocols and results.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers import success_features
from classifiers.encoder import Encoder, MiniLMEncoder, StaticEncoder
from classifiers.evaluate import metrics
from classifiers.evaluate.data import (
    Answers,
    DataError,
    folds_by,
    read_llmrouter,
    read_mt_bench,
    read_routellm,
)
from classifiers.evaluate.vectors import VectorCache, default_cache
from classifiers.success import Labels, SuccessHeads
from classifiers.success_features import PromptFeatures

__all__ = ["DataError", "Evaluation", "evaluate", "main"]

Doubles = NDArray[np.float64]
Folds = NDArray[np.int64]

SEEDS = (0, 1, 2)
LEARNING_CURVE = (300, 3000)
SHUFFLES = 3
ENCODERS: dict[str, tuple[Callable[[], Encoder], ...]] = {
    "static": (StaticEncoder.load,),
    "static+minilm": (StaticEncoder.load, MiniLMEncoder.load),
}
# The benchmarks know no classes: every model has one prior, its mean on the training rows.
CLASS = "all"


@dataclass(frozen=True, slots=True)
class Predictions:
    """Out-of-sample probabilities of one run. `fold`: id per row, -1 throughout where train and test are fixed."""

    data: str
    protocol: str
    seed: int
    answers: Answers
    fold: Folds
    probability: Doubles
    familiarity: Doubles


@dataclass(slots=True)
class Evaluation:
    """What `run` gathers: `results` as `evaluate` returns it, all predictions, curves for the plot."""

    results: dict[str, Any] = field(default_factory=dict)
    predictions: list[Predictions] = field(default_factory=list)
    panels: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)


def evaluate(
    data: Path, seeds: Sequence[int] = SEEDS, cache: Path | None = None, encoders: str = "static"
) -> dict[str, Any]:
    """Return the figures of all protocols as JSON-ready values: means over `seeds`, sd and per-seed values beside.

    `cache`: folder for embeddings (default: the user's cache folder). Raises DataError for unreadable data and
    ModuleNotFoundError without scikit-learn.
    """
    return run(data, seeds, cache, encoders).results


def run(data: Path, seeds: Sequence[int], cache: Path | None, encoders: str) -> Evaluation:
    """Run every protocol; see `evaluate`."""
    started = time.monotonic()
    made = [make() for make in ENCODERS[encoders]]
    caches = [VectorCache(cache or default_cache(), encoder) for encoder in made]
    encoder_id = success_features.encoders_id(made)

    def prompts(answers: Answers) -> list[PromptFeatures]:
        vectors = np.concatenate([each.encode(answers.texts) for each in caches], axis=1)
        return [
            success_features.read(text, vector) for text, vector in zip(answers.texts, vectors, strict=True)
        ]

    mmlu, gsm8k, mt_bench = read_routellm(data, "mmlu"), read_routellm(data, "gsm8k"), read_mt_bench(data)
    train, test = read_llmrouter(data, "train"), read_llmrouter(data, "test")
    p_mmlu, p_gsm8k, p_mt, p_train, p_test = map(prompts, (mmlu, gsm8k, mt_bench, train, test))
    done = Evaluation()

    def crossed(
        answers: Answers, features: list[PromptFeatures], protocol: str, folds: Any
    ) -> list[Predictions]:
        return [_cross(answers, features, protocol, folds(seed), seed, encoder_id) for seed in seeds]

    def held(
        name: str,
        protocol: str,
        from_: tuple[Answers, list[PromptFeatures]],
        to: tuple[Answers, list[PromptFeatures]],
    ) -> list[Predictions]:
        return [_hold(name, protocol, from_, to, seed, encoder_id) for seed in seeds]

    def by_prompt(seed: int) -> Folds:
        return folds_by(mmlu.texts, seed)

    def by_subject(seed: int) -> Folds:
        return folds_by(mmlu.groups, seed)

    runs = {
        ("mmlu", "kfold"): crossed(mmlu, p_mmlu, "kfold", by_prompt),
        ("mmlu", "leave_subjects_out"): crossed(mmlu, p_mmlu, "leave_subjects_out", by_subject),
        ("mmlu", "out_of_domain"): held("mmlu", "out_of_domain", (gsm8k, p_gsm8k), (mmlu, p_mmlu)),
        ("gsm8k", "kfold"): crossed(gsm8k, p_gsm8k, "kfold", lambda s: folds_by(gsm8k.texts, s)),
        ("gsm8k", "out_of_domain"): held("gsm8k", "out_of_domain", (mmlu, p_mmlu), (gsm8k, p_gsm8k)),
        ("mt_bench", "out_of_domain"): held("mt_bench", "out_of_domain", (mmlu, p_mmlu), (mt_bench, p_mt)),
    }
    for (name, protocol), made_predictions in runs.items():
        done.results.setdefault(name, {})[protocol] = _over_seeds([_pair(p) for p in made_predictions])
        done.predictions += made_predictions
        done.panels[f"{name}, {protocol.replace('_', ' ')}"] = _pair_curves(made_predictions[0])
    everything, p_all = _joined(train, test), p_train + p_test
    tasks = sorted(set(everything.groups.tolist()))
    out = np.isin(everything.groups, tasks[::2])
    nine = {
        "in_domain": held("llmrouter", "in_domain", (train, p_train), (test, p_test)),
        "tasks_held_out": held(
            "llmrouter",
            "tasks_held_out",
            (_part(everything, ~out), [p_all[i] for i in np.flatnonzero(~out)]),
            (_part(everything, out), [p_all[i] for i in np.flatnonzero(out)]),
        ),
    }
    priors = {"in_domain": train.scores.mean(axis=0), "tasks_held_out": everything.scores[~out].mean(axis=0)}
    for protocol, made_predictions in nine.items():
        rows = [_many(p, priors[protocol]) for p in made_predictions]
        done.results.setdefault("llmrouter", {})[protocol] = _over_seeds(rows)
        done.predictions += made_predictions
        done.panels[f"llmrouter, {protocol.replace('_', ' ')}"] = _many_curves(made_predictions[0])
    done.results["learning_curve"] = {
        str(count): _over_seeds(
            [
                {"apgr": _gap(_cross(mmlu, p_mmlu, "kfold", by_prompt(seed), seed, encoder_id, count))}
                for seed in seeds
            ]
        )
        for count in LEARNING_CURVE
    }
    # One permutation says little: heads that learned noise still rank whole kinds of prompts above others, so their
    # APGR varies more than that of a random order of single prompts (sd .01).
    shuffled = [
        {
            "apgr": float(
                np.mean(
                    [
                        _gap(_cross(mmlu, p_mmlu, "kfold", by_prompt(s), s, encoder_id, 3000, shuffle=True))
                        for s in range(1000 * seed, 1000 * seed + SHUFFLES)
                    ]
                )
            )
        }
        for seed in seeds
    ]
    done.results["shuffled_labels"] = _over_seeds(shuffled)
    done.results["decision_ms"] = decision_times(made, gsm8k, p_gsm8k, encoder_id)
    done.results["about"] = {
        "encoders": encoder_id,
        "seeds": list(seeds),
        "rows": {a.name: len(a.texts) for a in (mmlu, gsm8k, mt_bench, train, test)},
        "seconds": round(time.monotonic() - started, 1),
    }
    return done


def _fit(
    answers: Answers,
    features: list[PromptFeatures],
    rows: NDArray[Any],
    seed: int,
    encoder_id: str,
    scores: Doubles,
) -> SuccessHeads:
    """Learn on some rows. The prior is each model's mean there, scores brought to 0..1."""
    priors = {model: {CLASS: float(scores[:, m].mean())} for m, model in enumerate(answers.models)}
    return SuccessHeads.fit(
        [features[row] for row in rows],
        [CLASS] * len(rows),
        Labels.dense(scores),
        priors,
        encoder_id=encoder_id,
        seed=seed,
        at=rows.astype(np.float64),
    )


def _cross(
    answers: Answers,
    features: list[PromptFeatures],
    protocol: str,
    fold: Folds,
    seed: int,
    encoder_id: str,
    count: int | None = None,
    shuffle: bool = False,
) -> Predictions:
    """Predict every fold from the others; `count`: from so many prompts of them; `shuffle`: from permuted labels."""
    probability, familiarity = np.zeros_like(answers.scores), np.zeros(len(fold))
    for number in range(int(fold.max()) + 1):
        rows, unseen = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        rng = np.random.default_rng([seed, number])
        if count is not None:
            rows = np.sort(rng.choice(rows, min(count, len(rows)), replace=False))
        scores = answers.scores[rows]
        heads = _fit(
            answers,
            features,
            rows,
            seed,
            encoder_id,
            scores[rng.permutation(len(rows))] if shuffle else scores,
        )
        batch = heads.predict_many([features[row] for row in unseen], [CLASS] * len(unseen))
        probability[unseen], familiarity[unseen] = batch.probability, batch.familiarity
    return Predictions(answers.name, protocol, seed, answers, fold, probability, familiarity)


def _hold(
    name: str,
    protocol: str,
    source: tuple[Answers, list[PromptFeatures]],
    target: tuple[Answers, list[PromptFeatures]],
    seed: int,
    encoder_id: str,
) -> Predictions:
    """Predict one data set from another. Prompts of the target are left out of the source."""
    answers, features = source
    unseen = set(target[0].texts)
    rows = np.array([row for row, text in enumerate(answers.texts) if text not in unseen])
    heads = _fit(answers, features, rows, seed, encoder_id, answers.scores[rows])
    batch = heads.predict_many(target[1], [CLASS] * len(target[1]))
    fold = np.full(len(target[1]), -1, dtype=np.int64)
    return Predictions(name, protocol, seed, target[0], fold, batch.probability, batch.familiarity)


def _gap(made: Predictions) -> float:
    weak, strong = made.answers.scores.T
    return metrics.apgr(made.probability[:, 1] - made.probability[:, 0], strong, weak)


def _pair(made: Predictions) -> dict[str, float | None]:
    weak, strong = made.answers.scores.T
    score = made.probability[:, 1] - made.probability[:, 0]
    rng = np.random.default_rng(1_000 + made.seed)
    judged = made.answers.name == "mt_bench"  # Scores of 1..10 are no outcomes a probability could match.
    chance = [metrics.apgr(rng.random(len(score)), strong, weak) for _ in range(20)]
    return {
        "apgr": metrics.apgr(score, strong, weak),
        "cpt50": metrics.cpt(score, strong, weak, 0.5),
        "cpt80": metrics.cpt(score, strong, weak, 0.8),
        "auroc": None if judged else metrics.auroc(made.probability[:, 0], weak > 0.5),
        "ece": None if judged else metrics.ece(made.probability[:, 0], weak),
        "random": float(np.mean(chance)),
        "prior_only": metrics.apgr(np.zeros(len(score)), strong, weak),
        # Ties among equal gains are broken at random, so that shares move by deciles as a router's do.
        "oracle": metrics.apgr(strong - weak + 1e-6 * rng.random(len(score)), strong, weak),
        "weak": float(weak.mean()),
        "best_single": float(strong.mean()),
        "unfamiliar": float((made.familiarity <= 0.0).mean()),
    }


def _many(made: Predictions, prior: Doubles) -> dict[str, float | None]:
    score, cost = made.answers.scores, made.answers.cost
    assert cost is not None
    dearest = float(cost.mean(axis=0).max())
    singles = list(zip(cost.mean(axis=0).tolist(), score.mean(axis=0).tolist(), strict=True))
    best = int(score.mean(axis=0).argmax())
    rng = np.random.default_rng(1_000 + made.seed)
    uniform = [(float(cost.mean()), float(score.mean())), singles[int(cost.mean(axis=0).argmin())]]
    calibration = [metrics.ece(made.probability[:, m], score[:, m]) for m in range(score.shape[1])]
    return {
        "aiq": metrics.aiq(metrics.sweep(made.probability, score, cost), dearest),
        "zero_router": metrics.aiq(singles, dearest),
        # The best single model with the cheapest as alternative, both always available.
        "best_single": metrics.aiq([singles[int(cost.mean(axis=0).argmin())], singles[best]], dearest),
        "best_single_score": singles[best][1],
        "random": metrics.aiq(uniform, dearest),
        "prior_only": metrics.aiq(metrics.sweep(np.tile(prior, (len(score), 1)), score, cost), dearest),
        "noise": metrics.aiq(metrics.sweep(rng.random(score.shape), score, cost), dearest),
        "oracle": metrics.aiq(metrics.sweep(score, score, cost), dearest),
        "ece": float(np.mean(calibration)),
        "unfamiliar": float((made.familiarity <= 0.0).mean()),
    }


def _over_seeds(rows: Sequence[dict[str, float | None]] | Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return means, with standard deviations over the seeds under `sd` and the single values under `seeds`."""
    result: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        numbers = [value for value in values if value is not None]
        result[key] = float(np.mean(numbers)) if numbers else None
        result.setdefault("sd", {})[key] = float(np.std(numbers)) if numbers else None
        result.setdefault("seeds", {})[key] = values
    return result


def _joined(a: Answers, b: Answers) -> Answers:
    assert a.cost is not None
    assert b.cost is not None
    cost = np.concatenate((a.cost, b.cost))
    groups, scores = np.concatenate((a.groups, b.groups)), np.concatenate((a.scores, b.scores))
    return Answers("llmrouter", a.texts + b.texts, groups, a.models, scores, cost)


def _part(answers: Answers, mask: NDArray[np.bool_]) -> Answers:
    assert answers.cost is not None
    texts = [answers.texts[row] for row in np.flatnonzero(mask)]
    return Answers(
        answers.name, texts, answers.groups[mask], answers.models, answers.scores[mask], answers.cost[mask]
    )


def _pair_curves(made: Predictions) -> dict[str, list[tuple[float, float]]]:
    weak, strong = made.answers.scores.T
    rng = np.random.default_rng(made.seed)
    scores = {
        "oracle": strong - weak + 1e-6 * rng.random(len(weak)),
        "Farthing": made.probability[:, 1] - made.probability[:, 0],
    }
    curves = {}
    for name, score in scores.items():
        xs, ys = metrics.call_curve(score, strong, weak)
        curves[name] = list(zip(xs.tolist(), ys.tolist(), strict=True))
    return curves | {"random": [(0.0, float(weak.mean())), (1.0, float(strong.mean()))]}


def _many_curves(made: Predictions) -> dict[str, list[tuple[float, float]]]:
    score, cost = made.answers.scores, made.answers.cost
    assert cost is not None
    singles = list(zip(cost.mean(axis=0).tolist(), score.mean(axis=0).tolist(), strict=True))
    return {
        "oracle": metrics.hull(metrics.sweep(score, score, cost)),
        "Farthing": metrics.hull(metrics.sweep(made.probability, score, cost)),
        "zero router": metrics.hull(singles),
    }


def decision_times(
    encoders: Sequence[Encoder],
    answers: Answers,
    features: list[PromptFeatures],
    encoder_id: str,
    models: int = 20,
) -> dict[str, float]:
    """Time encoding, reading and estimating one 21-token prompt for `models` models; milliseconds, p50 and p95."""
    names = [f"m{number}" for number in range(models)]
    scores = answers.scores[:, np.arange(models) % answers.scores.shape[1]]
    priors = {name: {CLASS: 0.6} for name in names}
    heads = SuccessHeads.fit(
        features,
        [CLASS] * len(features),
        Labels.dense(scores),
        priors,
        encoder_id=encoder_id,
        seed=0,
    )
    now = dict.fromkeys(names, 0.6)
    text = "A baker sells 3 loaves for 2 dollars each and 5 rolls. How much does he earn?"
    times = []
    for _ in range(300):
        begun = time.perf_counter()
        vector = success_features.vectors(encoders, (text,))[0]
        heads.predict(success_features.read(text, vector), CLASS, now)
        times.append((time.perf_counter() - begun) * 1000.0)
    return {"models": float(models), "p50": float(np.median(times)), "p95": float(np.quantile(times, 0.95))}


def _lines(predictions: Sequence[Predictions]) -> Iterator[list[Any]]:
    yield [
        "data",
        "protocol",
        "seed",
        "row",
        "fold",
        "group",
        "familiarity",
        "model",
        "predicted",
        "score",
        "cost_usd",
    ]
    for made in predictions:
        answers = made.answers
        for row in range(len(answers.texts)):
            for m, model in enumerate(answers.models):
                yield [
                    *(made.data, made.protocol, made.seed, row, int(made.fold[row]), answers.groups[row]),
                    f"{made.familiarity[row]:.4f}",
                    model,
                    repr(float(made.probability[row, m])),
                    repr(float(answers.scores[row, m])),
                    "" if answers.cost is None else repr(float(answers.cost[row, m])),
                ]


def write_predictions(path: Path, predictions: Sequence[Predictions]) -> None:
    """Write one CSV line per run, row and model (gzip when the name ends in .gz); prompts are not written."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(_lines(predictions))
    content = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `farthing evaluate`; return 0, or 2 when data, folder or scikit-learn are missing."""
    parser = argparse.ArgumentParser(
        prog="farthing evaluate", description="Measure routing quality on recorded answers of many models."
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="folder with routellm/ and llmrouter/"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write every prediction as CSV (.gz to compress)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="write cost-quality curves as SVG (or .html with the SVG inside)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="embeddings by hash of the text (~/.cache/farthing)"
    )
    parser.add_argument("--encoders", choices=sorted(ENCODERS), default="static")
    options = parser.parse_args(argv)
    try:
        done = run(options.data, options.seeds, options.cache, options.encoders)
        if options.predictions:
            write_predictions(options.predictions, done.predictions)
        if options.plot:
            from classifiers.evaluate.report import plot

            svg = plot(done.panels)
            page = f"<!doctype html><meta charset='utf-8'><title>Cost and quality</title>{svg}"
            options.plot.write_text(page if options.plot.suffix == ".html" else svg, encoding="utf-8")
    except DataError as error:
        print(f"farthing evaluate: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"farthing evaluate: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"farthing evaluate: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(done.results, indent=1, default=float))
    else:
        from rich.console import Console

        from classifiers.evaluate.report import show

        show(done.results, Console())
    return 0
