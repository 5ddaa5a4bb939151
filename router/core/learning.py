"""What is learned from an installation's own traffic: labels, and the success they predict for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Label:
    """How good one model's answer to one request was: `score` 0..1, `weight` how far that is to be believed.

    `source` is feedback, refusal, truncated, invalid_json, tool_error, repeated, shadow or judge. `propensity` is
    the probability with which the answer came about, `key_id` and `team` are those of the request.
    """

    request_id: str
    model: str
    score: float
    weight: float
    source: str
    propensity: float
    at: datetime
    key_id: str
    team: str
    comment: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A model's probability of a good answer, with an interval. `evidence` is the weight of the labels behind it;
    `fallback`: the prior alone speaks.
    """

    success: float
    lower: float
    upper: float
    evidence: float
    fallback: bool


class SuccessPredictor(Protocol):
    """Heads learned from this installation's labels. `id` is the artefact's, its hash included."""

    id: str
    encoder_id: str

    def predict(
        self, features: npt.NDArray[np.float32], prompt_class: str, priors: Mapping[str, float]
    ) -> Mapping[str, Estimate]:
        """By model, for those in `priors` (the prior of the class, 0..1)."""
        ...
