"""Train the shipped heads from `data/prompts/*.jsonl` and report how good they are.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m classifiers.train

needs scikit-learn beside the run-time packages; takes a minute. Writes `head-static.*`, `head-minilm.*`,
`scores.json` and the heads' ids in `manifest.json`. With one thread two runs on one machine give the same bytes.

Protocol of the scores: 20 random splits of the kinds of task, two thirds to train and one third to test. In each
split everything (regularisation, weight of the vector, calibration, thresholds) is chosen on its training kinds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from classifiers import artefact, features
from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY, Encoder, MiniLMEncoder, StaticEncoder
from classifiers.head import CLASSES, PLACE, UNFAMILIAR, Head, calibrated, class_of, joined, placed

VERSION = "2"
REGULARISATION = (0.003, 0.01, 0.03)
# How much the vector counts beside the features, before regularisation.
VECTOR_WEIGHTS = (0.3, 0.6, 1.0)
INNER_FOLDS = 5
SPLITS = 20
TEST_SHARE = 1 / 3
# Share of familiar-enough training prompts; the rest counts as unfamiliar.
FAMILIAR_SHARE = 0.95
# Share of prompts of unseen kinds for which the transformer is asked.
TRANSFORMER_SHARE = 0.1

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

# Written after the features and never used in choosing anything: the last check.
LATER_KINDS = ("devops", "health", "office", "school", "travel")

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Prompts:
    texts: list[str]
    kinds: NDArray[np.str_]
    classes: NDArray[np.int64]
    log_tokens: Floats
    sha256: str


def read_prompts(paths: list[Path], kinds: set[str]) -> Prompts:
    """Read all prompts in order of file and line. Raises ValueError naming file and line of a bad one."""
    texts, of_kind, classes, tokens, digest = [], [], [], [], hashlib.sha256()
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            digest.update(line.encode())
            row = json.loads(line)
            if row["class"] not in CLASSES or row["kind"] not in kinds:
                raise ValueError(f"{path.name}:{number}: unknown class or kind")
            texts.append(row["text"])
            of_kind.append(row["kind"])
            classes.append(CLASSES.index(row["class"]))
            tokens.append(float(row["output_tokens"]))
    return Prompts(texts, np.array(of_kind), np.array(classes), np.log(tokens), digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Seen:
    """Texts as a head sees them: vectors (n, dimensions) and described features (n, len(ALL_NAMES)), float32."""

    vectors: NDArray[np.float32]
    described: NDArray[np.float32]

    def rows(self, rows: Rows) -> Seen:
        return Seen(self.vectors[rows], self.described[rows])


def see(encoder: Encoder, texts: list[str]) -> Seen:
    tasks = [features.focus(text) for text in texts]
    described = np.stack([features.describe(text, task) for text, task in zip(texts, tasks, strict=True)])
    return Seen(encoder.encode(tasks), described)


@dataclass(frozen=True, slots=True)
class Setting:
    regularisation: float
    vector_weight: float


@dataclass(frozen=True, slots=True)
class Linear:
    """Maps from raw features: columns are the three classes and log(output tokens)."""

    weights: Floats
    bias: Floats


def fit_linear(seen: Seen, prompts: Prompts, rows: Rows, setting: Setting) -> Linear:
    x = np.hstack([seen.vectors[rows], seen.described[rows]]).astype(np.float64)
    scaler = StandardScaler().fit(x)
    width = seen.vectors.shape[1]
    stretch = np.where(np.arange(x.shape[1]) < width, setting.vector_weight, 1.0) / np.asarray(scaler.scale_)
    scaled = (x - scaler.mean_) * stretch
    c = setting.regularisation
    classes = LogisticRegression(C=c, class_weight="balanced", max_iter=2000, tol=1e-6)
    classes.fit(scaled, prompts.classes[rows])
    tokens = Ridge(alpha=0.5 / c).fit(scaled, prompts.log_tokens[rows])
    weights = np.column_stack([classes.coef_.T, tokens.coef_]) * stretch[:, None]
    bias = np.append(classes.intercept_, tokens.intercept_) - scaler.mean_ @ weights
    return Linear(np.asarray(weights), np.asarray(bias))


def inner_folds(prompts: Prompts, rows: Rows) -> list[tuple[Rows, Rows]]:
    """Split rows by kind: a kind is never on both sides."""
    folds = GroupKFold(INNER_FOLDS).split(rows, groups=prompts.kinds[rows])
    return [(rows[train], rows[test]) for train, test in folds]


def choose(seen: Seen, prompts: Prompts, rows: Rows) -> Setting:
    """Choose the setting by the class-balanced log loss on kinds held out within `rows`."""
    folds = inner_folds(prompts, rows)

    def loss(setting: Setting) -> float:
        losses, truth = [], []
        for train, test in folds:
            linear = fit_linear(seen, prompts, train, setting)
            x = np.hstack([seen.vectors[test], seen.described[test]])
            p = softmax((x @ linear.weights + linear.bias)[:, :3])
            losses.append(-np.log(p[np.arange(len(test)), prompts.classes[test]] + 1e-12))
            truth.append(prompts.classes[test])
        joined, classes = np.concatenate(losses), np.concatenate(truth)
        return float(np.mean([joined[classes == index].mean() for index in range(len(CLASSES))]))

    return min((Setting(c, w) for w in VECTOR_WEIGHTS for c in REGULARISATION), key=loss)


def assemble(
    name: str, encoder_id: str, seen: Seen, prompts: Prompts, rows: Rows, setting: Setting
) -> tuple[dict[str, Any], dict[str, NDArray[Any]], Head]:
    """Fit a head on rows, without calibration: metadata, arrays and the head that they make."""
    linear = fit_linear(seen, prompts, rows, setting)
    vectors, described = seen.vectors[rows], seen.described[rows]
    centre = np.hstack([vectors.mean(axis=0), described.mean(axis=0)]).astype(np.float32)
    spread = np.maximum(described.std(axis=0), 1e-3)
    scale = np.hstack([np.ones(vectors.shape[1]), spread]).astype(np.float32)
    joint = joined(vectors, described, centre, scale)
    # The main axes of the labelled prompts; a sign is fixed by the axis' largest component.
    axes = np.linalg.eigh(joint.T.astype(np.float64) @ joint)[1][:, : -PLACE - 1 : -1].T
    axes *= np.sign(axes[np.arange(PLACE), np.abs(axes).argmax(axis=1)])[:, None]
    axes = axes.astype(np.float32)
    kinds = sorted(KINDS)
    metadata: dict[str, Any] = {
        "features": list(features.ALL_NAMES),
        "kinds": [KINDS[kind] for kind in kinds],
        "calibration": [1.0, 0.0],
        "familiar_above": -1.0,
        "transformer_below": 0.0,
    }
    arrays: dict[str, NDArray[Any]] = {
        "weights": linear.weights.astype(np.float32),
        "bias": linear.bias.astype(np.float32),
        "centre": centre,
        "scale": scale,
        "axes": axes,
        "labelled": placed(joint, axes).astype(np.float16),
        "labelled_classes": prompts.classes[rows].astype(np.int8),
        "labelled_kinds": np.array([kinds.index(kind) for kind in prompts.kinds[rows]], dtype=np.int8),
    }
    draft = Artefact(f"head-{name}", f"head-{name}", VERSION, encoder_id, metadata, arrays)
    return metadata, arrays, Head(draft, dimensions=vectors.shape[1])


@dataclass(frozen=True, slots=True)
class Trained:
    """A head and what was chosen for it."""

    head: Head
    metadata: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    setting: Setting


def train(name: str, encoder_id: str, seen: Seen, prompts: Prompts, rows: Rows) -> Trained:
    """Train a head on rows. Calibration and thresholds come from kinds held out within the rows."""
    setting = choose(seen, prompts, rows)
    p, right, nearest = [], [], []
    for inner, test in inner_folds(prompts, rows):
        _, _, head = assemble(name, encoder_id, seen, prompts, inner, setting)
        view = head.view(seen.vectors[test], seen.described[test])
        guess = named(view.probabilities)
        p.append(view.probabilities[np.arange(len(test)), guess])
        right.append(guess == prompts.classes[test])
        nearest.append(view.similarity)
    metadata, arrays, head = assemble(name, encoder_id, seen, prompts, rows, setting)
    slope, offset = calibrate(np.concatenate(p), np.concatenate(right))
    labelled = arrays["labelled"].astype(np.float32)
    similarity = labelled @ labelled.T
    np.fill_diagonal(similarity, -1.0)
    familiar_above = float(np.quantile(similarity.max(axis=1), 1 - FAMILIAR_SHARE))
    confidence = calibrated(np.concatenate(p), slope, offset)
    confidence *= np.where(np.concatenate(nearest) >= familiar_above, 1.0, UNFAMILIAR)
    metadata |= {
        "calibration": [round(slope, 6), round(offset, 6)],
        "familiar_above": round(familiar_above, 6),
        "transformer_below": round(float(np.quantile(confidence, TRANSFORMER_SHARE)), 6),
    }
    draft = Artefact(f"head-{name}", f"head-{name}", VERSION, encoder_id, metadata, arrays)
    return Trained(Head(draft, dimensions=seen.vectors.shape[1]), metadata, arrays, setting)


def softmax(scores: Floats) -> Floats:
    raw: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
    raw /= raw.sum(axis=1, keepdims=True)
    return raw


def named(p: Floats) -> NDArray[np.int64]:
    """Class by the borders on difficulty, as at run time."""
    return np.array([CLASSES.index(class_of(d)) for d in 0.5 * p[:, 1] + p[:, 2]])


def calibrate(p: Floats, right: NDArray[np.bool_]) -> tuple[float, float]:
    """Platt's method on held-out prompts: slope and offset of logit(confidence) over logit(p of the class named)."""
    bounded = np.clip(p, 1e-6, 1.0 - 1e-6)
    model = LogisticRegression(C=1e6, tol=1e-8).fit(np.log(bounded / (1 - bounded))[:, None], right)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Classes, confidences and expected tokens of n prompts."""

    classes: NDArray[np.int64]
    confidence: Floats
    tokens: NDArray[np.int64]


def judge(head: Head, seen: Seen) -> Verdicts:
    """Judge prompts one by one, as at run time."""
    judged = [
        head.judge(vector, described) for vector, described in zip(seen.vectors, seen.described, strict=True)
    ]
    return Verdicts(
        np.array([CLASSES.index(one.prompt_class) for one in judged]),
        np.array([one.confidence for one in judged]),
        np.array([one.output_tokens for one in judged]),
    )


def staged(static: Verdicts, minilm: Verdicts, below: float) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return classes of the deployed path and where the transformer was asked (see `Classifier.refine`)."""
    asked = static.confidence < below
    replaced = asked & (minilm.confidence >= static.confidence)
    return np.where(replaced, minilm.classes, static.classes), asked


