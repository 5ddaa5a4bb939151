"""The verifier: how probable it is that the stored answer to one prompt is the right answer to another.

Boosted trees over `classifiers.pairs.features`, trained by `classifiers/pairs/train.py`; at run time a handful of
array look-ups. Before it stands the guard, which refuses on plain evidence alone.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY, ArtefactError, Encoder
from classifiers.pairs import features, guard
from classifiers.pairs.bound import Labelled, threshold_for
from classifiers.pairs.lexicon import Lexicon

# Stands for "there is no such number": trees are trained on it as on any value.
MISSING = -9.0
# Reasons that refuse whatever the verifier thinks. The others are weighed: "not" and "only" also turn up in
# honest rewordings.
REFUSING = frozenset(("number", "date", "order", "format", "rest", *guard.UNREAD))
COSINE = features.names().index("cosine")
# What `enforce` assumes: of three candidates one is a trap. A scope's own share is measured in `certified` mode.
TRAP_SHARE = 1 / 3
# How high the cosine of two prompts by MiniLM gets at a cosine by the static encoder: no pair of 5,553 lies above by
# more than 0.02 (docs/semantic-cache.md).
STATIC, HIGHEST = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (0.82, 0.82, 0.84, 0.9, 0.95, 0.975, 0.99, 1.0)
# The trees do not rise everywhere with the cosine: so much more than at the highest a candidate may turn out.
MARGIN = 0.02


@dataclass(frozen=True, slots=True)
class Trees:
    """Trees laid out one after the other. Node i goes to `children[2 i]` if x[feature] <= threshold, else to the
    next entry; a leaf leads to itself and carries `value`. `roots`: the first node of each tree."""

    feature: NDArray[np.integer[Any]]
    threshold: NDArray[np.float32]
    children: NDArray[np.integer[Any]]
    value: NDArray[np.float32]
    roots: NDArray[np.integer[Any]]
    depth: int
    offset: float

    def scores(self, table: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the log-odds of every row of `table`, shape (rows, features)."""
        filled = np.nan_to_num(table, nan=MISSING)
        result = np.empty(len(filled))
        left = 2 * np.arange(len(self.feature))
        for row, x in enumerate(filled):
            # Where every node leads: quicker than to look up feature and threshold at each step of each tree.
            following = self.children.take(left + (x.take(self.feature) > self.threshold))
            node = self.roots
            for _ in range(self.depth):
                node = following.take(node)
            result[row] = self.value.take(node).sum() + self.offset
        return result

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "feature": self.feature,
            "threshold": self.threshold,
            "children": self.children,
            "value": self.value,
            "roots": self.roots,
        }

    @classmethod
    def from_sklearn(cls, fitted: Any) -> Trees:
        """Take the trees out of a fitted binary HistGradientBoostingClassifier trained without NaN."""
        feature: list[int] = []
        threshold: list[float] = []
        children: list[int] = []
        value: list[float] = []
        roots: list[int] = []
        depth = 0
        for (predictor,) in fitted._predictors:
            nodes, first = predictor.nodes, len(feature)
            roots.append(first)
            depth = max(depth, int(nodes["depth"].max()))
            for i, node in enumerate(nodes):
                leaf = bool(node["is_leaf"])
                feature.append(0 if leaf else int(node["feature_idx"]))
                threshold.append(np.inf if leaf else float(node["num_threshold"]))
                children += (
                    [first + i] * 2 if leaf else [first + int(node["left"]), first + int(node["right"])]
                )
                value.append(float(node["value"]) if leaf else 0.0)
        return cls(
            feature=np.asarray(feature, dtype=np.int32),
            threshold=np.asarray(threshold, dtype=np.float32),
            children=np.asarray(children, dtype=np.int32),
            value=np.asarray(value, dtype=np.float32),
            roots=np.asarray(roots, dtype=np.int32),
            depth=depth,
            offset=float(np.ravel(fitted._baseline_prediction)[0]),
        )


@dataclass(frozen=True, slots=True)
class Opinion:
    """What the verifier thinks of one candidate.

    `probability`: that the stored answer is right, calibrated on families of prompts that were held out of the
    training, half of them traps. `reasons`: what the guard found (see `guard.REASONS`). `refused`: one of them
    refuses whatever the probability.
    """

    probability: float
    reasons: tuple[str, ...]
    refused: bool


@dataclass(frozen=True, slots=True)
class Compared:
    """A prompt beside stored ones: what the guard found of each, and the features of those it does not refuse, all
    but the cosine by the cache's encoder. `rows`: place among the stored ones -> row of the table.
    """

    reasons: tuple[tuple[str, ...], ...]
    rows: Mapping[int, int]
    table: NDArray[np.float32] | None


