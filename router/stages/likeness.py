"""How alike prompts are: the encoders and the verifier of the semantic cache, asked for as little as will do."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from classifiers.classifier import Classifier
from classifiers.encoder import DATA_DIRECTORY
from classifiers.pairs import features, guard, lexicon, verifier
from classifiers.pairs.verifier import Verifier

log = logging.getLogger("farthing")

Vector = NDArray[np.float32]

REMEMBERED = 2_000
"""Vectors of the transformer remembered, by owner and text; 1.5 kB each."""
JUDGED = 4
"""Stored prompts for which the transformer is asked, at most."""
TOGETHER = 2
"""Stored prompts that are read before those further away, which need not be where one of these may answer."""


READING = guard, features, verifier, lexicon
"""What decides beside the trained trees. Where one changes, other pairs are candidates, and what was learned of the
earlier ones says nothing of them.
"""


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored prompt that may be near. `near`: cosine of the sketches. `vector`: float16 of the transformer; empty
    or zeros where nobody has made it yet.
    """

    prompt: str
    near: float
    vector: bytes


@dataclass(frozen=True, slots=True)
class Judged:
    """`index` of the stored prompt; `probability` that its answer is right."""

    index: int
    similarity: float
    probability: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """What may answer, the most probable first. `threshold`: the shipped one at the user's `max_error`; `refused`:
    stored prompts that the guard refused; `doubts`: where none may answer, what speaks against the nearest, in words.
    """

    judged: tuple[Judged, ...]
    threshold: float
    refused: int
    doubts: tuple[str, ...] = ()


class Likeness(Protocol):
    """`id` changes with each of its parts. `sketch` is quick; the others take milliseconds and may be called from
    other threads. `owner`: whose text it is. What is remembered of a text makes nobody else's request quicker: the
    time it takes would tell what others ask.
    """

    @property
    def id(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    @property
    def ready(self) -> bool:
        """Whether it is loaded. Nobody waits for that."""
        ...

    def load(self) -> None: ...

    def sketch(self, text: str) -> Vector: ...

    def vector(self, text: str, owner: str = "") -> Vector: ...

    def threshold(self, max_error: float) -> float: ...

    def rank(
        self,
        text: str,
        stored: Sequence[Stored],
        max_error: float,
        least: float | None = None,
        owner: str = "",
    ) -> Ranking:
        """Those at least as probable as `least` (None: as the shipped threshold). `stored`: the nearest first; those
        further away are looked at where none nearer reaches the shipped threshold.
        """
        ...


class ShippedLikeness:
    """The encoders and the verifier that ship with Farthing; the verifier is loaded when it is first needed."""

    dimensions = 384

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._static = classifier.static
        # Known before anything is loaded; loading checks that these are the files in force.
        described = json.loads((DATA_DIRECTORY / "verifier.json").read_text(encoding="utf-8"))
        self.id = "/".join(
            (self._static.id, described["encoder"], described["sha256"][:12], _fingerprint(*READING))
        )
        self.ready = False
        self._lock = threading.Lock()
        self._verifier: Verifier | None = None
        self._vectors: OrderedDict[tuple[str, str], Vector] = OrderedDict()

    def load(self) -> None:
        """Loads all that a look-up needs. Takes up to a second; a failure is logged, and it is not ready then."""
        try:
            self.rank("How are you?", [Stored("how are you doing?", 0.9, b"")], 0.05, 0.0, owner="")
        except Exception:
            log.exception("nothing is answered by likeness: the verifier or its encoder cannot be loaded")
        else:
            self.ready = True

    @property
    def verifier(self) -> Verifier:
        with self._lock:
            if self._verifier is None:
                self._verifier = Verifier.load(self._static, encoder_id=self._classifier.minilm.id)
            return self._verifier

    def sketch(self, text: str) -> Vector:
        sketch: Vector = self._static.encode((text,))[0]
        return sketch

    def vector(self, text: str, owner: str = "") -> Vector:
        key = (owner, text)
        with self._lock:
            found = self._vectors.get(key)
            if found is not None:
                self._vectors.move_to_end(key)
                return found
        made: Vector = self._classifier.minilm.encode((text,))[0]
        with self._lock:
            self._vectors[key] = made
            if len(self._vectors) > REMEMBERED:
                self._vectors.popitem(last=False)
        return made

    def threshold(self, max_error: float) -> float:
        return self.verifier.threshold(max_error)

    def rank(
        self,
        text: str,
        stored: Sequence[Stored],
        max_error: float,
        least: float | None = None,
        owner: str = "",
    ) -> Ranking:
        verifier = self.verifier
        threshold = verifier.threshold(max_error)
        floor = threshold if least is None else least
        judged: list[Judged] = []
        refused = asked = 0
        for first in range(0, len(stored), TOGETHER):
            group = stored[first : first + TOGETHER]
            compared = verifier.compared(text, [one.prompt for one in group], owner)
            ceilings = verifier.ceilings_of(compared, [one.near for one in group])
            refused += sum(ceiling is None for ceiling in ceilings)
            # The transformer is asked only where its answer could make the candidate one.
            chosen = [at for at, ceiling in enumerate(ceilings) if ceiling is not None and ceiling >= floor]
            chosen = chosen[: JUDGED - asked]
            if not chosen:
                continue
            asked += len(chosen)
            mine = self.vector(text, owner)
            cosines = {at: float(mine @ self._vector_of(group[at], owner)) for at in chosen}
            for (at, cosine), opinion in zip(
                cosines.items(), verifier.opinions_of(compared, cosines), strict=True
            ):
                if not opinion.refused and opinion.probability >= floor:
                    judged.append(Judged(first + at, cosine, opinion.probability, opinion.reasons))
            # Most that is found is found among the nearest; what lies further is not read then.
            if any(one.probability >= threshold for one in judged):
                break
        judged.sort(key=lambda one: (-one.probability, -one.similarity))
        return Ranking(tuple(judged), threshold, refused, () if judged else self._doubts(text, stored, owner))

    def _doubts(self, text: str, stored: Sequence[Stored], owner: str) -> tuple[str, ...]:
        if not stored:
            return ()
        found = self.verifier.reasons(text, max(stored, key=lambda one: one.near).prompt, owner)
        return tuple(guard.WORDS[reason] for reason in found) or ("not sure enough",)

    def _vector_of(self, stored: Stored, owner: str) -> Vector:
        vector = np.frombuffer(stored.vector, dtype="<f2").astype(np.float32)
        if vector.size == self.dimensions and vector.any():
            return vector
        return self.vector(stored.prompt, owner)


def _fingerprint(*modules: ModuleType) -> str:
    """Of their code and of the lexicon: unlike a number counted by hand it cannot be forgotten."""
    read = hashlib.sha256()
    for path in (*(Path(str(module.__file__)) for module in modules), DATA_DIRECTORY / "lexicon.json"):
        read.update(hashlib.sha256(path.read_bytes()).digest())
    return read.hexdigest()[:12]
