"""The words of a task and its pairs of neighbouring words: what a head learns weights for."""

from __future__ import annotations

import re
from itertools import pairwise

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|\?")
# The same for plain text, in two thirds of the time.
_PLAIN_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9]+|\?")
_DIGIT = re.compile(r"\d")
NUMBER = "0"


def said(task: str) -> tuple[str, ...]:
    """Return the words and the pairs of words of a task (`features.read`), each once, in lower case.

    Any number is the word "0", a question mark is a word.
    """
    task = task.lower()
    plain = task.isascii()
    words = _PLAIN_WORD.findall(task) if plain else _WORD.findall(task.replace("\u2019", "'"))
    if _DIGIT.search(task):
        words = [NUMBER if word[0].isdecimal() else word for word in words]
    return tuple(dict.fromkeys((*words, *map(" ".join, pairwise(words)))))
