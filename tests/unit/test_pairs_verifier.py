"""Near-miss set, features and verifier as they ship."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY, ArtefactError, StaticEncoder, read_manifest
from classifiers.pairs import data, evaluate, features, guard
from classifiers.pairs.lexicon import ANTONYM, NONE, SYNONYM, Lexicon
from classifiers.pairs.verifier import REFUSING, Trees, Verifier


@pytest.fixture(scope="module")
def static() -> StaticEncoder:
    return StaticEncoder.load()


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.load()


@pytest.fixture(scope="module")
def verifier(static: StaticEncoder) -> Verifier:
    return Verifier.load(static, encoder_id=read_manifest(DATA_DIRECTORY, "minilm").id)


def test_the_rows_are_what_the_families_expand_to() -> None:
    rows = data.read_pairs()
    assert sorted(data.expand_all(data.read_families()), key=lambda p: p.id) == sorted(
        rows, key=lambda p: p.id
    )


def test_the_set_is_large_balanced_and_without_duplicates() -> None:
    rows = data.read_pairs()
    assert len(rows) >= 1500
    assert 0.40 <= sum(r.same for r in rows) / len(rows) <= 0.50
    assert len({r.domain for r in rows}) >= 10
    assert set(data.KINDS) <= {r.kind for r in rows}
    assert len({frozenset((data.normal(r.a), data.normal(r.b))) | {r.label} for r in rows}) == len(rows)
    for row in rows:
        assert row.id == hashlib.sha256(f"{row.a}\n{row.b}".encode()).hexdigest()[:16]
        assert row.a != row.b
        assert "$" not in row.a.replace("\\d{3}-\\d{4}$", "").replace("\\d{4}-\\d{3}$", "")
    splits: dict[str, set[int]] = {}
    for row in rows:
        splits.setdefault(row.family, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert min(Counter(r.split for r in rows).values()) > len(rows) / 10


def test_an_unknown_kind_names_file_and_block(tmp_path: object) -> None:
    folder = tmp_path / "families"  # type: ignore[operator]
    folder.mkdir()
    (folder / "shop.txt").write_text("one?\nuno?\n\nyes?\n> colour\nno?\n")
    with pytest.raises(ValueError, match=r"shop\.txt, block 2.*colour"):
        data.read_families(tmp_path)  # type: ignore[arg-type]


def test_the_lexicon_knows_forms_and_relations(lexicon: Lexicon) -> None:
    assert [lexicon.lemma(w) for w in ("cancelled", "cities", "went", "boxes", "running", "is")] == [
        "cancel",
        "city",
        "go",
        "box",
        "run",
        "be",
    ]
    assert lexicon.relation("buy", "purchase") == SYNONYM
    assert lexicon.relation("buy", "sell") == ANTONYM
    assert lexicon.relation("sell", "buy") == ANTONYM
    assert lexicon.relation("carpet", "opinion") == NONE
    assert lexicon.relation("qwzx", "buy") == NONE
    assert 0.0 <= lexicon.rarity("water") < lexicon.rarity("orchid") <= lexicon.rarity("qwzx") == 1.0


def test_features_are_symmetric_and_complete(static: StaticEncoder, lexicon: Lexicon) -> None:
    pairs = features.PairFeatures(lexicon, static)
    for row in data.read_pairs()[::97]:
        a, b = pairs.read(row.a), pairs.read(row.b)
        there, back = pairs.compare(a, b, 0.9), pairs.compare(b, a, 0.9)
        assert there.shape == (len(features.names()),)
        np.testing.assert_allclose(there, back, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["", " ", "?", "😀", "a" * 50_000, "\ud800", "1 2 3", "please", "是的，谢谢"]
)
def test_any_text_can_be_judged(verifier: Verifier, text: str) -> None:
    (opinion,) = verifier.opinions(text, [("How do I reset it?", 0.4)])
    assert 0.0 <= opinion.probability <= 1.0
    (same,) = verifier.opinions(text, [(text, 1.0)])
    assert same.reasons == ()


def test_exported_trees_score_as_the_library_does() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(600, 7)).astype(np.float32)
    same = table[:, 0] * table[:, 1] + table[:, 2] > 0.1
    fitted = HistGradientBoostingClassifier(max_iter=30, max_leaf_nodes=8, random_state=0).fit(table, same)
    np.testing.assert_allclose(
        Trees.from_sklearn(fitted).scores(table), fitted.decision_function(table), atol=1e-4
    )


def test_the_shipped_verifier_tells_near_misses_from_rewordings(verifier: Verifier) -> None:
    """Prompts of no training family; cosines as MiniLM gives them."""
    good = [
        ("How do I water orchids?", "How should I water orchids?", 0.98),
        ("What's the fine for speeding?", "What is the fine for speeding?", 0.99),
        ("Where can I renew my library card?", "Where do I renew my library card?", 0.98),
    ]
    traps = [
        ("How do I water orchids?", "How do I water cactuses?", 0.75),
        ("Is the sauna heated before 8?", "Is the sauna heated before 9?", 0.97),
        ("How do I enable the alarm?", "How do I disable the alarm?", 0.93),
        ("Send the goods from Riga to Turku", "Send the goods from Turku to Riga", 0.97),
        ("Can my tenant keep bees?", "Can my landlord keep bees?", 0.9),
    ]

    def probability(a: str, b: str, cosine: float) -> float:
        (opinion,) = verifier.opinions(a, [(b, cosine)])
        return 0.0 if opinion.refused else opinion.probability

    worst_good = min(probability(*pair) for pair in good)
    best_trap = max(probability(*pair) for pair in traps)
    assert best_trap < 0.5 < worst_good
    assert best_trap < verifier.threshold(0.05)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ("who owns it", "who owned it", "tense"),
        ("What is the population of Oslo?", "What was the population of Oslo?", "tense"),
        ("Who wins the cup?", "Who won the cup?", "tense"),
        ("length of aaaa", "length of aaa", "wording"),
        ("Reverse the string abcd", "Reverse the string abdc", "wording"),
        ("base64 of foo", "base64 of fooo", "wording"),
        ("translate dog to german", "translate dogs to german", "wording"),
        ("Comment activer les notifications ?", "Comment désactiver les notifications ?", "language"),
        ("Wie schalte ich das Licht ein?", "Wie schalte ich das Licht aus?", "language"),
        ("¿Cuál es la capital de España?", "¿Cuál es la capital de Francia?", "language"),
        ("Bildirimleri nasıl açarım?", "Bildirimleri nasıl kapatırım?", "language"),
        ("Quanto custa o plano mensal?", "Quanto custa o plano anual?", "language"),
    ],
)
def test_what_takes_the_lexicon_to_see_is_refused(verifier: Verifier, a: str, b: str, reason: str) -> None:
    for asked, stored in ((a, b), (b, a)):
        (opinion,) = verifier.opinions(asked, [(stored, 0.99)])
        assert opinion.refused
        assert reason in opinion.reasons
        assert reason in verifier.reasons(asked, stored)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What causes inflation?", "What does inflation cause?"),
        ("Which company acquired Slack?", "Which company did Slack acquire?"),
        ("Who taught Plato?", "Who did Plato teach?"),
        ("What is 8 minus 3?", "What is 3 minus 8?"),
        ("Who founded Anthropic?", "Who did Anthropic found?"),
        ("Who reports to Tom?", "Who does Tom report to?"),
        ("What depends on numpy?", "What does numpy depend on?"),
        ("Which animals eat spiders?", "What do spiders eat?"),
        ("Who has access to the repo?", "What does the repo have access to?"),
        ("How many sharks lose teeth?", "How many teeth does a shark lose?"),
        ("How many pizzas feed a child?", "How many children does a pizza feed?"),
        ("Which company will acquire Slack?", "Which company did Slack acquire?"),
        ("Which company acquired Slack?", "Which company was acquired by Slack?"),
        ("Who was Plato taught by?", "Who did Plato teach?"),
        ("By whom was Plato taught?", "Whom did Plato teach?"),
        ("Did Slack acquire Salesforce?", "Was Slack acquired by Salesforce?"),
        ("Why did Google sue Microsoft?", "Why was Google sued by Microsoft?"),
    ],
)
def test_who_does_it_is_not_to_whom_it_is_done(verifier: Verifier, a: str, b: str) -> None:
    for asked, stored in ((a, b), (b, a)):
        (opinion,) = verifier.opinions(asked, [(stored, 0.99)])
        assert opinion.refused
        assert "order" in opinion.reasons


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("What does DNS mean?", "Tell me what DNS means"),
        ("Shall I pay 8 or 3?", "Pay 8 or 3?"),
        ("Which companies did Slack acquire?", "Which companies has Slack acquired?"),
        ("Which companies did Slack acquire?", "Which companies were acquired by Slack?"),
        ("Who taught Plato?", "Who was Plato taught by?"),
        ("Who taught Plato?", "By whom was Plato taught?"),
        ("Why was Microsoft sued by Google?", "Why did Google sue Microsoft?"),
        ("Does insurance cover theft?", "Is theft covered by insurance?"),
        ("What causes stress?", "What is stress caused by?"),
        ("What does the premium plan include?", "What is included in the premium plan?"),
        ("Which book did Orwell write in Paris?", "Which book was written by Orwell in Paris?"),
        ("When does the store open?", "What time is the store open?"),
        ("Is my data encrypted by default?", "Do you encrypt my data by default?"),
        ("How do I sort a list by key?", "How is a list sorted by key?"),
        ("What documents do I need for a visa?", "What visa documents should I bring?"),
    ],
)
def test_active_and_passive_of_the_same_pass(verifier: Verifier, a: str, b: str) -> None:
    assert "order" not in verifier.reasons(a, b)
    assert verifier.reasons(a, b) == verifier.reasons(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Who is it owned by?", "Who owns it?"),
        ("Gifts for women", "Gifts for a woman"),
        ("Translate this letter to German", "Translate this letter into German"),
        ("How do I decode a token?", "How can I decode tokens?"),
        ("What is the best way to pay?", "What's a good way to pay?"),
        ("What is the length of a marathon?", "what is the lenght of a marathon"),
        ("Comment activer les notifications ?", "comment activer les notifications"),
        ("postgres vs mysql vs sqlite", "mysql vs postgres vs sqlite"),
        ("kubectl logs of a pod", "kubectl pod logs"),
        ("Is El Paso in Texas?", "Does El Paso lie in Texas?"),
        ("how do i cancle my ordr", "How do I cancel my order?"),
        ("How do I say bonjour?", "How is bonjour said?"),
        ("How many calories are in an egg?", "What's the calorie count of an egg?"),
    ],
)
def test_rewordings_typos_and_names_are_left_to_the_verifier(verifier: Verifier, a: str, b: str) -> None:
    assert not set(verifier.reasons(a, b)) & {*guard.UNREAD}


def test_english_prompts_are_read_as_english_and_others_are_not(
    static: StaticEncoder, lexicon: Lexicon
) -> None:
    pairs = features.PairFeatures(lexicon, static)
    assert not [row.a for row in data.read_pairs()[::7] if pairs.read(row.a).foreign]
    others = (
        "Annuler mon abonnement",
        "Wo ist meine Bestellung?",
        "cancelar mi pedido",
        "Come attivo le notifiche?",
        "Hoe zet ik meldingen aan?",
        "Jak włączyć powiadomienia?",
        "Hur aktiverar jag aviseringar?",
        "Miten otan ilmoitukset käyttöön?",
        "Làm thế nào để bật thông báo?",
        "Bagaimana cara mengaktifkan notifikasi?",
    )
    assert all(pairs.read(text).foreign for text in others)


def test_a_refused_candidate_has_no_probability(verifier: Verifier) -> None:
    (opinion,) = verifier.opinions("Book 4 seats", [("Book 14 seats", 0.99)])
    assert opinion.refused
    assert not REFUSING.isdisjoint(opinion.reasons)
    assert opinion.probability == 0.0


def test_the_threshold_falls_as_more_errors_are_allowed(verifier: Verifier) -> None:
    thresholds = [verifier.threshold(error) for error in (0.0001, 0.01, 0.02, 0.05, 0.2)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > 1.0
    assert all(0.5 <= t < 1.0 for t in thresholds[2:])


def test_reading_is_remembered_within_bounds(static: StaticEncoder, lexicon: Lexicon) -> None:
    artefact = Artefact.load(DATA_DIRECTORY / "verifier.json")
    small = Verifier(artefact, features.PairFeatures(lexicon, static), remembered=3)
    first = small.read("one")
    assert small.read("one") is first
    assert small.read("one", "another tenant") is not first
    for text in ("two", "three", "four"):
        small.read(text)
    assert small.read("one") is not first


def test_another_encoder_is_refused(static: StaticEncoder) -> None:
    with pytest.raises(ArtefactError, match="not for other"):
        Verifier.load(static, encoder_id="other")


def test_the_artefact_was_trained_on_the_rows_that_ship() -> None:
    metadata = Artefact.load(DATA_DIRECTORY / "verifier.json").metadata
    rows = data.read_pairs()
    assert metadata["rows"] == len(rows)
    assert (
        metadata["rows_sha256"] == hashlib.sha256("\n".join(sorted(r.id for r in rows)).encode()).hexdigest()
    )


def test_protocol_and_curve_on_scores_that_are_known() -> None:
    rng = np.random.default_rng(1)
    same = np.arange(300) % 2 == 0
    perfect = np.where(same, 1.0, 0.0) + rng.normal(scale=0.01, size=300)
    pooled = evaluate.protocol(same, lambda rows: lambda asked: perfect[asked], (0.01, 0.05), repeats=2)
    assert pooled.auc == 1.0
    # The threshold lies just above the worst calibration trap: everything good is served.
    assert pooled.rates[0.01].served == 1.0
    assert pooled.rates[0.01].wrong <= 0.02
    noise = rng.normal(size=300)
    chance = evaluate.protocol(same, lambda rows: lambda asked: noise[asked], (0.05,), repeats=4)
    assert chance.rates[0.05].wrong == pytest.approx(0.05, abs=0.03)
    assert evaluate.auc(np.zeros(300), same) == 0.5
    assert evaluate.curve(perfect, same, (0.0,)) == [evaluate.Rates(1.0, 0.0)]


def test_no_threshold_is_sure_enough_on_few_traps() -> None:
    assert evaluate.calibrated_threshold(np.zeros(50), 0.01) == np.inf
    assert evaluate.calibrated_threshold(np.arange(100.0), 0.01) > 99.0
