"""Train the shipped heads from `data/prompts/*.jsonl` and `data/paraphrases.jsonl` and report how good they are.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m classifiers.train

needs scikit-learn beside the run-time packages; takes some minutes. Writes `head-static.*`, `head-minilm.*`,
`scores.json` and the heads' ids in `manifest.json`. With one thread two runs on one machine give the same bytes.

Protocol of the scores: 20 random splits of the kinds of task, two thirds to train and one third to test. In each
split everything (regularisation, calibration, thresholds) is chosen on its training kinds, and only paraphrases of
prompts of these kinds are learned from. Beside it: new prompts of known kinds, and new wordings of known prompts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from classifiers import artefact, features, phrases
from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY, Encoder, MiniLMEncoder, StaticEncoder
from classifiers.head import CLASSES, PLACE, Head, border_distance, class_of, joined, placed

VERSION = "4"
# How much the vector counts beside the features, before regularisation.
VECTOR_WEIGHT = 0.6
# Regularisation, and how much a direction in which a prompt and its paraphrases differ is held back: what is chosen
# from.
SETTINGS = ((0.003, 1.0), (0.01, 3.0))
# A phrase is learned when so many prompts say it, in their own words or in a paraphrase's.
PHRASE_PROMPTS = 3
# How much a phrase counts beside the features, before regularisation ...
PHRASE_WEIGHT = 4.0
# ... and how much it is held back for each unit of the share of pairs of which one says it and one does not.
PHRASE_STEADINESS = 20.0
# Regularisation draws all difficulties to the middle, where the borders are: the scores are stretched by this.
STRETCH = 2.0
# Of the scatter of those differences, what is added to every direction when prompts are placed.
PLACE_FLOOR = 0.5
INNER_FOLDS = 5
SPLITS = 20
TEST_SHARE = 1 / 3
# Share of familiar-enough training prompts; the rest counts as unfamiliar.
FAMILIAR_SHARE = 0.95
# Share of prompts of unseen kinds for which the transformer is asked.
TRANSFORMER_SHARE = 0.2
# A flip between difficulties this close is one that a border made.
SMALL_STEP = 0.15

# No two texts of different kinds may be nearer (cosine, MiniLM).
MAX_LIKENESS = 0.85

KINDS = {
    "apis_integration": "APIs and integration",
    "chat": "chat",
    "chemistry_biology": "chemistry or biology",
    "classify": "classification",
    "code_debug": "debugging",
    "code_write": "coding task",
    "cooking": "cooking",
    "creative": "creative writing",
    "critique": "critique",
    "customer_support": "customer support",
    "data_sql": "data or SQL question",
    "document": "question on a pasted text",
    "ecommerce": "online shop",
    "economics_policy": "economics or policy",
    "engineering": "engineering",
    "ethics_philosophy": "ethics or philosophy",
    "extraction": "extraction",
    "format": "format conversion",
    "frontend_web": "web front end",
    "history_geography": "history or geography",
    "home_garden": "home and garden",
    "languages": "prompt in another language",
    "legal_finance": "legal or financial question",
    "long_trivial": "small question in a long text",
    "lookup": "factual question",
    "marketing": "marketing",
    "maths": "mathematics",
    "media": "books, films, music",
    "mobile_apps": "mobile app",
    "people_hr": "people at work",
    "planning": "planning",
    "proofs": "proof or theorem",
    "recruiting": "recruiting",
    "rewrite": "rewriting",
    "sales": "sales",
    "science": "science question",
    "security": "security",
    "short_hard": "terse hard question",
    "sports": "sports",
    "spreadsheets": "spreadsheets",
    "statistics_ml": "statistics or machine learning",
    "strategy_operations": "strategy or operations",
    "summarise": "summary",
    "system_design": "system design",
    "testing_qa": "software testing",
    "tool_use": "tool use",
    "translate": "translation",
}

# These kinds are by the hand that made the features, all others by four further ones.
FIRST_HAND = (
    "chat", "classify", "code_debug", "code_write", "creative", "data_sql", "document", "extraction", "format",
    "languages", "legal_finance", "long_trivial", "lookup", "maths", "planning", "proofs", "rewrite", "science",
    "short_hard", "summarise", "system_design", "tool_use", "translate",
)  # fmt: skip

# Written after the features and never used in choosing anything: the last check.
LATER_KINDS = ("devops", "health", "office", "school", "travel")

Floats = NDArray[np.float64]
Setting = tuple[float, float]
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
class Told:
    """Paraphrases: `texts`, and of each the row of the prompt that it tells anew."""

    texts: list[str]
    sources: Rows
    sha256: str

    def of(self, rows: Rows) -> Rows:
        """Return which paraphrases tell one of these prompts."""
        return np.flatnonzero(np.isin(self.sources, rows))


def read_told(path: Path, prompts: Prompts) -> Told:
    """Read the paraphrases. Raises ValueError for one of no known prompt or labelled otherwise than its prompt."""
    row_of = {text: row for row, text in enumerate(prompts.texts)}
    texts, sources = [], []
    content = path.read_text(encoding="utf-8")
    for number, line in enumerate(content.splitlines(), 1):
        told = json.loads(line)
        row = row_of.get(told["paraphrases"])
        if (
            row is None
            or told["kind"] != prompts.kinds[row]
            or told["class"] != CLASSES[prompts.classes[row]]
        ):
            raise ValueError(f"{path.name}:{number}: no such prompt, or another kind or class than it has")
        texts.append(told["text"])
        sources.append(row)
    return Told(texts, np.array(sources), hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class Seen:
    """Texts as a head sees them.

    Vectors (n, dimensions) and described features (n, len(ALL_NAMES)), float32, and what `phrases.said` finds, (n,).
    """

    vectors: NDArray[np.float32]
    described: NDArray[np.float32]
    said: NDArray[np.object_]

    def rows(self, rows: Rows) -> Seen:
        return Seen(self.vectors[rows], self.described[rows], self.said[rows])

    def and_(self, other: Seen) -> Seen:
        return Seen(
            np.vstack([self.vectors, other.vectors]),
            np.vstack([self.described, other.described]),
            np.concatenate([self.said, other.said]),
        )

    @property
    def joined(self) -> Floats:
        return np.hstack([self.vectors, self.described]).astype(np.float64)


def see(encoder: Encoder, texts: list[str]) -> Seen:
    read = [features.read(text) for text in texts]
    described = np.stack([features.describe(counted, task) for counted, task in read])
    said = np.empty(len(texts), dtype=object)
    said[:] = [phrases.said(task) for _, task in read]
    return Seen(encoder.encode([task for _, task in read]), described, said)


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a head is trained on: prompts with their classes and paraphrases of them, as an encoder sees them.

    `rows` are the prompts to learn from, `told` the paraphrases (of these prompts).
    """

    encoder: str
    encoder_id: str
    prompts: Prompts
    seen: Seen
    sources: Rows
    retold: Seen
    rows: Rows
    told: Rows

    def only(self, rows: Rows) -> Lesson:
        """Return the lesson with some of its prompts, and of its paraphrases those that tell them."""
        return replace(self, rows=rows, told=self.told[np.isin(self.sources[self.told], rows)])

    @property
    def texts(self) -> Seen:
        return self.seen.rows(self.rows).and_(self.retold.rows(self.told))


