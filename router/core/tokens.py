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
    length = len(text)
    if text.isascii():
        return int(-(-length // _ASCII_CHARACTERS_PER_TOKEN))
    ascii_characters = len(text.encode("ascii", "ignore"))
    other = length - ascii_characters
    return int(ascii_characters / _ASCII_CHARACTERS_PER_TOKEN + other / _OTHER_CHARACTERS_PER_TOKEN) + 1
