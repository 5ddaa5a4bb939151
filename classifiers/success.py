"""Success heads: each model's probability of a good answer to a prompt, learned from labels, shrunk to a prior.

For model m and a prompt of class c

    base(m, c)  = prior(m, c) + shift(m, c)            shift: shrunken mean of (label - prior), model then class
    raw         = base + (1 - w) ridge(x) + w forest(x)  both learned on the residual (label - base)
    logit(p)    = logit(prior) + familiarity (a (logit(raw) - logit(prior)) + b(m))
    probability = prior + common + carry (p - prior - common)        common: mean of p - prior over the models

The third line is Platt's (1999) with one slope for all models, fitted with the shrinkage inside of it; a and b are
shrunk to 1 and 0.

*ridge*: linear in hashed word n-grams (TF-IDF), the encoder's vector, the structure and a Gaussian kernel to
remembered prompts (Hoerl & Kennard 1970; Williams & Seeger 2001, "Using the Nystroem Method to Speed Up Kernel
Machines").
*forest*: extremely randomised trees (Geurts et al. 2006) over structure, the vector's principal components and what
the ridge predicts for every model (Wolpert 1992, "Stacked generalization": they learn from what it predicts for rows
it had not seen), one forest for all models. A leaf keeps, per model, the sum of residuals and of weights; the
prediction is sum(residuals) / (sum(weights) + SHRINKAGE * trees), the posterior mean under a prior worth SHRINKAGE
labels: no labels near the prompt, no departure from the base. w, a, b come from predictions for rows the learners had
not seen. Trees split where models differ rather than where all do better or worse (COMMON).
*carry* is 1 where the labelled prompts are of the same kinds at all times: those to come will be so too. Where kinds
come and go with time (`_moved`), some will come that have no labels. A router acts on which model does better here,
and that is what it loses by there. So clusters of the labelled prompts are held out. Where what the ridge knows of
such differences carries over to them (most of what it explains of rows held out at random), they are believed in
full, else down to CAUTION, as far as kinds move. It is one number for all prompts, so that those which gain most from
a stronger model stay in order.
*familiarity* falls from 1 to 0 with the cosine to the nearest remembered prompt; at 0 the prior stands alone.

The interval is Wilson's (1927) with `evidence` + PRIOR_WORTH observations, evidence being the labels of this model
in an average leaf: wider than the forest's average deserves, on purpose. Fitting needs scikit-learn (the extra
`train`); prediction is numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from classifiers import artefact as artefacts
from classifiers import success_features as features
from classifiers.artefact import Artefact
from classifiers.encoder import ArtefactError
from classifiers.success_features import PromptFeatures

Array = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]

NAME, VERSION = "success", "2"

# A prior counts as much as this many labels: for the model's mean, for a class within it, in a leaf, in an interval.
MODEL_SHRINKAGE, CLASS_SHRINKAGE, SHRINKAGE, PRIOR_WORTH = 10.0, 20.0, 2.0, 4.0
# A 90 % interval.
Z = 1.6449
# Ridge: penalty, and how far each block reaches beside the n-grams' unit rows.
PENALTY, STRUCTURE_SCALE, VECTOR_SCALE = 8.0, 0.7, 0.5
# Kernel: exp(-KERNEL_WIDTH distance^2), the structure with scale 1, the vector with VECTOR_SCALE.
KERNEL_WIDTH, LEAST_EIGENVALUE = 4.0, 1e-3
# Forest.
TREES, MAX_DEPTH, MIN_LEAF, FEATURE_SHARE, SAMPLE, COMPONENTS = 100, 16, 8, 0.4, 0.7, 24
# The forest's share before any label, and how far labels move it (standard deviation).
BLEND, BLEND_SPREAD = 0.5, 0.12
# What is left of that part of the labels that all models share on a prompt, when trees are split.
COMMON = 0.3
FOLDS = 4
# Differences between models: the least that is believed of them, and the shares of what is explained at random that
# must be explained of held-out clusters too for that least and for all.
CAUTION, CARRIED = 0.3, (0.3, 0.6)
CLUSTERS, CLUSTERED_LABELS = 8, 8000
# Do kinds of prompts come and go? How many parts of time are compared, how many orders by lot they must differ more
# than, and the share of prompts that other times lack from which on caution is whole.
QUARTERS, CHANCES, MOVED = 4, 20, 0.5
CALIBRATION_WORTH = 5.0
LANDMARKS = 512
# Shares of the labelled prompts below which familiarity starts to fall, and below which it is gone.
FAMILIAR, UNFAMILIAR = 0.02, 0.002
MIN_LABELS = 30
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Labels:
    """One label a row: `prompt` and `model` index the sequences given beside it, `score` is 0..1, `weight` > 0."""

    prompt: Integers
    model: Integers
    score: Doubles
    weight: Doubles

    @classmethod
    def dense(cls, scores: Doubles) -> Labels:
        """Take a matrix (prompts, models); NaN where there is no label. All weights are 1."""
        prompt, model = np.nonzero(~np.isnan(scores))
        return cls(prompt, model, scores[prompt, model], np.ones(len(prompt)))


class Estimate(NamedTuple):
    """One model's success on one prompt: probability with a 90 % interval, all 0..1.

    `evidence`: labels of this model near the prompt. `familiarity`: 0 (prior alone) to 1. `source`: `learned`,
    `unfamiliar` (the prompt is unlike all labelled ones) or `prior` (no labels of this model).
    """

    probability: float
    lower: float
    upper: float
    evidence: float
    familiarity: float
    source: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Arrays of shape (prompts, models) but for `familiarity` (prompts,): what `Estimate` holds for one."""

    probability: Doubles
    evidence: Doubles
    familiarity: Doubles


