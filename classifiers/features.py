"""Structural features of a prompt: what can be counted without understanding it.

All work is bounded: of a long prompt only its beginning and its end are read, where people put the task.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from functools import lru_cache
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from classifiers import demand_words

# Characters read from the beginning and the end for counting ...
HEAD_CHARACTERS, TAIL_CHARACTERS = 3000, 1500
# ... and for the encoders: at most FOCUS characters, of the sentences that ask or instruct. A pasted document would
# drown them in the mean.
FOCUS, SENTENCE = 600, 400
# Read for finding them: the edges of a long text, and at most this many sentences of each.
EDGE_CHARACTERS, EDGE_SENTENCES = 1200, 25
# A text up to this length is taken whole.
SHORT = 240

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

# Every repetition is bounded: the patterns run on text that a caller chose. Patterns of words run on lower case,
# which is quicker than ignoring case. A pattern that begins with plain characters skips through a text several times
# as fast as one that begins with \b or ^: the costly patterns run only where a quick one (`_MAY_BE_...`) found what
# each of their matches contains.
_WORD = re.compile(r"\w+")
_CODE = re.compile(
    r"[{};][ \t]{0,8}$"
    r"|^[ \t]{0,40}(?:def|class|import|from|func|fn|public|private|const|let|var|return|#include|for|while|if)\b"
    r"|\w\([^()\n]{0,80}\)[ \t]{0,8}[:{;]|=>|->|::|==|!=|&&|\|\||</\w{1,20}>|\bSELECT\b|\bself\.",
    re.MULTILINE,
)
_MAY_BE_CODE = re.compile(r"[{};(=>&|<]")
# What of `_CODE` is left where none of its signs is found; each line stands after a line end.
_CODE_LINE = re.compile(
    r"\n[ \t]{0,40}(?:def|class|import|from|func|fn|public|private|const|let|var|return|#include|for|while|if)\b"
)
_MATHS = re.compile(r"[=^<>+*/\u2200-\u22ff\u0391-\u03c9]|\\[a-z]+|\b\w\(\w\)")
_MAY_BE_MATHS = re.compile(r"[=^<>+*/\\(\u2200-\u22ff\u0391-\u03c9]")
_LIST = re.compile(r"^[ \t]{0,40}(?:[-*\u2022]|\d{1,2}[.)])[ \t]{1,8}\S|\b\d\)\s", re.MULTILINE)
_MAY_BE_LIST = re.compile(r"[-*\u2022\d](?:[.)]|(?<!\d)[ \t])")
_INSTRUCTIONS = (
    r"write|explain|list|compare|describe|give|find|show|prove|derive|design|implement|create|make|draft|plan|"
    r"summari[sz]e|translate|rewrite|convert|extract|classify|compute|calculate|evaluate|analy[sz]e|discuss|assess|"
    r"propose|recommend|justify|estimate|identify|build|solve|fix|review|argue|determine|decide|keep|state|return|"
    r"include|mention|add|use|suggest|outline|develop|reconstruct|quantify|schreibe|erkl\u00e4re|beweise|vergleiche|"
    r"\u00e9cris|explique|explica|escribe|demuestra"
)
_INSTRUCTION = re.compile(rf"\b(?:{_INSTRUCTIONS})\b")
_REASONING = re.compile(
    r"\b(?:prov(?:e|es|ing)|proof|deriv(?:e|ation)|rigorous\w*|trade-?offs?|architect\w*|distributed|concurren\w*|"
    r"consisten\w*|lock-free|deadlocks?|race|invariants?|root cause|assumptions?|counter-?(?:example|argument)s?|"
    r"critical\w*|implications?|hypothes[ie]s|sensitivity|scenarios?|theor(?:em|y)|asymptotic\w*|optimal\w*|"
    r"optimi[sz]ation|causal\w*|identification|mechanism|robust\w*|why|justify\w*|argue|analy[sz]e|assess|strateg\w*|"
    r"negotiat\w*|liabilit\w*|complexity|converge\w*|failure modes?|reconcile|interact\w*|migrat\w*|"
    r"beweis\w*|d\u00e9montr\w*|demuestr\w*)\b",
)
_CONSTRAINT = re.compile(
    r"\b(?:must|at most|at least|exactly|without|only|each|every|under|within|no more than|avoid|ensure|between|"
    r"with|using|do not|don't|mindestens|h\u00f6chstens|sin|sans|ohne)\b",
)
_LOOKUP = re.compile(
    r"(?:what(?:'s| is| does| are| year)|who|when|where|how (?:many|much|tall|old|long|far|do i|do you say)|which|is|"
    r"are|does|do|can|name|spell|convert|translate|hi|hello|thanks)\b",
)
# The words of a text, and the groups of words that one of the three patterns above counts as one. Most texts hold
# none of those.
_COUNTED = re.compile(
    r"(?:trade-offs?|lock-free|root cause|counter-(?:example|argument)s?|failure modes?|at most|at least|"
    r"no more than|do not|don't)\b|\w+"
)
_MAY_BE_GROUPS = (
    *("trade-off", "lock-free", "root cause", "counter-", "failure mode"),
    *("at most", "at least", "no more than", "do not", "don't"),
)
_ASCII_LETTERS, _ASCII_UPPER = string.ascii_letters.encode(), string.ascii_uppercase.encode()
_ASCII_DIGITS = string.digits.encode()
# Turns what is no part of a word into spaces.
_ONLY_WORDS = bytes(
    ord(c) if ord(c) < 128 and (c.isalnum() or c == "_") else 32 for c in map(chr, range(256))
)

_QUOTATION = re.compile(
    r'"""[^"]{0,2000}"""|["\u201c\u201d\u201e\u00ab\u00bb][^"\u201c\u201d\u201e\u00ab\u00bb\n]{25,1500}["\u201c\u201d\u00ab\u00bb]'
)
# White space after the end of a sentence, or line ends.
_SENTENCE_END = re.compile(r"\s(?:(?<=[.!?\u3002\uff1f]\s)\s*|(?<=\n)\n*)")
TASK_LIKENESS = 1.7
_IMPERATIVE = re.compile(
    r"(?:(?:please|now|then|finally|first|and|also|question:|task:|q:)[ ,]{1,3})?(?:" + _INSTRUCTIONS + r"|"
    r"answer|tell|name|put|count|copy|repeat|remove|sort|choose|pick|say|turn|check|call|help|read|take|get|work|walk|"
    r"think|trace|set|diagnose|reconcile|weigh|advise|run|begin|replace|return|make|go)\b",
)
_REQUEST = re.compile(
    r"\b(?:please|could you|can you|would you|tell me|tell us|give me|help me|help us|i need|i'd like|we'd like|"
    r"i want|my question|how (?:should|would|do|can|many|much|long)|what|which|should|why)\b|"
    r"^(?:user|customer|guest|question|task|q|patient|client) ?:",
)

# What says nothing of the task: greetings and thanks around it, and marks such as [a81f02c4].
_COURTESY_BEFORE = re.compile(
    r"(?:(?:hi|hello|hey|dear all|good (?:morning|afternoon|evening)|excuse me|sorry to bother you|"
    r"quick (?:one|question)|one more thing|please|pls)\b(?: there| all| everyone)?[ ,.!:;-]{1,4}){1,3}",
    re.IGNORECASE,
)
_COURTESY_AFTER = re.compile(
    r"[ ,.!-]{1,3}(?:please|pls|thanks|thank you|thx|cheers|many thanks)"
    r"(?: a lot| so much| very much| in advance){0,2}[.! ]{0,3}$",
    re.IGNORECASE,
)
_MARK = re.compile(
    r"\[(?=[a-z_-]{0,64}\d)[0-9a-z_-]{6,64}\]|\((?:ref|id)\.?:? ?[\w-]{1,64}\)|"
    r"\b(?=\d{0,64}[a-f])(?=[a-f]{0,64}\d)[0-9a-f]{8,64}\b",
    re.IGNORECASE,
)
_MAY_BE_HEXADECIMAL = re.compile(r"[0-9a-fA-F]{8}")
_MAY_BE_COURTESY_AFTER = ("pl", "thank", "thx", "cheer")
# So much must be left of a task without its courtesies.
MIN_TASK = 8
_TOKEN = re.compile(r"[^\W_]+(?:['\-;][^\W_]+)*")
_ASCII_TOKEN = re.compile(r"[a-z0-9]+(?:['\-;][a-z0-9]+)*")
_SMALL_ANSWER = re.compile(
    r"\b(?:a |one |1 |two |2 |three |single |the )(?:single |short |plain )?"
    r"(?:word|words|sentence|sentences|line|lines|letter)\b|"
    r"\bone[- ]line|\byes or no\b|\btrue or false\b|\btl;?dr\b|\bjust (?:the|tell|yes|give)\b|\bnothing else\b|"
    r"\bonly (?:the|one|question)\b|\bheadline\b|\bin a few words\b",
)
_MAY_BE_SMALL_ANSWER = (
    *("word", "sentence", "line", "letter", "yes or no", "true or false", "tl"),
    *("just ", "nothing else", "only "),
)
_SIZE = re.compile(r"\b(\d{2,4})[ -]?(?:words?|lines|characters|minutes|pages?)\b")
_FURTHER_REQUEST = re.compile(
    # "and" and "then" are whole words: what stands before is looked at after the first letter, see above.
    r"(?:,|;|a(?<!\wa)nd|t(?<!\wt)hen)\s{1,3}(?:also |then |please )?(?:explain|say|state|show|tell|give|write|list|"
    r"compare|justify|argue|name|note|flag|mark|keep|design|prove|discuss|recommend|what|which|how|why|whether|who|where|"
    r"find|add|include|reconcile|defend|assess|propose|advise|suggest|predict|draft|identify|quantify|rank|bound|decide)\b",
)
_WHY = re.compile(r"\b(?:why|reasons?|reasoning|because)\b")
_HOW = re.compile(r"h(?<!\wh)ow (?:does|do|did|is|are|can|could|would|should|to|one)\b")
_NUMBER, _ASCII_NUMBER = re.compile(r"\d+"), re.compile(r"[0-9]+")

_GROUPS = tuple(demand_words.GROUPS)
_PHRASES = tuple(demand_words.PHRASES)


def _places(groups: Mapping[str, frozenset[str]], size: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return for each phrase of `size` words the places of its groups."""
    found: dict[tuple[str, ...], tuple[int, ...]] = {}
    for at, phrases in enumerate(groups.values()):
        for phrase in phrases:
            if len(words := tuple(phrase.split(" "))) == size:
                found[words] = (*found.get(words, ()), at)
    return found


_PAIRS, _TRIPLES = _places(demand_words.PHRASES, 2), _places(demand_words.PHRASES, 3)


def _known_words() -> dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Return for each word that counts the places of its groups and phrases, and whether it begins a longer one."""
    groups, phrases = _places(demand_words.GROUPS, 1), _places(demand_words.PHRASES, 1)
    first = {words[0] for words in (*_PAIRS, *_TRIPLES)}
    words = {word for (word,) in (*groups, *phrases)} | first
    return {word: (groups.get((word,), ()), phrases.get((word,), ()), word in first) for word in words}


_KNOWN = _known_words()
# What of the counts of phrases is said on each level.
_OF_LEVEL = tuple(
    itemgetter(*(_PHRASES.index(phrase) for phrase in phrases)) for phrases in demand_words.LEVELS.values()
)
# What several phrases say together; see `_together`.
_AT = {phrase: at for at, phrase in enumerate(_PHRASES)}
_AT_MEANING, _AT_FACT, _AT_ITEM, _AT_HOW_TO = _AT["meaning"], _AT["fact"], _AT["item"], _AT["how_to"]
_AT_TOOL, _AT_THEORY, _AT_PROOF, _AT_SCHOOL = _AT["tool"], _AT["theory"], _AT["proof"], _AT["school_proof"]
_AT_MAKING, _AT_BREVITY, _AT_DESIGN = _AT["making"], _AT["brevity"], _AT["design"]
_AT_WHY, _AT_WORKINGS = _AT["why"], _AT["workings"]
_PARTS = tuple(demand_words.PARTS.values())
_NO_PARTS = (0.0,) * len(_PARTS)
# Words at the beginning whose groups count once more.
FIRST_WORDS = 6

DEMAND_NAMES = (
    *(f"words_{group}" for group in _GROUPS),
    *(f"first_{group}" for group in _GROUPS),
    *demand_words.PARTS,
    "small_answer",
    "answer_size",
    "further_requests",
    "asks_why",
    "asks_how",
    "task_words",
    "task_characters",
    "task_punctuation",
    "task_questions",
    "task_share",
    "task_numbers",
    "task_word_length",
    "task_long_words",
    "task_up_to_12_words",
    "task_up_to_25_words",
    *(f"says_{phrase}" for phrase in _PHRASES),
    *(
        f"{level}_{measure}"
        for level in demand_words.LEVELS
        for measure in ("total", "any", "kinds", "share")
    ),
    "expert_less_plain",
    "expert_less_ordinary",
    "ordinary_less_plain",
    "expert_up_to_2",
    "expert_root",
    *(f"levels_{combination}" for combination in range(8)),
    "how_to_with_tool",
    "fact_of_theory",
    "fact_alone",
    "school_proof_alone",
    "making_briefly",
    "terse_design",
    "why_for_experts",
    "workings_plainly",
)
ALL_NAMES = (*NAMES, *DEMAND_NAMES)


def demand(text: str, task: str) -> NDArray[np.float32]:
    """Return the features of `DEMAND_NAMES` of a text and its `focus` as float32: what the task asks for.

    Counts come as log(1 + n), flags as 0 or 1, shares in 0..1.
    """
    return np.array(_demand(text, task), dtype=np.float32)


def _demand(text: str, task: str) -> list[float]:
    task = task.lower().replace("\u2019", "'")
    plain = task.isascii()
    words = (_ASCII_TOKEN if plain else _TOKEN).findall(task)
    size = len(words)
    counts, first, said = [0] * len(_GROUPS), [0.0] * len(_GROUPS), [0] * len(_PHRASES)
    for at, word in enumerate(words):
        known = _KNOWN.get(word)
        if known is None:
            continue
        groups, phrases, begins = known
        for group in groups:
            counts[group] += 1
            if at < FIRST_WORDS:
                first[group] = 1.0
        for phrase in phrases:
            said[phrase] += 1
        if begins:
            for phrase in _PAIRS.get(tuple(words[at : at + 2]), ()):
                said[phrase] += 1
            for phrase in _TRIPLES.get(tuple(words[at : at + 3]), ()):
                said[phrase] += 1
    numbers = len((_ASCII_NUMBER if plain else _NUMBER).findall(task))
    asked_size = _SIZE.search(task) if numbers else None
    may_ask_why = "why" in task or "reason" in task or "because" in task
    may_be_small = any(map(task.__contains__, _MAY_BE_SMALL_ANSWER))
    lengths = [*map(len, words)]
    log = math.log1p
    return [
        *map(log, counts),
        *first,
        *(_NO_PARTS if plain else (log(len(parts.findall(task))) for parts in _PARTS)),
        1.0 if may_be_small and _SMALL_ANSWER.search(task) else 0.0,
        log(float(asked_size[1])) / 4 if asked_size else 0.0,
        log(len(_FURTHER_REQUEST.findall(task))),
        log(len(_WHY.findall(task))) if may_ask_why else 0.0,
        log(len(_HOW.findall(task))) if "how " in task else 0.0,
        log(size),
        log(len(task)),
        log(task.count(",") + task.count(";") + task.count(":")),
        log(task.count("?")),
        min(len(task) / max(len(text), 1), 1.0),
        log(numbers),
        min(sum(lengths) / max(size, 1), 20.0),
        log(len([length for length in lengths if length > 9])),
        min(size, 12) / 12,
        min(size, 25) / 25,
        *map(log, said),
        *_together(said, max(size, 1)),
    ]


def _together(said: list[int], size: int) -> list[float]:
    """Return what the phrases said in a task of `size` words say together.

    A task told anew seldom keeps its words and mostly keeps its level: these vary less than single groups do.
    """
    log = math.log1p
    levels: list[float] = []
    totals: list[int] = []
    for of_level in _OF_LEVEL:
        on_it = of_level(said)
        total = sum(on_it)
        totals.append(total)
        if total:
            levels += (log(total), 1.0, log(len(on_it) - on_it.count(0)), min(total / size, 1.0))
        else:
            levels += (0.0, 0.0, 0.0, 0.0)
    expert, ordinary, plain = levels[0], levels[4], levels[8]
    experts, ordinaries, plains = totals
    combination = 4 * (experts > 0) + 2 * (ordinaries > 0) + (plains > 0)
    fact = said[_AT_MEANING] or said[_AT_FACT] or said[_AT_ITEM]
    return [
        *levels,
        expert - plain,
        expert - ordinary,
        ordinary - plain,
        float(min(experts, 2)),
        math.sqrt(experts),
        *_COMBINATIONS[combination],
        1.0 if said[_AT_HOW_TO] and said[_AT_TOOL] else 0.0,
        1.0 if fact and said[_AT_THEORY] else 0.0,
        1.0 if fact and not experts else 0.0,
        1.0 if said[_AT_PROOF] and said[_AT_SCHOOL] else 0.0,
        1.0 if said[_AT_MAKING] and said[_AT_BREVITY] else 0.0,
        min(10 / size, 1.0) if said[_AT_DESIGN] else 0.0,
        1.0 if said[_AT_WHY] and experts else 0.0,
        1.0 if said[_AT_WORKINGS] and not experts else 0.0,
    ]


_COMBINATIONS = tuple(tuple(1.0 if at == other else 0.0 for other in range(8)) for at in range(8))


def excerpt(text: str) -> str:
    """Return the part of the text that is counted: at most 4,501 characters."""
    if len(text) <= HEAD_CHARACTERS + TAIL_CHARACTERS:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n{text[-TAIL_CHARACTERS:]}"


def focus(text: str) -> str:
    """Return the task of a text: the part that is encoded, at most 600 characters.

    A short text is returned as it is but for long quotations. Of a longer one, the sentences and lines that ask or
    instruct, the likeliest first, in their order in the text; where there are none, the first and the last.
    """
    text = text.strip()
    if len(text) > 2 * EDGE_CHARACTERS:
        text = f"{text[:EDGE_CHARACTERS]}\n{text[-EDGE_CHARACTERS:]}"
    if len(text) > SHORT or '"' in text:
        text = _QUOTATION.sub(' "..." ', text).strip()
    if len(text) <= SHORT:
        return text
    sentences = [stripped for part in _SENTENCE_END.split(text) if (stripped := part.strip())]
    if len(sentences) > 2 * EDGE_SENTENCES:
        sentences = sentences[:EDGE_SENTENCES] + sentences[-EDGE_SENTENCES:]
    last = len(sentences) - 1
    likeness = [_task_likeness(s[:SENTENCE].lower(), at == 0, at == last) for at, s in enumerate(sentences)]
    order = sorted(range(len(sentences)), key=lambda at: (-likeness[at], -at))
    wanted = [at for at in order if likeness[at] >= TASK_LIKENESS] or [0, last]
    taken: list[int] = []
    room = FOCUS
    for at in dict.fromkeys(wanted):
        size = min(len(sentences[at]), SENTENCE) + 1
        if size <= room or not taken:
            taken.append(at)
            room -= size
    return "\n".join(sentences[at][:SENTENCE] for at in sorted(taken))[:FOCUS]


def bare(task: str) -> str:
    """Return a task without greetings, thanks and marks such as [a81f02c4]; itself where little else is in it."""
    may_hold_marks = "[" in task or "(" in task or _MAY_BE_HEXADECIMAL.search(task)
    short = _MARK.sub(" ", task) if may_hold_marks else task
    begins = _COURTESY_BEFORE.match(short)
    end = short[-40:]
    may_end = any(map(end.lower().__contains__, _MAY_BE_COURTESY_AFTER))
    ends = _COURTESY_AFTER.search(short, len(short) - len(end)) if may_end else None
    short = short[begins.end() if begins else 0 : ends.start() if ends else len(short)].strip()
    return short if len(short) >= MIN_TASK else task


def read(text: str) -> tuple[str, str]:
    """Return what is counted and what is encoded of a text: the text and its task, both without courtesies.

    In a long text they are left where they stand: they do not count there.
    """
    text = text.strip()
    focused = focus(text)
    task = bare(focused)
    if len(text) > SHORT:
        return text, task
    return (task if focused == text else bare(text)), task


def _task_likeness(sentence: str, first: bool, last: bool) -> float:
    """Say how much a sentence in lower case looks like the task of its text: a sum of hand-set weights."""
    likeness = 0.6 * first + 0.8 * last
    if sentence[-1] in "?\uff1f\u061f":
        likeness += 2.0
    if _IMPERATIVE.match(sentence):
        likeness += 2.0
    elif _INSTRUCTION.search(sentence):
        likeness += 0.7
    if _REQUEST.search(sentence):
        likeness += 1.0
    return likeness


def structure(text: str) -> NDArray[np.float32]:
    """Return the features of `NAMES` as float32, shape (18,). Counts come as log(1 + n), shares in 0..1."""
    return np.array(_structure(text), dtype=np.float32)


def _structure(text: str) -> list[float]:
    part = excerpt(text)
    edges = part if len(part) <= 601 else f"{part[:300]}\n{part[-300:]}"
    size = max(len(part), 1)
    words = _count_words(part)
    letters, upper, digits, latin = _count_characters(edges)
    lowered = edges.lower()
    counted_as = "".join(map(_counted_as, _counted(lowered)))
    log = math.log1p
    return [
        log(len(text)),
        log(words * len(text) / size),
        log(part.count("\n")),
        min(size / max(words, 1), 20.0),
        log(_count_code_signs(part)),
        1.0 if "```" in part else 0.0,
        log(len(_MATHS.findall(edges))) if _MAY_BE_MATHS.search(edges) else 0.0,
        digits / max(len(edges), 1),
        log(edges.count("?") + edges.count("\uff1f") + edges.count("\u061f")),
        log(len(_LIST.findall(part))) if _MAY_BE_LIST.search(part) else 0.0,
        log(counted_as.count("i")),
        log(counted_as.count("r")),
        log(counted_as.count("c")),
        1.0 if _LOOKUP.match(lowered) else 0.0,
        log(edges.count(",") + edges.count(";") + edges.count(":")),
        log(edges.count('"') + edges.count("\u201c")),
        upper / max(letters, 1),
        1.0 - latin / letters if letters else 0.0,
    ]


def _counted(text: str) -> list[str]:
    """Return the matches of `_COUNTED` in a text in lower case."""
    if text.isascii() and not any(map(text.__contains__, _MAY_BE_GROUPS)):
        return _ascii_words(text)
    return _COUNTED.findall(text)


def _ascii_words(text: str) -> list[str]:
    return text.encode().translate(_ONLY_WORDS).decode().split()


# Prompts share most of their words. A word has at most 601 characters, so the cache is bounded in bytes, too.
@lru_cache(maxsize=8192)
def _counted_as(words: str) -> str:
    """Say as what a match of `_COUNTED` counts: i(nstruction), r(easoning), c(onstraint), several or none of them."""
    return (
        ("i" if _INSTRUCTION.fullmatch(words) else "")
        + ("r" if _REASONING.fullmatch(words) else "")
        + ("c" if _CONSTRAINT.fullmatch(words) else "")
    )


def _count_words(text: str) -> int:
    if text.isascii():
        return len(_ascii_words(text))
    return len(_WORD.findall(text))


def _count_characters(text: str) -> tuple[int, int, int, int]:
    """Count letters, capital letters, digits and letters of the Latin script."""
    ascii_part = text.encode("ascii", "ignore")
    size = len(ascii_part)
    letters = latin = size - len(ascii_part.translate(None, _ASCII_LETTERS))
    upper = size - len(ascii_part.translate(None, _ASCII_UPPER))
    digits = size - len(ascii_part.translate(None, _ASCII_DIGITS))
    if size < len(text):
        for character in text:
            if character <= "\x7f":
                continue
            if character.isalpha():
                letters += 1
                latin += character < "\u0250"
                upper += character.isupper()
            elif character.isdigit():
                digits += 1
    return letters, upper, digits, latin


def _count_code_signs(text: str) -> int:
    if _MAY_BE_CODE.search(text) or "::" in text or "SELECT" in text or "self." in text:
        return len(_CODE.findall(text))
    return len(_CODE_LINE.findall(f"\n{text}"))


def describe(text: str, task: str) -> NDArray[np.float32]:
    """Return `structure` and `demand` side by side, shape (len(ALL_NAMES),); `task` is the text's `focus`."""
    return np.array(_structure(text) + _demand(text, task), dtype=np.float32)
