"""The head: an encoder's vector and the described features in, a judgement out.

Trained by `classifiers/train.py` with scikit-learn; at run time matrix products over plain arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from classifiers import features
from classifiers.artefact import Artefact
from classifiers.encoder import ArtefactError

CLASSES = ("simple", "medium", "complex")
# Class borders on the difficulty scale.
BORDERS = (1.0 / 3.0, 2.0 / 3.0)
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 4, 4096
# What an unfamiliar prompt's confidence is multiplied with.
UNFAMILIAR = 0.8

# Dimensions of the space in which labelled prompts are compared.
PLACE = 48
# So many labelled prompts are compared at once: OpenBLAS starts no threads for a product of fewer than 9,216 numbers.
BLOCK = 128
# Similarity of two prompts: this share from the vectors' cosine (about the mean), the rest from that of the features.
VECTOR_SHARE = 0.7
# Below the first similarity a labelled prompt has no say, above the second it decides.
NEAR, SAME = 0.65, 0.8
# How sharply the nearest of several labelled prompts is preferred.
SHARPNESS = 20.0
# Above this share of letters outside the Latin script a prompt counts as unfamiliar.
MAX_NON_LATIN = 0.5
# Standardised features are cut here, so that one odd count does not decide.
MAX_DEVIATION = 3.0

Array = NDArray[np.float32]

_NON_LATIN = features.NAMES.index("non_latin_share")
_FEATURES_TO_VECTOR = math.sqrt((1.0 - VECTOR_SHARE) / VECTOR_SHARE)


def class_of(difficulty: float) -> str:
    """Return the class of a difficulty in 0..1: simple below 1/3, medium below 2/3, else complex."""
    return CLASSES[0] if difficulty < BORDERS[0] else CLASSES[1] if difficulty < BORDERS[1] else CLASSES[2]


def border_distance(difficulty: float) -> float:
    """Return how far a difficulty is from the nearer border between two classes."""
    return min(abs(difficulty - border) for border in BORDERS)


def joined(vectors: Array, described: Array, centre: Array, scale: Array) -> Array:
    """Join vectors and features of n prompts into rows of length 1.

    `centre` and `scale` have the joint width of vector and features; only the features are divided by their scale.
    """
    width = vectors.shape[1]
    v = vectors - centre[:width]
    f = np.clip((described - centre[width:]) / scale[width:], -MAX_DEVIATION, MAX_DEVIATION)
    v *= math.sqrt(VECTOR_SHARE) / np.maximum(np.sqrt((v * v).sum(axis=1, keepdims=True)), 1e-9)
    f *= math.sqrt(1.0 - VECTOR_SHARE) / np.maximum(np.sqrt((f * f).sum(axis=1, keepdims=True)), 1e-9)
    return np.concatenate((v, f), axis=1)


def placed(joint: Array, axes: Array) -> Array:
    """Project rows of `joined` on `axes` (PLACE, width): the product of two results is their similarity, -1..1."""
    places: Array = products(joint, axes)
    places /= np.maximum(np.sqrt((places * places).sum(axis=1, keepdims=True)), 1e-9)
    return places


def products(left: Array, right: Array) -> Array:
    """Return left @ right.T. One row does not go through BLAS, whose threads cost milliseconds on a busy machine."""
    if len(left) > 1:
        return left @ right.T
    row: Array = np.einsum("ij,j->i", right, left[0])
    return row[None, :]


class Judgement(NamedTuple):
    """What a head thinks of one prompt.

    `probabilities`: of simple, medium, complex. `difficulty`: 0.5 p(medium) + p(complex). `confidence`: the
    probability of the class named, calibrated on kinds of task that were held out of the training, and lowered
    when the prompt is not `familiar` (its nearest labelled prompt is less similar than that of 95 % of the labelled
    ones). `output_tokens`: expected length of the answer. `kind`: words for the nearest prompt's kind of task.
    """

    probabilities: tuple[float, float, float]
    difficulty: float
    prompt_class: str
    confidence: float
    output_tokens: int
    kind: str
    familiar: bool


@dataclass(frozen=True, slots=True)
class View:
    """What a head sees in n prompts, before calibration.

    `probabilities`: (n, 3). `log_tokens`: (n,). `similarity` and `nearest`: of the nearest labelled prompt, (n,);
    the similarity is -1 where the script is not known.
    """

    probabilities: NDArray[np.float64]
    log_tokens: NDArray[np.float64]
    similarity: NDArray[np.float64]
    nearest: NDArray[np.int64]


class Head:
    """Multinomial logistic regression corrected by the labelled prompts nearby; ridge for log(output tokens)."""

    def __init__(self, artefact: Artefact, *, dimensions: int) -> None:
        """Take the arrays of an artefact. Raises ArtefactError when they do not fit encoder or features."""
        self.id = artefact.id
        metadata, arrays = artefact.metadata, artefact.arrays
        width = dimensions + len(features.ALL_NAMES)
        try:
            if tuple(metadata["features"]) != features.ALL_NAMES:
                raise ArtefactError(f"{artefact.id}: trained on other features: train again")
            self._weights: Array = np.ascontiguousarray(arrays["weights"], dtype=np.float32)
            self._bias: Array = arrays["bias"].astype(np.float32)
            phrases = arrays["phrases"].tobytes().decode().split("\n")
            phrase_weights = arrays["phrase_weights"].astype(np.float64)
            self._phrases = dict(zip(phrases, map(tuple, phrase_weights.tolist()), strict=True))
            self._centre: Array = arrays["centre"].astype(np.float32)
            self._scale: Array = arrays["scale"].astype(np.float32)
            self._feature_scale: Array = self._scale[dimensions:]
            self._axes: Array = np.ascontiguousarray(arrays["axes"], dtype=np.float32)
            labelled = arrays["labelled"]
            self._labelled: Array = np.ascontiguousarray(labelled, dtype=np.float32)
            blocks = np.zeros((-(-len(labelled) // BLOCK), BLOCK, PLACE), dtype=np.float32)
            blocks.reshape(-1, PLACE)[: len(labelled)] = self._labelled
            self._labelled_blocks: Array = blocks
            labels = arrays["labelled_classes"].astype(np.int64)
            self._labelled_kinds = arrays["labelled_kinds"].astype(np.int64)
            self._kinds = tuple(str(words) for words in metadata["kinds"])
            self._slope, self._offset = (float(number) for number in metadata["calibration"])
            self._familiar_above = float(metadata["familiar_above"])
            # A verdict nearer than this to a border between classes is worth asking the transformer.
            self.transformer_within = float(metadata["transformer_within"])
            self._labels: Array = np.eye(len(CLASSES), dtype=np.float32)[labels]
            self._weights_by_output: Array = np.ascontiguousarray(self._weights.T)
            self._biases: list[float] = self._bias.tolist()
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(f"{artefact.id}: incomplete head ({error})") from error
        # Columns: three classes, then log(output tokens).
        if self._weights.shape != (width, 4) or self._bias.shape != (4,):
            raise ArtefactError(
                f"{artefact.id}: weights have shape {self._weights.shape}, expected ({width}, 4)"
            )
        count = len(self._labels)
        if (
            phrase_weights.shape[1:] != (len(CLASSES),)
            or labelled.shape != (count, PLACE)
            or self._axes.shape != (PLACE, width)
            or self._labelled_kinds.shape != (count,)
            or self._centre.shape != (width,)
            or self._scale.shape != (width,)
            or not count
            or self._labelled_kinds.max() >= len(self._kinds)
        ):
            raise ArtefactError(f"{artefact.id}: the labelled prompts do not fit the head")

    def view(self, vectors: Array, described: Array, said: Iterable[Iterable[str]]) -> View:
        """See n prompts: unit vectors (n, dimensions), `features.describe` (n, len(ALL_NAMES)) and `phrases.said`."""
        scores = np.concatenate((vectors, described), axis=1) @ self._weights + self._bias
        scores[:, :3] += [self._of_phrases(phrases) for phrases in said]
        p = np.exp(scores[:, :3] - scores[:, :3].max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        joint = joined(vectors, described, self._centre, self._scale)
        similarity = products(placed(joint, self._axes), self._labelled)
        nearest = similarity.argmax(axis=1)
        top = similarity[np.arange(len(nearest)), nearest]
        # Scripts that the encoders hardly know give all texts one vector: no likeness follows from it.
        top[described[:, _NON_LATIN] > MAX_NON_LATIN] = -1.0
        say = np.clip((top - NEAR) / (SAME - NEAR), 0.0, 1.0)[:, None]
        if say.any():
            votes = np.exp(SHARPNESS * (similarity - similarity.max(axis=1, keepdims=True)))
            p = (1.0 - say) * p + say * (votes @ self._labels) / votes.sum(axis=1, keepdims=True)
        return View(p.astype(np.float64), scores[:, 3].astype(np.float64), top.astype(np.float64), nearest)

    def _of_phrases(self, said: Iterable[str]) -> tuple[float, float, float]:
        """Return what a prompt's phrases add to the scores of the three classes."""
        simple = medium = hard = 0.0
        for weights in map(self._phrases.get, said):
            if weights is not None:
                simple += weights[0]
                medium += weights[1]
                hard += weights[2]
        return simple, medium, hard

    def _see(
        self, vector: Array, described: Array, said: Iterable[str]
    ) -> tuple[list[float], float, float, int]:
        """Do what `view` does, for one prompt: three probabilities, log(tokens), similarity and nearest prompt.

        The gateway asks for every request, and most of `view`'s time goes into calls of NumPy for arrays of one row.
        Here single numbers are Python's, and no product starts the threads of BLAS, which cost milliseconds on a busy
        machine: `vecdot` is quick for few long rows, blocks below what BLAS has threads for are for many short ones.
        """
        width = len(vector)
        row = np.concatenate((vector, described))
        scores = [*map(float.__add__, np.vecdot(self._weights_by_output, row).tolist(), self._biases)]
        p = [*map(float.__add__, scores[:3], self._of_phrases(said))]
        highest = max(p)
        p = [math.exp(score - highest) for score in p]
        total = sum(p)
        p = [share / total for share in p]

        # As in `joined` and `placed`, but that lengths are taken into account where single numbers are left.
        row -= self._centre
        v, f = row[:width], row[width:]
        f /= self._feature_scale
        np.minimum(np.maximum(f, -MAX_DEVIATION, out=f), MAX_DEVIATION, out=f)
        f *= _FEATURES_TO_VECTOR * max(math.sqrt(v.dot(v)), 1e-9) / max(math.sqrt(f.dot(f)), 1e-9)
        place = np.vecdot(self._axes, row)
        length = max(math.sqrt(place.dot(place)), 1e-9)
        likeness = (self._labelled_blocks @ place).reshape(-1)[: len(self._labels)]

        nearest = int(likeness.argmax())
        best = likeness.item(nearest) / length
        similarity = best if described.item(_NON_LATIN) <= MAX_NON_LATIN else -1.0
        say = min((similarity - NEAR) / (SAME - NEAR), 1.0)
        if say > 0.0:
            likeness *= SHARPNESS / length
            votes = (np.exp(likeness, out=likeness) @ self._labels).tolist()
            total = sum(votes)
            p = [(1.0 - say) * own + say * near / total for own, near in zip(p, votes, strict=True)]
        return p, scores[3], similarity, nearest

    def judge(self, vector: Array, described: Array, said: Iterable[str]) -> Judgement:
        """Judge one prompt: its unit vector (dimensions,), `features.describe` (len(ALL_NAMES),), `phrases.said`."""
        p, log_tokens, similarity, nearest = self._see(vector, described, said)
        difficulty = min(max(0.5 * p[1] + p[2], 0.0), 1.0)
        prompt_class = class_of(difficulty)
        familiar = similarity >= self._familiar_above
        named = min(max(p[CLASSES.index(prompt_class)], 1e-6), 1.0 - 1e-6)
        logit = self._slope * math.log(named / (1.0 - named)) + self._offset
        confidence = (1.0 if familiar else UNFAMILIAR) / (1.0 + math.exp(-logit))
        tokens = round(math.exp(min(log_tokens, 10.0)))
        return Judgement(
            probabilities=(p[0], p[1], p[2]),
            difficulty=difficulty,
            prompt_class=prompt_class,
            confidence=confidence,
            output_tokens=min(max(tokens, MIN_OUTPUT_TOKENS), MAX_OUTPUT_TOKENS),
            kind=self._kinds[self._labelled_kinds[nearest]],
            familiar=familiar,
        )
