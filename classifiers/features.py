"""Structural features of a prompt: what can be counted without understanding it.

All work is bounded: of a long prompt only its beginning and its end are read, where people put the task.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

# Characters read from the beginning and the end for counting ...
HEAD_CHARACTERS, TAIL_CHARACTERS = 3000, 1500
# ... and for the encoders: the task stands at an edge; a pasted document between would drown it in the mean.
FOCUS_HEAD, FOCUS_TAIL, FOCUS_GLIMPSE = 300, 300, 100

NAMES = (
    "log_characters",
    "log_words",
    "log_lines",
    "characters_per_word",
    "code_signs",
    "code_fence",
    "maths_signs",
    "digit_share",
    "questions",
    "list_items",
    "instructions",
    "reasoning_words",
    "constraint_words",
    "lookup_start",
    "commas_and_semicolons",
    "quoted",
    "upper_share",
    "non_latin_share",
)

# Every repetition is bounded: the patterns run on text that a caller chose.
_WORD = re.compile(r"\w+")
_CODE = re.compile(
    r"[{};][ \t]{0,8}$"
    r"|^[ \t]{0,40}(?:def|class|import|from|func|fn|public|private|const|let|var|return|#include|for|while|if)\b"
    r"|\w\([^()\n]{0,80}\)[ \t]{0,8}[:{;]|=>|->|::|==|!=|&&|\|\||</\w{1,20}>|\bSELECT\b|\bself\.",
    re.MULTILINE,
)
_MATHS = re.compile(r"[=^<>+*/\u2200-\u22ff\u0391-\u03c9]|\\[a-z]+|\b\w\(\w\)")
_LIST = re.compile(r"^[ \t]{0,40}(?:[-*\u2022]|\d{1,2}[.)])[ \t]{1,8}\S|\b\d\)\s", re.MULTILINE)
_INSTRUCTION = re.compile(
    r"\b(?:write|explain|list|compare|describe|give|find|show|prove|derive|design|implement|create|make|draft|plan|"
    r"summari[sz]e|translate|rewrite|convert|extract|classify|compute|calculate|evaluate|analy[sz]e|discuss|assess|"
    r"propose|recommend|justify|estimate|identify|build|solve|fix|review|argue|determine|decide|keep|state|return|"
    r"include|mention|add|use|suggest|outline|develop|reconstruct|quantify|schreibe|erkl\u00e4re|beweise|vergleiche|"
    r"\u00e9cris|explique|explica|escribe|demuestra)\b",
    re.IGNORECASE,
)
_REASONING = re.compile(
    r"\b(?:prov(?:e|es|ing)|proof|deriv(?:e|ation)|rigorous\w*|trade-?offs?|architect\w*|distributed|concurren\w*|"
    r"consisten\w*|lock-free|deadlocks?|race|invariants?|root cause|assumptions?|counter-?(?:example|argument)s?|"
    r"critical\w*|implications?|hypothes[ie]s|sensitivity|scenarios?|theor(?:em|y)|asymptotic\w*|optimal\w*|"
    r"optimi[sz]ation|causal\w*|identification|mechanism|robust\w*|why|justify\w*|argue|analy[sz]e|assess|strateg\w*|"
    r"negotiat\w*|liabilit\w*|complexity|converge\w*|failure modes?|reconcile|interact\w*|migrat\w*|"
    r"beweis\w*|d\u00e9montr\w*|demuestr\w*)\b",
    re.IGNORECASE,
)
_CONSTRAINT = re.compile(
    r"\b(?:must|at most|at least|exactly|without|only|each|every|under|within|no more than|avoid|ensure|between|"
    r"with|using|do not|don't|mindestens|h\u00f6chstens|sin|sans|ohne)\b",
    re.IGNORECASE,
)
_LOOKUP = re.compile(
    r"(?:what(?:'s| is| does| are| year)|who|when|where|how (?:many|much|tall|old|long|far|do i|do you say)|which|is|"
    r"are|does|do|can|name|spell|convert|translate|hi|hello|thanks)\b",
    re.IGNORECASE,
)


def excerpt(text: str) -> str:
    """Return the part of the text that is counted: at most 4,501 characters."""
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n{text[-TAIL_CHARACTERS:]}"


def focus(text: str) -> str:
    """Return the part of the text that is encoded: at most 601 characters.

    A short text is returned as it is. Of a long one: the last line if it asks or instructs and is short, else
    the first line under the same condition, together with a glimpse of the other end; where neither line does,
    both ends.
    """
    if len(text) > 4 * FOCUS_HEAD:
        text = text[: 2 * FOCUS_HEAD].lstrip() + "\n" * ("\n" in text) + text[-2 * FOCUS_TAIL :].rstrip()
    else:
        text = text.strip()
    if len(text) <= FOCUS_HEAD + FOCUS_TAIL:
        return text
    first, last = text.partition("\n")[0], text.rpartition("\n")[2]
    if len(last) <= FOCUS_TAIL and _asks(last):
        return f"{text[:FOCUS_GLIMPSE]}\n{last}"
    if len(first) <= FOCUS_HEAD and _asks(first):
        return f"{first}\n{text[-FOCUS_GLIMPSE:]}"
    return f"{text[:FOCUS_HEAD]}\n{text[-FOCUS_TAIL:]}"


def _asks(line: str) -> bool:
    return "?" in line or _INSTRUCTION.search(line) is not None


def structure(text: str) -> NDArray[np.float32]:
    """Return the features of `NAMES` as float32, shape (18,). Counts come as log(1 + n), shares in 0..1."""
    part = excerpt(text)
    edges = focus(text)
    size = max(len(part), 1)
    words = len(_WORD.findall(part))
    letters = latin = upper = digits = 0
    for character in edges:
        if character.isalpha():
            letters += 1
            latin += character < "\u0250"
            upper += character.isupper()
        elif character.isdigit():
            digits += 1
    log = math.log1p
    return np.array(
        (
            log(len(text)),
            log(words * len(text) / size),
            log(part.count("\n")),
            min(size / max(words, 1), 20.0),
            log(len(_CODE.findall(part))),
            1.0 if "```" in part else 0.0,
            log(len(_MATHS.findall(edges))),
            digits / max(len(edges), 1),
            log(edges.count("?") + edges.count("\uff1f") + edges.count("\u061f")),
            log(len(_LIST.findall(part))),
            log(len(_INSTRUCTION.findall(edges))),
            log(len(_REASONING.findall(edges))),
            log(len(_CONSTRAINT.findall(edges))),
            1.0 if _LOOKUP.match(edges) else 0.0,
            log(edges.count(",") + edges.count(";") + edges.count(":")),
            log(edges.count('"') + edges.count("\u201c")),
            upper / max(letters, 1),
            1.0 - latin / letters if letters else 0.0,
        ),
        dtype=np.float32,
    )
