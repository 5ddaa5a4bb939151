"""Makes `classifiers/data/lexicon.json` and `.npz` from WordNet 3.0's database files.

    python -m classifiers.pairs.make_lexicon FOLDER      # the folder with data.noun, index.noun, ...

Debian's package `wordnet-base` carries the files (WordNet licence, Princeton University 2006; see data/NOTICE).
Kept are single words known to the encoders' vocabulary or common in WordNet's tagged texts, their most frequent
senses, and four relations: synonyms, direct hypernyms, antonyms, derivations.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers import artefact
from classifiers.encoder import DATA_DIRECTORY, load_tokenizer

PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
SENSES = {"n": 3, "v": 5, "a": 4, "r": 3}
VERSION = "1"


def read(folder: Path, ranks: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Return the lexicon's arrays (see `classifiers.pairs.lexicon.Lexicon`)."""
    senses: dict[str, list[tuple[str, int]]] = {}
    for name, part in PARTS.items():
        for line in (folder / f"index.{name}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            lemma, count, pointers = fields[0], int(fields[2]), int(fields[3])
            tagged = int(fields[5 + pointers])
            if "_" in lemma or not lemma.isalpha() or (lemma not in ranks and not tagged):
                continue
            offsets = fields[6 + pointers :][: min(count, SENSES[part])]
            senses.setdefault(lemma, []).extend((part, int(offset)) for offset in offsets)
    words = sorted(senses)
    index = {word: i for i, word in enumerate(words)}
    wanted = {sense for found in senses.values() for sense in found}

    synset_ids: dict[tuple[str, int], int] = {}

    def synset(key: tuple[str, int]) -> int:
        return synset_ids.setdefault(key, len(synset_ids))

    hypernyms: dict[tuple[str, int], set[int]] = defaultdict(set)
    groups: dict[tuple[str, int], set[int]] = defaultdict(set)
    antonyms: dict[int, set[int]] = defaultdict(set)
    derived: dict[int, set[int]] = defaultdict(set)
    links: list[tuple[dict[int, set[int]], int, tuple[str, int], int]] = []
    members: dict[tuple[str, int], list[str]] = {}
    for name, part in PARTS.items():
        for line in (folder / f"data.{name}").read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split("|")[0].split()
            key, count = (part, int(fields[0])), int(fields[3], 16)
            own = [w.split("(")[0].lower() for w in fields[4 : 4 + 2 * count : 2]]
            members[key] = own
            at = 5 + 2 * count
            for _ in range(int(fields[at - 1])):
                symbol, offset, target_part, ends = fields[at : at + 4]
                at += 4
                target = ("a" if target_part == "s" else target_part, int(offset))
                if symbol in ("@", "@i") and key in wanted:
                    hypernyms[key].add(synset(target))
                elif symbol in ("&", "$") and key in wanted:
                    groups[key].add(synset(target))
                elif symbol in ("!", "+", "\\"):
                    source = own[int(ends[:2], 16) - 1] if int(ends[:2], 16) else own[0]
                    if source in index:
                        links.append(
                            (antonyms if symbol == "!" else derived, index[source], target, int(ends[2:], 16))
                        )
    for table, source_word, target, word in links:
        other = members[target][word - 1] if word else members[target][0]
        if other in index and index[other] != source_word:
            table[source_word].add(index[other])

    def rows(found: list[set[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        starts = np.cumsum([0, *(len(row) for row in found)]).astype(np.int32)
        return starts, np.asarray([i for row in found for i in sorted(row)], dtype=np.int32)

    own_synsets = [{synset(key) for key in senses[word]} for word in words]
    near = [set().union(*(groups[key] for key in senses[word])) for word in words]
    above = [set().union(*(hypernyms[key] for key in senses[word])) for word in words]
    exceptions = {}
    for name in PARTS:
        for line in (folder / f"{name}.exc").read_text(encoding="latin-1").splitlines():
            form, *lemmas = line.split()
            if form.isalpha() and lemmas[0] in index and form not in exceptions and (form in ranks):
                exceptions[form] = lemmas[0]
    arrays: dict[str, NDArray[Any]] = {
        "words": _text(words),
        "ranks": np.asarray([ranks.get(word, 0) for word in words], dtype=np.int32),
        "exceptions": _text([f"{form} {lemma}" for form, lemma in sorted(exceptions.items())]),
    }
    for name, found in (
        ("synsets", own_synsets),
        ("similar", near),
        ("hypernyms", above),
        ("antonyms", [antonyms[i] for i in range(len(words))]),
        ("derived", [derived[i] for i in range(len(words))]),
    ):
        arrays[f"{name}_starts"], arrays[name] = rows(found)
    return arrays


def _text(lines: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join(lines).encode(), dtype=np.uint8)


def main() -> None:
    vocabulary = load_tokenizer(DATA_DIRECTORY / "tokenizer.json", max_pieces=None).get_vocab()
    ranks = {word: rank for word, rank in vocabulary.items() if word.isalpha() and len(word) > 1}
    arrays = read(Path(sys.argv[1]), ranks)
    made = artefact.save(
        DATA_DIRECTORY / "lexicon.json",
        name="lexicon",
        version=VERSION,
        encoder_id="none",
        metadata={
            "source": "WordNet 3.0, Debian package wordnet-base 1:3.0",
            "words": int(arrays["ranks"].size),
        },
        arrays=arrays,
    )
    print(made, {name: array.nbytes for name, array in arrays.items()})


if __name__ == "__main__":
    main()
