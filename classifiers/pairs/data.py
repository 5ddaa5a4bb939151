"""The near-miss training set: families of prompts written by hand, expanded to labelled pairs.

    python -m classifiers.pairs.data        # writes classifiers/data/near_misses/*.jsonl again

A family (a block of `near_misses/families/DOMAIN.txt`) holds several wordings of one request and, after each line
`> KIND`, wordings of a sibling request that needs another answer. Slots (`@n number: 5~five | 50`) are filled with
the same value for a pair that may share an answer (`~` separates spellings of one value) and with two values for a
trap; an `order` slot (`@A,B order: ...`) is also swapped. Wordings of one request pair up as `same`, everything
else as `trap`. Courtesies, case, contractions and small typos are sprinkled over both, so that they carry no label.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[1] / "data" / "near_misses"
KINDS = ("number", "date", "name", "unit", "negation", "scope", "order", "antonym", "format")
SPLITS = 5
SAME_PER_FAMILY, TRAPS_PER_FAMILY = 9, 11


@dataclass(frozen=True, slots=True)
class Pair:
    """Two prompts and whether one answer serves both.

    `id`: 16 hex digits of a hash over both texts. `kind`: what a trap differs in, `paraphrase` or `repeat` for
    the same request. `label`: `same` or `trap`. `family`: rows of one family share wordings. `split`: 0 to 4,
    by family, so that rows of two splits share none.
    """

    id: str
    domain: str
    kind: str
    a: str
    b: str
    label: str
    family: str
    split: int

    @property
    def same(self) -> bool:
        return self.label == "same"


@dataclass(frozen=True, slots=True)
class Slot:
    """Names of the placeholders it fills (two for `order`), its kind, and its values as lists of spellings."""

    names: tuple[str, ...]
    kind: str
    values: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """`requests[0]` is the family's own request; each further one is a sibling with the kind of its difference."""

    domain: str
    id: str
    slots: tuple[Slot, ...]
    requests: tuple[tuple[str, tuple[str, ...]], ...]


def read_families(directory: Path | None = None) -> list[Family]:
    """Read every family. Raises ValueError naming file and block on an unknown kind or an empty request."""
    families = []
    for path in sorted(((directory or DIRECTORY) / "families").glob("*.txt")):
        for number, block in enumerate(
            re.split(r"\n\s*\n", path.read_text(encoding="utf-8").strip()), start=1
        ):
            where = f"{path.name}, block {number}"
            slots: list[Slot] = []
            requests: list[tuple[str, list[str]]] = [("paraphrase", [])]
            for line in block.splitlines():
                if line.startswith("@"):
                    head, _, values = line[1:].partition(":")
                    names, _, kind = head.partition(" ")
                    slots.append(
                        Slot(
                            tuple(names.split(",")),
                            _known(kind.strip(), where),
                            tuple(tuple(v.strip() for v in value.split("~")) for value in values.split("|")),
                        )
                    )
                elif line.startswith(">"):
                    requests.append((_known(line[1:].strip(), where), []))
                else:
                    requests[-1][1].append(line.strip())
            if not all(wordings for _, wordings in requests):
                raise ValueError(f"{where}: a request without a wording")
            digest = hashlib.sha256(block.encode()).hexdigest()[:8]
            families.append(
                Family(
                    path.stem,
                    f"{path.stem}-{digest}",
                    tuple(slots),
                    tuple((k, tuple(w)) for k, w in requests),
                )
            )
    return families


