"""What is learned from an installation's own traffic: labels, and the success they predict for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from classifiers.floor import Calibration
    from classifiers.success_features import PromptFeatures


BUDGET = "learn"
"""The budget that shadow answers and judges are paid from."""
DRAWN = "floor"
DRAWN_SAME = "floor_same"
DRAWN_JUDGED = "floor_judge"
DRAWN_SOURCES = (DRAWN, DRAWN_SAME, DRAWN_JUDGED)
"""Of labels of requests that were compared for a quality floor (`classifiers.floor.draw_comparison`): by agreement,
by the same answer twice beyond doubt, and by a judge. Both answers of the pair are labelled. Certificates rest on
these alone.
"""
OWN_CALLS = "learn."
"""How endpoints of calls begin that the gateway makes of its own to learn: a team's cost, no request of its apps."""


@dataclass(frozen=True, slots=True)
class Label:
    """How good one model's answer to one request was: `score` 0..1, `weight` how far that is to be believed; 0: not
    at all, the row only says that the request was drawn.

    `source` is feedback, refusal, truncated, invalid_json, tool_error, repeated, shadow, judge or of `DRAWN_SOURCES`.
    `propensity` is the probability with which the answer came about, `key_id` and `team` are those of the request.
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


class Estimate(msgspec.Struct, frozen=True):
    """A model's probability of a good answer, with an interval. `evidence` is the weight of the labels behind it;
    `fallback`: the prior alone speaks, and `unfamiliar` says that it does because the prompt is unlike the labelled
    traffic, not for want of labels of this model.
    """

    success: float
    lower: float
    upper: float
    evidence: float
    fallback: bool
    unfamiliar: bool = False


class SuccessPredictor(Protocol):
    """Heads learned from this installation's labels. `id` is the artefact's, its hash included."""

    id: str
    encoder_id: str

    def predict(
        self, features: PromptFeatures, prompt_class: str, priors: Mapping[str, float]
    ) -> Mapping[str, Estimate]:
        """By model, for those in `priors` (the prior of the class, 0..1)."""
        ...


@dataclass(frozen=True, slots=True)
class Learned:
    """The artefact in force: what predicts, and the held-out rows that tell how far it may be relied on."""

    predictor: SuccessPredictor
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True)
class Floor:
    """How far down one class may be routed where its policy asks for confidence (`classifiers/floor.py`).

    Beside `reference` only `model` may answer, from a predicted success of `threshold` on, and nothing where it is
    None. `missing`: by cheaper model without a certificate, the clean labels it lacks. `bound`: on the excess failure
    rate of this rule against always using the reference; 0 where only the reference answers. `compared`: the
    cheaper models, on each of which a drawn request is as likely to be compared, with a certificate and without.
    """

    reference: str
    confidence: Decimal
    model: str | None
    threshold: float
    bound: float
    missing: Mapping[str, int]
    compared: tuple[str, ...] = ()

    def excludes(self, model: str, estimate: Estimate | None) -> str | None:
        """Why a model other than the reference may not answer; None: it may."""
        sure = f"{(self.confidence * 100).normalize():f} % confidence"
        if model in self.missing:
            count = self.missing[model]
            return f"quality floor: {count} label{'s' * (count != 1)} missing for {sure}"
        if self.model is None:
            return f"quality floor: nothing but {self.reference} is shown to do with {sure}"
        if model != self.model:
            return f"quality floor: {self.reference} and {self.model} answer for {sure}"
        if estimate is None or estimate.fallback:
            return (
                f"quality floor: the prompt is unlike the labelled traffic, so nothing is known with {sure}"
            )
        if estimate.success < self.threshold:
            return (
                f"quality floor: learned success {estimate.success:.2f} below {self.threshold:.2f} for {sure}"
            )
        return None
