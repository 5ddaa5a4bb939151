"""The guard: reads from two prompts what must agree for one answer to serve both, and says what does not.

Pure and quick. It knows English words and any digits; it refuses on evidence and never vouches for a pair: what it
passes is for the verifier to judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

# A prompt is read up to here; of a longer one the rest is compared by its hash alone (`Reading.rest`).
MAX_CHARACTERS = 2000

REASONS = (
    "number",
    "number_alone",
    "date",
    "date_alone",
    "unit",
    "name",
    "negation",
    "opposite",
    "scope",
    "order",
    "format",
    "person",
    "rest",
)
UNREAD = ("signs", "long", "wording", "case", "people", "code", "prefix", "tense", "language")
"""What the verifier cannot judge, found beside `REASONS`: features know nothing of it."""
LONG = 30
"""Words. Few pairs that the verifier was trained on are longer (the longest 39): in a longer text one word that
makes all the difference weighs too little (docs/decisions/0105), so it has to be the same.
"""
WORDS = {
    "number": "another number",
    "number_alone": "a number that only one has",
    "date": "another date",
    "date_alone": "a date that only one has",
    "unit": "another unit",
    "name": "another name",
    "negation": "only one is negated",
    "opposite": "the opposite is asked",
    "scope": "another scope",
    "order": "the order is turned around",
    "format": "another format",
    "person": "somebody else's matter",
    "rest": "the end differs",
    "signs": "other signs or letters",
    "long": "another long text",
    "wording": "the wording itself is asked about",
    "case": "upper or lower case that makes a difference",
    "people": "somebody else does it",
    "code": "another code or file",
    "prefix": "another prefix of the same word",
    "tense": "another tense",
    "language": "another language than English",
}
"""What each reason says of two prompts."""

TOKEN = re.compile(
    r"\d{1,2}:\d{2}(?::\d{2})?|\d{4}-\d{2}-\d{2}|\d+(?:[.,]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?|[%$€£¥°#+*/=<>^@&|~\\-]"
)

# What neither the encoders nor `TOKEN` read, or read as nothing much: operators, what follows a backslash, emoji,
# letters of other scripts. Digits are read whatever their script, letters with accents are Latin.
SIGN = re.compile(r"\\.|[<>=^\\|~+*]|[^\x00-\x7f]", re.DOTALL)
TYPOGRAPHY = frozenset("’‘“”„‚«»‹›–—…•·®™©´\u00a0\u202f\u200b\u200c\u200d\u2060\ufeff\ufe0f¿¡€£¥°")


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


COURTESY = word_set(
    "hi hello hey please thanks thank thx cheers sorry kindly pls good morning afternoon evening dear "
    "greetings"
)
# Who asks about these asks about the wording, where a letter, a typo or a courtesy is what counts.
LITERAL = word_set(
    "spell spells spelled spelling spelt misspelled misspelling letters "
    "anagram anagrams palindrome rhyme rhymes syllable syllables grammar proofread typo typos synonym synonyms "
    "antonym antonyms pronounce pronounced pronunciation vowel vowels consonant consonants"
)
# Here words in other letters are the matter only where the lexicon does not know them (`features.reasons`).
STRINGS = word_set(
    "length reverse reversed characters character string strings substring uppercase lowercase hash concatenate "
    "encode encoded decode decoded base checksum md sha"
)
# These are about a text: what stands in quotes or behind a colon. Of the first it counts to the letter.
EDITING = word_set(
    "rewrite rephrase reword paraphrase correct fix edit improve capitalise capitalize punctuate"
)
ABOUT = word_set(
    "translate translation sentiment classify categorise categorize summarise summarize summary reply mean means "
    "explain"
)
# Bounded, and no part of it can match in two ways.
QUOTED = re.compile(r"""(?<!\w)(?:"([^"]{1,2000})"|'([^']{1,2000})'(?!\w)|[“„«]([^”“»]{1,2000})[”“»])""")
SLIPS = re.compile(r"(?:n['’]?t|['’](?:re|ve|ll|m|d|s))$")
# A code begins with a letter and has a digit ("AB12", "INC-4411a"); a file has an ending ("a.txt").
CODE = re.compile(r"[A-Za-z][\w-]*(?:\.[A-Za-z]{2,4}(?!\w))?")
# Units where "m" and "M" are far apart, read behind a number only: elsewhere they abbreviate other things.
CASED_UNITS = word_set("mw mv ma mhz mpa pa ms mj mm mn mwh mah")
# In capitals another word; "us" is left out, since most who write it of the country mean the country.
CAPITALS = word_set("who it aids")
BITS = word_set("kb mb gb tb kbps mbps gbps")
# A letter behind one of these is a name, and names in programs and formulas tell "n" from "N".
NAMING = word_set(
    "variable variables letter letters symbol constant character parameter matrix vector secret field column "
    "called named file key"
)
KINDS = word_set("vitamin vitamins plan hepatitis grade option type group class big")
# Behind other words these are mostly "you", "I", an article or a language.
LOOSE_LETTERS = word_set("a i u c r")
PERSONS = {
    "i": "i",
    "me": "i",
    "we": "we",
    "us": "we",
    "you": "you",
    "he": "he",
    "him": "he",
    "his": "he",
    "she": "she",
    "her": "she",
    "they": "they",
    "them": "they",
    "it": "it",
}
TURNED: dict[str, tuple[str, ...]] = {}
"""Prefix -> those that turn it."""
_turned = """hypo hyper inter intra un re pre post over under macro micro anti pro im ex in ex in out up down
    sub super mono poly homo hetero endo exo"""