@dataclass(frozen=True, slots=True)
class Linear:
    """Maps from raw features: columns are the three classes and log(output tokens); of phrases the three alone."""

    weights: Floats
    bias: Floats
    phrases: tuple[str, ...]
    phrase_weights: Floats

    def scores(self, seen: Seen) -> Floats:
        """Scores of the three classes, (n, 3)."""
        found: Floats = (seen.joined @ self.weights + self.bias)[:, :3]
        return np.asarray(found + saying(seen.said, self.phrases) @ self.phrase_weights)


def learned_phrases(lesson: Lesson) -> tuple[str, ...]:
    """Return the phrases said by at least PHRASE_PROMPTS of the prompts or of their paraphrases, in order."""
    by_prompt: dict[int, set[str]] = {}
    for row, said in zip(lesson.rows.tolist(), lesson.seen.said[lesson.rows], strict=True):
        by_prompt[row] = set(said)
    for row, said in zip(lesson.sources[lesson.told].tolist(), lesson.retold.said[lesson.told], strict=True):
        by_prompt[row].update(said)
    prompts = Counter(phrase for said in by_prompt.values() for phrase in said)
    return tuple(sorted(phrase for phrase, count in prompts.items() if count >= PHRASE_PROMPTS))


def saying(said: NDArray[np.object_], known: tuple[str, ...]) -> NDArray[np.float32]:
    """Return who says which of the known phrases, (n, len(known)) of 0 and 1."""
    column = {phrase: at for at, phrase in enumerate(known)}
    found = np.zeros((len(said), len(known)), dtype=np.float32)
    for row, of_text in enumerate(said):
        found[row, [column[phrase] for phrase in of_text if phrase in column]] = 1.0
    return found