def scores_of(guess: NDArray[np.int64], truth: NDArray[np.int64]) -> dict[str, float]:
    return {
        "accuracy": float(accuracy_score(truth, guess)),
        "macro_f1": float(
            f1_score(truth, guess, average="macro", labels=range(len(CLASSES)), zero_division=0)
        ),
        "two_classes_off": float((np.abs(truth - guess) == 2).mean()),
    }


def calibration_error(confidence: Floats, right: NDArray[np.bool_]) -> float:
    """Expected calibration error over ten equal-width bins."""
    bins = np.minimum((confidence * 10).astype(int), 9)
    gaps = [abs(float(confidence[bins == b].sum() - right[bins == b].sum())) for b in range(10)]
    return sum(gaps) / len(confidence)


def kind_splits(kinds: NDArray[np.str_]) -> Iterator[tuple[Rows, Rows]]:
    """Yield `SPLITS` pairs of training and test rows; a third of the kinds is drawn for the test each time."""
    names = np.unique(kinds)
    random = np.random.default_rng(0)
    for _ in range(SPLITS):
        test = np.isin(kinds, random.permutation(names)[: round(len(names) * TEST_SHARE)])
        yield np.flatnonzero(~test), np.flatnonzero(test)


def by_length(prompts: Prompts, train_rows: Rows, test_rows: Rows) -> dict[str, float]:
    """Score the length-only baseline: logistic regression on a cubic of log(characters), the best of three C."""
    length = np.log1p([len(text) for text in prompts.texts])
    x = np.column_stack([length, length**2, length**3])
    scaler = StandardScaler().fit(x[train_rows])
    results = []
    for c in (0.01, 0.1, 1.0):
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
        model.fit(scaler.transform(x[train_rows]), prompts.classes[train_rows])
        guess = named(model.predict_proba(scaler.transform(x[test_rows])))
        results.append(scores_of(guess, prompts.classes[test_rows]))
    return max(results, key=lambda scores: scores["macro_f1"])


