"""The guard refuses on evidence: what differs is named, honest rewordings pass."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifiers.pairs import guard


def reasons(a: str, b: str) -> tuple[str, ...]:
    return guard.reasons(guard.read(a), guard.read(b))


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("Book 4 seats", "Book 14 seats", "number"),
        ("Is a 30 year lease possible?", "Is a 13 year lease possible?", "number"),
        ("What is 12 % of 90?", "What is 21 % of 90?", "number"),
        ("Raise the limit to 10k", "Raise the limit to 10,500", "number"),
        ("Plan for 5 seats", "Plan", "number_alone"),
        ("Is the shop open on Tuesday?", "Is the shop open on Friday?", "date"),
        ("Wake me at 6am", "Wake me at 6pm", "date"),
        ("Flights on March 3", "Flights on May 3", "date"),
        ("Is the shop open?", "Is the shop open on Sunday?", "date_alone"),
        ("How high is it in metres?", "How high is it in feet?", "unit"),
        ("Does Acme ship to Peru?", "Does Globex ship to Peru?", "name"),
        ("Which plans include support?", "Which plans do not include support?", "negation"),
        ("How do I enable logging?", "How do I disable logging?", "opposite"),
        ("Is the part compatible?", "Is the part incompatible?", "opposite"),
        ("Delete all rows", "Delete the first row", "scope"),
        ("Move the file from A1 to B2", "Move the file from B2 to A1", "order"),
        ("Convert dollars to euros", "Convert euros to dollars", "order"),
        ("Write it in Rust", "Write it in Kotlin", "format"),
        ("What is my balance?", "What is his balance?", "person"),
    ],
)
def test_a_difference_is_named_in_both_directions(a: str, b: str, reason: str) -> None:
    assert reason in reasons(a, b)
    assert reasons(a, b) == reasons(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Can I pay within 14 days?", "Is paying within two weeks fine?"),
        ("Wake me at 7pm", "Wake me at 7 in the evening"),
        ("Is a loan of 250k possible?", "Is a loan of 250,000 possible?"),
        ("Select logins after 2024-03-01", "Select logins after 1 March 2024"),
        ("Meet at 14:00", "Meet at 2pm"),
        ("What's the fee?", "Hi, what is the fee? Thanks!"),
        ("I don't have a card", "I do not have a card"),
        ("Who's the owner?", "Who is the owner"),
        ("Write it in JS", "Write it in JavaScript"),
    ],
)
def test_the_same_said_otherwise_passes(a: str, b: str) -> None:
    assert reasons(a, b) == ()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Who owns account 48829103?", "Who owns account 48829104?"),
        ("Is 6898169388 prime?", "Is 6898169389 prime?"),
        ("Ping 192.168.10.21", "Ping 192.168.10.22"),
        ("What is new in 2.31.1.4?", "What is new in 2.31.1.5?"),
        ("Is iOS 17.1 secure?", "Is iOS 17.10 secure?"),
        ("Is 3.1415926 pi?", "Is 3.1415927 pi?"),
        ("What is in room 012?", "What is in room 12?"),
        ("Open port 1,000", "Open port 1.000"),
        ("Is 1,000,001 prime?", "Is 1,000,002 prime?"),
        ("Convert 1234567.89 euros", "Convert 1234567.99 euros"),
        ("Convert 12345678901234567890 g", "Convert 12345678901234567891 g"),
        ("Convert 1.500 euros", "Convert 1.5 euros"),
        ("Convert 1.500 euros", "Convert 1,500 euros"),
        ("What is 5 plus 5 plus 3?", "What is 5 plus 3 plus 3?"),
        ("Add 4 4 5", "Add 4 5 5"),
        ("Add 2 2 3", "Add 2 3"),
        ("What is -4 squared?", "What is 4 squared?"),
        ("Is it minus 5 outside?", "Is it 5 outside?"),
        ("Spend six hundred thousand", "Spend six hundred million"),
        ("Spend a hundred dollars", "Spend a thousand dollars"),
        ("Who ruled in the 1990s?", "Who ruled in 1990?"),
        ("What happened on 3/4?", "What happened on 4/3?"),
        ("Who has 1234-5678?", "Please say who has 5678-1234"),
    ],
)
def test_numbers_are_what_is_written_to_the_last_digit(a: str, b: str) -> None:
    assert "number" in reasons(a, b)
    assert reasons(a, b) == reasons(b, a)


@given(
    st.integers(1, 10**30),
    st.sampled_from(["Where is {}?", "Is {} kg much?", "Does {} usd do?", "At 10.0.{}.1"]),
)
@settings(max_examples=200, deadline=None)
def test_neighbouring_numbers_differ_however_long_they_are(number: int, text: str) -> None:
    assert "number" in reasons(text.format(number), text.format(number + 1))
    assert reasons(text.format(number), text.format(number)) == ()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Remind me at 8.05am", "Remind me at 8.50am"),
        ("Is the 9.15 am train late?", "Is the 9.45 am train late?"),
        ("Wake me at 8:05 in the morning", "Wake me at 8:05 in the evening"),
        ("Is it at 12:10 am?", "Is it at 12:10 pm?"),
        ("Is 1:30:15 long?", "Is 1:30:45 long?"),
    ],
)
def test_times_keep_their_minutes(a: str, b: str) -> None:
    assert "date" in reasons(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Does it cost 17.10 dollars?", "Does it cost $17.1?"),
        ("Is 3,5 kg heavy?", "Is 3.5 kg heavy?"),
        ("Is 2.000.000 euros enough?", "Is 2 million euros enough?"),
        ("Is 0.50 litres a lot?", "Is 500 ml a lot?"),
        ("Is one million much?", "Is 1,000,000 much?"),
        ("Is 3 in 3 days fine?", "Is 3 in 72 hours fine?"),
        ("Wake me at 8.05 am", "Wake me at 8:05 in the morning"),
        ("Who called on 01 March?", "Who called on March 1?"),
        ("Is it -5 outside?", "Is it minus 5 outside?"),
    ],
)
def test_amounts_agree_by_what_they_are_worth(a: str, b: str) -> None:
    assert not {"number", "number_alone", "date", "date_alone"} & set(reasons(a, b))


def test_a_contraction_may_stand_alone() -> None:
    assert guard.read("do n't 5 n't").words == ("do", "not", "5", "not")


def test_what_lies_beyond_the_part_that_is_read_must_be_equal() -> None:
    long = "word " * 1000
    assert reasons(long + "x", long + "y") == ("rest",)
    assert reasons(long + "x", long + "x") == ()


@given(st.text(max_size=300), st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_text_is_read_and_comparing_is_symmetric(a: str, b: str) -> None:
    assert reasons(a, b) == reasons(b, a)
    assert reasons(a, a) == ()


@pytest.mark.parametrize(
    "part", [" ", "hi, ", "please ", ".", "1", "1,", "from to ", "'", "a-", "\n", "é", "thanks!"]
)
def test_no_text_takes_long(part: str) -> None:
    text = part * (100_000 // len(part))
    started = time.process_time()
    guard.read(text)
    guard.read("hi," + text + "x")
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("如何开启通知?", "如何关闭通知?"),
        ("Как включить уведомления?", "Как выключить уведомления?"),
        ("What does 👍 mean?", "What does 👎 mean?"),
        ("What is 7 × 5?", "What is 7 ÷ 5?"),
        ("What is √16?", "What is 16?"),
        ("What is −5 °C in Fahrenheit?", "What is 5 °C in Fahrenheit?"),
        (r"What does \d match?", r"What does \D match?"),
        ("Is 5 > 3?", "Is 5 < 3?"),
    ],
)
def test_what_no_encoder_reads_has_to_be_the_same(a: str, b: str) -> None:
    assert reasons(a, b)[-1:] == ("signs",)
    assert reasons(b, a)[-1:] == ("signs",)


def test_accents_typography_and_the_case_of_other_letters_are_no_signs() -> None:
    assert not reasons("What’s a “café” – in short…", "What's a cafe\u0301 - in short")
    assert not reasons("Где мой заказ?", "где мой заказ")
    assert not reasons("It costs 5 € at 20 °C", "It costs 5 € at 20 °C\u200b")


def test_a_long_text_has_to_have_the_same_words() -> None:
    text = " ".join(f"Member {chr(97 + at // 26)}{chr(97 + at % 26)} spoke." for at in range(40))
    assert "long" in reasons(text + " List the verbs.", text + " List the nouns.")
    assert not reasons(text + " List the verbs.", "Hello! " + text + "\nlist the verbs")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("How do you say thanks in French?", "How do you say please in French?"),
        ("Translate 'hello' to Spanish", "Translate 'sorry' to Spanish"),
        ("Is 'recieve' spelled right?", "Is 'receive' spelled right?"),
        ("Count the letters in strawberry", "Count the letters in strawbery"),
    ],
)
def test_where_the_wording_is_the_matter_it_has_to_be_the_same(a: str, b: str) -> None:
    assert reasons(a, b) == reasons(b, a) == ("wording",)


def test_courtesies_around_what_is_asked_may_differ() -> None:
    for courteous in ("Hi, how do I pay?", "Could you please say how I pay?", "How do I pay? Many thanks"):
        assert "wording" not in reasons(courteous, "Hello! How do I pay, please?")


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("10 mW in watts", "10 MW in watts", "case"),
        ("Is 5 mHz possible?", "Is 5 MHz possible?", "case"),
        ("How long does 1 Mb take?", "How long does 1 MB take?", "case"),
        ("Is 10 MBps enough?", "Is 10 Mbps enough?", "case"),
        ("What does the variable n hold?", "What does the variable N hold?", "case"),
        ("What is k8s secret a?", "What is k8s secret A?", "case"),
        ("What does WHO recommend?", "What does who recommend?", "case"),
        ("Did she call him?", "Did he call her?", "people"),
        ("Who can see me?", "Who can I see?", "people"),
        ("Can I help you?", "Can you help me?", "people"),
        ("Status of INC-4411a", "Status of INC-4411b", "code"),
        ("How do I delete file a.txt?", "How do I delete file b.txt?", "code"),
        ("Hypoglycemia treatment", "Hyperglycemia treatment", "prefix"),
        ("inter-city trains", "intra-city trains", "prefix"),
        ("Undo the last commit", "Redo the last commit", "prefix"),
        ("rewrite: dont do it", "rewrite: don't do it", "wording"),
        ("Is dont spelled right?", "Is don't spelled right?", "wording"),
        ("Correct this: Lets eat, grandma", "Correct this: Let's eat grandma", "wording"),
        ("how many r in strawberry", "how many r in strawbery", "wording"),
        ("How many vowels has banana?", "How many vowels has banan?", "wording"),
        ("Fix: he go home", "Fix: he goed home", "wording"),
        ('Translate "good night" to French', 'Translate "good day" to French', "wording"),
    ],
)
def test_one_letter_or_place_can_make_all_the_difference(a: str, b: str, reason: str) -> None:
    assert reason in reasons(a, b)
    assert reasons(a, b) == reasons(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Can I upload 500 MB?", "can i upload 500 mb"),
        ("Is 50 Mbps fast?", "is 50 mbps fast"),
        ("Is 20 KM far?", "Is 20 km far?"),
        ("What is vitamin C good for?", "what is vitamin c good for"),
        ("How do I learn C?", "how do i learn c"),
        ("How did Q2 2023 go?", "how did q2 2023 go"),
        ("Copy a file to S3", "copy a file to s3"),
        ("translate it to polish", "Translate it to Polish"),
        ("How can I pay?", "How I can pay?"),
        ("At the weekend, can I add her?", "Can I add her at the weekend?"),
        ("Can I get a refund?", "Can you give me a refund?"),
        ("Where is order AB-12?", "where is order ab12"),
        ("Is the app free, i.e. without ads?", "Is the app free i.e. without ads"),
        ("How many are in strawberry jam?", "how many are in strawbery jam"),
        ("WHO OWNS IT", "Who owns it?"),
        ("I dont have a card", "I don't have a card"),
        ("What's a synonym of big?", "What is a synonym of big?"),
        ("Translate: good morning", "translate: Good morning."),
        ("How do I fix it if it doesnt start?", "How do I fix it if it does not start?"),
    ],
)
def test_what_is_written_otherwise_but_the_same_passes(a: str, b: str) -> None:
    assert not set(reasons(a, b)) & {*guard.UNREAD, *guard.REASONS}