def fit_linear(lesson: Lesson, setting: Setting) -> Linear:
    """Fit classes and lengths on prompts and paraphrases.

    Before, the space is shrunk in the directions in which a prompt and its paraphrase differ: (1 + a D)^(-1/2), D the
    mean outer product of their differences. Under ridge regularisation that is the penalty a |w (x - x')|^2 on the
    scores' differences (cf. within-class covariance normalisation, Hatch et al. 2006). Of phrases the diagonal of D
    is taken.
    """
    regularisation, steadiness = setting
    x = lesson.seen.rows(lesson.rows).joined
    scaler = StandardScaler().fit(x)
    width = lesson.seen.vectors.shape[1]
    stretch = np.where(np.arange(x.shape[1]) < width, VECTOR_WEIGHT, 1.0) / np.asarray(scaler.scale_)
    told, of_told = lesson.retold.rows(lesson.told), lesson.seen.rows(lesson.sources[lesson.told])
    differences = (told.joined - of_told.joined) * stretch
    pairs = max(len(differences), 1)
    spread, axes = np.linalg.eigh(differences.T @ differences / pairs)
    shrink = axes / np.sqrt(1.0 + steadiness * np.maximum(spread, 0.0)) @ axes.T
    turn = stretch[:, None] * shrink
    texts = lesson.texts
    scaled = (texts.joined - scaler.mean_) @ turn
    known = learned_phrases(lesson)
    changed = ((saying(told.said, known) - saying(of_told.said, known)) ** 2).sum(axis=0) / pairs
    say = PHRASE_WEIGHT / np.sqrt(1.0 + steadiness * PHRASE_STEADINESS * changed)
    both = np.hstack([scaled, saying(texts.said, known) * say]).astype(np.float32)
    labelled = np.concatenate([lesson.rows, lesson.sources[lesson.told]])
    classes = LogisticRegression(C=regularisation, class_weight="balanced", max_iter=1000, tol=1e-3)
    classes.fit(both, lesson.prompts.classes[labelled])
    tokens = Ridge(alpha=0.5 / regularisation).fit(scaled, lesson.prompts.log_tokens[labelled])
    coefficients = STRETCH * classes.coef_.T
    weights = turn @ np.column_stack([coefficients[: x.shape[1]], tokens.coef_])
    bias = np.append(STRETCH * classes.intercept_, tokens.intercept_) - scaler.mean_ @ weights
    return Linear(np.asarray(weights), np.asarray(bias), known, say[:, None] * coefficients[x.shape[1] :])


def inner_folds(lesson: Lesson) -> list[tuple[Rows, Rows]]:
    """Split the rows of a lesson by kind: a kind is never on both sides."""
    folds = GroupKFold(INNER_FOLDS).split(lesson.rows, groups=lesson.prompts.kinds[lesson.rows])
    return [(lesson.rows[train], lesson.rows[test]) for train, test in folds]


