"""Train the shipped heads from `data/prompts/*.jsonl` and report how good they are.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m classifiers.train

needs scikit-learn beside the run-time packages. Writes `head-static.*`, `head-minilm.*`, `scores.json` and the
heads' ids in `manifest.json`. With one thread two runs on one machine give the same bytes.

Scores are leave-one-kind-out (the head never saw a prompt of the kind it is judged on), but for `known_kinds`:
five random folds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import StandardScaler

from classifiers import artefact, features
from classifiers.encoder import DATA_DIRECTORY, Encoder, MiniLMEncoder, StaticEncoder
from classifiers.head import CLASSES, calibrated, class_of

VERSION = "1"
REGULARISATION = (0.001, 0.003, 0.01, 0.03)
# Share of familiar-enough training prompts; the rest counts as unfamiliar.
FAMILIAR_SHARE = 0.95
# Share of prompts for which the transformer is asked.
TRANSFORMER_SHARE = 0.3

KINDS = {
    "chat": "chat",
    "classify": "classification",
    "code_debug": "debugging",
    "code_write": "coding task",
    "creative": "creative writing",
    "data_sql": "data or SQL question",
    "document": "question on a pasted text",
    "extraction": "extraction",
    "format": "format conversion",
    "languages": "prompt in another language",
    "legal_finance": "legal or financial question",
    "long_trivial": "small question in a long text",
    "lookup": "factual question",
    "maths": "mathematics",
    "planning": "planning",
    "proofs": "proof or theorem",
    "rewrite": "rewriting",
    "science": "science question",
    "short_hard": "terse hard question",
    "summarise": "summary",
    "system_design": "system design",
    "tool_use": "tool use",
    "translate": "translation",
}

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Prompts:
    texts: list[str]
    kinds: NDArray[np.str_]
    classes: NDArray[np.int64]
    log_tokens: Floats
    sha256: str


def read_prompts(directory: Path) -> Prompts:
    """Read all prompts in order of file and line. Raises ValueError naming file and line of a bad one."""
    texts, kinds, classes, tokens, digest = [], [], [], [], hashlib.sha256()
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            digest.update(line.encode())
            row = json.loads(line)
            if row["class"] not in CLASSES or row["kind"] not in KINDS:
                raise ValueError(f"{path.name}:{number}: unknown class or kind")
            texts.append(row["text"])
            kinds.append(row["kind"])
            classes.append(CLASSES.index(row["class"]))
            tokens.append(float(row["output_tokens"]))
    return Prompts(texts, np.array(kinds), np.array(classes), np.log(tokens), digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Fit:
    """Linear maps from raw features: columns are the three classes and log(output tokens)."""

    weights: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Trained:
    """A head's id, its held-out classes and confidences (n,) and its scores."""

    id: str
    guess: NDArray[np.int64]
    confidence: Floats
    report: dict[str, Any]


def fit(x: Floats, prompts: Prompts, rows: NDArray[Any], c: float) -> Fit:
    scaler = StandardScaler().fit(x[rows])
    scaled = scaler.transform(x[rows])
    classes = LogisticRegression(C=c, class_weight="balanced", max_iter=2000, tol=1e-8)
    classes.fit(scaled, prompts.classes[rows])
    tokens = Ridge(alpha=0.5 / c).fit(scaled, prompts.log_tokens[rows])
    weights = np.column_stack([classes.coef_.T, tokens.coef_])
    bias = np.append(classes.intercept_, tokens.intercept_)
    folded = weights / scaler.scale_[:, None]
    return Fit(np.asarray(folded), np.asarray(bias - scaler.mean_ @ folded))


def held_out(x: Floats, prompts: Prompts, c: float, groups: NDArray[Any]) -> Floats:
    """Return scores (n, 4), each row from a fit that never saw the row's group."""
    result = np.empty((len(x), 4))
    for group in np.unique(groups):
        own = groups == group
        model = fit(x, prompts, ~own, c)
        result[own] = x[own] @ model.weights + model.bias
    return result


def softmax(scores: Floats) -> Floats:
    raw: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
    raw /= raw.sum(axis=1, keepdims=True)
    return raw


def log_loss(p: Floats, classes: NDArray[np.int64]) -> float:
    return float(-np.log(p[np.arange(len(p)), classes] + 1e-12).mean())


def named(p: Floats) -> NDArray[np.int64]:
    """Class by the borders on difficulty, as at run time."""
    return np.array([CLASSES.index(class_of(d)) for d in 0.5 * p[:, 1] + p[:, 2]])


def scores_of(guess: NDArray[np.int64], truth: NDArray[np.int64]) -> dict[str, float]:
    return {
        "accuracy": round(float(accuracy_score(truth, guess)), 3),
        "macro_f1": round(float(f1_score(truth, guess, average="macro")), 3),
        "two_classes_off": round(float((np.abs(truth - guess) == 2).mean()), 3),
    }


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error over ten equal-width bins."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs(float(confidence[bins == b].sum() - right[bins == b].sum())) for b in range(10)]
    return round(sum(gaps) / len(confidence), 3)


