"""Token counts good enough to decide with. True usage is booked at settlement.

A tokenizer's tables cannot be had offline, and an exact count costs more than the decision it feeds. The
constants are characters per token of common byte-pair vocabularies: about four for Latin text, less than two
for scripts outside it.
"""

from __future__ import annotations

_ASCII_CHARACTERS_PER_TOKEN = 4.0
_OTHER_CHARACTERS_PER_TOKEN = 1.6

MESSAGE_OVERHEAD = 4
"""Tokens a chat template adds for each message (role and separators)."""


def estimate_tokens(text: str) -> int:
    """About how many tokens `text` is, rounded up."""
    return tokens_of(len(text), outside_ascii(text))


def tokens_of(characters: int, other: int) -> int:
    """The same for a text of so many characters, `other` of them outside ASCII."""
    if not other:
        return int(-(-characters // _ASCII_CHARACTERS_PER_TOKEN))
    return int((characters - other) / _ASCII_CHARACTERS_PER_TOKEN + other / _OTHER_CHARACTERS_PER_TOKEN) + 1


def outside_ascii(text: str) -> int:
    """Characters of `text` outside ASCII."""
    return 0 if text.isascii() else len(text) - len(text.encode("ascii", "ignore"))