def choose(lesson: Lesson) -> tuple[Setting, list[Linear]]:
    """Choose the setting by errors and flips on kinds held out within the lesson: 1 - macro F1 + flips.

    Returned with what was fitted by it in each of the inner folds.
    """
    folds = inner_folds(lesson)
    told = lesson.sources[lesson.told]
    found: list[tuple[float, Setting, list[Linear]]] = []
    for setting in SETTINGS:
        guess = np.zeros(len(lesson.prompts.texts), dtype=np.int64)
        again = np.zeros(len(told), dtype=np.int64)
        fitted = [fit_linear(lesson.only(train), setting) for train, _ in folds]
        for linear, (_, test) in zip(fitted, folds, strict=True):
            guess[test] = named(softmax(linear.scores(lesson.seen.rows(test))))
            here = np.isin(told, test)
            again[here] = named(softmax(linear.scores(lesson.retold.rows(lesson.told[here]))))
        f1 = scores_of(guess[lesson.rows], lesson.prompts.classes[lesson.rows])["macro_f1"]
        found.append((1.0 - f1 + float((guess[told] != again).mean()), setting, fitted))
    _, setting, fitted = min(found, key=lambda one: one[0])
    return setting, fitted


def assemble(lesson: Lesson, linear: Linear) -> tuple[dict[str, Any], dict[str, NDArray[Any]], Head]:
    """Make a head of what was fitted on a lesson, without calibration: metadata, arrays and the head they make."""
    prompts = lesson.seen.rows(lesson.rows)
    width = prompts.vectors.shape[1]
    centre = np.hstack([prompts.vectors.mean(axis=0), prompts.described.mean(axis=0)]).astype(np.float32)
    spread = np.maximum(prompts.described.std(axis=0), 1e-3)
    scale = np.hstack([np.ones(width), spread]).astype(np.float32)

    def joint(seen: Seen) -> Floats:
        return joined(seen.vectors, seen.described, centre, scale).astype(np.float64)

    axes = place_axes(
        joint(lesson.texts),
        joint(lesson.retold.rows(lesson.told)) - joint(lesson.seen.rows(lesson.sources[lesson.told])),
    )
    # A prompt stands in the middle of its tellings.
    labelled = placed(joint(prompts).astype(np.float32), axes)
    at = np.searchsorted(lesson.rows, lesson.sources[lesson.told])
    np.add.at(labelled, at, placed(joint(lesson.retold.rows(lesson.told)).astype(np.float32), axes))
    labelled /= np.maximum(np.sqrt((labelled * labelled).sum(axis=1, keepdims=True)), 1e-9)
    kinds = sorted(KINDS)
    metadata: dict[str, Any] = {
        "features": list(features.ALL_NAMES),
        "kinds": [KINDS[kind] for kind in kinds],
        "calibration": [1.0, 0.0],
        "familiar_above": -1.0,
        "transformer_within": 0.0,
    }
    arrays: dict[str, NDArray[Any]] = {
        "weights": linear.weights.astype(np.float32),
        "bias": linear.bias.astype(np.float32),
        "phrases": np.frombuffer("\n".join(linear.phrases).encode(), dtype=np.uint8),
        "phrase_weights": linear.phrase_weights.astype(np.float16),
        "centre": centre,
        "scale": scale,
        "axes": axes,
        "labelled": labelled.astype(np.float16),
        "labelled_classes": lesson.prompts.classes[lesson.rows].astype(np.int8),
        "labelled_kinds": np.array(
            [kinds.index(kind) for kind in lesson.prompts.kinds[lesson.rows]], dtype=np.int8
        ),
    }
    name = f"head-{lesson.encoder}"
    draft = Artefact(name, name, VERSION, lesson.encoder_id, metadata, arrays)
    return metadata, arrays, Head(draft, dimensions=width)