class Verifier:
    """Judges candidates. Immutable but for a bounded memory of prompts read; safe to share between threads.

    What it remembers of a prompt is the `owner`'s alone: nobody's request is quicker because of what others asked.
    """

    def __init__(self, artefact: Artefact, pairs: features.PairFeatures, *, remembered: int = 1024) -> None:
        metadata, arrays = artefact.metadata, artefact.arrays
        if tuple(metadata["features"]) != features.names():
            raise ArtefactError(
                "verifier: trained on other features than this version computes; train it again"
            )
        self.id = artefact.id
        self.encoder_id = artefact.encoder_id
        self._pairs = pairs
        self._trees = Trees(
            # As NumPy indexes: otherwise every look-up converts them.
            feature=arrays["feature"].astype(np.intp),
            threshold=arrays["threshold"],
            children=arrays["children"].astype(np.intp),
            value=arrays["value"],
            roots=arrays["roots"].astype(np.intp),
            depth=int(metadata["depth"]),
            offset=float(metadata["offset"]),
        )
        self._slope, self._intercept = (float(v) for v in metadata["calibration"])
        self._shipped = [
            Labelled(score=float(s), right=bool(r))
            for s, r in zip(arrays["held_out_probability"], arrays["held_out_same"], strict=True)
        ]
        self._thresholds: dict[float, float] = {}
        self._remembered = remembered
        self._read: OrderedDict[tuple[str, str], features.ReadPrompt] = OrderedDict()
        self._reading = threading.Lock()

    @classmethod
    def load(cls, static: Encoder, *, encoder_id: str, directory: Path | None = None) -> Verifier:
        """Load the shipped verifier for the cache's encoder `encoder_id`; `static` gives the word vectors.

        Raises ArtefactError when files are missing or damaged, or were made for other encoders.
        """
        directory = directory or DATA_DIRECTORY
        artefact = Artefact.load(directory / "verifier.json", encoder_id=encoder_id)
        if artefact.metadata["word_encoder"] != static.id:
            raise ArtefactError("verifier.json was made with other word vectors: train it again")
        return cls(artefact, features.PairFeatures(Lexicon.load(directory), static))

    def read(self, prompt: str, owner: str = "") -> features.ReadPrompt:
        """Read a prompt, or take it from the memory of the last thousand."""
        key = (owner, prompt)
        with self._reading:
            found = self._read.get(key)
            if found is not None:
                self._read.move_to_end(key)
                return found
        found = self._pairs.read(prompt)
        with self._reading:
            self._read[key] = found
            while len(self._read) > self._remembered:
                self._read.popitem(last=False)
        return found

    def reasons(self, prompt: str, other: str, owner: str = "") -> tuple[str, ...]:
        """Say what the guard finds between two prompts (see `guard.REASONS`)."""
        return features.reasons(self.read(prompt, owner), self.read(other, owner))

    def compared(self, prompt: str, others: Sequence[str], owner: str = "") -> Compared:
        """Compare a prompt with stored ones, as far as that goes without the cache's encoder."""
        mine = self.read(prompt, owner)
        read = [self.read(text, owner) for text in others]
        reasons = tuple(features.reasons(mine, other) for other in read)
        # A refused candidate needs no probability.
        rows = [at for at, found in enumerate(reasons) if REFUSING.isdisjoint(found)]
        table = [self._pairs.compare(mine, read[at], math.nan, reasons[at]) for at in rows]
        return Compared(reasons, {at: row for row, at in enumerate(rows)}, np.stack(table) if table else None)

    def ceilings(
        self, prompt: str, candidates: Sequence[tuple[str, float]], owner: str = ""
    ) -> list[float | None]:
        """Say how probable each candidate may turn out at most, before the cache's encoder is asked.

        A candidate is a stored prompt and its cosine to `prompt` by the static encoder. None: the guard refuses it.
        """
        compared = self.compared(prompt, [text for text, _ in candidates], owner)
        return self.ceilings_of(compared, [cosine for _, cosine in candidates])

    def ceilings_of(self, compared: Compared, cosines: Sequence[float]) -> list[float | None]:
        """The same of prompts that have been compared."""
        highest = np.interp(cosines, STATIC, HIGHEST)
        probable = self._probabilities(compared, {at: float(highest[at]) for at in compared.rows})
        return [
            None if (p := probable.get(at)) is None else min(1.0, p + MARGIN)
            for at in range(len(compared.reasons))
        ]

    def opinions(
        self, prompt: str, candidates: Sequence[tuple[str, float]], owner: str = ""
    ) -> list[Opinion]:
        """Judge candidates, each a stored prompt and its cosine to `prompt` by the cache's encoder."""
        compared = self.compared(prompt, [text for text, _ in candidates], owner)
        return self.opinions_of(compared, {at: cosine for at, (_, cosine) in enumerate(candidates)})

    def opinions_of(self, compared: Compared, cosines: Mapping[int, float]) -> list[Opinion]:
        """The same of some of the prompts that have been compared, in the order of `cosines`."""
        probable = self._probabilities(compared, cosines)
        return [Opinion(probable.get(at, 0.0), compared.reasons[at], at not in probable) for at in cosines]

    def _probabilities(self, compared: Compared, cosines: Mapping[int, float]) -> dict[int, float]:
        """Of those that the guard does not refuse."""
        judged = [at for at in cosines if at in compared.rows]
        if not judged or compared.table is None:
            return {}
        table = compared.table[[compared.rows[at] for at in judged]]
        table[:, COSINE] = [cosines[at] for at in judged]
        return dict(zip(judged, self.calibrated(self._trees.scores(table)), strict=True))

    def calibrated(self, scores: Iterable[float]) -> list[float]:
        """Map log-odds to calibrated probabilities (Platt 1999)."""
        return [
            1.0 / (1.0 + math.exp(-min(max(self._slope * s + self._intercept, -40.0), 40.0))) for s in scores
        ]

    def threshold(self, max_error: float) -> float:
        """Return the least probability at which a candidate is served in `enforce` mode; 1.01 serves nothing.

        Chosen on the held-out pairs that ship with Farthing: with confidence 95 % wrong / served stays under
        `max_error` on such pairs as long as at most a third of the candidates are traps. Other traffic has other
        traps: only `certified` holds the bound for a scope's own.
        """
        if max_error not in self._thresholds:
            chosen = threshold_for(self._shipped, max_error=max_error, trap_share=TRAP_SHARE)
            self._thresholds[max_error] = 1.01 if chosen is None else chosen.threshold
        return self._thresholds[max_error]
