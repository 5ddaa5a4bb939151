"""Success heads: each model's probability of a good answer to a prompt, learned from labels, shrunk to a prior.

For model m and a prompt of class c

    base(m, c)  = prior(m, c) + shift(m, c)            shift: shrunken mean of (label - prior), model then class
    raw         = base + (1 - w) ridge(x) + w forest(x)  both learned on the residual (label - base)
    p           = sigmoid(a logit(raw) + b)              Platt (1999), a and b shrunk to 1 and 0
    probability = prior + familiarity (p - prior)

*ridge*: linear in hashed word n-grams (TF-IDF), the encoder's vector and the structure (Hoerl & Kennard 1970).
*forest*: extremely randomised trees (Geurts et al. 2006) over structure and the vector's principal components, one
forest for all models. A leaf keeps, per model, the sum of residuals and of weights; the prediction is
sum(residuals) / (sum(weights) + SHRINKAGE * trees), the posterior mean under a prior worth SHRINKAGE labels: no
labels near the prompt, no departure from the base. w, a, b come from predictions for rows the learners had not seen.
*familiarity* falls from 1 to 0 with the cosine to the nearest remembered prompt; at 0 the prior stands alone.

The interval is Wilson's (1927) with `evidence` + PRIOR_WORTH observations, evidence being the labels of this model
in an average leaf: wider than the forest's average deserves, on purpose. Fitting needs scikit-learn (the extra
`train`); prediction is numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

NAME, VERSION = "success", "1"

# A prior counts as much as this many labels: for the model's mean, for a class within it, in a leaf, in an interval.
MODEL_SHRINKAGE, CLASS_SHRINKAGE, SHRINKAGE, PRIOR_WORTH = 10.0, 20.0, 2.0, 4.0
# A 90 % interval.
Z = 1.6449
# Ridge: penalty, and how far each block reaches beside the n-grams' unit rows.
PENALTY, STRUCTURE_SCALE, VECTOR_SCALE = 8.0, 0.7, 0.5
# Forest.
TREES, MAX_DEPTH, MIN_LEAF, FEATURE_SHARE, SAMPLE, COMPONENTS = 100, 16, 8, 0.4, 0.7, 24
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDS = 4
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


@dataclass(frozen=True, slots=True)
class Estimate:
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
            self._blend = float(metadata["blend"])
            self._nearness = (float(metadata["nearness"][0]), float(metadata["nearness"][1]))
            if tuple(metadata["features"]) != features.NAMES:
                raise ArtefactError("the success heads were learned on other features: learn again")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(f"incomplete success heads ({error})") from error

    def _check(self) -> None:
        a, models, width = self.arrays, len(self.models), len(features.NAMES)
        dimensions, nodes = a["center"].shape[0], a["feature"].shape[0]
        components = a["components"].shape[1]
        expected = {
            "priors": (models, len(self.classes)),
            "base": (models, len(self.classes)),
            "labels": (models,),
            "idf": (features.BUCKETS,),
            "gram_weights": (features.BUCKETS, models),
            "dense_weights": (width + dimensions, models),
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
        if leaves != a["weights"].shape or leaves[1] != models or a["landmarks"].shape[1] != dimensions:
            raise ArtefactError("success heads: leaves or landmarks do not fit the models or the encoder")
        inside = (
            (a["children"].min() >= 0 and a["children"].max() < nodes)
            and (a["leaf"].min() >= 0 and a["leaf"].max() < max(leaves[0], 1))
            and (a["feature"].min() >= 0 and a["feature"].max() < width + components)
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
        probability, near, familiar = self._chunk((prompt,), (prompt_class,))
        familiarity = float(familiar[0])
        result = {}
        probabilities, evidences = probability[0].tolist(), (near[0] * familiarity).tolist()
        for model, prior in priors.items():
            row = self._row.get(model)
            if row is None or not self._labels[row] or prompt_class not in self._class:
                p, evidence, source = float(prior), 0.0, "prior"
            elif familiarity <= 0.0:
                p, evidence, source = float(prior), 0.0, "unfamiliar"
            else:
                p, evidence, source = probabilities[row], evidences[row], "learned"
            lower, upper = wilson(p, evidence + PRIOR_WORTH)
            result[model] = Estimate(p, lower, upper, evidence, familiarity, source)
        return result

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
            raise ArtefactError(
                f"the heads were learned on vectors of {a['center'].shape[0]} numbers, got {vector.shape[1]}"
            )
        structure = np.stack([prompt.structure for prompt in prompts])
        near = (vector @ a["landmarks"].T).max(axis=1)
        low, high = self._nearness
        familiarity = np.clip((near - low) / max(high - low, 1e-6), 0.0, 1.0).astype(np.float64)
        rows = [self._class.get(name, -1) for name in classes]
        priors, base = _of_class(a["priors"], rows), _of_class(a["base"], rows)
        centered = vector - a["center"]
        raw = base.copy()
        if self._blend < 1.0:
            raw += (1.0 - self._blend) * self._ridge(prompts, structure, centered)
        sums, weights = self._forest(np.concatenate((structure, centered @ a["components"]), axis=1))
        raw += self._blend * sums / (weights + SHRINKAGE * self._trees)
        p = calibrate(raw, a["calibration"])
        return priors + familiarity[:, None] * (p - priors), weights / self._trees, familiarity

    def _ridge(self, prompts: Sequence[PromptFeatures], structure: Array, centered: Array) -> Doubles:
        a = self.arrays
        dense = np.concatenate((_standardised(structure, a), centered * VECTOR_SCALE), axis=1)
        result: Doubles = (dense @ a["dense_weights"]).astype(np.float64)
        for row, prompt in enumerate(prompts):
            values = (1.0 + np.log(prompt.counts)) * a["idf"][prompt.grams]
            length = math.sqrt(float(values @ values))
            if length > 0.0:
                result[row] += (values / length) @ a["gram_weights"][prompt.grams]
        return result

    def _forest(self, x: Array) -> tuple[Doubles, Doubles]:
        a = self.arrays
        if len(x) == 1:
            # What a request waits for: `take` over one row costs half of indexing over many.
            prompt, feature, threshold = x[0], a["feature"], a["threshold"]
            children, node = a["children"].reshape(-1), a["roots"]
            for _ in range(self._depth):
                node = children.take(2 * node + (prompt.take(feature.take(node)) > threshold.take(node)))
            leaf = a["leaf"].take(node)
            return (
                a["sums"].take(leaf, axis=0).sum(axis=0, keepdims=True, dtype=np.float64),
                a["weights"].take(leaf, axis=0).sum(axis=0, keepdims=True, dtype=np.float64),
            )
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
            raise ArtefactError(f"{path.name} holds {loaded.name}-{loaded.version}, not {NAME}-{VERSION}")
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
    ) -> SuccessHeads:
        """Learn from labels; `priors`: model -> class -> probability, in the order `labels.model` indexes.

        `classes` gives each prompt's class. Equal input, seed and one BLAS thread give equal arrays. Raises
        ValueError for labels out of range, unknown classes or fewer than 30 labelled prompts, and
        ModuleNotFoundError without scikit-learn.
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
            cls, prompts, rows, y, weight, residual, base, prior, models, names, encoder_id, seed, trees, rng
        )