def place_axes(joint: Floats, differences: Floats) -> NDArray[np.float32]:
    """Return PLACE axes on which texts (n, width) scatter most for how much a text and its paraphrase differ there.

    The main axes once the scatter of those differences (m, width) is made round (Fisher's criterion); an axis' sign
    is fixed by its largest component.
    """
    within = differences.T @ differences / max(len(differences), 1)
    within += PLACE_FLOOR * np.trace(within) / len(within) * np.eye(len(within))
    spread, turned = np.linalg.eigh(within)
    rounding = turned / np.sqrt(spread) @ turned.T
    main = np.linalg.eigh(rounding @ (joint.T @ joint / len(joint)) @ rounding)[1][:, : -PLACE - 1 : -1]
    axes = (rounding @ main).T
    axes *= np.sign(axes[np.arange(PLACE), np.abs(axes).argmax(axis=1)])[:, None]
    result: NDArray[np.float32] = axes.astype(np.float32)
    return result


@dataclass(frozen=True, slots=True)
class Trained:
    """A head and what was chosen for it."""

    head: Head
    metadata: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    setting: Setting


def train(lesson: Lesson) -> Trained:
    """Train a head. Calibration and thresholds come from kinds held out within the lesson."""
    setting, fitted = choose(lesson)
    seen, truth = lesson.seen, lesson.prompts.classes
    p, right, nearest, margins = [], [], [], []
    for linear, (inner, test) in zip(fitted, inner_folds(lesson), strict=True):
        _, _, head = assemble(lesson.only(inner), linear)
        view = head.view(seen.vectors[test], seen.described[test], list(seen.said[test]))
        guess = named(view.probabilities)
        p.append(view.probabilities[np.arange(len(test)), guess])
        right.append(guess == truth[test])
        nearest.append(view.similarity)
        margins += [border_distance(d) for d in view.probabilities @ (0.0, 0.5, 1.0)]
    metadata, arrays, head = assemble(lesson, fit_linear(lesson, setting))
    slope, offset = calibrate(np.concatenate(p), np.concatenate(right))
    labelled = arrays["labelled"].astype(np.float32)
    similarity = labelled @ labelled.T
    np.fill_diagonal(similarity, -1.0)
    familiar_above = float(np.quantile(similarity.max(axis=1), 1 - FAMILIAR_SHARE))
    metadata |= {
        "calibration": [round(slope, 6), round(offset, 6)],
        "familiar_above": round(familiar_above, 6),
        "transformer_within": round(float(np.quantile(margins, TRANSFORMER_SHARE)), 6),
    }
    name = f"head-{lesson.encoder}"
    draft = Artefact(name, name, VERSION, lesson.encoder_id, metadata, arrays)
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
    """Classes, difficulties, confidences and expected tokens of n prompts."""

    classes: NDArray[np.int64]
    difficulty: Floats
    confidence: Floats
    tokens: NDArray[np.int64]


def judge(head: Head, seen: Seen) -> Verdicts:
    """Judge prompts one by one, as at run time."""
    judged = [
        head.judge(vector, described, said)
        for vector, described, said in zip(seen.vectors, seen.described, seen.said, strict=True)
    ]
    return Verdicts(
        np.array([CLASSES.index(one.prompt_class) for one in judged], dtype=np.int64),
        np.array([one.difficulty for one in judged]),
        np.array([one.confidence for one in judged]),
        np.array([one.output_tokens for one in judged]),
    )


def staged(static: Verdicts, minilm: Verdicts, within: float) -> tuple[Verdicts, NDArray[np.bool_]]:
    """Return the verdicts of the deployed path and where the transformer was asked (see `Classifier.refine`)."""
    asked = np.array([border_distance(difficulty) < within for difficulty in static.difficulty])
    replaced = asked & (minilm.confidence >= static.confidence)
    return Verdicts(
        *(
            np.where(replaced, getattr(minilm, field), getattr(static, field))
            for field in ("classes", "difficulty", "confidence", "tokens")
        )
    ), asked


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


PATHS = ("static", "minilm", "static_then_minilm")


