"""What words mean to each other: base forms, rarity, and WordNet's relations, from one small artefact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY

NONE, SYNONYM, DERIVED, SIMILAR, BROADER, SISTER, ANTONYM = range(7)
# A word the vocabulary lacks is rarer than all it holds.
VOCABULARY = 30522
# The vocabulary's first thousand ids are no words.
FIRST_WORD = 1000
SHOWN = ("synsets", "similar", "hypernyms", "antonyms", "derived")


@dataclass(frozen=True, slots=True)
class Senses:
    """One word's rows: synsets it belongs to, similar and broader synsets, antonyms and derivations (word ids)."""

    word: int
    synsets: frozenset[int]
    similar: frozenset[int]
    hypernyms: frozenset[int]
    antonyms: frozenset[int]
    derived: frozenset[int]


class Lexicon:
    """About 22,000 words of WordNet 3.0 with their most frequent senses; see `make_lexicon.py`."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        words = arrays["words"].tobytes().decode().split("\n")
        self._index = {word: i for i, word in enumerate(words)}
        self._ranks = arrays["ranks"]
        lines = arrays["exceptions"].tobytes().decode().split("\n")
        self._exceptions = dict(line.split(" ", 1) for line in lines)
        self._rows = {name: (arrays[f"{name}_starts"], arrays[name]) for name in SHOWN}
        # Words come back again and again; the bound keeps a stream of odd words from growing the process.
        self.lemma = lru_cache(maxsize=16384)(self._lemma)
        self.senses = lru_cache(maxsize=4096)(self._senses)
        self.rarity = lru_cache(maxsize=16384)(self._rarity)
        self.relation = lru_cache(maxsize=16384)(self._relation)

    @classmethod
    def load(cls, directory: Path | None = None) -> Lexicon:
        """Load the shipped lexicon. Raises ArtefactError when it is missing or damaged."""
        artefact = Artefact.load((directory or DATA_DIRECTORY) / "lexicon.json")
        return cls(dict(artefact.arrays))

    def _lemma(self, word: str) -> str:
        """Return the base form of a lower-case word, or the word itself."""
        if word in self._exceptions:
            return self._exceptions[word]
        if len(word) < 4:
            return word
        if word.endswith("ss") or word.endswith("us"):
            return word
        if word.endswith("ies") and len(word) > 4:
            return word[:-3] + "y"
        if word.endswith(("ches", "shes", "sses", "xes", "zes")):
            return word[:-2]
        if word.endswith("s"):
            return word[:-1] if word[:-1] in self._index or word not in self._index else word
        for ending in ("ied", "ed", "ing"):
            if word.endswith(ending) and len(word) > len(ending) + 2:
                stem = word[: -len(ending)]
                candidates = [stem + "y"] if ending == "ied" else [stem + "e", stem]
                if ending != "ied" and len(stem) > 2 and stem[-1] == stem[-2]:
                    candidates = [stem[:-1], stem]
                # "being" is a noun as well: the verb's base is wanted where it is known.
                for candidate in sorted(candidates, key=lambda c: self._known_rank(c)):
                    if candidate in self._index:
                        return candidate
        return word

    def _known_rank(self, word: str) -> int:
        found = self._index.get(word)
        rank = int(self._ranks[found]) if found is not None else 0
        return rank or VOCABULARY

    def _rarity(self, word: str) -> float:
        """Return 0 for the commonest word to 1 for one the vocabulary lacks (log rank)."""
        rank = max(self._known_rank(word) - FIRST_WORD, 1)
        return float(np.log(rank) / np.log(VOCABULARY - FIRST_WORD))

    def known(self, word: str) -> bool:
        return word in self._index

    def _senses(self, word: str) -> Senses | None:
        found = self._index.get(word)
        if found is None:
            return None
        rows = []
        for name in SHOWN:
            starts, values = self._rows[name]
            rows.append(frozenset(values[starts[found] : starts[found + 1]].tolist()))
        return Senses(found, *rows)

    def _relation(self, a: str, b: str) -> int:
        """Say how two different base forms relate; the strongest relation, antonyms first."""
        x, y = self.senses(a), self.senses(b)
        if x is None or y is None:
            return NONE
        if y.word in x.antonyms or x.word in y.antonyms:
            return ANTONYM
        if x.synsets & y.synsets:
            return SYNONYM
        if y.word in x.derived or x.word in y.derived:
            return DERIVED
        if x.similar & y.synsets or y.similar & x.synsets:
            return SIMILAR
        if x.hypernyms & y.synsets or y.hypernyms & x.synsets:
            return BROADER
        if x.hypernyms & y.hypernyms:
            return SISTER
        return NONE