def wilson(p: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval (1927, 90 %) for a proportion p seen in n > 0 trials."""
    center = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n)
    half = Z / (1.0 + Z * Z / n) * math.sqrt(p * (1.0 - p) / n + Z * Z / (4.0 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def calibrate(raw: Doubles, calibration: NDArray[Any]) -> Doubles:
    """Return sigmoid(a logit(raw) + b), raw cut to .01...99 first; `calibration`: (models, 2), columns a and b."""
    bounded = np.clip(raw, 0.01, 0.99)
    logit = np.log(bounded / (1.0 - bounded))
    result: Doubles = 1.0 / (1.0 + np.exp(-(logit * calibration[:, 0] + calibration[:, 1])))
    return result


def _of_class(table: NDArray[Any], rows: list[int]) -> Doubles:
    """Return table[:, class] per row, (rows, models); the mean over classes for row -1."""
    known = table.T.astype(np.float64)
    padded = np.concatenate((known, known.mean(axis=0, keepdims=True)))
    result: Doubles = padded[rows]
    return result


def _standardised(structure: Array, a: Mapping[str, NDArray[Any]]) -> Array:
    z = np.clip((structure - a["structure_mean"]) / a["structure_scale"], -4.0, 4.0)
    result: Array = (z * (STRUCTURE_SCALE / math.sqrt(z.shape[1]))).astype(np.float32)
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
    dense = np.concatenate((_standardised(structure, a), centered * np.float32(VECTOR_SCALE)), axis=1)
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
    forest, unseen_forest, depth = _grow(
        np.concatenate((structure, centered @ components), axis=1), residual, weight, seed, trees, rng
    )

    def raw_of(w: float) -> Doubles:
        return base.T[rows] + (1.0 - w) * unseen_ridge + w * unseen_forest

    blend = min(BLENDS, key=lambda w: _loss(raw_of(w), y, weight))
    raw = raw_of(blend)
    calibration = np.array([_platt(raw[:, m], y[:, m], weight[:, m]) for m in range(len(models))])
    landmarks, nearness = _landmarks(vector, rng)
    gram_weights = np.zeros((features.BUCKETS, len(models)), dtype=np.float32)
    gram_weights[seen] = ridge.grams
    a |= forest | {
        "priors": prior,
        "base": base,
        "labels": (weight > 0).sum(axis=0),
        "idf": idf,
        "gram_weights": gram_weights,
        "dense_weights": ridge.dense,
        "center": center,
        "components": components,
        "calibration": calibration,
        "landmarks": landmarks,
    }
    metadata = {
        "features": list(features.NAMES),
        "depth": depth,
        "blend": blend,
        "nearness": nearness,
        "seed": seed,
        "prompts": n,
        "labels": int((weight > 0).sum()),
    }
    return cls(models=models, classes=names, encoder_id=encoder_id, arrays=a, metadata=metadata)


def _loss(p: Doubles, y: Doubles, weight: Doubles) -> float:
    """Return the weighted squared error; of the differences between models where prompts carry several labels.

    What decides is which model does better on this prompt, so what all models share on it is left out.
    """
    error, several = p - y, (weight > 0).sum(axis=1) > 1
    if several.mean() > 0.5:
        error, weight = error[several], weight[several]
        error = error - ((error * weight).sum(axis=1) / weight.sum(axis=1))[:, None]
    return float((weight * error * error).sum())


def _platt(raw: Doubles, y: Doubles, weight: Doubles) -> tuple[float, float]:
    """Fit a, b of `calibrate` by Newton's method on the log loss + CALIBRATION_WORTH ((a - 1)^2 + b^2)."""
    bounded = np.clip(raw, 0.01, 0.99)
    z = np.stack((np.log(bounded / (1.0 - bounded)), np.ones(len(raw))), axis=1)
    start = np.array([1.0, 0.0])
    beta = start.copy()
    for _ in range(25):
        p = 1.0 / (1.0 + np.exp(-np.clip(z @ beta, -30, 30)))
        gradient = z.T @ (weight * (p - y)) + 2.0 * CALIBRATION_WORTH * (beta - start)
        hessian = (z * (weight * p * (1.0 - p))[:, None]).T @ z + 2.0 * CALIBRATION_WORTH * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        beta -= step
        if np.abs(step).max() < 1e-8:
            break
    # Never turn the order round: a head that is worse than nothing becomes flat.
    return max(float(beta[0]), 0.0), float(beta[1])


def _landmarks(vector: Array, rng: np.random.Generator) -> tuple[Array, list[float]]:
    """Keep up to 512 prompts' vectors, and the cosines between which familiarity falls from 1 to 0."""
    order = rng.permutation(len(vector))
    kept, others = vector[order[:LANDMARKS]], vector[order[LANDMARKS:]]
    if len(others) >= LANDMARKS:
        near = (others @ kept.T).max(axis=1)
    else:
        cosines = kept @ kept.T
        np.fill_diagonal(cosines, -1.0)
        near = cosines.max(axis=1)
    low, high = np.quantile(near, (UNFAMILIAR, FAMILIAR))
    return kept.astype(np.float32), [float(low), float(max(high, low + 1e-3))]


def _grow(
    x: Array, residual: Doubles, weight: Doubles, seed: int, trees: int, rng: np.random.Generator
) -> tuple[dict[str, NDArray[Any]], Doubles, int]:
    """Grow the forest, every tree on 70 % of the prompts.

    Returns its arrays, the predictions (prompts, models) by the trees that had not seen the prompt, and its depth.
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
    parts: dict[str, list[NDArray[Any]]] = {
        key: [] for key in ("feature", "threshold", "children", "leaf", "sums", "weights")
    }
    roots, nodes, leaves, depth = [], 0, 0, 1
    weighted = weight * residual
    for number in range(trees):
        order = rng.permutation(n)
        cut = max(int(SAMPLE * n), 1)
        inside, outside = order[:cut], order[cut:]
        grown = ExtraTreeRegressor(
            max_depth=MAX_DEPTH,
            min_samples_leaf=MIN_LEAF,
            max_features=FEATURE_SHARE,
            random_state=seed * 100_003 + number,
        ).fit(x[inside], residual[inside], sample_weight=importance[inside])
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
    unseen = sums / (weights + SHRINKAGE * np.maximum(unseen_trees, 1.0)[:, None])
    return arrays, unseen, depth