@dataclass(frozen=True, slots=True)
class Judged:
    """Verdicts by path on prompts and on paraphrases, and for which prompts the transformer was asked."""

    before: dict[str, Verdicts]
    after: dict[str, Verdicts]
    asked: NDArray[np.bool_]


def judged(heads: dict[str, Head], before: dict[str, Seen], after: dict[str, Seen]) -> Judged:
    sides = []
    within = heads["static"].transformer_within
    for seen in (before, after):
        verdicts = {name: judge(heads[name], seen[name]) for name in heads}
        verdicts["static_then_minilm"], asked = staged(verdicts["static"], verdicts["minilm"], within)
        sides.append((verdicts, asked))
    return Judged(sides[0][0], sides[1][0], sides[0][1])


class Flips:
    """Which pairs of a prompt and a paraphrase flipped, over several trainings."""

    def __init__(self) -> None:
        self._flips: dict[str, dict[int, list[float]]] = {path: {} for path in PATHS}
        self._small: dict[str, list[float]] = {path: [] for path in PATHS}

    def note(self, path: str, pairs: Rows, before: Verdicts, after: Verdicts) -> NDArray[np.bool_]:
        flipped: NDArray[np.bool_] = before.classes != after.classes
        for pair, flip in zip(pairs.tolist(), flipped.tolist(), strict=True):
            self._flips[path].setdefault(pair, []).append(flip)
        self._small[path] += (np.abs(before.difficulty - after.difficulty)[flipped] < SMALL_STEP).tolist()
        return flipped

    def report(self, sources: Rows) -> dict[str, Any]:
        """Mean over pairs; 95 % interval by resampling prompts; share of the flips that are small steps."""
        random = np.random.default_rng(0)
        found: dict[str, Any] = {}
        for path, of_pair in self._flips.items():
            pairs = np.array(sorted(of_pair))
            rates = np.array([np.mean(of_pair[pair]) for pair in pairs])
            names, group = np.unique(sources[pairs], return_inverse=True)
            sums, counts = np.bincount(group, rates), np.bincount(group)
            drawn = random.integers(0, len(names), (2000, len(names)))
            low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
            found[path] = {
                "mean": round(float(rates.mean()), 3),
                "interval": [round(float(low), 3), round(float(high), 3)],
                "pairs": len(pairs),
                "of_which_small_steps": round(float(np.mean(self._small[path])), 2),
            }
        return found


def by_hand(prompts: Prompts) -> dict[str, NDArray[np.bool_]]:
    first = np.isin(prompts.kinds, FIRST_HAND)
    return {"first_hand": first, "further_hands": ~first}