def calibrate(p: Floats, right: NDArray[np.bool_]) -> tuple[float, float]:
    """Platt's method on held-out prompts: slope and offset of logit(confidence) over logit(p of the class named)."""
    model = LogisticRegression(C=1e6, tol=1e-8).fit(np.log(p / (1 - p))[:, None], right)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def train(encoder: Encoder, name: str, prompts: Prompts, out: Path) -> Trained:
    """Train and write one head."""
    vectors = encoder.encode([features.focus(text) for text in prompts.texts]).astype(np.float64)
    counted = np.stack([features.structure(text) for text in prompts.texts]).astype(np.float64)
    x = np.hstack([vectors, counted])
    kinds_out = {c: held_out(x, prompts, c, prompts.kinds) for c in REGULARISATION}
    c = min(REGULARISATION, key=lambda c: log_loss(softmax(kinds_out[c][:, :3]), prompts.classes))
    scores = kinds_out[c]
    p = softmax(scores[:, :3])
    guess = named(p)
    right = guess == prompts.classes
    slope, offset = calibrate(p[np.arange(len(p)), guess], right)
    confidence = calibrated(p[np.arange(len(p)), guess], slope, offset)
    model = fit(x, prompts, np.ones(len(x), dtype=bool), c)

    kinds = sorted(KINDS)
    sums = np.stack([vectors[prompts.kinds == kind].sum(axis=0) for kind in kinds])
    centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    # Nearness to the nearest kind, the prompt itself taken out of its own centroid.
    nearness = vectors @ centroids.T
    for row, kind in enumerate(prompts.kinds):
        rest = sums[kinds.index(kind)] - vectors[row]
        nearness[row, kinds.index(kind)] = vectors[row] @ rest / np.linalg.norm(rest)
    familiar_above = float(np.quantile(nearness.max(axis=1), 1 - FAMILIAR_SHARE))
    transformer_below = float(np.quantile(confidence, TRANSFORMER_SHARE))

    folds = np.random.default_rng(0).permutation(len(x)) % 5
    known = named(softmax(held_out(x, prompts, c, folds)[:, :3]))
    token_ratio = np.exp(np.abs(scores[:, 3] - prompts.log_tokens))
    report = {
        **scores_of(guess, prompts.classes),
        "calibration_error": calibration_error(confidence, right),
        "known_kinds": scores_of(known, prompts.classes),
        "output_tokens_median_factor": round(float(np.median(token_ratio)), 2),
        "regularisation": c,
    }
    id = artefact.save(
        out / f"head-{name}.json",
        name=f"head-{name}",
        version=VERSION,
        encoder_id=encoder.id,
        metadata={
            "features": list(features.NAMES),
            "kinds": [KINDS[kind] for kind in kinds],
            "calibration": [round(slope, 6), round(offset, 6)],
            "familiar_above": round(familiar_above, 6),
            "transformer_below": round(transformer_below, 6),
            "prompts": len(prompts.texts),
            "prompts_sha256": prompts.sha256,
            "held_out_kinds": report,
            "made_with": {"scikit-learn": package_version("scikit-learn"), "numpy": package_version("numpy")},
        },
        arrays={
            "weights": model.weights.astype(np.float32),
            "bias": model.bias.astype(np.float32),
            "centroids": centroids.astype(np.float32),
        },
    )
    return Trained(id, guess, confidence, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA_DIRECTORY)
    data: Path = parser.parse_args().data
    prompts = read_prompts(data / "prompts")
    truth = prompts.classes
    trained = {
        "static": train(StaticEncoder.load(data), "static", prompts, data),
        "minilm": train(MiniLMEncoder.load(data), "minilm", prompts, data),
    }
    reports: dict[str, Any] = {name: head.report for name, head in trained.items()}
    counted = np.stack([features.structure(text) for text in prompts.texts]).astype(np.float64)
    length = counted[:, features.NAMES.index("log_characters")]

    def baseline(x: Floats) -> dict[str, float]:
        return max(
            (
                scores_of(named(softmax(held_out(x, prompts, c, prompts.kinds)[:, :3])), truth)
                for c in (0.01, 0.1, 1.0)
            ),
            key=lambda s: s["macro_f1"],
        )

    reports["baseline_majority"] = scores_of(np.zeros_like(truth), truth)
    reports["baseline_length_only"] = baseline(np.column_stack([length, length**2, length**3]))
    reports["baseline_structure_only"] = baseline(counted)
    static, minilm = trained["static"], trained["minilm"]
    asked = static.confidence < float(np.quantile(static.confidence, TRANSFORMER_SHARE))
    surer = asked & (minilm.confidence >= static.confidence)
    for name, replaced in (("static_then_minilm", asked), ("static_then_minilm_if_surer", surer)):
        reports[name] = scores_of(np.where(replaced, minilm.guess, static.guess), truth)
    reports["per_kind_accuracy"] = {
        kind: round(float((static.guess == truth)[prompts.kinds == kind].mean()), 2) for kind in sorted(KINDS)
    }
    summary = {
        "protocol": "leave one kind out",
        "prompts": {name: int((truth == index).sum()) for index, name in enumerate(CLASSES)},
        "results": reports,
    }
    (data / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    manifest["heads"] = {name: head.id for name, head in trained.items()}
    (data / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    print(manifest["heads"])


if __name__ == "__main__":
    warnings.simplefilter("error", category=RuntimeWarning)
    main()