for _left, _right in zip(_turned.split()[::2], _turned.split()[1::2], strict=True):
    TURNED[_left] = (*TURNED.get(_left, ()), _right)
    TURNED[_right] = (*TURNED.get(_right, ()), _left)
PREFIXED = tuple(TURNED)
# Little words of other European languages that English lacks; the verifier knows English alone.
FOREIGN = word_set(
    "le la les des du une un est sont dans pour que qui quel quelle quels quelles avec je vous mon ma mes votre "
    "ce cette où pourquoi quand combien faire et ou "
    "der das und ist ein eine einen einem ich nicht wie zu auf mit von für den dem wo warum wann kann wir mein "
    "meine sind gibt wird viel aus bei nach oder "
    "el los las una uno por para del mi mis en es cómo qué cuál dónde cuándo como donde cuando cual puedo esta "
    "il lo gli di che come sono mio mia nel della dove quando posso perché quanto "
    "o os um uma não meu minha onde quanto são de da do no na "
    "het een van ik mijn hoe waar wat wanneer niet zijn kan voor naar "
    "jak gdzie kiedy czy nie jest się mój moje na w z "
    "och är jag hur var när inte min mitt og er jeg hvordan hvor på att det"
) - word_set("come do no on in so as den o w z var min van")
# Applied to the first and last characters of a prompt alone, so that no text makes them slow.
OPENINGS = re.compile(
    r"^(?:\s*(?:hi|hello|hey|dear|good (?:morning|afternoon|evening)|sorry to bother you|quick question|"
    r"please tell me|excuse me|i have a question|just wondering|question)(?: there| all| team| guys)?"
    r"\s*[,!.:;-]+\s*)+",
    re.IGNORECASE,
)
CLOSINGS = re.compile(
    r"[\s,.!?-]*(?:many thanks|thanks(?: a lot| so much| in advance)?|thank you(?: very much| so much)?|"
    r"cheers|thx|please|pls)[\s.!]*$",
    re.IGNORECASE,
)
ENDS = 100
CONTRACTED = {
    "n't": " not",
    "'re": " are",
    "'ve": " have",
    "'ll": " will",
    "'m": " am",
    "'d": " would",
}
IS_AFTER = word_set("what who where how when why that there it he she here which let")