def evaluate(lessons: dict[str, Lesson]) -> dict[str, Any]:
    """Score static head, transformer head and the deployed path over random splits of the kinds."""
    prompts, sources = lessons["static"].prompts, lessons["static"].sources
    scores: dict[str, list[dict[str, float]]] = {path: [] for path in (*PATHS, "length_only", "majority")}
    hits: dict[str, dict[str, list[float]]] = {path: {kind: [] for kind in sorted(KINDS)} for path in PATHS}
    flips = Flips()
    hands = by_hand(prompts)
    flips_of = {hand: Flips() for hand in hands}
    f1_of: dict[str, dict[str, list[float]]] = {hand: {path: [] for path in PATHS} for hand in hands}
    for train_rows, test_rows in kind_splits(prompts.kinds):
        heads = {name: train(lesson.only(train_rows)).head for name, lesson in lessons.items()}
        truth = prompts.classes[test_rows]
        told = np.flatnonzero(np.isin(sources, test_rows))
        at = np.searchsorted(test_rows, sources[told])
        found = judged(
            heads,
            {name: lesson.seen.rows(test_rows) for name, lesson in lessons.items()},
            {name: lesson.retold.rows(told) for name, lesson in lessons.items()},
        )
        for path in PATHS:
            verdicts = found.before[path]
            result = scores_of(verdicts.classes, truth)
            flipped = flips.note(path, told, part(verdicts, at), found.after[path])
            result["flips_under_paraphrase"] = float(flipped.mean())
            for hand, written in hands.items():
                own, pairs = written[test_rows], np.flatnonzero(written[sources[told]])
                f1_of[hand][path].append(scores_of(verdicts.classes[own], truth[own])["macro_f1"])
                flips_of[hand].note(
                    path, told[pairs], part(verdicts, at[pairs]), part(found.after[path], pairs)
                )
            result["macro_f1_of_paraphrases"] = scores_of(found.after[path].classes, truth[at])["macro_f1"]
            right = verdicts.classes == truth
            result["calibration_error"] = calibration_error(verdicts.confidence, right)
            ratio = np.abs(np.log(verdicts.tokens) - prompts.log_tokens[test_rows])
            result["output_tokens_median_factor"] = float(np.exp(np.median(ratio)))
            if path == "static_then_minilm":
                result["transformer_asked"] = float(found.asked.mean())
            scores[path].append(result)
            for kind in np.unique(prompts.kinds[test_rows]):
                own = prompts.kinds[test_rows] == kind
                hits[path][kind].append(float(right[own].mean()))
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
        path: [round(one["macro_f1"], 3) for one in scores[path]] for path in (*PATHS, "length_only")
    }
    report["accuracy_per_kind"] = {
        path: {kind: round(float(np.mean(values)), 2) for kind, values in hits[path].items() if values}
        for path in PATHS
    }
    report["flips"] = flips.report(sources)
    report["by_hand"] = {
        hand: {
            "macro_f1": {path: round(float(np.mean(values)), 3) for path, values in f1_of[hand].items()},
            "flips": flips_of[hand].report(sources),
        }
        for hand in hands
    }
    return report


def part(verdicts: Verdicts, at: Rows) -> Verdicts:
    return Verdicts(
        *(getattr(verdicts, field)[at] for field in ("classes", "difficulty", "confidence", "tokens"))
    )


def known_kinds(lessons: dict[str, Lesson], shipped: dict[str, Trained]) -> dict[str, Any]:
    """Score on kinds that were learned: prompts held out with their paraphrases, and paraphrases held out alone.

    Five folds each, drawn over the prompts. Regularisation and the transformer's threshold are the shipped
    heads', the confidence is not calibrated.
    """
    prompts, sources = lessons["static"].prompts, lessons["static"].sources
    hands = by_hand(prompts)
    fold_of = np.random.default_rng(1).integers(0, INNER_FOLDS, len(prompts.texts))
    report: dict[str, Any] = {}
    for held_out in ("prompts", "wordings"):
        flips, results = Flips(), {path: np.zeros(len(prompts.texts), dtype=np.int64) for path in PATHS}
        flips_of = {hand: Flips() for hand in hands}
        for fold in range(INNER_FOLDS):
            test = np.flatnonzero(fold_of == fold)
            told = np.flatnonzero(fold_of[sources] == fold)
            heads = {}
            for name, lesson in lessons.items():
                if held_out == "prompts":
                    learned = lesson.only(np.flatnonzero(fold_of != fold))
                else:
                    learned = replace(lesson, told=np.setdiff1d(lesson.told, told))
                heads[name] = assemble(learned, fit_linear(learned, shipped[name].setting))[2]
            heads["static"].transformer_within = shipped["static"].head.transformer_within
            found = judged(
                heads,
                {name: lesson.seen.rows(test) for name, lesson in lessons.items()},
                {name: lesson.retold.rows(told) for name, lesson in lessons.items()},
            )
            at = np.searchsorted(test, sources[told])
            for path in PATHS:
                results[path][test] = found.before[path].classes
                flips.note(path, told, part(found.before[path], at), found.after[path])
                for hand, written in hands.items():
                    own = np.flatnonzero(written[sources[told]])
                    flips_of[hand].note(
                        path, told[own], part(found.before[path], at[own]), part(found.after[path], own)
                    )
        report[f"unseen_{held_out}"] = {
            "flips": flips.report(sources),
            "flips_by_hand": {hand: of_hand.report(sources) for hand, of_hand in flips_of.items()},
        }
        if held_out == "prompts":
            report["unseen_prompts"]["scores"] = {
                path: rounded(scores_of(guess, prompts.classes)) for path, guess in results.items()
            }
    return report


