"""What the success heads read of a prompt: counts of its structure, hashed word n-grams, an encoder's vector.

All work is bounded: at most 4,501 characters (both ends of a long prompt) are read.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import Encoder, Vectors
from classifiers.features import excerpt

Floats = NDArray[np.float32]

# Word n-grams up to this length are hashed into 2^16 buckets (Weinberger et al. 2009, "Feature hashing").
MAX_GRAM = 3
BUCKETS = 1 << 16

# Every repetition is bounded or linear: the patterns run on text that a caller chose.
_TOKEN = re.compile(r"[^\W_]+|[^\w\s]")
_OPTION = re.compile(r"^[ \t]{0,4}\(?[A-J][.):][ \t]{1,4}(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"\d[\d,]{0,15}(?:\.\d{1,9})?")
_FORMULA = re.compile(r"\b[a-z]\^|[a-z]_\d|\d?[a-z] ?[=+\-] ?[\w(]|\b[a-zA-Z]\([a-z]\)")
_UNIT = re.compile(r"\d\s?(?:kg|g|mg|cm|mm|km|ms|[mslLJNVWKA]|Hz|mol|mL|eV)\b")
# One of these is in every formula, and one of those a token of whatever looks like code.
_SIGN = re.compile(r"[\^_=+(\-]")
_CODE_TOKENS = frozenset(("{", "}", ";", "=", "def", "return", "int", "class"))
_NUMERIC = re.compile(r"[\s$+-]{0,4}[\d,.]+\s?\S{0,6}")
_CODE = re.compile(r"[{};]|=>|\b(?:def|return|int|class)\b")

_WORDS: dict[str, str] = {
    "negation": "not no never none except neither nor without least incorrect false cannot t",
    "arithmetic": "each every per times twice half third quarter double triple total left remain remaining remains "
    "more less fewer than altogether average percent ratio equally split share shared cost costs sum",
    "time": "hour hours minute minutes day days week weeks month months year years second seconds old ago later",
    "fraction": "half third quarter fifth fourth thirds quarters percent",
    "roman": "i ii iii iv",
    "what": "what",
    "why": "why",
    "how": "how",
    "who": "who whom whose",
    "when": "when",
    "where": "where",
    "which": "which",
    "best": "best",
    "most": "most",
    "if": "if suppose assume",
    "because": "because",
    "true": "true",
    "correct": "correct",
    "following": "following",
    "passage": "passage",
    "refer": "refer refers",
    "calculate": "calculate compute find determine",
    "probability": "probability likely",
    "case": "case",
    "patient": "patient woman man",
    "scenario": "scenario",
    "wrong": "wrong moral morally",
    "statement": "statement",
    "function": "function python program",
}
_PHRASES = (
    "which of the following",
    "all of the above",
    "none of the",
    "according to",
    "how many",
    "how much",
    "year-old",
    "__",
    "\n",
    ",",
    "?",
    '"',
    "(",
    ";",
    "|",
    "$",
    "%",
    "/",
    "=",
    "*",
    "^",
)
_CAPITAL_NEGATIONS = ("NOT", "EXCEPT", "LEAST", "FALSE", "INCORRECT")
_UPPER, _DIGITS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"0123456789"
_CATEGORY: dict[str, tuple[int, ...]] = {}
for _index, _members in enumerate(_WORDS.values()):
    for _word in _members.split():
        _CATEGORY[_word] = (*_CATEGORY.get(_word, ()), _index)

NAMES: tuple[str, ...] = (
    "log_characters",
    "log_characters_squared",
    "log_words",
    "letters_per_word",
    "sentences",
    "words_per_sentence",
    "distinct_words",
    "options",
    "option_length_mean",
    "option_length_max",
    "option_length_min",
    "option_length_range",
    "options_numeric",
    "options_with_digits",
    "option_overlap_stem",
    "numbers",
    "numbers_per_word",
    "distinct_numbers",
    "largest_number",
    "smallest_number",
    "decimal_number",
    "formulas",
    "units",
    "code",
    "capital_negation",
    "ends_with_question",
    "ends_with_colon",
    "upper_share",
    "digit_share",
    "capitalised_words",
    "non_ascii_share",
    "last_line_words",
    "last_sentence_words",
    "long_words",
    *(f"words_{name}" for name in _WORDS),
    *(f"contains_{phrase!r}" for phrase in _PHRASES),
)


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """One prompt. `structure`: float32 (len(NAMES),). `grams`: int64 bucket ids, ascending and distinct, with
    `counts` float32 of the same shape. `vector`: float32, one or more encoders' unit vectors side by side."""

    structure: Floats
    grams: NDArray[np.int64]
    counts: Floats
    vector: Vectors


def read(text: str, vector: Vectors) -> PromptFeatures:
    """Return the features of a text of any length whose vector was computed before."""
    part = excerpt(text)
    tokens = _TOKEN.findall(part)
    lower = [token.lower() for token in tokens]
    grams, counts = _grams(lower)
    return PromptFeatures(_structure(part, len(text), tokens, lower), grams, counts, vector)


def vectors(encoders: Sequence[Encoder], texts: Sequence[str]) -> Vectors:
    """Return the encoders' vectors side by side, float32 (len(texts), sum of dimensions)."""
    return np.concatenate([encoder.encode(texts) for encoder in encoders], axis=1)


