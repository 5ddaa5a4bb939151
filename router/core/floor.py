"""Which cheaper model a class may use, and how far down: `classifiers/floor.py` applied to the policy in force.

Excess failures of several cheaper models would add up, so one of them serves a class beside the reference: of those
with a certificate the one that saves most on the labelled requests. The certificates of all candidates hold together,
so that choosing among them costs no confidence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from datetime import datetime
from decimal import ROUND_CEILING, Decimal

from classifiers.floor import Calibration, labels_needed
from router.core.learning import Floor
from router.core.policy import EffectivePolicy
from router.core.ports import Snapshot

MEMORY = 1024
_CENT = Decimal("0.01")
_Key = tuple[str, tuple[str, ...], str | None, str, Decimal, Decimal]


class QualityFloor:
    """Floors computed from one artefact's `calibration` (None: nothing is learned yet), each once, which takes some
    milliseconds a candidate model. With an `executor` nobody waits for that: until a floor is known the reference
    answers.
    """

    def __init__(self, calibration: Calibration | None, executor: Executor | None = None) -> None:
        self._calibration = calibration
        self._executor = executor if calibration is not None else None
        self._known: OrderedDict[_Key, Floor] = OrderedDict()
        self._pending: set[_Key] = set()

    def of(
        self,
        snapshot: Snapshot,
        policy: EffectivePolicy,
        prompt_class: str,
        min_quality: Decimal,
        at: datetime,
    ) -> Floor | None:
        """The floor of a class; None where the policy asks for no confidence. A `min_quality` above the policy's
        counts in whole percent, rounded up, so that callers' own wishes cannot ask for endlessly many floors.
        """
        requirement = policy.classes[prompt_class]
        if requirement.confidence is None:
            return None
        quality = max(requirement.min_quality, min_quality)
        if quality > requirement.min_quality:
            quality = quality.quantize(_CENT, ROUND_CEILING)
        key = (
            snapshot.hash, policy.allow, policy.baseline, prompt_class, quality, requirement.confidence,
        )  # fmt: skip
        found = self._known.get(key)
        if found is not None:
            return found
        reference = reference_of(snapshot, policy, prompt_class)
        if reference is None:
            return None
        saved = _saved(snapshot, policy, reference, at)
        work = (key, reference, requirement.confidence, saved)
        if self._executor is None:
            return self._fill(*work)
        if key not in self._pending:
            self._pending.add(key)
            self._executor.submit(self._fill, *work)
        return Floor(reference, requirement.confidence, None, 1.0, 0.0, {}, tuple(sorted(saved)))

    def _fill(self, key: _Key, reference: str, confidence: Decimal, saved: Mapping[str, Decimal]) -> Floor:
        _, _, _, prompt_class, quality, _ = key
        found = self._compute(reference, prompt_class, quality, confidence, saved)
        self._known[key] = found
        if len(self._known) > MEMORY:
            self._known.popitem(last=False)
        self._pending.discard(key)
        return found

    def missing(self) -> Iterator[tuple[str, str, int]]:
        """(class, model, clean labels missing), the most of any floor in use; for a gauge."""
        most: dict[tuple[str, str], int] = {}
        for key, floor in list(self._known.items()):
            counts = dict(floor.missing)
            if floor.model is not None:
                counts[floor.model] = 0
            for model, count in counts.items():
                place = (key[3], model)
                most[place] = max(count, most.get(place, 0))
        for (prompt_class, model), count in most.items():
            yield prompt_class, model, count

    def _compute(
        self,
        reference: str,
        prompt_class: str,
        quality: Decimal,
        confidence: Decimal,
        saved: Mapping[str, Decimal],
    ) -> Floor:
        compared = tuple(sorted(saved))
        max_excess, delta = float(1 - quality), float(1 - confidence)
        if self._calibration is None:
            needed = labels_needed(0, max_excess, delta / max(len(saved), 1))
            return Floor(reference, confidence, None, 1.0, 0.0, dict.fromkeys(saved, needed), compared)
        found = self._calibration.certificates(prompt_class, list(saved), reference, max_excess, delta)
        best = max(
            (entry for entry in found.values() if entry.threshold is not None),
            key=lambda entry: entry.share * float(saved[entry.model]),
            default=None,
        )
        missing = {name: entry.missing for name, entry in found.items() if entry.threshold is None}
        if best is None or best.threshold is None:
            return Floor(reference, confidence, None, 1.0, 0.0, missing, compared)
        return Floor(reference, confidence, best.model, best.threshold, best.bound, missing, compared)


def reference_of(snapshot: Snapshot, policy: EffectivePolicy, prompt_class: str) -> str | None:
    """What cheaper models are measured against: the baseline where allowed, else the model with the best prior."""
    if policy.baseline in policy.allow:
        return policy.baseline
    priors = {
        name: quality[prompt_class] for name in policy.allow if (quality := snapshot.models[name].quality)
    }
    return max(priors, key=lambda name: priors[name], default=None)


def _saved(snapshot: Snapshot, policy: EffectivePolicy, reference: str, at: datetime) -> dict[str, Decimal]:
    """What each cheaper model saves, in one figure to compare them by: three input tokens to one output token, as
    routing pays them. A model without a prior is never chosen, so it is not among them.
    """
    costs = {
        name: 3 * price.marginal_prices["input"] + price.marginal_prices["output"]
        for name in policy.allow
        if (price := snapshot.price(name, at)) is not None
    }
    dear = costs.get(reference, Decimal("Infinity"))
    return {
        name: dear - cost
        for name, cost in costs.items()
        if name != reference and cost < dear and snapshot.models[name].quality is not None
    }