def nearest_of_other_kinds(lesson: Lesson) -> float:
    """Return the highest cosine of two texts of different kinds. Raises ValueError above MAX_LIKENESS."""
    vectors = np.vstack([lesson.seen.vectors, lesson.retold.vectors])
    kinds = np.concatenate([lesson.prompts.kinds, lesson.prompts.kinds[lesson.sources]])
    likeness = np.where(kinds[:, None] == kinds[None, :], -1.0, vectors @ vectors.T)
    nearest = float(likeness.max())
    if nearest > MAX_LIKENESS:
        pair = np.unravel_index(likeness.argmax(), likeness.shape)
        raise ValueError(f"texts {pair} (prompts, then paraphrases) of two kinds have cosine {nearest:.3f}")
    return nearest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA_DIRECTORY)
    data: Path = parser.parse_args().data
    prompts = read_prompts(sorted((data / "prompts").glob("*.jsonl")), set(KINDS))
    later = read_prompts([data / "later_prompts.jsonl"], set(LATER_KINDS))
    told = read_told(data / "paraphrases.jsonl", prompts)
    encoders: dict[str, Encoder] = {"static": StaticEncoder.load(data), "minilm": MiniLMEncoder.load(data)}
    everything = np.arange(len(prompts.texts))
    lessons = {
        name: Lesson(
            name, encoder.id, prompts, see(encoder, prompts.texts), told.sources, see(encoder, told.texts),
            everything, np.arange(len(told.texts)),
        )
        for name, encoder in encoders.items()
    }  # fmt: skip
    later_told = read_told(data / "later_paraphrases.jsonl", later)
    seen_later = {name: see(encoder, later.texts) for name, encoder in encoders.items()}
    retold_later = {name: see(encoder, later_told.texts) for name, encoder in encoders.items()}

    nearest = nearest_of_other_kinds(lessons["minilm"])
    unseen_kinds = evaluate(lessons)
    trained = {name: train(lesson) for name, lesson in lessons.items()}
    on_later = judged({name: one.head for name, one in trained.items()}, seen_later, retold_later)
    flips = Flips()
    for path in PATHS:
        before = part(on_later.before[path], later_told.sources)
        flips.note(path, np.arange(len(later_told.texts)), before, on_later.after[path])
    summary: dict[str, Any] = {
        "protocol": f"{SPLITS} random splits of the kinds, {TEST_SHARE:.2f} of them for the test; mean and sd",
        "prompts": {
            "kinds": len(KINDS),
            **{name: int((prompts.classes == index).sum()) for index, name in enumerate(CLASSES)},
            "paraphrases": len(told.texts),
            "later": len(later.texts),
            "highest_cosine_of_two_kinds": round(nearest, 3),
        },
        "unseen_kinds": unseen_kinds,
        "known_kinds": known_kinds(lessons, trained),
        "later_prompts": {
            **{path: rounded(scores_of(on_later.before[path].classes, later.classes)) for path in PATHS},
            "transformer_asked": round(float(on_later.asked.mean()), 3),
            "flips": flips.report(later_told.sources),
        },
    }
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    for name, one in trained.items():
        manifest["heads"][name] = artefact.save(
            data / f"head-{name}.json",
            name=f"head-{name}",
            version=VERSION,
            encoder_id=encoders[name].id,
            metadata={
                **one.metadata,
                "prompts": len(prompts.texts),
                "prompts_sha256": prompts.sha256,
                "paraphrases": len(told.texts),
                "paraphrases_sha256": told.sha256,
                "regularisation": one.setting[0],
                "steadiness": one.setting[1],
                "vector_weight": VECTOR_WEIGHT,
                "phrase_weight": PHRASE_WEIGHT,
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