def encoders_id(encoders: Sequence[Encoder]) -> str:
    """Return the id under which heads on these encoders' vectors are stored."""
    return "+".join(encoder.id for encoder in encoders)


_TRUE = np.ones(1, dtype=bool)
_SPREAD, _ODD, _OFFSET, _MIX = map(np.uint32, (2654435761, 40503, 97, 2246822519))
_HALF, _KEPT = np.uint32(15), np.uint32(16)


def _grams(words: list[str]) -> tuple[NDArray[np.int64], Floats]:
    """Hash the 1- to 3-grams; crc32 per word, a multiplicative mix for sequences (all modulo 2^32)."""
    if not words:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    crc = zlib.crc32
    one = np.array([crc(word.encode("utf-8", "replace")) for word in words], dtype=np.uint32)
    parts, last = [one], one
    turned = one * _ODD + _OFFSET
    for size in range(1, min(MAX_GRAM, len(words))):
        last = (last[:-1] * _SPREAD) ^ turned[size:]
        parts.append(last)
    hashed = np.concatenate(parts)
    hashed ^= hashed >> _HALF
    hashed *= _MIX
    hashed >>= _KEPT
    hashed.sort()
    # As np.unique does it, without its ways through Python.
    borders = np.concatenate((_TRUE, hashed[1:] != hashed[:-1], _TRUE)).nonzero()[0]
    first = borders[:-1]
    return hashed[first].astype(np.int64), (borders[1:] - first).astype(np.float32)


def _structure(part: str, characters: int, tokens: list[str], lower: list[str]) -> Floats:
    log = math.log1p
    size, distinct = max(len(part), 1), set(lower)
    if part.isascii():
        # Deleting bytes is quicker than asking every character.
        read, ascii_size = part.encode("ascii"), size
        upper = len(read) - len(read.translate(None, _UPPER))
        digits = len(read) - len(read.translate(None, _DIGITS))
    else:
        ascii_size = sum(character < "\x80" for character in part)
        upper, digits = sum(map(str.isupper, part)), sum(map(str.isdigit, part))
    # A pattern that cannot match is not tried: each takes microseconds that a request waits for.
    first = _OPTION.search(part) if "\n" in part else None
    options = _OPTION.findall(part) if first else []
    if len(options) < 2:
        options, stem = [], part
    else:
        stem = part[: first.start()] if first else part
    words = [word for word in tokens if word[0].isalnum()]
    count = max(len(words), 1)
    lengths = [len(option) for option in options] or [0]
    stem_words = set(_TOKEN.findall(stem.lower())) if options else set()
    overlap = 0.0
    for option in options:
        inside = _TOKEN.findall(option.lower())
        overlap += sum(word in stem_words for word in inside) / max(len(inside), 1) / len(options)
    numbers = _NUMBER.findall(stem) if digits else []
    values = [float(number.replace(",", "")) for number in numbers]
    sentences = stem.count(". ") + stem.count("? ") + stem.count(".\n") + stem.count("?\n") + 1
    end = stem.rstrip()
    last_line = end.rpartition("\n")[2]
    last_sentence = max(end.rpartition(". ")[2], "", key=len)
    categories = [0] * len(_WORDS)
    for word in lower:
        for index in _CATEGORY.get(word, ()):
            categories[index] += 1
    folded = part.lower()
    return np.array(
        (
            log(characters),
            log(characters) ** 2 / 10.0,
            log(len(words)),
            sum(map(len, words)) / count,
            log(sentences),
            min(count / sentences / 20.0, 20.0),
            len(distinct) / max(len(lower), 1),
            len(options) / 4.0,
            log(sum(lengths) / len(lengths)),
            log(max(lengths)),
            log(min(lengths)),
            log(max(lengths) - min(lengths)),
            sum(_NUMERIC.fullmatch(option.strip()[:40]) is not None for option in options) / 4.0,
            sum(any(map(str.isdigit, option)) for option in options) / 4.0,
            overlap,
            log(len(numbers)),
            len(numbers) / count,
            log(len(set(values))),
            log(min(max(values, default=0.0), 1e12)) / 5.0,
            log(min(min(values, default=0.0), 1e12)) / 5.0,
            float(any("." in number for number in numbers)),
            log(len(_FORMULA.findall(part)) if _SIGN.search(part) else 0),
            log(len(_UNIT.findall(part)) if digits else 0),
            log(0 if distinct.isdisjoint(_CODE_TOKENS) else len(_CODE.findall(part))),
            float(sum(map(part.count, _CAPITAL_NEGATIONS))),
            float(end.endswith("?")),
            float(end.endswith(":")),
            upper / size * 10.0,
            digits / size * 5.0,
            sum([word[0].isupper() for word in words]) / count,
            (1.0 - ascii_size / size) * 10.0,
            log(last_line.count(" ") + 1),
            log(last_sentence.count(" ") + 1),
            sum([len(word) > 9 for word in words]) / count * 5.0,
            *map(log, categories),
            *map(log, map(folded.count, _PHRASES)),
        ),
        dtype=np.float32,
    )
