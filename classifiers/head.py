"""The head: an encoder's vector and the structural features in, a judgement out.

Trained by `classifiers/train.py` with scikit-learn; at run time two matrix products over plain arrays.
"""

from __future__ import annotations

import math
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


def calibrated(p: NDArray[np.float64], slope: float, offset: float) -> NDArray[np.float64]:
    """Map the raw probability of the class named (any shape, 0..1) to a calibrated one (Platt 1999)."""
    bounded = np.clip(p, 1e-6, 1.0 - 1e-6)
    result: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-slope * np.log(bounded / (1.0 - bounded)) - offset))
    return result


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a head thinks of one prompt.

    `probabilities`: of simple, medium, complex. `difficulty`: 0.5 p(medium) + p(complex). `confidence`: the
    probability of the class named, calibrated on kinds of task that were held out of the training, and halved
    when the prompt is not `familiar` (its nearest kind is further away than that of 95 % of the training
    prompts). `output_tokens`: expected length of the answer. `kind`: words for the nearest kind of task.
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
            self._slope, self._offset = (float(number) for number in metadata["calibration"])
            self._familiar_above = float(metadata["familiar_above"])
            self.transformer_below = float(metadata["transformer_below"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{artefact.id}: incomplete head ({error})") from error
        # Columns: three classes, then log(output tokens).
        if self._weights.shape != (width, 4) or self._bias.shape != (4,):
            raise ArtefactError(
                f"{artefact.id}: weights have shape {self._weights.shape}, expected ({width}, 4)"
            )
        if self._centroids.shape != (len(self._kinds), dimensions):
            raise ArtefactError(f"{artefact.id}: centroids do not fit the kinds")

    def judge(self, vector: Array, structure: Array) -> Judgement:
        """Judge one prompt from its unit vector (dimensions,) and `features.structure` (18,)."""
        scores = np.concatenate((vector, structure)) @ self._weights + self._bias
        raw = np.exp(scores[:3] - scores[:3].max())
        p = (raw / raw.sum()).tolist()
        difficulty = min(max(0.5 * p[1] + p[2], 0.0), 1.0)
        prompt_class = class_of(difficulty)
        nearness = self._centroids @ vector
        nearest = int(nearness.argmax())
        familiar = bool(nearness[nearest] >= self._familiar_above)
        named = min(max(p[CLASSES.index(prompt_class)], 1e-6), 1.0 - 1e-6)
        logit = self._slope * math.log(named / (1.0 - named)) + self._offset
        confidence = (1.0 if familiar else UNFAMILIAR) / (1.0 + math.exp(-logit))
        tokens = round(math.exp(min(float(scores[3]), 10.0)))
        return Judgement(
            probabilities=(p[0], p[1], p[2]),
            difficulty=difficulty,
            prompt_class=prompt_class,
            confidence=confidence,
            output_tokens=min(max(tokens, MIN_OUTPUT_TOKENS), MAX_OUTPUT_TOKENS),
            kind=self._kinds[nearest],
            familiar=familiar,
        )
