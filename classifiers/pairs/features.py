"""Numbers about a pair of prompts, from which the verifier judges whether one answer serves both.

A prompt is read once (`PairFeatures.read`, about 0.2 ms, to be kept beside a stored entry); comparing two readings
costs about 0.1 ms. All numbers are symmetric in the two prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import Encoder
from classifiers.pairs import guard
from classifiers.pairs.lexicon import ANTONYM, BROADER, DERIVED, NONE, SIMILAR, SISTER, SYNONYM, Lexicon

Vector = NDArray[np.float32]

# Of a longer prompt this many content words are aligned.
MAX_WORDS = 64
# Relations are looked up among this many words that only one of the two has.
MAX_RELATED = 12
# Words among which it is read who does what to whom.
CLAUSE = 40
FUNCTION = guard.word_set(
    "a an the this that these those i me my mine we us our you your he him his she her it its they them their "
    "is are was were be been being am do does did doing have has had having can could may might will would "
    "shall should must of to in on at by for with from as into about than then so such if or and but what "
    "which who whom whose when where why how there here not no nor too very just also any some s t d ll m o "
    "re ve y up out off over under again further once all both each few more most other own same please get "
    "got want like need know tell give let way ok okay possible allowed able one thing things % - / . ,"
)
# No English word has a letter three times in a row: "aaa" is a string.
THRICE = re.compile(r"(.)\1\1")
PLACES = ("who", "when", "where", "why", "amount", "many", "duration", "measure")
RELATIONS = (SYNONYM, DERIVED, SIMILAR, BROADER, SISTER, ANTONYM)
PREPOSITIONS = guard.word_set(
    "of to in on at by for with from into about over under before after during within between through against "
    "without until since across behind beyond near"
)

BE = guard.word_set("is are was were be been being am get gets got")
# "Has" and "have" may be what is asked about ("Who has access?").
HELPING = guard.AUXILIARIES - guard.word_set("have has had")
# Who asks with one of these may ask for who does it or for whom it is done to.
ASKING = guard.word_set("who whom whose what which")
# Participles that look like the base form.
UNCHANGED = guard.word_set("cut hit hurt put read run set shut split spread")
# Stands for what is asked for.
ASKED = "?"


@dataclass(frozen=True, slots=True)
class Clause:
    """Who does what to whom, as far as the little words tell. Words are base forms that carry a meaning.

    `kind`: "subject" ("Which company bought it?"; also "which company it bought"), "fronted" ("Which company did it
    buy?"), "modal" ("Which company will ..."), "passive" ("... bought by it"), "plain" (nothing of it is asked for),
    or empty. `head`: between the question word and the auxiliary; `rest`: behind it. Of a passive: the verb, by whom
    and who else there is.
    """

    kind: str = ""
    head: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    verb: str = ""
    agents: frozenset[str] = frozenset()
    patients: frozenset[str] = frozenset()
    by: bool = False


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt as it is compared: the guard's reading, base forms, content words with vectors and rarities."""

    reading: guard.Reading
    lemmas: tuple[str, ...]
    content: tuple[str, ...]
    vectors: Vector
    rarities: tuple[float, ...]
    static: Vector
    grams: frozenset[str]
    past: tuple[bool, ...] = ()
    foreign: bool = False
    unknown: frozenset[str] = frozenset()
    clause: Clause = Clause()


def names() -> tuple[str, ...]:
    """Return the names of the features, in the order of `PairFeatures.compare`."""
    return (
        "cosine", "cosine_static", "length_min", "length_max", "length_ratio", "words_shared", "content_shared",
        "rarity_shared_min", "rarity_shared_max", "grams_shared", "prefix_suffix", "middle_min", "middle_max",
        "same_words", "bigrams_shared",
        "residual_mean_min", "residual_mean_max", "residual_worst_min", "residual_worst_max",
        "left_min", "left_max", "left_rarity_min", "left_rarity_max", "left_sum_min", "left_sum_max",
        "unexplained_min", "unexplained_max", "unexplained_sum_min", "unexplained_sum_max",
        "left_best_cosine", "left_mean_cosine", "left_centre_cosine",
        *(f"relation_{name}" for name in ("synonym", "derived", "similar", "broader", "sister", "antonym")),
        "single", "single_cosine", "single_rarity_min", "single_rarity_max", "single_relation",
        *(f"guard_{reason}" for reason in guard.REASONS), "guard_count",
        "names_alone_min", "names_alone_max", "names_shared", "numbers_shared", "numbers_alone", "dates_alone",
        "scope_alone_min", "scope_alone_max", "negations_alone", "negated_both", "formats_shared",
        "asks_same", "asks_do_one", "asks_yesno_one",
        *(f"asks_{name}_one" for name in PLACES),
        "poles_alone_min", "poles_alone_max", "negative_alone_min", "negative_alone_max", "negative_shared",
        "inverted", "route_turned", "route_same", "little_changed",
        "owners_alone", "prepositions_alone", "function_alone", "typo", "unknown_alone", "last_word_same",
        "head_cosine",
    )  # fmt: skip


class PairFeatures:
    """Reads prompts and compares them with a lexicon and the static encoder's word vectors."""

    def __init__(self, lexicon: Lexicon, static: Encoder) -> None:
        self._lexicon = lexicon
        self._static = static
        self._vector = lru_cache(maxsize=8192)(self._encode)

    def _encode(self, word: str) -> Vector:
        vector: Vector = self._static.encode([word])[0]
        return vector

    def read(self, text: str) -> ReadPrompt:
        """Read a prompt: bounded work, any text."""
        reading = guard.read(text)
        lemma, rarity = self._lexicon.lemma, self._lexicon.rarity
        lemmas = tuple(lemma(word) for word in reading.words[:400])
        content = tuple(dict.fromkeys(w for w in lemmas if w not in FUNCTION))[:MAX_WORDS]
        if not content:
            content = tuple(dict.fromkeys(lemmas))[:MAX_WORDS] or ("",)
        joined = " ".join(lemmas)[:600]
        past = tuple(map(_past, reading.words, lemmas))
        return ReadPrompt(
            reading=reading,
            lemmas=lemmas,
            content=content,
            vectors=np.stack([self._vector(word) for word in content]),
            rarities=tuple(rarity(word) for word in content),
            static=self._static.encode([text[: guard.MAX_CHARACTERS]])[0],
            grams=frozenset(joined[i : i + 3] for i in range(max(len(joined) - 2, 1))),
            past=past,
            foreign=self._foreign(reading, lemmas),
            unknown=frozenset(
                w for w in content if w[:1].isalpha() and (THRICE.search(w) or not self._lexicon.known(w))
            ),
            # "Found" is the past of "find" and the base of "founded": both become "find".
            clause=_clause(reading.words[:CLAUSE], tuple(_base(lemma(w)) for w in lemmas[:CLAUSE]), past),
        )

    def _foreign(self, reading: guard.Reading, lemmas: tuple[str, ...]) -> bool:
        """Tell whether at least half of the words are none of English."""
        words = strange = little = 0
        for word, base in zip(reading.words, lemmas, strict=False):
            if (
                len(word) < 2
                or not word[0].isalpha()
                or word in reading.names
                or word in guard.FORMATS
                or word == "vs"
            ):
                continue
            words += 1
            if word in guard.FOREIGN:
                little += 1
            elif base not in FUNCTION and word not in FUNCTION and not self._lexicon.known(base):
                # An accent tells as much as a little word.
                little += not word.isascii()
                strange += word.isascii()
        # Without a little word of another language unknown ones may be names or commands.
        return (little + strange > 1 and 2 * (little + strange) >= words and little > 0) or (
            words > 3 and 4 * strange > 3 * words
        )

    def compare(
        self, a: ReadPrompt, b: ReadPrompt, cosine: float, reasons: tuple[str, ...] | None = None
    ) -> NDArray[np.float32]:
        """Return the features, shape (len(names()),). `cosine`: of the prompts' vectors by the cache's encoder;
        `reasons`: what the guard finds, where that is known.
        """
        x, y = a.reading, b.reading
        lexicon = self._lexicon
        out: list[float] = [cosine, float(a.static @ b.static)]
        short, long = sorted((len(a.lemmas), len(b.lemmas)))
        out += [short, long, short / max(long, 1)]
        set_a, set_b = set(a.lemmas), set(b.lemmas)
        content_a, content_b = set(a.content), set(b.content)
        typos = 0
        for odd, others, into in (
            (content_a - set_b, content_b, set_b),
            (content_b - set_a, content_a, set_a),
        ):
            for word in odd:
                if not lexicon.known(word) and (meant := next((o for o in others if _typo(word, o)), None)):
                    # Both spellings count as present on both sides.
                    typos += 1
                    into.add(word)
                    (set_a if into is set_b else set_b).add(meant)
        out.append(_jaccard(set_a, set_b))
        out.append(_jaccard(content_a, content_b))
        has_a, has_b = [w in set_b for w in a.content], [w in set_a for w in b.content]
        weights_a, weights_b = [r + 0.05 for r in a.rarities], [r + 0.05 for r in b.rarities]
        total_a, total_b = sum(weights_a), sum(weights_b)
        out += _ordered(
            sum(w for w, has in zip(weights_a, has_a, strict=True) if has) / total_a,
            sum(w for w, has in zip(weights_b, has_b, strict=True) if has) / total_b,
        )
        out.append(_jaccard(a.grams, b.grams))
        prefix, suffix = _ends(a.lemmas, b.lemmas)
        out.append((prefix + suffix) / max(long, 1))
        out += _ordered(len(a.lemmas) - prefix - suffix, len(b.lemmas) - prefix - suffix)
        out.append(float(sorted(a.lemmas) == sorted(b.lemmas)))
        out.append(
            _jaccard(
                set(zip(a.lemmas, a.lemmas[1:], strict=False)), set(zip(b.lemmas, b.lemmas[1:], strict=False))
            )
        )

        similar = a.vectors @ b.vectors.T
        # Plain lists from here: prompts are short, and an array operation costs more than a dozen additions.
        rest_a = [
            0.0 if has else (1.0 - best) * w
            for has, best, w in zip(has_a, similar.max(axis=1).tolist(), weights_a, strict=True)
        ]
        rest_b = [
            0.0 if has else (1.0 - best) * w
            for has, best, w in zip(has_b, similar.max(axis=0).tolist(), weights_b, strict=True)
        ]
        out += _ordered(sum(rest_a) / total_a, sum(rest_b) / total_b)
        out += _ordered(max(rest_a), max(rest_b))

        left_a = [i for i, has in enumerate(has_a) if not has]
        left_b = [i for i, has in enumerate(has_b) if not has]
        rare_a, rare_b = [a.rarities[i] for i in left_a], [b.rarities[i] for i in left_b]
        out += _ordered(len(left_a), len(left_b))
        out += _ordered(max(rare_a, default=0.0), max(rare_b, default=0.0))
        out += _ordered(sum(rare_a), sum(rare_b))
        counts = dict.fromkeys(RELATIONS, 0)
        explained_a: set[int] = set()
        explained_b: set[int] = set()
        for i in left_a[:MAX_RELATED]:
            for j in left_b[:MAX_RELATED]:
                relation = lexicon.relation(a.content[i], b.content[j])
                if relation != NONE:
                    counts[relation] += 1
                    if relation in (SYNONYM, DERIVED, SIMILAR):
                        explained_a.add(i)
                        explained_b.add(j)
        odd_out_a = [i for i in left_a if i not in explained_a]
        odd_out_b = [i for i in left_b if i not in explained_b]
        out += _ordered(
            max((a.rarities[i] for i in odd_out_a), default=0.0),
            max((b.rarities[i] for i in odd_out_b), default=0.0),
        )
        out += _ordered(sum(rest_a[i] for i in odd_out_a), sum(rest_b[i] for i in odd_out_b))
        if len(left_a) and len(left_b):
            block = similar[left_a][:, left_b]
            rows, columns = block.max(axis=1).tolist(), block.max(axis=0).tolist()
            centre_a, centre_b = a.vectors[left_a].sum(axis=0), b.vectors[left_b].sum(axis=0)
            length = float(np.sqrt((centre_a @ centre_a) * (centre_b @ centre_b)))
            out += [
                max(rows),
                (sum(rows) / len(rows) + sum(columns) / len(columns)) / 2,
                float(centre_a @ centre_b) / max(length, 1e-6),
            ]
        else:
            out += [np.nan, np.nan, np.nan]
        out += [float(counts[relation]) for relation in RELATIONS]
        if len(left_a) == 1 and len(left_b) == 1:
            i, j = left_a[0], left_b[0]
            out += [1.0, float(similar[i, j]), *_ordered(a.rarities[i], b.rarities[j])]
            out.append(float(lexicon.relation(a.content[i], b.content[j])))
        else:
            out += [0.0, np.nan, np.nan, np.nan, np.nan]

        if reasons is None:
            reasons = guard.reasons(x, y)
        out += [float(reason in reasons) for reason in guard.REASONS]
        out.append(float(sum(reason in reasons for reason in guard.REASONS)))
        vocabulary_a, vocabulary_b = x.vocabulary, y.vocabulary
        numbers_a, numbers_b = frozenset(x.numbers), frozenset(y.numbers)
        out += _ordered(len(x.names - vocabulary_b - y.names), len(y.names - vocabulary_a - x.names))
        out += [
            len(x.names & y.names),
            len(numbers_a & numbers_b),
            len(numbers_a ^ numbers_b),
            len(x.dates ^ y.dates),
        ]
        out += _ordered(len(x.scope - y.scope), len(y.scope - x.scope))
        out += [
            len(x.negations ^ y.negations),
            float(bool(x.negations & y.negations)),
            len(x.formats & y.formats),
        ]
        asks = {x.asks, y.asks}
        out += [
            float(len(asks) == 1),
            float(len(asks) == 2 and "do" in asks),
            float(len(asks) == 2 and "yesno" in asks),
        ]
        out += [float(len(asks) == 2 and place in asks) for place in PLACES]
        alone_a, alone_b = [a.content[i] for i in left_a], [b.content[i] for i in left_b]
        only_a, only_b = vocabulary_a - vocabulary_b, vocabulary_b - vocabulary_a
        out += _ordered(sum(w in guard.OPPOSITES for w in only_a), sum(w in guard.OPPOSITES for w in only_b))
        out += _ordered(
            sum(_negative(w, lexicon) for w in only_a), sum(_negative(w, lexicon) for w in only_b)
        )
        out.append(sum(w in guard.NEGATIVE for w in vocabulary_a & vocabulary_b))
        out.append(_inverted(a.content, b.content))
        out += [float(guard.turned(x.route, y.route)), float(x.route == y.route and any(x.route))]
        out.append(len(only_a) + len(only_b))
        out.append(len(x.owners ^ y.owners))
        out.append(len((vocabulary_a ^ vocabulary_b) & PREPOSITIONS))
        out.append(len((set_a ^ set_b) & FUNCTION))
        unknown = sum(not lexicon.known(w) for w in alone_a) + sum(not lexicon.known(w) for w in alone_b)
        out += [float(typos), float(unknown)]
        out.append(float(a.lemmas[-1:] == b.lemmas[-1:]))
        out.append(float(a.vectors[-1] @ b.vectors[-1]))
        return np.asarray(out, dtype=np.float32)

    def table(self, pairs: Sequence[tuple[str, str]], cosines: Sequence[float]) -> NDArray[np.float32]:
        """Return the features of many pairs, shape (len(pairs), len(names()))."""
        read = {text: self.read(text) for pair in pairs for text in pair}
        rows = [self.compare(read[a], read[b], c) for (a, b), c in zip(pairs, cosines, strict=True)]
        return np.stack(rows)


def _ordered(a: float, b: float) -> tuple[float, float]:
    return (a, b) if a <= b else (b, a)


def _jaccard(a: set | frozenset, b: set | frozenset) -> float:  # type: ignore[type-arg]
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def _ends(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[int, int]:
    """Return how many words the two share at their start and (beyond that) at their end."""
    shorter = min(len(a), len(b))
    prefix = 0
    while prefix < shorter and a[prefix] == b[prefix]:
        prefix += 1
    suffix = 0
    while suffix < shorter - prefix and a[-1 - suffix] == b[-1 - suffix]:
        suffix += 1
    return prefix, suffix


def reasons(a: ReadPrompt, b: ReadPrompt) -> tuple[str, ...]:
    """Return why one answer cannot serve both prompts: what the guard finds, and what takes the lexicon to see."""
    found = guard.reasons(a.reading, b.reading)
    x, y = a.reading, b.reading
    if x.words == y.words:
        return found
    if "wording" not in found and _literal(a, b):
        found += ("wording",)
    if "order" not in found and (_exchanged(a.clause, b.clause) or _numbers_turned(x, y)):
        found += ("order",)
    if a.past != b.past and a.lemmas == b.lemmas:
        found += ("tense",)
    if a.foreign or b.foreign:
        found += ("language",)
    return found


def _base(lemma: str) -> str:
    """Make "sued" and "sue", "clicked" and "click" one where the lexicon does not know the past."""
    stem = lemma[:-1] if lemma.endswith("ed") and len(lemma) > 3 else lemma
    return stem.rstrip("e") if len(stem) > 3 else stem


def _clause(words: tuple[str, ...], bases: tuple[str, ...], past: tuple[bool, ...]) -> Clause:
    count = len(words)
    asking = next(
        (
            at
            for at, word in enumerate(words)
            if word in ASKING or (word == "how" and words[at + 1 : at + 2] in (("many",), ("much",)))
        ),
        -1,
    )
    first = asking + (2 if words[asking] == "how" else 1) if asking >= 0 else 0
    helping = next((at for at in range(first, count) if words[at] in HELPING), count)
    by = next(
        (
            at
            for at in range(2, count)
            if words[at] == "by"
            and (past[at - 1] or words[at - 1].endswith("ed") or words[at - 1] in UNCHANGED)
            and not BE.isdisjoint(words[max(at - 8, 0) : at - 1])
        ),
        -1,
    )

    def meaning(start: int, end: int) -> tuple[str, ...]:
        return tuple(
            base
            for word, base in zip(words[start:end], bases[start:end], strict=True)
            if word[:1].isalpha() and word not in FUNCTION and base not in FUNCTION
        )

    if by >= 0:
        end = next((at for at in range(by + 1, count) if words[at] in PREPOSITIONS), count)
        agents = frozenset(meaning(by + 1, end)) or frozenset((ASKED,))
        patients = frozenset(meaning(0, by - 1))
        if asking >= 0 and ASKED not in agents:
            patients |= {ASKED}
        return Clause("passive", verb=bases[by - 1], agents=agents, patients=patients, by=True)
    if asking > 0 and words[asking - 1] == "by" and helping < count and words[helping] in BE:
        verb = next((at for at in range(helping + 1, count) if past[at]), -1)
        if verb > 0:  # "By whom was he taught?"
            agents = frozenset((ASKED, *meaning(first, helping)))
            return Clause(
                "passive",
                verb=bases[verb],
                agents=agents,
                patients=frozenset(meaning(helping, verb)),
                by=True,
            )
    kind = "plain"
    if asking >= 0:
        kind = "subject" if helping == count else "" if words[helping] in BE else "modal"
        if helping < count and words[helping] in ("do", "does", "did"):
            kind = "fronted"
    return Clause(kind, meaning(first, helping), meaning(helping, count), by="by" in words)


def _exchanged(a: Clause, b: Clause) -> bool:
    """Tell whether one asks for who does what the other asks to whom it is done ("What causes stress?", "What does
    stress cause?"), be it in the active or the passive voice.
    """
    if a.kind == b.kind or not a.kind or not b.kind:
        return False
    if "passive" in (a.kind, b.kind):
        passive, active = (a, b) if a.kind == "passive" else (b, a)
        return not active.by and _passive_turned(passive, active)
    if "plain" in (a.kind, b.kind):
        return False
    if "modal" in (a.kind, b.kind) and frozenset(a.head + a.rest) != frozenset(b.head + b.rest):
        return False
    if "subject" not in (a.kind, b.kind):
        return _in_other_order(a.rest, b.rest)
    subject, other = (a, b) if a.kind == "subject" else (b, a)
    if (
        other.head
        and subject.head[:1]
        and subject.head[0] in other.rest
        and subject.head[0] not in other.head
    ):
        return True  # "How many sharks lose teeth?", "How many teeth does a shark lose?"
    return _in_other_order(subject.head, other.head + other.rest)


def _numbers_turned(a: guard.Reading, b: guard.Reading) -> bool:
    """Tell whether numbers have changed places among the same words ("8 minus 3")."""
    return a.numbers != b.numbers and sorted(a.words) == sorted(b.words)


def _passive_turned(passive: Clause, active: Clause) -> bool:
    verb = passive.verb
    if active.kind in ("fronted", "modal"):
        if verb not in active.rest:
            return False
        at = active.rest.index(verb)
        before, after = frozenset(active.rest[:at]), frozenset(active.rest[at + 1 :])
        head = frozenset((ASKED, *active.head))
        agents, patients = (before, head) if before else (head, after)
    else:
        words = active.head + active.rest
        if verb not in words:
            return False
        at = words.index(verb)
        agents, patients = frozenset(words[:at]), frozenset(words[at + 1 :])
        if active.kind == "subject":
            if at and not patients:  # "which company it bought"
                agents, patients = frozenset(words[at - 1 : at]), frozenset((ASKED, *words[: at - 1]))
            else:
                agents |= {ASKED}
        elif not agents:
            return False
    if passive.agents & agents and not (passive.agents & agents) <= passive.patients:
        # The same one does it: whoever else is named has moved, and no more.
        return False
    return bool(passive.agents & patients or passive.patients & agents)


def _in_other_order(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Tell whether one has all words of the other, two or more, in another order."""
    mine, yours = frozenset(a), frozenset(b)
    common = mine & yours
    if len(common) < 2 or common not in (mine, yours):
        return False
    return list(dict.fromkeys(w for w in a if w in common)) != list(
        dict.fromkeys(w for w in b if w in common)
    )


def _literal(a: ReadPrompt, b: ReadPrompt) -> bool:
    """Tell whether unknown words stand for themselves, or a form of a word is to be translated ("dog", "dogs")."""
    words = a.reading.words + b.reading.words
    if a.lemmas == b.lemmas:
        return "translate" in words or not guard.LANGUAGES.isdisjoint(words)
    return bool(a.unknown - b.unknown and b.unknown - a.unknown) and not guard.STRINGS.isdisjoint(words)


# Irregular forms that are no past.
NO_PAST = guard.word_set(
    "men women children people feet teeth mice geese better worse less more most data media"
)


def _past(word: str, lemma: str) -> bool:
    if word in ("was", "were"):
        return True
    return word != lemma and not word.endswith(("s", "ing", "er", "est", "am", "are")) and word not in NO_PAST


TURNING = ("un", "dis", "non", "in", "im", "il", "ir")


def _negative(word: str, lexicon: Lexicon) -> bool:
    """Tell whether a word turns or belittles: "worst", "avoid", "unsuitable"."""
    if word in guard.NEGATIVE or word in guard.NEGATIONS:
        return True
    return word.startswith(TURNING) and any(
        word.startswith(prefix) and len(word) > len(prefix) + 3 and lexicon.known(word[len(prefix) :])
        for prefix in TURNING
    )


def _inverted(a: tuple[str, ...], b: tuple[str, ...]) -> float:
    """Return the share of pairs of shared content words that stand in the other order (0 when there is none)."""
    place = {word: i for i, word in enumerate(b)}
    order = [place[word] for word in a if word in place]
    count = len(order)
    if count < 2:
        return 0.0
    turned = sum(order[i] > order[j] for i in range(count) for j in range(i + 1, count))
    return turned / (count * (count - 1) / 2)


def _typo(odd: str, word: str) -> bool:
    """Tell whether an unknown word is another with two neighbouring letters swapped, or one more or less."""
    if odd == word or len(odd) < 4 or abs(len(odd) - len(word)) > 1 or odd[0] != word[0]:
        return False
    prefix, suffix = _ends(tuple(odd), tuple(word))
    rest_a, rest_b = odd[prefix : len(odd) - suffix], word[prefix : len(word) - suffix]
    return len(rest_a) + len(rest_b) == 1 or (len(rest_a) == 2 and rest_a == rest_b[::-1])