NUMBER_WORDS: dict[str, int] = {}
_numbers = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty"""
for _place, _word in enumerate(_numbers.split()):
    NUMBER_WORDS[_word] = _place
NUMBER_WORDS |= {
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
    "k": 1000,
    "m": 10**6,
    "bn": 10**9,
}
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
POINTED_THOUSANDS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}")
# Of an amount "1.500" may be one and a half or fifteen hundred: it equals itself alone.
EITHER = re.compile(r"[1-9]\d{0,2}\.\d{3}")
# Numbers written as one: in another order they are another date, fraction, range or reference.
JOINED = re.compile(r"(?<![\w.,/-])\d+(?:[-/]\d+)+(?![\w/-])")
# Of a number whose products are exact: Decimal keeps 28 digits, and no factor has more than 13.
MAX_DIGITS = 15
MINUS = re.compile(r"(?:(?<=[\s(=:,;*+/])|^)-(?=\d)")
# Unit -> (kind, factor to the kind's smallest unit). Kinds are compared, so "two weeks" is "14 days".
UNITS: dict[str, tuple[str, Decimal]] = {}
for _kind, _entries in {
    "time": "second sec 1 minute min mins 60 hour hr hrs 3600 day 86400 week 604800 fortnight 1209600 "
    "month 2629800 year yr 31557600 decade 315576000",
    "mass": "mcg microgram 0.001 mg milligram 1 g gram gramme 1000 kg kilo kilogram kilogramme 1000000 "
    "lb lbs pound 453592.37 oz ounce 28349.5 ton tonne 1000000000",
    "length": "mm millimetre millimeter 1 cm centimetre centimeter 10 m metre meter 1000 km kilometre kilometer "
    "1000000 mile mi 1609344 inch inches 25.4 foot feet ft 304.8 yard 914.4",
    "volume": "ml millilitre milliliter 1 cl 10 dl 100 litre liter 1000 gallon 3785.4 pint 473 cup 240 "
    "tablespoon tbsp 15 teaspoon tsp 5",
    "data": "byte 1 kb kilobyte 1000 mb megabyte 1000000 gb gigabyte 1000000000 tb terabyte 1000000000000",
    "dollar": "$ usd dollar buck 1",
    "euro": "€ eur euro 1",
    "sterling": "£ gbp quid 1",
    "yen": "¥ jpy yen 1",
    "percent": "% percent pct 1",
    "celsius": "celsius centigrade 1",
    "fahrenheit": "fahrenheit 1",
    "kelvin": "kelvin 1",
    "word": "word 1",
    "character": "character char 1",
    "sentence": "sentence 1",
    "paragraph": "paragraph 1",
    "bullet": "bullet 1",
    "token": "token 1",
}.items():
    _names: list[str] = []
    for _entry in _entries.split():
        if not _entry[0].isdigit():
            _names.append(_entry)
            continue
        for _name in _names:
            UNITS[_name] = (_kind, Decimal(_entry))
        _names = []
WEEKDAYS: dict[str, str] = {}
for _day in ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"):
    WEEKDAYS |= {_day: _day, _day + "s": _day}
WEEKDAYS |= {"mon": "monday", "tue": "tuesday", "wed": "wednesday", "thu": "thursday", "fri": "friday"}
MONTHS: dict[str, int] = {}
_months = "january february march april may june july august september october november december"
for _place, _month in enumerate(_months.split(), start=1):
    MONTHS[_month] = _place
    if _month != "may":
        MONTHS[_month[:3]] = _place
MONTHS.pop("mar")
RELATIVE = {
    "today": "today",
    "tonight": "tonight",
    "tomorrow": "tomorrow",
    "yesterday": "yesterday",
    "weekend": "weekend",
    "weekends": "weekend",
    "spring": "spring",
    "summer": "summer",
    "autumn": "autumn",
    "winter": "winter",
    "christmas": "christmas",
    "easter": "easter",
    "noon": "12:00",
    "midnight": "00:00",
}
QUARTER = re.compile(r"^q[1-4]$")

NEGATIONS = word_set(
    "not no never without neither nor cannot none nobody nothing nowhere non except excluding exclude lacking "
    "lacks lack stop avoid refuse unable fail fails failed prevent forbidden banned prohibited ban prohibit"
)
# Of those, words that turn the request itself; two of them cancel out.
TURNING = word_set("not no never without neither nor none nobody nothing non")

SCOPE_GROUPS = (
    "all every everyone everybody entire whole each any",
    "some several few",
    "only just solely exclusively",
    "except besides apart excluding",
    "first initial earliest",
    "last final latest",
    "second",
    "third",
    "next upcoming following",
    "previous prior",
    "before prior",
    "after once",
    "during while",
    "until till",
    "within under",
    "over above",
    "below beneath",
    "between",
    "at_least minimum min least",
    "at_most maximum max most",
    "both",
    "half",
    "double twice",
    "single",
    "always",
    "sometimes occasionally",
    "usually",
    "permanent permanently forever",
    "temporary temporarily",
    "monthly",
    "weekly",
    "daily",
    "yearly annual annually",
    "hourly",
    "quarterly",
    "inside indoors",
    "outside outdoors outdoor",
    "online",
    "offline",
    "abroad overseas",
    "national domestic",
    "international",
    "public",
    "private",
    "local",
    "remote",
    "free",
    "premium",
    "internal",
    "external",
)
SCOPE: dict[str, str] = {}
for _group in SCOPE_GROUPS:
    for _word in _group.split():
        SCOPE.setdefault(_word, _group.split()[0])

OPPOSITES: dict[str, frozenset[str]] = {}
_sides = [
    ("enable activate", "disable deactivate"),
    ("on", "off"),
    ("increase raise grow", "decrease reduce lower cut"),
    ("add include insert attach", "remove delete exclude drop"),
    ("open", "close closed shut"),
    ("start begin launch", "stop end finish quit"),
    ("buy purchase", "sell"),
    ("lend", "borrow"),
    ("import", "export"),
    ("upload", "download"),
    ("lock", "unlock"),
    ("block ban", "unblock unban"),
    ("show display reveal", "hide conceal"),
    ("accept approve allow permit", "reject decline refuse deny forbid ban prohibit block"),
    ("install", "uninstall"),
    ("connect link", "disconnect unlink"),
    ("subscribe", "unsubscribe"),
    ("join enter", "leave exit"),
    ("upgrade", "downgrade"),
    ("encrypt", "decrypt"),
    ("encode", "decode"),
    ("compress zip", "decompress unzip extract"),
    ("serialize", "deserialize"),
    ("push", "pull"),
    ("send", "receive"),
    ("give", "take"),
    ("pay", "charge"),
    ("win", "lose"),
    ("gain", "lose"),
    ("arrive arrival", "depart departure leave"),
    ("good best better", "bad worst worse"),
    ("advantage benefit pro upside", "disadvantage drawback con downside risk"),
    ("cheap cheapest cheaper", "expensive dearest"),
    ("high highest higher", "low lowest lower"),
    ("big biggest large largest", "small smallest little"),
    ("long longest longer", "short shortest shorter"),
    ("fast fastest quick quickest", "slow slowest"),
    ("hot warm", "cold cool"),
    ("wet", "dry"),
    ("full", "empty"),
    ("early earliest earlier", "late latest later"),
    ("new newest", "old oldest"),
    ("young youngest", "old oldest elderly"),
    ("hard difficult", "easy simple"),
    ("strong", "weak"),
    ("rich", "poor"),
    ("safe", "unsafe dangerous risky"),
    ("legal lawful", "illegal unlawful"),
    ("possible", "impossible"),
    ("valid", "invalid"),
    ("positive", "negative"),
    ("true", "false"),
    ("right correct", "wrong incorrect"),
    ("same", "different"),
    ("common", "rare"),
    ("public", "private"),
    ("internal inside", "external outside"),
    ("before", "after"),
    ("above over", "below under"),
    ("with", "without"),
    ("more most", "less least fewer fewest"),
    ("maximum max most", "minimum min least"),
    ("first", "last"),
    ("previous last past", "next upcoming future"),
    ("ascending", "descending"),
    ("synchronous sync", "asynchronous async"),
    ("horizontal", "vertical"),
    ("left", "right"),
    ("up", "down"),
    ("top", "bottom"),
    ("front", "back rear"),
    ("raw uncooked", "cooked"),
    ("sweet", "salty savoury sour bitter"),
    ("spicy hot", "mild bland"),
    ("alcoholic", "nonalcoholic"),
    ("male man men father dad husband son boy", "female woman women mother mum mom wife daughter girl"),
    ("adult grown", "child kid children toddler baby infant"),
    ("employer landlord seller teacher parent doctor", "employee tenant buyer student child patient"),
    ("formal", "informal casual"),
    ("temporary", "permanent"),
    ("manual manually", "automatic automatically"),
    ("import", "export"),
    ("input", "output"),
    ("read", "write"),
    ("save", "spend discard"),
    ("create make", "delete destroy remove"),
    ("merge join", "split"),
    ("lengthen expand extend", "shorten shrink"),
    ("freeze", "unfreeze thaw defrost"),
    ("mute", "unmute"),
    ("pin", "unpin"),
    ("archive", "unarchive restore"),
    ("follow", "unfollow"),
    ("hire", "fire dismiss"),
    ("rent", "buy own"),
    ("ask question", "answer"),
    ("cause", "cure prevent"),
    ("success succeed", "failure fail"),
    ("profit", "loss"),
    ("income revenue", "expense cost"),
    ("debit", "credit"),
    ("sunrise", "sunset"),
    ("day", "night"),
    ("am", "pm"),
    ("domestic", "international"),
    ("inbound incoming", "outbound outgoing"),
    ("include", "exclude"),
    ("part", "full"),
]
for _left, _right in _sides:
    for _one, _two in ((_left, _right), (_right, _left)):
        for _word in _one.split():
            OPPOSITES[_word] = OPPOSITES.get(_word, frozenset()) | frozenset(_two.split())
NEGATIVE = frozenset(word for _, right in _sides for word in right.split()) - word_set("old student")
PREFIXES = ("un", "in", "im", "il", "ir", "dis", "non", "de", "mis", "anti")

FORMATS = word_set(
    "python javascript typescript java kotlin rust golang ruby php perl swift scala haskell bash powershell "
    "sql html css react vue angular django flask json yaml xml csv toml markdown pdf docx xlsx excel latex "
    "table list bullets prose"
)
LANGUAGES = word_set(
    "english german french spanish italian portuguese dutch polish russian ukrainian "
    "chinese mandarin japanese korean arabic hindi turkish swedish danish norwegian finnish greek hebrew "
    "czech hungarian romanian vietnamese thai welsh indonesian latin irish catalan"
)
FORMATS |= LANGUAGES
SAME_FORMAT = {
    "js": "javascript",
    "ts": "typescript",
    "py": "python",
    "golang": "go",
    "md": "markdown",
    "mandarin": "chinese",
}

OWNERS = {
    "my": "me",
    "me": "me",
    "mine": "me",
    "i": "me",
    "our": "me",
    "we": "me",
    "us": "me",
    "his": "him",
    "he": "him",
    "him": "him",
    "her": "her",
    "she": "her",
    "their": "them",
    "them": "them",
}
ALIASES = {
    "uk": "britain",
    "gb": "britain",
    "usa": "america",
    "us": "america",
    "american": "america",
    "british": "britain",
    "nyc": "newyork",
    "postgres": "postgresql",
    "js": "javascript",
    "k8s": "kubernetes",
    "covid": "covid",
}
DIRECTED = word_set(
    "from to into than before after over under with by of but for compared versus instead between above below "
    "cause causes"
)
SWAPPING = word_set("replace substitute swap exchange trade")
LITTLE = word_set("the a an my our your some any this that one on do how can i")
QUESTION_WORDS = ("what", "which", "who", "whom", "whose", "when", "where", "why", "how")
AUXILIARIES = word_set(
    "is are was were do does did can could may might will would shall should must has have had am"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one prompt says, as far as the guard reads it. Words are lower case with courtesies taken off."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]
    dates: frozenset[str]
    units: frozenset[str]
    names: frozenset[str]
    negated: int
    negations: frozenset[str]
    scope: frozenset[str]
    route: tuple[str, str]
    formats: frozenset[str]
    owners: frozenset[str]
    asks: str
    rest: int
    signs: tuple[str, ...] = ()
    polite: frozenset[str] = frozenset()
    said: tuple[str, ...] = ()
    text: str = ""
    slips: tuple[str, ...] = ()
    cased: frozenset[str] = frozenset()
    people: tuple[str, ...] = ()
    codes: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()

    @property
    def vocabulary(self) -> frozenset[str]:
        return frozenset(self.words)


def read(text: str) -> Reading:
    """Read one prompt. Never raises; linear in the first 2,000 characters."""
    rest = hash(text[MAX_CHARACTERS:]) if len(text) > MAX_CHARACTERS else 0
    text = text[:MAX_CHARACTERS]
    signs = _signs(text)
    text = text.replace("’", "'")
    text = _bare(text) or text
    words: list[str] = []
    names: set[str] = set()
    said: list[str] = []
    cased: set[str] = set()
    below: set[int] = set()
    starts = True
    shouting = text.upper() == text
    for match in TOKEN.finditer(text):
        token = match[0]
        lower = token.lower()
        gap = text[max(match.start() - 2, 0) : match.start()]
        starts = starts or "." in gap or "?" in gap or "!" in gap or "\n" in gap or ":" in gap
        if token[0].isalpha():
            if token[0].isupper() and not shouting and lower not in ("i", "i'm", "i'd", "i've", "i'll"):
                inner = token[1:] != token[1:].lower()
                if (
                    (not starts or (inner and len(token) > 1))
                    and lower not in MONTHS
                    and lower not in WEEKDAYS
                ):
                    names.add(ALIASES.get(lower.removesuffix("'s"), lower.removesuffix("'s")))
            # "s3" and "q2" are no letters.
            if len(token) < 5 and not text[match.end() : match.end() + 1].isdigit():
                cased.update(
                    _cased(
                        lower if shouting and lower in CAPITALS else token, lower, words[-1] if words else ""
                    )
                )
            words.extend(_expanded(lower))
        else:
            if token[0].isdigit() and MINUS.match(text, match.start() - 1):
                below.add(len(words))
            words.append(lower)
        said.append(lower)
        starts = False
    # At the ends they are gone by now: what is left is within what is said, and may be what it is about.
    polite = frozenset(word for word in words if word in COURTESY)
    kept = [
        at
        for at, word in enumerate(words)
        if word not in COURTESY or word in ("morning", "evening", "afternoon")
    ]
    below = {place for place, at in enumerate(kept) if at in below}
    words = [words[at] for at in kept]
    if not words:
        words = [match[0].lower() for match in TOKEN.finditer(text)]
    numbers, dates, units = _quantities(words, below)
    vocabulary = set(words)
    literal = not LITERAL.isdisjoint(vocabulary) or _counts_letters(words)
    editing = not EDITING.isdisjoint(vocabulary)
    about = _quoted(text, editing) if editing or not ABOUT.isdisjoint(vocabulary) else ""
    turning = sum(word in TURNING for word in words)
    return Reading(
        words=tuple(words),
        numbers=tuple(numbers),
        dates=frozenset(dates),
        units=frozenset(units),
        names=frozenset(names),
        negated=turning,
        negations=frozenset(vocabulary & NEGATIONS),
        scope=frozenset(SCOPE[word] for word in vocabulary if word in SCOPE),
        route=_route(words),
        formats=frozenset(SAME_FORMAT.get(w, w) for w in vocabulary if w in FORMATS or w in SAME_FORMAT),
        owners=frozenset(OWNERS[word] for word in vocabulary if word in OWNERS),
        asks=_asks(words),
        rest=rest,
        signs=signs,
        polite=polite,
        said=tuple(said) if literal else (),
        text=about,
        slips=tuple(word for word in said if SLIPS.search(word)) if literal or (editing and about) else (),
        cased=frozenset(cased),
        people=tuple(word for word in words if word in PERSONS),
        codes=_codes(text),
        joined=frozenset(JOINED.findall(text.replace("–", "-")))
        if "/" in text or "-" in words
        else frozenset(),
    )


def _cased(token: str, lower: str, before: str) -> tuple[str, ...]:
    """Read a word whose case counts: a unit or a letter that names something. At most one; else empty."""
    if len(token) == 1:
        named = before in NAMING or (lower not in LOOSE_LETTERS and before not in KINDS and before != "\\")
        return (token,) if named else ()
    if lower in CAPITALS:
        return (token if token.isupper() else lower,)
    if lower in BITS:
        # "mb" and "MB" are bytes to those who write them, "Mb" are bits; "mbps" and "Mbps" are bits, "MBps" bytes.
        odd = token[1:] == "b" and token[0].isupper() if len(token) == 2 else token[1:].startswith("Bp")
        return (token.upper() if odd else lower,)
    return (token,) if lower in CASED_UNITS and before[:1].isdigit() else ()


def _counts_letters(words: list[str]) -> bool:
    """Tell whether it is asked how many of a letter there are ("how many r in strawberry")."""
    return any(
        one == "many" and len(other) == 1 and other.isalpha() and other not in ("i", "u")
        for one, other in pairwise(words)
    )


def _quoted(text: str, exact: bool) -> str:
    """Return the text that a prompt is about: what stands in quotes, else behind the first colon."""
    found = QUOTED.search(text)
    part = next(filter(None, found.groups())) if found else re.split(r":\s", text, maxsplit=1)[-1]
    if not found and part == text:
        return ""
    part = " ".join(part.split()).strip()
    return part if exact else part.strip(" .,!?").casefold()


def _codes(text: str) -> frozenset[str]:
    return frozenset(
        code.replace("-", "").replace("_", "").casefold()
        for code in CODE.findall(text)
        if "." in code or any(map(str.isdigit, code))
    )


def _signs(text: str) -> tuple[str, ...]:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    found = (match[0] for match in SIGN.finditer(text))
    return tuple(sign.casefold() if len(sign) == 1 else sign for sign in found if not _read_elsewhere(sign))


def _read_elsewhere(sign: str) -> bool:
    if sign in TYPOGRAPHY or sign.isspace():
        return True
    return len(sign) == 1 and sign.isalpha() and unicodedata.name(sign, "").startswith("LATIN ")


def _bare(text: str) -> str:
    """Take courtesies off both ends."""
    text = OPENINGS.sub("", text[:ENDS]) + text[ENDS:]
    return text[:-ENDS] + CLOSINGS.sub("", text[-ENDS:])


def _expanded(word: str) -> list[str]:
    if "'" not in word:
        if word == "cannot":
            return ["can", "not"]
        if word in (
            "dont",
            "doesnt",
            "isnt",
            "cant",
            "wont",
            "didnt",
            "arent",
            "havent",
            "wasnt",
            "shouldnt",
        ):
            return ["can" if word == "cant" else "will" if word == "wont" else word[:-2], "not"]
        return [word]
    if word in ("can't", "won't", "shan't"):
        return [{"can't": "can", "won't": "will", "shan't": "shall"}[word], "not"]
    for ending, full in CONTRACTED.items():
        if word.endswith(ending):
            stem = word.removesuffix(ending)
            return [stem, full.strip()] if stem else [full.strip()]  # "n't" alone
    if word.endswith("'s"):
        stem = word[:-2]
        return [stem, "is"] if stem in IS_AFTER else [stem]
    return [word.replace("'", "")]


def _quantities(words: list[str], below: set[int]) -> tuple[list[str], set[str], set[str]]:
    """Find numbers (see `_amount`; each as often as it is said), dates and times, and units asked for without a
    number. `below`: places of words that are below zero.
    """
    numbers: list[str] = []
    dates: set[str] = set()
    units: set[str] = set()
    at, end = 0, len(words)
    while at < end:
        word = words[at]
        following = words[at + 1] if at + 1 < end else ""
        if word in WEEKDAYS:
            dates.add(WEEKDAYS[word])
        elif word in RELATIVE:
            dates.add(RELATIVE[word])
        elif QUARTER.match(word + following) and following.isdigit():
            dates.add(word + following)
            at += 1
        elif word in MONTHS and (
            word != "may" or following.isdigit() or (at and words[at - 1] in ("in", "of", "on", "by"))
        ):
            dates.add(f"month {MONTHS[word]}")
        elif ":" in word and word[0].isdigit():
            half, used = _half(words, at + 1)
            dates.add(_time(word, half))
            at += used
        elif word == "half" and following in ("an", "a") and at + 2 < end and words[at + 2] == "hour":
            numbers.append(_amount("0.5", "hour"))
            at += 2
        elif word.count("-") == 2 and word[0].isdigit():
            year, month, day = word.split("-")
            dates.add(f"month {int(month)}")
            numbers += [year, day.lstrip("0")]
        elif word == "single" and _unit(following):
            numbers.append(_amount("1", following))
            at += 1
        elif word == "two" and (following == "times" or (at and words[at - 1] == "between")):
            pass
        elif word[0].isdigit() or word in NUMBER_WORDS:
            value, used = _value(words, at)
            before = words[at - 1] if at else ""
            if at in below or (before in ("minus", "negative") and not (at > 1 and _numeral(words[at - 2]))):
                value = "-" + value
            unit = words[at + used] if at + used < end else ""
            while unit in ("-", "°", "degrees", "degree", "square", "cubic") and at + used + 1 < end:
                used += 1
                unit = words[at + used]
            if unit in ("c", "f"):
                unit = "celsius" if unit == "c" else "fahrenheit"
            if unit in MONTHS or before in MONTHS:
                value = value.lstrip("0") or value  # "01 March"
            half, of_day = _half(words, at + used)
            if of_day:
                dates.add(_time(value, half))
                used += of_day
            elif unit in ("st", "nd", "rd", "th"):
                numbers.append(value)
                used += 1
            elif unit == "s" and word[-1] == "0" and len(word) > 1:
                numbers.append(value + "s")
                used += 1
            elif _unit(unit):
                numbers.append(_amount(value, _unit(unit)))
                used += 1
            elif before in UNITS and UNITS[before][0] in ("dollar", "euro", "sterling", "yen"):
                numbers.append(_amount(value, before))
            # "one" alone is mostly a pronoun.
            elif word != "one" or used > 1:
                numbers.append(value)
            at += used - 1
        elif word in ("hundred", "thousand", "million", "billion", "trillion", "dozen"):
            numbers.append(str(SCALES[word]))
        elif len(word) > 2 and _unit(word):
            kind, factor = UNITS[_unit(word)]
            units.add(f"{kind} {factor:f}")
        at += 1
    return numbers, dates, units


def _numeral(word: str) -> bool:
    return word[0].isdigit() or word in NUMBER_WORDS or word in SCALES


def _half(words: list[str], at: int) -> tuple[str, int]:
    """Read behind a number which half of the day it is in, and how many words say so; none where it is no time."""
    one, two, three = (*words[at : at + 3], "", "", "")[:3]
    if one in ("am", "pm"):
        return one, 1
    if one == "oclock" or (one, two) == ("o", "clock"):
        used = 1 if one == "oclock" else 2
        half, more = _half(words, at + used)
        return half, used + more
    if (one, two) == ("in", "the") and three in ("morning", "afternoon", "evening"):
        return "am" if three == "morning" else "pm", 3
    return "", 0


def _time(said: str, half: str) -> str:
    """Return a time in 24 hours: of "8.05" and "8:05" in the second half "20:05"."""
    hour, *rest = re.split("[:.]", said)
    if not hour.isdigit():
        return said + half
    hours = int(hour)
    if half and hours <= 12:
        hours = hours % 12 + 12 * (half == "pm")
    return ":".join((f"{hours:02d}", *(rest or ["00"])))


def _unit(word: str) -> str:
    if word in UNITS:
        return word
    return word[:-1] if word.endswith("s") and word[:-1] in UNITS else ""


def _amount(value: str, unit: str) -> str:
    """Return an amount as "value smallest kind": "2 1209600 time" for two weeks. A bare number is its text alone."""
    kind, factor = UNITS[_unit(unit)]
    if EITHER.fullmatch(value):
        return f"{value} {value}*{factor:f} {kind}"
    plain = value.replace(".", "") if POINTED_THOUSANDS.fullmatch(value) else value.replace(",", ".")
    amount = _decimal(plain)
    if amount is None:
        return f"{value} {value} {kind}"
    return f"{_plain(amount)} {_plain(amount * factor)} {kind}"


def _decimal(text: str) -> Decimal | None:
    """None where it is no number ("1.2.3"), or one of so many digits that a product would be rounded."""
    try:
        return Decimal(text) if len(text) <= MAX_DIGITS else None
    except ArithmeticError:
        return None


def _plain(number: Decimal) -> str:
    digits = f"{number:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _value(words: list[str], at: int) -> tuple[str, int]:
    """Return the number that starts at `at`, every digit of it, and how many words it takes.

    A number that stands alone may be a version, an address or an id: it is what is written, but for commas between
    thousands.
    """
    word = words[at]
    if word[0].isdigit():
        text = word.replace(",", "") if THOUSANDS.fullmatch(word) else word
        used = 1
    else:
        number, used = NUMBER_WORDS[word], 1
        following = at + 1
        if number >= 20 and following < len(words):
            step = 1 if words[following] != "-" else 2
            if at + step < len(words) and 0 < NUMBER_WORDS.get(words[at + step], 0) < 10:
                number, used = number + NUMBER_WORDS[words[at + step]], step + 1
        text = str(number)
    while at + used < len(words) and words[at + used] in SCALES:
        scaled = _decimal(text.replace(",", "."))
        if scaled is None:
            break
        text = _plain(scaled * SCALES[words[at + used]])
        used += 1
    return text, used


def _route(words: list[str]) -> tuple[str, str]:
    """Return what is left and what is reached: of "from A to B", "A into B", "B instead of A", "replace A with B"."""
    content = [(at, w) for at, w in enumerate(words) if w not in LITTLE]
    before = dict(content)

    def after(at: int) -> str:
        return next((w for place, w in content if at < place <= at + 3), "")

    def ahead(at: int) -> str:
        return next((before[place] for place in range(at - 1, max(at - 4, -1), -1) if place in before), "")

    left = reached = ""
    since = until = False
    for at, word in enumerate(words[:-1]):
        if word == "from" and not since:
            left, since = after(at), True
        elif word in ("to", "into") and after(at) and (not reached or (since and not until)):
            # "write to the team: it moves from Tuesday to Thursday": the one after "from" is meant.
            reached, until = after(at), since
            left = left or ahead(at)
        elif word == "of" and at and words[at - 1] in ("instead", "place"):
            left, reached = after(at), ahead(at - 1 if words[at - 1] == "instead" else at - 2)
        elif word in ("with", "by", "for") and not reached and not SWAPPING.isdisjoint(words[:at]):
            left, reached = ahead(at), after(at)
    return left, reached


def _asks(words: list[str]) -> str:
    """Name what kind of answer is asked for: who, when, ..., amount, duration, yesno, or do."""
    for at, word in enumerate(words[:24]):
        if word in QUESTION_WORDS:
            following = words[at + 1] if at + 1 < len(words) else ""
            if word == "how":
                if following in ("much", "expensive"):
                    return "amount"
                if following == "many":
                    return "many"
                if following in ("long", "soon", "quickly", "fast"):
                    return "duration"
                if following in ("often", "big", "far", "old", "high", "tall", "late", "early"):
                    return "measure"
                return "how"
            if word in ("what", "which"):
                if following in ("time", "year", "date", "day", "month", "hour", "century"):
                    return "when"
                if following in ("city", "country", "place", "town", "street", "address"):
                    return "where"
                if following in ("price", "cost", "fee", "fare"):
                    return "amount"
                if following in ("person", "man", "woman", "artist", "author", "company"):
                    return "who"
                return "what"
            return "who" if word in ("whom", "whose") else word
        if at == 0 and word in AUXILIARIES:
            return "yesno"
    return "do"


def reasons(a: Reading, b: Reading) -> tuple[str, ...]:
    """Return why one answer cannot serve both prompts, in the order of `REASONS` and `UNREAD`; empty when nothing
    was found.
    """
    found: list[str] = []
    if a.numbers != b.numbers and (alone := unmatched(a.numbers, b.numbers)):
        found.append(alone)
    elif a.joined - b.joined and b.joined - a.joined:
        found.append("number")
    if a.dates != b.dates:
        found.append("date" if a.dates - b.dates and b.dates - a.dates else "date_alone")
    if a.units and b.units and a.units != b.units:
        found.append("unit")
    mine, yours = a.vocabulary, b.vocabulary
    if any(n not in yours and n not in b.names for n in a.names) and any(
        n not in mine and n not in a.names for n in b.names
    ):
        found.append("name")
    if a.negated % 2 != b.negated % 2:
        found.append("negation")
    if opposed(mine - yours, yours - mine):
        found.append("opposite")
    only_a, only_b = a.scope - b.scope, b.scope - a.scope
    if only_a and only_b:
        found.append("scope")
    if turned(a.route, b.route) or swapped(a, b):
        found.append("order")
    if a.formats - b.formats and b.formats - a.formats:
        found.append("format")
    if a.owners and b.owners and not a.owners & b.owners:
        found.append("person")
    if a.rest != b.rest:
        found.append("rest")
    if a.signs != b.signs:
        found.append("signs")
    if a.words != b.words and max(len(a.words), len(b.words)) > LONG:
        found.append("long")
    if (
        (a.polite - b.polite and b.polite - a.polite)
        or ((a.said or b.said) and (a.words, a.polite) != (b.words, b.polite))
        or _slipped(a, b)
        or (a.text and b.text and a.text != b.text)
    ):
        found.append("wording")
    if a.cased != b.cased and _cases_differ(a.cased, b.cased):
        found.append("case")
    if a.people != b.people and _people_turned(a, b):
        found.append("people")
    if a.codes - b.codes and b.codes - a.codes:
        found.append("code")
    if _prefixed(mine - yours, yours - mine):
        found.append("prefix")
    return tuple(found)


def _slipped(a: Reading, b: Reading) -> bool:
    """Tell whether the same words are contracted otherwise ("dont", "don't") where the wording is the matter."""
    if a.words != b.words or a.slips == b.slips:
        return False
    # "What's" for "What is" is about nobody's wording.
    return [s for s in a.slips if s[:-2] not in IS_AFTER] != [s for s in b.slips if s[:-2] not in IS_AFTER]


def _cases_differ(a: frozenset[str], b: frozenset[str]) -> bool:
    there = {x.casefold() for x in a} & {x.casefold() for x in b}
    return any(x.casefold() in there for x in a ^ b)


def _people_turned(a: Reading, b: Reading) -> bool:
    """Tell whether pronouns have changed places while all else is the same ("can I see him", "can he see me")."""
    if not a.people or not b.people:
        return False

    def bare(reading: Reading) -> list[str]:
        return sorted(PERSONS.get(word, word) for word in reading.words if word not in AUXILIARIES)

    return bare(a) == bare(b)


def _prefixed(mine: frozenset[str], yours: frozenset[str]) -> bool:
    """Tell whether a word of one is a word of the other with a prefix that turns it ("hypo", "hyper")."""
    for word in mine:
        if word.startswith(PREFIXED):
            for prefix, others in TURNED.items():
                stem = word.removeprefix(prefix)
                # "Inter-city" are two words. "In" and "up" alone are no prefixes.
                if (1 < len(stem) < len(word) or (not stem and len(prefix) > 2)) and any(
                    other + stem in yours for other in others if stem or len(other) > 2
                ):
                    return True
    return False


def unmatched(a: Sequence[str], b: Sequence[str]) -> str:
    """Tell whether each has a quantity that the other lacks ("number"), or one of them ("number_alone"); else empty.

    A quantity counts as often as it is said. A bare number agrees with its value in any unit.
    """
    only_a, only_b = _without(a, b, _quantity, _quantity), _without(b, a, _quantity, _quantity)
    only_a, only_b = (
        _without(only_a, only_b, _valued, _value_of_other),
        _without(only_b, only_a, _valued, _value_of_other),
    )
    if (only_a and only_b) or ((only_a or only_b) and set(a) == set(b)):
        return "number"  # the same numbers, one of them more often: "5 plus 5 plus 3"
    return "number_alone" if only_a or only_b else ""


def _without(
    mine: Sequence[str],
    others: Sequence[str],
    key: Callable[[str], tuple[str, ...]],
    key_of_other: Callable[[str], tuple[str, ...]],
) -> list[str]:
    there = Counter(map(key_of_other, others))
    rest = []
    for number in mine:
        if there[key(number)] > 0:
            there[key(number)] -= 1
        else:
            rest.append(number)
    return rest


def _quantity(number: str) -> tuple[str, ...]:
    value, *smallest = number.split(" ")
    return tuple(smallest) or (value,)


def _valued(number: str) -> tuple[str, ...]:
    value, *smallest = number.split(" ")
    return ("amount" if smallest else "bare", value)


def _value_of_other(number: str) -> tuple[str, ...]:
    value, *smallest = number.split(" ")
    return ("bare" if smallest else "amount", value)


def turned(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Tell whether one prompt leaves what the other reaches."""
    (left_a, reached_a), (left_b, reached_b) = a, b
    if a == b or (left_a and left_a == left_b) or (reached_a and reached_a == reached_b):
        return False
    return bool((left_a and left_a == reached_b) or (left_b and left_b == reached_a))


def swapped(a: Reading, b: Reading) -> bool:
    """Tell whether the same words stand in another order around a word that gives the order a meaning."""
    if a.words == b.words or len(a.words) != len(b.words) or DIRECTED.isdisjoint(a.words):
        return False
    return sorted(a.words) == sorted(b.words)


def opposed(mine: frozenset[str], yours: frozenset[str]) -> bool:
    """Tell whether a word only one prompt has is the opposite of a word only the other has."""
    for word in mine:
        if word in OPPOSITES and not OPPOSITES[word].isdisjoint(yours):
            return True
        for prefix in PREFIXES:
            if word.startswith(prefix) and word[len(prefix) :] in yours and len(word) > len(prefix) + 2:
                return True
    for word in yours:
        for prefix in PREFIXES:
            if word.startswith(prefix) and word[len(prefix) :] in mine and len(word) > len(prefix) + 2:
                return True
    return False