def _known(kind: str, where: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{where}: unknown kind {kind!r}, one of {', '.join(KINDS)}")
    return kind


def expand(family: Family) -> Iterator[Pair]:
    """Yield the family's pairs, a bounded sample of all combinations, always the same ones."""
    rng = random.Random(family.id)  # noqa: S311 (a sample of training data)
    split = int(hashlib.sha256(family.id.encode()).hexdigest(), 16) % SPLITS
    seen: set[str] = set()

    def pair(kind: str, a: str, b: str) -> Pair | None:
        if kind not in ("paraphrase", "repeat") or rng.random() < 0.4:
            a, b = sprinkle(a, rng, 0.25), sprinkle(b, rng, 0.25)
        if rng.random() < 0.5:
            a, b = b, a
        same = kind in ("paraphrase", "repeat")
        key = "\n".join(sorted((normal(a), normal(b))))
        if a == b or key in seen or (not same and normal(a) == normal(b)):
            return None
        seen.add(key)
        digest = hashlib.sha256(f"{a}\n{b}".encode()).hexdigest()[:16]
        return Pair(digest, family.domain, kind, a, b, "same" if same else "trap", family.id, split)

    sames: list[Pair] = []
    own = [w for _, w in family.requests]
    for _ in range(12 * SAME_PER_FAMILY):
        if len(sames) == SAME_PER_FAMILY:
            break
        wordings = own[0] if rng.random() < 0.7 else rng.choice(own)
        chosen = choose(family.slots, rng)
        if rng.random() < 0.22 or len(wordings) == 1:
            text = fill(rng.choice(wordings), chosen, rng)
            made = pair("repeat", sprinkle(text, rng, 0.3), sprinkle(text, rng, 1.0))
        else:
            a, b = rng.sample(wordings, 2)
            made = pair("paraphrase", fill(a, chosen, rng), fill(b, chosen, rng))
        if made:
            sames.append(made)
    traps: list[Pair] = []
    for _ in range(12 * TRAPS_PER_FAMILY):
        if len(traps) == TRAPS_PER_FAMILY:
            break
        chosen = choose(family.slots, rng)
        if family.slots and (rng.random() < 0.5 or len(family.requests) == 1):
            slot = rng.randrange(len(family.slots))
            other = change(family.slots[slot], chosen[slot], rng)
            changed = [*chosen[:slot], other, *chosen[slot + 1 :]]
            _, wordings = rng.choice(family.requests)
            a = rng.choice(wordings)
            b = a if rng.random() < 0.5 else rng.choice(wordings)
            names = ["$" + name for name in family.slots[slot].names]
            if not all(name in text for name in names for text in (a, b)):
                continue
            made = pair(family.slots[slot].kind, fill(a, chosen, rng), fill(b, changed, rng))
        else:
            if len(family.requests) == 1:
                continue
            kind, wordings = rng.choice(family.requests[1:])
            first = (
                own[0]
                if rng.random() < 0.85
                else rng.choice([w for _, w in family.requests if w != wordings])
            )
            a, b = rng.choice(first), rng.choice(wordings)
            if rng.random() < 0.5:
                # The sibling's first wording is mostly the request's first wording with one change.
                a, b = first[0], wordings[0]
            made = pair(kind, fill(a, chosen, rng), fill(b, chosen, rng))
        if made:
            traps.append(made)
    yield from sames
    yield from traps


Choice = tuple[tuple[str, tuple[str, ...]], ...]


def choose(slots: Iterable[Slot], rng: random.Random) -> list[Choice]:
    """Pick values: per slot, (placeholder, spellings) for each of its placeholders, all different."""
    return [tuple(zip(s.names, rng.sample(s.values, len(s.names)), strict=True)) for s in slots]


def change(slot: Slot, chosen: Choice, rng: random.Random) -> Choice:
    """Return another choice for the slot: swapped or one placeholder changed."""
    if len(chosen) == 2 and rng.random() < 0.6:
        (first, x), (second, y) = chosen
        return ((first, y), (second, x))
    taken = [value for _, value in chosen]
    place = rng.randrange(len(chosen))
    value = rng.choice([v for v in slot.values if v not in taken] or [taken[place - 1]])
    return tuple((name, value if i == place else old) for i, (name, old) in enumerate(chosen))


def fill(text: str, chosen: Iterable[Choice], rng: random.Random) -> str:
    """Put one spelling of each value into its placeholder."""
    for choice in chosen:
        for name, spellings in choice:
            first = rng.random() < 0.7 or len(spellings) == 1
            text = text.replace("$" + name, spellings[0] if first else rng.choice(spellings[1:]))
    return text


CONTRACTIONS = (
    ("What is ", "What's "),
    ("what is ", "what's "),
    ("I am ", "I'm "),
    ("I would ", "I'd "),
    ("do not ", "don't "),
    ("does not ", "doesn't "),
    ("Who is ", "Who's "),
    ("Where is ", "Where's "),
    ("How do I ", "How can I "),
    ("How do I ", "How does one "),
    ("How do I ", "How would I "),
    ("How can I ", "What do I have to do to "),
    ("Can I ", "Could I "),
    ("Can I ", "Am I able to "),
    ("Do you ", "Do you guys "),
)
OPENERS = (
    "Hi, ",
    "Hello! ",
    "Quick question: ",
    "Please tell me: ",
    "hey ",
    "Good morning, ",
    "Sorry to bother you, ",
)
CLOSERS = (" Thanks!", " Thank you", " please", " Many thanks.", " Cheers", " thx")


def sprinkle(text: str, rng: random.Random, chance: float) -> str:
    """Change the text's surface, never its meaning: courtesies, case, contractions, punctuation, a typo."""
    if rng.random() >= chance:
        return text
    for _ in range(rng.choice((1, 1, 2))):
        way = rng.randrange(7)
        if way == 0:
            opener = rng.choice(OPENERS)
            text = opener + (
                text[0].lower() + text[1:] if text[:2] not in ("I ", "I'") and rng.random() < 0.7 else text
            )
        elif way == 1:
            text = text + rng.choice(CLOSERS)
        elif way == 2 and len(text) < 90:
            text = text.lower()
        elif way == 3:
            text = text.rstrip("?.!")
        elif way in (4, 5):
            usable = [(x, y) for x, y in CONTRACTIONS if x in text or y in text]
            if usable:
                x, y = rng.choice(usable)
                text = text.replace(x, y) if x in text else text.replace(y, x)
        else:
            words = list(re.finditer(r"[a-z]{5,}", text))
            if words:
                word = rng.choice(words)
                at = word.start() + rng.randrange(1, len(word[0]) - 2)
                text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text


def normal(text: str) -> str:
    """Fold case and everything that is neither letter nor digit."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def expand_all(families: Iterable[Family]) -> list[Pair]:
    """Expand all families, without pairs that another family already holds."""
    seen: set[str] = set()
    pairs = []
    for family in families:
        for pair in expand(family):
            key = "\n".join(sorted((normal(pair.a), normal(pair.b))))
            if key not in seen:
                seen.add(key)
                pairs.append(pair)
    return pairs


def read_pairs(directory: Path | None = None) -> list[Pair]:
    """Read the written rows (`near_misses/DOMAIN.jsonl`) in order of name."""
    rows = []
    for path in sorted((directory or DIRECTORY).glob("*.jsonl")):
        rows += [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return rows


def main() -> None:
    pairs = expand_all(read_families())
    for domain in sorted({pair.domain for pair in pairs}):
        lines = [json.dumps(asdict(p), ensure_ascii=False) for p in pairs if p.domain == domain]
        (DIRECTORY / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    same = sum(p.same for p in pairs)
    print(
        f"{len(pairs)} pairs, {same} same ({same / len(pairs):.0%}), {len({p.family for p in pairs})} families"
    )


if __name__ == "__main__":
    main()
