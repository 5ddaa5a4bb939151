"""Prompts of known length that are never sent twice in a run.

A template takes three of WORDS, each a single word piece of MiniLM's vocabulary, so that every prompt of a
template has the same number of word pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WORDS = (
    "apple river table window garden doctor market summer winter bridge castle engine forest hammer "
    "island jacket kitchen ladder mirror needle orange pencil rabbit school ticket valley wagon yellow "
    "anchor basket camera desert eagle farmer guitar harbor insect jungle king lemon magnet nest ocean "
    "palace queen rocket saddle temple umbrella village whale arrow bottle candle dragon elephant flower "
    "glass horse iron jewel knife lion mountain newspaper oven piano rain silver train uncle violin wheel "
    "book chair door egg field gate house ice leaf moon nose owl paper ring stone tower wall boat cloud "
    "drum fish gold hill lamp mouse pipe road shoe "
)
WORDS = _WORDS.split()

# One for each class, of 15 to 22 word pieces.
STATIC = (
    "What is the capital city of the country where a %s was found near the %s and the %s?",
    "Explain how a %s works compared with a %s and a %s.",
    "Design a distributed %s store with a %s log and a %s index, and discuss trade-offs.",
)
# Of these, for each class, the run takes the one the static encoder is surest of.
SURE = (
    (
        STATIC[0],
        "How many letters are in the words %s, %s and %s?",
        "What does the word %s mean, and what do %s and %s mean?",
        "What is the Spanish word for %s, and for %s and %s?",
    ),
    (
        STATIC[1],
        "Write a lesson plan for children about a %s, a %s and a %s.",
        "Write a blog post about how to choose a %s, a %s and a %s.",
        "Write an email to a customer about a %s, a %s and a %s that came late.",
    ),
    (STATIC[2], "Prove or refute that every %s of a %s is a %s, and give a rigorous argument."),
)
SAMPLE = 300
# The static verdict of about three quarters of these is too close to call; 21 word pieces.
CLOSE = ("Is a %s heavier than a %s? Work it out from the size of the %s first.",)
CLOSE_PIECES = 21
# One prompt, sent again and again.
SAME = ("Explain why the sky is blue to a child of ten in three sentences.",)


@dataclass(slots=True)
class PromptNumbers:
    """Hands out ranges of prompt numbers that do not overlap."""

    next: int = 0

    def take(self, count: int) -> int:
        first, self.next = self.next, self.next + count
        if self.next > len(WORDS) ** 3:
            raise RuntimeError("the prompts are used up: measure for fewer seconds or rounds")
        return first


def prompt(templates: Sequence[str], number: int) -> str:
    """The prompt of a number, the same one that `wrk.lua` makes of it."""
    template = templates[number % len(templates)]
    if "%s" not in template:
        return template
    count = len(WORDS)
    # A prime to the number of words, so that each number has words of its own and neighbours share none.
    spread = number * 7919 % count**3
    return template % (WORDS[spread % count], WORDS[spread // count % count], WORDS[spread // count**2])


def sure_templates() -> tuple[str, ...]:
    """For each class the template of which the fewest prompts are too close to call for the static encoder."""
    from classifiers.classifier import Classifier

    classifier = Classifier.load()

    def close(template: str) -> int:
        verdicts = (classifier.classify(prompt((template,), number)) for number in range(SAMPLE))
        return sum(map(classifier.needs_transformer, verdicts))

    return tuple(min(templates, key=close) for templates in SURE)


def close_prompts(count: int) -> list[str]:
    """Different prompts of CLOSE_PIECES word pieces for which the classifier asks the transformer and believes it."""
    from classifiers.classifier import Classifier

    classifier, found, number = Classifier.load(), list[str](), 0
    while len(found) < count:
        text = prompt(CLOSE, number)
        verdict = classifier.classify(text)
        if classifier.needs_transformer(verdict) and classifier.refine(text, verdict) is not verdict:
            found.append(text)
        number += 1
        if number >= 20 * count:
            raise RuntimeError("the classifier is too sure of CLOSE: write a template it finds hard to judge")
    return found


def pieces(text: str) -> int:
    """Word pieces of a prompt, as MiniLM's tokenizer cuts it, with both marks."""
    from classifiers.encoder import DATA_DIRECTORY, load_tokenizer

    return len(load_tokenizer(DATA_DIRECTORY / "tokenizer.json", max_pieces=None).encode(text).ids)