def evaluate(
    seen: dict[str, Seen], ids: dict[str, str], prompts: Prompts, paraphrases: dict[str, Seen], sources: Rows
) -> dict[str, Any]:
    """Score static head, transformer head and the deployed path over random splits of the kinds."""
    paths = ("static", "minilm", "static_then_minilm")
    scores: dict[str, list[dict[str, float]]] = {path: [] for path in (*paths, "length_only", "majority")}
    hits: dict[str, dict[str, list[float]]] = {path: {kind: [] for kind in sorted(KINDS)} for path in paths}
    for train_rows, test_rows in kind_splits(prompts.kinds):
        heads = {name: train(name, ids[name], seen[name], prompts, train_rows).head for name in seen}
        truth = prompts.classes[test_rows]
        told = np.flatnonzero(np.isin(sources, test_rows))
        at = np.searchsorted(test_rows, sources[told])
        verdicts = {name: judge(heads[name], seen[name].rows(test_rows)) for name in seen}
        retold = {name: judge(heads[name], paraphrases[name].rows(told)) for name in seen}
        below = heads["static"].transformer_below
        classes = {name: verdicts[name].classes for name in seen}
        again = {name: retold[name].classes for name in seen}
        classes["static_then_minilm"], asked = staged(verdicts["static"], verdicts["minilm"], below)
        again["static_then_minilm"], _ = staged(retold["static"], retold["minilm"], below)
        for path in paths:
            result = scores_of(classes[path], truth)
            result["flips_under_paraphrase"] = float((classes[path][at] != again[path]).mean())
            if path in verdicts:
                right = classes[path] == truth
                result["calibration_error"] = calibration_error(verdicts[path].confidence, right)
                ratio = np.abs(np.log(verdicts[path].tokens) - prompts.log_tokens[test_rows])
                result["output_tokens_median_factor"] = float(np.exp(np.median(ratio)))
            else:
                result["transformer_asked"] = float(asked.mean())
            scores[path].append(result)
            for kind in np.unique(prompts.kinds[test_rows]):
                own = prompts.kinds[test_rows] == kind
                hits[path][kind].append(float((classes[path] == truth)[own].mean()))
        scores["length_only"].append(by_length(prompts, train_rows, test_rows))
        scores["majority"].append(scores_of(np.zeros_like(truth), truth))
    report: dict[str, Any] = {
        path: {
            measure: {
                "mean": round(float(np.mean([one[measure] for one in results])), 3),
                "sd": round(float(np.std([one[measure] for one in results])), 3),
            }
            for measure in results[0]
        }
        for path, results in scores.items()
    }
    report["macro_f1_per_split"] = {
        path: [round(one["macro_f1"], 3) for one in scores[path]] for path in (*paths, "length_only")
    }
    report["accuracy_per_kind"] = {
        path: {kind: round(float(np.mean(values)), 2) for kind, values in hits[path].items() if values}
        for path in paths
    }
    return report


