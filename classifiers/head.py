"""The head: an encoder's vector and the structural features in, a judgement out.

Trained by `classifiers/train.py` with scikit-learn; at run time two matrix products over plain arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

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
UNFAMILIAR = 0.5

Array = NDArray[np.float32]


def class_of(difficulty: float) -> str:
    """Return the class of a difficulty in 0..1: simple below 1/3, medium below 2/3, else complex."""
    return CLASSES[0] if difficulty < BORDERS[0] else CLASSES[1] if difficulty < BORDERS[1] else CLASSES[2]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a head thinks of one prompt.

    `probabilities`: of simple, medium, complex. `difficulty`: 0.5 p(medium) + p(complex). `confidence`: the
    calibrated probability of the class named, halved when the prompt is not `familiar`. `output_tokens`: expected
    length of the answer. `kind`: words for the kind of task that lies nearest.
    """

    probabilities: tuple[float, float, float]
    difficulty: float
    prompt_class: str
    confidence: float
    output_tokens: int
    kind: str
    familiar: bool


class Head:
    """Multinomial logistic regression for the class, ridge regression for log(output tokens), kind centroids."""

    def __init__(self, artefact: Artefact, *, dimensions: int) -> None:
        """Take the arrays of an artefact. Raises ArtefactError when they do not fit encoder or features."""
        self.id = artefact.id
        metadata, arrays = artefact.metadata, artefact.arrays
        width = dimensions + len(features.NAMES)
        try:
            if tuple(metadata["features"]) != features.NAMES:
                raise ArtefactError(f"{artefact.id}: trained on other structural features: train again")
            self._weights: Array = np.ascontiguousarray(arrays["weights"], dtype=np.float32)
            self._bias: Array = arrays["bias"].astype(np.float32)
            self._centroids: Array = np.ascontiguousarray(arrays["centroids"], dtype=np.float32)
            self._kinds = tuple(str(words) for words in metadata["kinds"])
            self._familiar_above = float(metadata["familiar_above"])
            self.transformer_below = float(metadata["transformer_below"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{artefact.id}: incomplete head ({error})") from error
        # Columns: three classes, then log(output tokens).
        if self._weights.shape != (width, 4) or self._bias.shape != (4,):
            raise ArtefactError(f"{artefact.id}: weights have shape {self._weights.shape}, expected ({width}, 4)")
        if self._centroids.shape != (len(self._kinds), dimensions):
            raise ArtefactError(f"{artefact.id}: centroids do not fit the kinds")

    def judge(self, vector: Array, structure: Array) -> Judgement:
        """Judge one prompt from its unit vector (dimensions,) and `features.structure` (18,)."""
        scores = np.concatenate((vector, structure)) @ self._weights + self._bias
        simple, medium, complex_ = scores[:3].tolist()
        top = max(simple, medium, complex_)
        raw = np.exp(scores[:3] - top)
        p = (raw / raw.sum()).tolist()
        difficulty = min(max(0.5 * p[1] + p[2], 0.0), 1.0)
        prompt_class = class_of(difficulty)
        nearness = self._centroids @ vector
        nearest = int(nearness.argmax())
        familiar = bool(nearness[nearest] >= self._familiar_above)
        confidence = p[CLASSES.index(prompt_class)] * (1.0 if familiar else UNFAMILIAR)
        tokens = round(float(np.exp(min(float(scores[3]), 10.0))))
        return Judgement(
            probabilities=(p[0], p[1], p[2]),
            difficulty=difficulty,
            prompt_class=prompt_class,
            confidence=min(confidence, 1.0),
            output_tokens=min(max(tokens, MIN_OUTPUT_TOKENS), MAX_OUTPUT_TOKENS),
            kind=self._kinds[nearest],
            familiar=familiar,
        )