class SuccessHeads:
    """Heads for the models of `models`; immutable, safe to use from several threads."""

    def __init__(
        self,
        *,
        models: Sequence[str],
        classes: Sequence[str],
        encoder_id: str,
        arrays: Mapping[str, NDArray[Any]],
        metadata: Mapping[str, Any],
    ) -> None:
        """Take fitted arrays. Raises ArtefactError when they do not fit each other."""
        self.models, self.classes, self.encoder_id = tuple(models), tuple(classes), encoder_id
        self.metadata = dict(metadata)
        self.arrays = dict(arrays)
        self._row = {model: row for row, model in enumerate(self.models)}
        self._class = {name: row for row, name in enumerate(self.classes)}
        try:
            self._check()
            self._depth = int(metadata["depth"])
            self._trees = len(self.arrays["roots"])
            self._labels = self.arrays["labels"].tolist()
            self._priors, self._base = _by_class(self.arrays["priors"]), _by_class(self.arrays["base"])
            self._blend, self._carry = float(metadata["blend"]), float(metadata["carry"])
            self._labelled = self.arrays["labels"] > 0
            self._landmark_squares = _squares(self.arrays["landmark_structure"], self.arrays["landmarks"])
            self._nearness = (float(metadata["nearness"][0]), float(metadata["nearness"][1]))
            self._one = _One(self)
            if tuple(metadata["features"]) != features.NAMES:
                raise ArtefactError("the success heads were learned on other features: learn again")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(f"incomplete success heads ({error})") from error

    def _check(self) -> None:
        a, models, width = self.arrays, len(self.models), len(features.NAMES)
        dimensions, nodes, landmarks = a["center"].shape[0], a["feature"].shape[0], a["landmarks"].shape[0]
        components = a["components"].shape[1]
        expected = {
            "priors": (models, len(self.classes)),
            "base": (models, len(self.classes)),
            "labels": (models,),
            "idf": (features.BUCKETS,),
            "gram_weights": (features.BUCKETS, models),
            "dense_weights": (width + dimensions, models),
            "kernel_weights": (landmarks, models),
            "intercept": (models,),
            "landmarks": (landmarks, dimensions),
            "landmark_structure": (landmarks, width),
            "structure_mean": (width,),
            "structure_scale": (width,),
            "components": (dimensions, components),
            "threshold": (nodes,),
            "children": (nodes, 2),
            "leaf": (nodes,),
            "calibration": (models, 2),
        }
        for name, shape in expected.items():
            if a[name].shape != shape:
                raise ArtefactError(f"success heads: {name} has shape {a[name].shape}, expected {shape}")
        leaves = a["sums"].shape
        if leaves != a["weights"].shape or leaves[1] != models:
            raise ArtefactError("success heads: leaves do not fit the models")
        inside = (
            (a["children"].min() >= 0 and a["children"].max() < nodes)
            and (a["leaf"].min() >= 0 and a["leaf"].max() < max(leaves[0], 1))
            and (a["feature"].min() >= 0 and a["feature"].max() < width + components + models)
            and (a["roots"].min() >= 0 and a["roots"].max() < nodes)
        )
        if not inside:
            raise ArtefactError("success heads: a tree points outside of its arrays")

    # -- prediction ------------------------------------------------------------------------------------------

    def predict(
        self, prompt: PromptFeatures, prompt_class: str, priors: Mapping[str, float]
    ) -> dict[str, Estimate]:
        """Estimate every model of `priors` (its prior for this class now, 0..1).

        A model the heads do not know, or know no labels of, gets its prior. Raises ArtefactError when the
        vector's length is not that of the encoder the heads were learned on.
        """
        if len(prompt.vector) != self.arrays["center"].shape[0]:
            raise self._other_vector(len(prompt.vector))
        known = self._class.get(prompt_class)
        found: dict[str, Estimate] = {}
        familiarity = 0.0
        if known is not None:
            probability, evidence, familiarity = self._one.predict(prompt, known)
            if familiarity > 0.0:
                lowest, highest = _wilson(probability, evidence + PRIOR_WORTH)
                columns = (probability.tolist(), lowest.tolist(), highest.tolist(), evidence.tolist())
                rows = zip(*columns, repeat(familiarity), repeat("learned"), strict=False)
                found = dict(zip(self.models, map(Estimate._make, rows), strict=True))
        result = {}
        for model, prior in priors.items():
            row = self._row.get(model)
            if row is not None and self._labels[row] and found:
                result[model] = found[model]
                continue
            lower, upper = wilson(prior, PRIOR_WORTH)
            source = "prior" if row is None or known is None or not self._labels[row] else "unfamiliar"
            result[model] = Estimate(float(prior), lower, upper, 0.0, familiarity, source)
        return result

    def _other_vector(self, found: int) -> ArtefactError:
        return ArtefactError(
            f"the heads were learned on vectors of {self.arrays['center'].shape[0]} numbers, got {found}"
        )

    def predict_many(self, prompts: Sequence[PromptFeatures], classes: Sequence[str]) -> Batch:
        """Estimate all models on all prompts; an unknown class gets the mean over classes as its base."""
        parts = []
        for start in range(0, len(prompts), CHUNK):
            parts.append(self._chunk(prompts[start : start + CHUNK], classes[start : start + CHUNK]))
        return Batch(*(np.concatenate([part[i] for part in parts]) for i in range(3)))

    def _chunk(self, prompts: Sequence[PromptFeatures], classes: Sequence[str]) -> tuple[Doubles, ...]:
        a = self.arrays
        vector = np.stack([prompt.vector for prompt in prompts])
        if vector.shape[1] != a["center"].shape[0]:
            raise self._other_vector(vector.shape[1])
        structure = np.stack([prompt.structure for prompt in prompts])
        cosines = vector @ a["landmarks"].T
        familiarity = familiarity_of(cosines.max(axis=1), self._nearness)
        rows = [self._class.get(name, -1) for name in classes]
        priors, base = self._priors[rows], self._base[rows]
        centered = vector - a["center"]
        ridge = self._ridge(prompts, structure, centered, vector, cosines)
        sums, weights = self._forest(_inputs(structure, centered @ a["components"], ridge))
        forest = sums / (weights + SHRINKAGE * self._trees)
        raw = base + (1.0 - self._blend) * ridge + self._blend * forest
        p = calibrate(priors, raw, familiarity, a["calibration"])
        if self._carry < 1.0 and self._labelled.any():
            common = (p - priors)[:, self._labelled].mean(axis=1, keepdims=True)
            p = np.minimum(np.maximum(p - (1.0 - self._carry) * (p - priors - common), 0.0), 1.0)
        return p, weights / self._trees, familiarity

    def _ridge(
        self,
        prompts: Sequence[PromptFeatures],
        structure: Array,
        centered: Array,
        vector: Array,
        products: Array,
    ) -> Doubles:
        a = self.arrays
        standard = _standardised(structure, a)
        dense = np.concatenate((standard, centered * VECTOR_SCALE), axis=1)
        near = _kernel(standard, vector, products, a["landmark_structure"], self._landmark_squares)
        result: Doubles = (dense @ a["dense_weights"] + near @ a["kernel_weights"] + a["intercept"]).astype(
            np.float64
        )
        for row, prompt in enumerate(prompts):
            values = (1.0 + np.log(prompt.counts)) * a["idf"][prompt.grams]
            length = math.sqrt(float(values @ values))
            if length > 0.0:
                result[row] += (values / length) @ a["gram_weights"][prompt.grams]
        return result

    def _forest(self, x: Array) -> tuple[Doubles, Doubles]:
        a = self.arrays
        node = np.broadcast_to(a["roots"], (len(x), self._trees))
        feature, threshold, children = a["feature"], a["threshold"], a["children"].reshape(-1)
        row = np.arange(len(x))[:, None]
        for _ in range(self._depth):
            right = x[row, feature[node]] > threshold[node]
            node = children[2 * node + right]
        leaf = a["leaf"][node]
        return a["sums"][leaf].sum(axis=1, dtype=np.float64), a["weights"][leaf].sum(axis=1, dtype=np.float64)

    # -- files -----------------------------------------------------------------------------------------------

    def save(self, path: Path) -> str:
        """Write `path` (.json) and its .npz; return the artefact's id."""
        metadata = {**self.metadata, "models": list(self.models), "classes": list(self.classes)}
        return artefacts.save(
            path,
            name=NAME,
            version=VERSION,
            encoder_id=self.encoder_id,
            metadata=metadata,
            arrays=self.arrays,
        )

    @classmethod
    def load(cls, path: Path, *, encoder_id: str) -> SuccessHeads:
        """Load what `save` wrote. Raises ArtefactError when damaged, of another format or for another encoder."""
        loaded = Artefact.load(path, encoder_id=encoder_id)
        if loaded.name != NAME or loaded.version != VERSION:
            raise ArtefactError(
                f"{path.name} holds {loaded.name}-{loaded.version}, this version reads {NAME}-{VERSION}: "
                "run farthing learn again"
            )
        try:
            models, classes = loaded.metadata["models"], loaded.metadata["classes"]
        except KeyError as error:
            raise ArtefactError(f"{path.name}: incomplete success heads ({error})") from error
        return cls(
            models=models,
            classes=classes,
            encoder_id=encoder_id,
            arrays=loaded.arrays,
            metadata=loaded.metadata,
        )

    # -- learning --------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        prompts: Sequence[PromptFeatures],
        classes: Sequence[str],
        labels: Labels,
        priors: Mapping[str, Mapping[str, float]],
        *,
        encoder_id: str,
        seed: int,
        trees: int = TREES,
        at: Doubles | None = None,
    ) -> SuccessHeads:
        """Learn from labels; `priors`: model -> class -> probability, in the order `labels.model` indexes.

        `classes` gives each prompt's class, `at` when it was labelled, in any unit (None: all at one time), which
        decides how far differences between models are believed (`carry` above). Equal input, seed and one BLAS thread
        give equal arrays. Raises ValueError for labels out of range, unknown classes or fewer than 30 labelled
        prompts, and ModuleNotFoundError without scikit-learn.
        """
        models, names = tuple(priors), tuple(dict.fromkeys(name for row in priors.values() for name in row))
        y, weight = _matrix(labels, len(prompts), len(models))
        if (weight.sum(axis=1) > 0).sum() < MIN_LABELS:
            raise ValueError(f"success heads need labels on at least {MIN_LABELS} prompts")
        kept = np.flatnonzero(weight.sum(axis=1) > 0).tolist()
        y, weight, prompts = y[kept], weight[kept], [prompts[i] for i in kept]
        index = {name: row for row, name in enumerate(names)}
        try:
            rows = np.array([index[classes[i]] for i in kept])
            prior = np.array([[float(priors[model][name]) for name in names] for model in models])
        except KeyError as error:
            raise ValueError(f"no prior for class {error}") from error
        base = _base(prior, rows, y, weight)
        residual = np.where(weight > 0, y - base.T[rows], 0.0)
        rng = np.random.default_rng(seed)
        return _fit(
            cls,
            prompts,
            rows,
            y,
            weight,
            residual,
            base,
            prior,
            models,
            names,
            encoder_id,
            seed,
            trees,
            None if at is None else at[kept],
            rng,
        )


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval (1927, 90 %) for a proportion p seen in n > 0 trials."""
    center = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n)
    half = Z / (1.0 + Z * Z / n) * math.sqrt(p * (1.0 - p) / n + Z * Z / (4.0 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _wilson(p: Doubles, n: Doubles) -> tuple[Doubles, Doubles]:
    """Return `wilson` of many proportions at once; numerators and denominator times n."""
    good, whole = p * n, n + Z * Z
    half = np.sqrt(good - good * p + Z * Z / 4.0) * Z
    good += Z * Z / 2.0
    return np.maximum((good - half) / whole, 0.0), np.minimum((good + half) / whole, 1.0)


def _by_level(roots: NDArray[Any], children: NDArray[Any]) -> tuple[Integers, Integers]:
    """Return all trees' nodes level by level, a right child behind its left one, and where each one's left child
    stands (itself, where it has none)."""
    levels, lefts, count = [roots.astype(np.int64)], [], len(roots)
    while len(levels[-1]):
        here = levels[-1]
        inner = children[here, 0] != here
        own = np.arange(count - len(here), count)
        lefts.append(np.where(inner, count + 2 * (np.cumsum(inner) - 1), own))
        levels.append(children[here[inner]].reshape(-1).astype(np.int64))
        count += len(levels[-1])
        if count > len(children):
            raise ValueError("a tree's node has two parents")
    return np.concatenate(levels), np.concatenate(lefts)


_ONE = np.float32(1.0)


class _One:
    """Heads laid out for one prompt, which a request waits for: the same numbers as of many (but for rounding), in
    fewer and smaller steps. What one prompt costs is not arithmetic but calls and memory that is not in a cache.

    Means and scales are folded into the weights. Trees: a right child stands behind its left one, so that a step is
    an addition, all of a level side by side, and in the type that numpy indexes by.
    """

    def __init__(self, heads: SuccessHeads) -> None:
        a, self._trees, self._depth = heads.arrays, heads._trees, heads._depth
        width, self._models = len(a["structure_mean"]), len(heads.models)
        reach = STRUCTURE_SCALE / math.sqrt(width)
        self._mean, self._scale = a["structure_mean"], (reach / a["structure_scale"]).astype(np.float32)
        self._most = np.full(width, 4.0 * reach, dtype=np.float32)
        self._least = -self._most
        # To what the ridge predicts beside n-grams and kernel, and to the components.
        linear, dimensions = a["dense_weights"], len(a["center"])
        self._dense = np.zeros(
            (width + dimensions, self._models + a["components"].shape[1]), dtype=np.float32
        )
        self._dense[:width, : self._models] = linear[:width]
        self._dense[width:, : self._models] = linear[width:] * VECTOR_SCALE
        self._dense[width:, self._models :] = a["components"]
        self._start = -(a["center"] @ self._dense[width:])
        self._start[: self._models] += a["intercept"]
        # As the kernel wants the products; familiarity's bounds with them.
        twice = 2.0 * KERNEL_WIDTH * VECTOR_SCALE**2
        self._landmarks = np.ascontiguousarray(twice * a["landmarks"].T, dtype=np.float32)
        low, high = heads._nearness
        self._low, self._familiar = twice * low, twice * max(high - low, 1e-6)
        near = (2.0 * KERNEL_WIDTH * _KERNEL_STRUCTURE) * a["landmark_structure"].T
        self._near = np.ascontiguousarray(near, dtype=np.float32)
        self._squares = np.float32(KERNEL_WIDTH) * heads._landmark_squares
        self._kernel, self._grams, self._idf = a["kernel_weights"], a["gram_weights"], a["idf"]
        order, self._left = _by_level(a["roots"], a["children"])
        ends = self._left == np.arange(len(order))
        self._feature = a["feature"][order].astype(np.intp)
        self._threshold = np.where(ends, np.float32(np.inf), a["threshold"][order])
        self._leaf = a["leaf"][order].astype(np.intp)
        self._leaves = np.concatenate((a["sums"], a["weights"]), axis=1)
        self._every, self._roots = np.ones(self._trees, dtype=np.float32), np.arange(self._trees)
        self._priors, self._logits, self._base = heads._priors, _logit(heads._priors), heads._base
        self._slope, self._shift = np.ascontiguousarray(a["calibration"].T)
        self._blend, self._carry, self._labelled = heads._blend, heads._carry, heads._labelled

    def predict(self, prompt: PromptFeatures, prompt_class: int) -> tuple[Doubles, Doubles, float]:
        """Return probability and evidence (models,) and familiarity; where that is 0, nothing of use beside."""
        models, vector = self._models, prompt.vector
        products = vector @ self._landmarks
        familiarity = min(max((float(products[products.argmax()]) - self._low) / self._familiar, 0.0), 1.0)
        if familiarity <= 0.0:
            return self._priors[prompt_class], self._priors[prompt_class], 0.0
        standard = (prompt.structure - self._mean) * self._scale
        np.minimum(np.maximum(standard, self._least, out=standard), self._most, out=standard)
        found = np.concatenate((standard, vector)) @ self._dense + self._start
        own = _KERNEL_STRUCTURE * float(standard @ standard) + VECTOR_SCALE**2 * float(vector @ vector)
        products += standard @ self._near
        products -= self._squares
        products -= np.float32(KERNEL_WIDTH * own)
        ridge = found[:models]
        ridge += np.exp(products, out=products) @ self._kernel
        if len(prompt.grams):
            values = np.log(prompt.counts)
            values += _ONE
            values *= self._idf.take(prompt.grams)
            ridge += (values @ self._grams.take(prompt.grams, axis=0)) * np.float32(
                1.0 / math.sqrt(float(values @ values))
            )
        x = np.concatenate((prompt.structure, found[models:], ridge))
        feature, threshold, left, place = self._feature, self._threshold, self._left, self._roots
        for _ in range(self._depth):
            place = left[place] + (x[feature[place]] > threshold[place])
        leaves = self._every @ self._leaves.take(self._leaf[place], axis=0)
        weights = leaves[models:].astype(np.float64)
        raw = leaves[:models] / (weights + SHRINKAGE * self._trees)
        raw -= ridge
        raw *= self._blend
        raw += ridge
        raw += self._base[prompt_class]
        np.minimum(np.maximum(raw, 0.01, out=raw), 0.99, out=raw)
        raw /= 1.0 - raw
        before = self._logits[prompt_class]
        moved = np.log(raw, out=raw)
        moved -= before
        moved *= self._slope
        moved += self._shift
        moved *= -familiarity
        moved -= before
        np.exp(moved, out=moved)
        moved += 1.0
        p: Doubles = 1.0 / moved
        if self._carry < 1.0 and self._labelled.any():
            beyond = p - self._priors[prompt_class]
            beyond -= float(beyond[self._labelled].mean())
            p = np.minimum(np.maximum(p - (1.0 - self._carry) * beyond, 0.0), 1.0)
        weights *= familiarity / self._trees
        return p, weights, familiarity


def calibrate(prior: Doubles, raw: Doubles, familiarity: Doubles, calibration: NDArray[Any]) -> Doubles:
    """Return sigmoid(logit(prior) + familiarity (a (logit(raw) - logit(prior)) + b)); at familiarity 0 the prior.

    `prior`, `raw`: (prompts, models), cut to .01...99 first. `familiarity`: (prompts,). `calibration`: (models, 2),
    columns a and b.
    """
    before = _logit(prior)
    moved = calibration[:, 0] * (_logit(raw) - before) + calibration[:, 1]
    result: Doubles = 1.0 / (1.0 + np.exp(-(before + familiarity[:, None] * moved)))
    return np.where(familiarity[:, None] > 0.0, result, prior)


def _logit(p: Doubles) -> Doubles:
    # Not np.clip: its ways through Python cost a request more than the numbers do.
    bounded = np.minimum(np.maximum(p, 0.01), 0.99)
    result: Doubles = np.log(bounded / (1.0 - bounded))
    return result


def _inputs(structure: Array, components: Array, ridge: Doubles) -> Array:
    """Return what the forest reads, float32 (prompts, structure + components + models)."""
    return np.concatenate((structure, components, ridge.astype(np.float32)), axis=1)


def _by_class(table: NDArray[Any]) -> Doubles:
    """Return (classes + 1, models): the last row, which -1 picks, is the mean over classes."""
    known = table.T.astype(np.float64)
    result: Doubles = np.concatenate((known, known.mean(axis=0, keepdims=True)))
    return result


def _standardised(structure: Array, a: Mapping[str, NDArray[Any]]) -> Array:
    z = np.minimum(np.maximum((structure - a["structure_mean"]) / a["structure_scale"], -4.0), 4.0)
    result: Array = (z * (STRUCTURE_SCALE / math.sqrt(z.shape[1]))).astype(np.float32)
    return result


# The kernel reads what `_standardised` returns at scale 1.
_KERNEL_STRUCTURE = 1.0 / STRUCTURE_SCALE**2


def _squares(standard: Array, vector: Array) -> Array:
    """Return the squared length of every prompt, as the kernel measures it."""
    result: Array = (
        _KERNEL_STRUCTURE * (standard * standard).sum(axis=1)
        + VECTOR_SCALE**2 * (vector * vector).sum(axis=1)
    ).astype(np.float32)
    return result


def _kernel(standard: Array, vector: Array, products: Array, landmarks: Array, squares: Array) -> Array:
    """Return exp(-KERNEL_WIDTH |prompt - landmark|^2), float32 (prompts, landmarks).

    `products`: vector times the landmarks' vectors. `landmarks`: their standardised structure, `squares`: their
    squared lengths. The vectors' mean cancels in the difference.
    """
    twice = (2.0 * _KERNEL_STRUCTURE) * (standard @ landmarks.T) + (2.0 * VECTOR_SCALE**2) * products
    distance = _squares(standard, vector)[:, None] + squares - twice
    result: Array = np.exp(-KERNEL_WIDTH * np.maximum(distance, 0.0))
    return result


def _matrix(labels: Labels, prompts: int, models: int) -> tuple[Doubles, Doubles]:
    """Gather labels to weighted means and weights, both (prompts, models)."""
    fine = (
        len(labels.prompt) == len(labels.model) == len(labels.score) == len(labels.weight)
        and bool(np.all((labels.score >= 0) & (labels.score <= 1) & (labels.weight > 0)))
        and bool(np.all(np.isfinite(labels.weight)))
    )
    if not fine:
        raise ValueError("labels need equal lengths, scores between 0 and 1 and weights above 0")
    weight, total = np.zeros((prompts, models)), np.zeros((prompts, models))
    np.add.at(weight, (labels.prompt, labels.model), labels.weight)
    np.add.at(total, (labels.prompt, labels.model), labels.weight * labels.score)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0), weight


def _base(prior: Doubles, rows: Integers, y: Doubles, weight: Doubles) -> Doubles:
    """Return (models, classes): the prior moved by the shrunken mean residual of the model, then of its class."""
    residual = weight * (y - prior.T[rows])
    shift = residual.sum(axis=0) / (weight.sum(axis=0) + MODEL_SHRINKAGE)
    base = np.empty_like(prior)
    for name in range(prior.shape[1]):
        here = rows == name
        moved = residual[here].sum(axis=0) + CLASS_SHRINKAGE * shift
        base[:, name] = prior[:, name] + moved / (weight[here].sum(axis=0) + CLASS_SHRINKAGE)
    return np.clip(base, 0.01, 0.99)


class _Ridge:
    """Weighted ridge on [sparse n-grams | dense], a column of weights per model; conjugate gradients.

    Minimises sum_i w_i (r_i - x_i v)^2 + penalty |v|^2 (Hestenes & Stiefel 1952 on the normal equations).
    """

    def __init__(self, grams: Any, dense: Array, target: Doubles, weight: Doubles, penalty: float) -> None:
        transposed, split = grams.T.tocsr(), grams.shape[1]
        w = weight.astype(np.float32)

        def back(r: Array) -> Array:
            return np.concatenate((transposed @ r, dense.T @ r))

        b = back(w * target.astype(np.float32))
        x, r = np.zeros_like(b), b.copy()
        p, rs = r.copy(), (r * r).sum(axis=0)
        goal = 1e-5 * rs
        for _ in range(200):
            q = back(w * (grams @ p[:split] + dense @ p[split:])) + np.float32(penalty) * p
            step = rs / np.maximum((p * q).sum(axis=0), 1e-30)
            x += step * p
            r -= step * q
            following = (r * r).sum(axis=0)
            if (following <= goal).all():
                break
            p = r + (following / np.maximum(rs, 1e-30)) * p
            rs = following
        self.grams, self.dense = x[:split], x[split:]

    def predict(self, grams: Any, dense: Array) -> Doubles:
        result: Doubles = (grams @ self.grams + dense @ self.dense).astype(np.float64)
        return result


def _tfidf(prompts: Sequence[PromptFeatures]) -> tuple[Any, Array]:
    """Return the n-grams as a CSR matrix of unit rows, (1 + log count) * idf, and the idf.

    A bucket never seen keeps the largest idf: it has no weight, but takes its part of a new prompt's length, as
    the rare words of a labelled prompt do. Without that a new prompt's known words would count for too much.
    """
    from scipy import sparse

    lengths = [len(prompt.grams) for prompt in prompts]
    ids = np.concatenate([prompt.grams for prompt in prompts])
    seen = np.bincount(ids, minlength=features.BUCKETS)
    idf = (np.log((1 + len(prompts)) / (1 + seen)) + 1.0).astype(np.float32)
    values = (1.0 + np.log(np.concatenate([prompt.counts for prompt in prompts]))) * idf[ids]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    squares = np.concatenate(([0.0], np.cumsum(values.astype(np.float64) ** 2)))
    norms = np.sqrt(np.maximum(squares[starts[1:]] - squares[starts[:-1]], 1e-12))
    values = (values / np.repeat(norms, lengths)).astype(np.float32)
    return sparse.csr_matrix((values, ids, starts), shape=(len(prompts), features.BUCKETS)), idf


def _fit(
    cls: type[SuccessHeads],
    prompts: Sequence[PromptFeatures],
    rows: Integers,
    y: Doubles,
    weight: Doubles,
    residual: Doubles,
    base: Doubles,
    prior: Doubles,
    models: tuple[str, ...],
    names: tuple[str, ...],
    encoder_id: str,
    seed: int,
    trees: int,
    at: Doubles | None,
    rng: np.random.Generator,
) -> SuccessHeads:
    n = len(prompts)
    structure, vector = np.stack([p.structure for p in prompts]), np.stack([p.vector for p in prompts])
    center = vector.mean(axis=0)
    centered = vector - center
    a: dict[str, NDArray[Any]] = {
        "structure_mean": structure.mean(axis=0),
        "structure_scale": structure.std(axis=0) + np.float32(1e-3),
    }
    standard = _standardised(structure, a)
    remembered, nearness, near, products = _landmarks(vector, rng)
    landmarks, landmark_structure = vector[remembered], standard[remembered]
    kernel = _kernel(standard, vector, products, landmark_structure, _squares(landmark_structure, landmarks))
    whitening = _whitening(kernel[remembered])
    local = kernel @ whitening.astype(np.float32)
    local_mean = local.mean(axis=0)
    dense = np.concatenate((standard, centered * np.float32(VECTOR_SCALE), local - local_mean), axis=1)
    linear = standard.shape[1] + vector.shape[1]
    grams, idf = _tfidf(prompts)
    seen = np.unique(grams.indices)
    grams = grams[:, seen]
    ridge = _Ridge(grams, dense, residual, weight, PENALTY)
    unseen_ridge = np.zeros_like(residual)
    fold = rng.permutation(n) % FOLDS
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        part = _Ridge(grams[train], dense[train], residual[train], weight[train], PENALTY)
        unseen_ridge[test] = part.predict(grams[test], dense[test])

    covariance = (centered.T @ centered).astype(np.float64) / n
    values, directions = np.linalg.eigh(covariance)
    components = directions[:, np.argsort(-values)[:COMPONENTS]].astype(np.float32)
    forest, unseen_forest, noise, depth = _grow(
        _inputs(structure, centered @ components, unseen_ridge), residual, weight, seed, trees, rng
    )

    blend = _blend(unseen_ridge, unseen_forest, residual, weight, noise)
    raw = base.T[rows] + (1.0 - blend) * unseen_ridge + blend * unseen_forest
    calibration = _platt(prior.T[rows], raw, familiarity_of(near, nearness), y, weight)
    gram_weights = np.zeros((features.BUCKETS, len(models)), dtype=np.float32)
    gram_weights[seen] = ridge.grams
    a |= forest | {
        "priors": prior,
        "base": base,
        "labels": (weight > 0).sum(axis=0),
        "idf": idf,
        "gram_weights": gram_weights,
        "dense_weights": ridge.dense[:linear],
        "kernel_weights": (whitening @ ridge.dense[linear:]).astype(np.float32),
        "intercept": -(local_mean @ ridge.dense[linear:]),
        "center": center,
        "components": components,
        "calibration": calibration,
        "landmarks": landmarks,
        "landmark_structure": landmark_structure,
    }
    moved, carry = 0.0, 1.0
    if at is not None:
        moved, carry = _carry(grams, dense, linear, unseen_ridge, residual, weight, at, seed)
    metadata = {
        "features": list(features.NAMES),
        "depth": depth,
        "blend": blend,
        "carry": carry,
        "moved": moved,
        "nearness": nearness,
        "seed": seed,
        "prompts": n,
        "labels": int((weight > 0).sum()),
    }
    return cls(models=models, classes=names, encoder_id=encoder_id, arrays=a, metadata=metadata)


def _differences(errors: Sequence[Doubles], weight: Doubles) -> tuple[list[Doubles], Doubles]:
    """Return arrays (prompts, models) less what all models share on a prompt, where prompts carry several labels.

    What decides is which model does better on this prompt. Where most prompts carry one label, all stays as it is.
    """
    if not _paired(weight):
        return list(errors), weight
    several = (weight > 0).sum(axis=1) > 1
    weight = weight[several]
    total = weight.sum(axis=1)
    return [e[several] - ((e[several] * weight).sum(axis=1) / total)[:, None] for e in errors], weight


def _paired(weight: Doubles) -> bool:
    """Whether most prompts carry several labels, so that models can be compared on the same prompt."""
    return bool(((weight > 0).sum(axis=1) > 1).mean() > 0.5)


def _blend(ridge: Doubles, forest: Doubles, residual: Doubles, weight: Doubles, noise: Doubles) -> float:
    """Return the forest's share: least squares of unseen rows with a normal prior (BLEND, BLEND_SPREAD).

    `forest` comes from the few trees that have not seen a row, so it varies more than the whole forest will. `noise`
    (prompts,) is that excess, a variance summed over models; uncorrected it makes the forest look worse than it is.
    """
    (beyond, left), w = _differences((forest - ridge, residual - ridge), weight)
    error = float((w * (left - BLEND * beyond) ** 2).sum() / max(w.sum(), 1e-12))
    worth = error / BLEND_SPREAD**2
    several = (weight > 0).sum(axis=1) > 1 if _paired(weight) else np.ones(len(weight), dtype=bool)
    square = float((w * beyond * beyond).sum())
    square -= min(float((w.mean(axis=1) * noise[several]).sum()), 0.5 * square)
    share = ((w * beyond * left).sum() + BLEND * worth) / (square + worth + 1e-12)
    return float(np.clip(share, 0.0, 1.0))


def _carry(
    grams: Any,
    dense: Array,
    linear: int,
    unseen_ridge: Doubles,
    residual: Doubles,
    weight: Doubles,
    at: Doubles,
    seed: int,
) -> tuple[float, float]:
    """Return how far the kinds of prompts move with time, 0 to 1, and how far differences between models are
    believed, CAUTION to 1; from at most 8,000 labels."""
    import warnings

    from sklearn.cluster import KMeans

    n, models = residual.shape
    rng = np.random.default_rng([seed, CLUSTERS])
    kept = np.sort(rng.permutation(n)[: max(CLUSTERED_LABELS // models, MIN_LABELS)])
    grams, dense, residual, weight = grams[kept], dense[kept], residual[kept], weight[kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fewer distinct prompts than clusters.
        cluster = KMeans(CLUSTERS, n_init=1, random_state=seed).fit_predict(dense[:, :linear])
    moved = _moved(cluster, at[kept], rng)
    if moved <= 0.0:
        return moved, 1.0
    unseen = np.zeros_like(residual)
    for number in range(CLUSTERS):
        train, test = cluster != number, cluster == number
        part = _Ridge(grams[train], dense[train], residual[train], weight[train], PENALTY)
        unseen[test] = part.predict(grams[test], dense[test])
    (target, random, apart), w = _differences((residual, unseen_ridge[kept], unseen), weight)
    at_random, at_clusters = (
        float((w * (target**2 - (target - predicted) ** 2)).sum()) for predicted in (random, apart)
    )
    low, high = CARRIED
    carried = 0.0
    if at_random > 0.0:
        carried = min(max((at_clusters / at_random - low) / (high - low), 0.0), 1.0)
    return moved, 1.0 - min(moved / MOVED, 1.0) * (1.0 - CAUTION) * (1.0 - carried)


def _moved(cluster: Integers, at: Doubles, rng: np.random.Generator) -> float:
    """Return the share of prompts that are of other clusters than those of other times: the total variation between a
    quarter of time and the rest, mean of the quarters, less what chance gives, as a share of what is left to it.

    Prompts of one time stay together; where there is one time alone nothing moves.
    """
    ordered = np.sort(at)
    quarter = (QUARTERS * np.searchsorted(ordered, at)) // len(at)

    def variation(quarter: Integers) -> float:
        counts = np.zeros((QUARTERS, CLUSTERS))
        np.add.at(counts, (quarter, cluster), 1.0)
        inside, outside = counts.sum(axis=1), len(at) - counts.sum(axis=1)
        rest = (counts.sum(axis=0) - counts) / np.maximum(outside, 1.0)[:, None]
        apart = 0.5 * np.abs(counts / np.maximum(inside, 1.0)[:, None] - rest).sum(axis=1)
        return float((apart * inside * (outside > 0)).sum() / len(at))

    chance = max(variation(rng.permutation(quarter)) for _ in range(CHANCES))
    return max(variation(quarter) - chance, 0.0) / max(1.0 - chance, 1e-9)


def _platt(prior: Doubles, raw: Doubles, familiarity: Doubles, y: Doubles, weight: Doubles) -> Doubles:
    """Return `calibrate`'s (models, 2) by Newton's method on the log loss + CALIBRATION_WORTH ((a - 1)^2 + |b|^2).

    One slope a for all models: a slope each follows the noise of each, and what decides is the difference between
    models on a prompt.
    """
    models = prior.shape[1]
    row, model = np.nonzero(weight)
    offset = _logit(prior)
    change = (familiarity[:, None] * (_logit(raw) - offset))[row, model]
    x = np.zeros((len(row), models + 1))
    x[:, 0], x[np.arange(len(row)), model + 1] = change, familiarity[row]
    offset, target, w = offset[row, model], y[row, model], weight[row, model]
    start = np.zeros(models + 1)
    start[0] = 1.0
    beta = start.copy()
    for _ in range(25):
        p = 1.0 / (1.0 + np.exp(-np.clip(offset + x @ beta, -30, 30)))
        gradient = x.T @ (w * (p - target)) + 2.0 * CALIBRATION_WORTH * (beta - start)
        hessian = (x * (w * p * (1.0 - p))[:, None]).T @ x + 2.0 * CALIBRATION_WORTH * np.eye(models + 1)
        step = np.linalg.solve(hessian, gradient)
        beta -= step
        if np.abs(step).max() < 1e-8:
            break
    # Never turn the order round: heads that are worse than nothing become flat.
    return np.stack((np.full(models, max(float(beta[0]), 0.0)), beta[1:]), axis=1)


def familiarity_of(near: Array, nearness: Sequence[float]) -> Doubles:
    """Return 0 at cosines up to `nearness[0]`, 1 from `nearness[1]` on, linear between."""
    low, high = nearness
    share = (near.astype(np.float64) - low) / max(high - low, 1e-6)
    result: Doubles = np.minimum(np.maximum(share, 0.0), 1.0)
    return result


def _whitening(kernel: Array) -> Doubles:
    """Return the inverse square root's factor of the landmarks' kernel, columns of unit variance (Nystroem)."""
    values, directions = np.linalg.eigh(kernel.astype(np.float64))
    result: Doubles = directions / np.sqrt(np.maximum(values, LEAST_EIGENVALUE))
    return result


def _landmarks(vector: Array, rng: np.random.Generator) -> tuple[Integers, list[float], Array, Array]:
    """Choose up to 512 prompts to remember.

    Returns their rows, the cosines between which familiarity falls from 1 to 0, each prompt's cosine to its nearest
    other landmark, and all products of vectors (prompts, landmarks).
    """
    rows = rng.permutation(len(vector))[:LANDMARKS]
    products = vector @ vector[rows].T
    others = products.copy()
    others[rows, np.arange(len(rows))] = -1.0
    near = others.max(axis=1)
    low, high = np.quantile(near, (UNFAMILIAR, FAMILIAR))
    return rows, [float(low), float(max(high, low + 1e-3))], near, products


def _grow(
    x: Array, residual: Doubles, weight: Doubles, seed: int, trees: int, rng: np.random.Generator
) -> tuple[dict[str, NDArray[Any]], Doubles, Doubles, int]:
    """Grow the forest, every tree on 70 % of the prompts.

    Returns its arrays, the predictions (prompts, models) by the trees that had not seen the prompt, by how much
    these vary more than those of all trees (`_blend`), and its depth.
    """
    try:
        from sklearn.tree import ExtraTreeRegressor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "learning needs scikit-learn: pip install 'farthing[train]'", name="sklearn"
        ) from error
    n, models = residual.shape
    # A prompt without a label of some model counts as average there, a prompt with more labels as more.
    importance = weight.sum(axis=1)
    sums, weights = np.zeros((n, models)), np.zeros((n, models))
    unseen_trees = np.zeros(n)
    single, squares, paired = np.zeros((n, models)), np.zeros(n), _paired(weight)
    parts: dict[str, list[NDArray[Any]]] = {
        key: [] for key in ("feature", "threshold", "children", "leaf", "sums", "weights")
    }
    roots, nodes, leaves, depth = [], 0, 0, 1
    weighted = weight * residual
    common = np.where((weight > 0).sum(axis=1) > 1, weighted.sum(axis=1) / importance, 0.0)
    target = np.where(weight > 0, residual - (1.0 - COMMON) * common[:, None], 0.0)
    for number in range(trees):
        order = rng.permutation(n)
        cut = max(int(SAMPLE * n), 1)
        inside, outside = order[:cut], order[cut:]
        grown = ExtraTreeRegressor(
            max_depth=MAX_DEPTH,
            min_samples_leaf=MIN_LEAF,
            max_features=FEATURE_SHARE,
            random_state=seed * 100_003 + number,
        ).fit(x[inside], target[inside], sample_weight=importance[inside])
        tree = grown.tree_
        is_leaf = tree.children_left < 0
        number_of_leaf = np.cumsum(is_leaf) - 1
        own = np.arange(tree.node_count)
        left = np.where(is_leaf, own, tree.children_left)
        right = np.where(is_leaf, own, tree.children_right)
        landed = number_of_leaf[grown.apply(x)]
        leaf_sums, leaf_weights = (np.zeros((int(is_leaf.sum()), models)) for _ in range(2))
        np.add.at(leaf_sums, landed[inside], weighted[inside])
        np.add.at(leaf_weights, landed[inside], weight[inside])
        sums[outside] += leaf_sums[landed[outside]]
        weights[outside] += leaf_weights[landed[outside]]
        unseen_trees[outside] += 1
        alone = leaf_sums / (leaf_weights + SHRINKAGE)
        if paired:
            alone -= alone.mean(axis=1, keepdims=True)
        single[outside] += alone[landed[outside]]
        squares[outside] += (alone**2).sum(axis=1)[landed[outside]]
        roots.append(nodes)
        parts["feature"].append(np.where(is_leaf, 0, tree.feature).astype(np.int32))
        parts["threshold"].append(tree.threshold.astype(np.float32))
        parts["children"].append((np.stack((left, right), axis=1) + nodes).astype(np.int32))
        parts["leaf"].append(np.where(is_leaf, number_of_leaf + leaves, 0).astype(np.int32))
        parts["sums"].append(leaf_sums.astype(np.float32))
        parts["weights"].append(leaf_weights.astype(np.float32))
        nodes += tree.node_count
        leaves += len(leaf_sums)
        depth = max(depth, int(tree.max_depth))
    arrays = {key: np.concatenate(values) for key, values in parts.items()}
    arrays["roots"] = np.array(roots, dtype=np.int32)
    count = np.maximum(unseen_trees, 1.0)
    unseen = sums / (weights + SHRINKAGE * count[:, None])
    variance = (squares - (single**2).sum(axis=1) / count) / np.maximum(count - 1.0, 1.0)
    noise = np.maximum(variance, 0.0) * np.maximum(1.0 / count - 1.0 / trees, 0.0)
    return arrays, unseen, noise, depth