def unfolded(trained: dict[str, Trained], seen: dict[str, Seen]) -> dict[str, Any]:
    """Return the classes of the shipped heads on other texts, for each path, and the share asked."""
    verdicts = {name: judge(trained[name].head, seen[name]) for name in trained}
    classes: dict[str, Any] = {name: verdicts[name].classes for name in trained}
    below = trained["static"].head.transformer_below
    classes["static_then_minilm"], asked = staged(verdicts["static"], verdicts["minilm"], below)
    return {"classes": classes, "asked": asked}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA_DIRECTORY)
    data: Path = parser.parse_args().data
    prompts = read_prompts(sorted((data / "prompts").glob("*.jsonl")), set(KINDS))
    later = read_prompts([data / "later_prompts.jsonl"], set(LATER_KINDS))
    told = [
        json.loads(line) for line in (data / "paraphrases.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    row_of = {text: row for row, text in enumerate(prompts.texts)}
    sources = np.array([row_of[one["paraphrases"]] for one in told])
    encoders: dict[str, Encoder] = {"static": StaticEncoder.load(data), "minilm": MiniLMEncoder.load(data)}
    ids = {name: encoder.id for name, encoder in encoders.items()}
    seen = {name: see(encoder, prompts.texts) for name, encoder in encoders.items()}
    retold = {name: see(encoder, [one["text"] for one in told]) for name, encoder in encoders.items()}
    seen_later = {name: see(encoder, later.texts) for name, encoder in encoders.items()}

    unseen_kinds = evaluate(seen, ids, prompts, retold, sources)
    everything = np.arange(len(prompts.texts))
    trained = {name: train(name, ids[name], seen[name], prompts, everything) for name in encoders}
    before, after = unfolded(trained, seen), unfolded(trained, retold)
    on_later = unfolded(trained, seen_later)
    summary: dict[str, Any] = {
        "protocol": f"{SPLITS} random splits of the kinds, {TEST_SHARE:.2f} of them for the test; mean and sd",
        "prompts": {
            "kinds": len(KINDS),
            **{name: int((prompts.classes == index).sum()) for index, name in enumerate(CLASSES)},
            "paraphrases": len(told),
            "later": len(later.texts),
        },
        "unseen_kinds": unseen_kinds,
        "later_prompts": {
            **{path: rounded(scores_of(guess, later.classes)) for path, guess in on_later["classes"].items()},
            "transformer_asked": round(float(on_later["asked"].mean()), 3),
        },
        "flips_of_labelled_prompts": {
            path: round(float((before["classes"][path][sources] != after["classes"][path]).mean()), 3)
            for path in before["classes"]
        },
    }
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    for name, one in trained.items():
        manifest["heads"][name] = artefact.save(
            data / f"head-{name}.json",
            name=f"head-{name}",
            version=VERSION,
            encoder_id=ids[name],
            metadata={
                **one.metadata,
                "prompts": len(prompts.texts),
                "prompts_sha256": prompts.sha256,
                "regularisation": one.setting.regularisation,
                "vector_weight": one.setting.vector_weight,
                "unseen_kinds": unseen_kinds[name],
                "made_with": {
                    "scikit-learn": package_version("scikit-learn"),
                    "numpy": package_version("numpy"),
                },
            },
            arrays=one.arrays,
        )
    (data / "scores.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (data / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    print(manifest["heads"])


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {measure: round(value, 3) for measure, value in scores.items()}


if __name__ == "__main__":
    warnings.simplefilter("error", category=RuntimeWarning)
    main()
