"""What the classify stage remembers, and for whom."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import cast

from classifiers.classifier import Classifier, Verdict
from router.stages.classify import Classify


class Counting:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.classified: list[str] = []
        self.refined: list[str] = []
        self.verdict = cast(Verdict, object())

    def classify(self, text: str) -> Verdict:
        self.classified.append(text)
        return self.verdict

    def refine(self, text: str, verdict: Verdict) -> Verdict:
        self.refined.append(text)
        return verdict

    def needs_transformer(self, verdict: Verdict) -> bool:
        return True


async def test_a_verdict_is_remembered_for_who_asked_alone() -> None:
    classifier = Counting()
    with ThreadPoolExecutor(1) as executor:
        classify = Classify(cast(Classifier, classifier), executor)
        for owner in ("search", "search", "support", "support"):
            assert await classify.verdict(owner, "Why?", lambda _: True) is classifier.verdict
        # Nor can the border between owner and text be moved.
        await classify.verdict("sup", "port\0Why?", lambda _: True)
    assert classifier.classified == ["Why?", "Why?", "port\0Why?"]
    assert classifier.refined == classifier.classified


async def test_the_transformer_is_not_asked_where_it_changes_nothing() -> None:
    classifier = Counting()
    with ThreadPoolExecutor(1) as executor:
        classify = Classify(cast(Classifier, classifier), executor)
        await classify.verdict("search", "Why?", lambda _: False)
        assert classifier.refined == []
        await classify.verdict("search", "Why?", lambda _: True)
    assert classifier.classified == classifier.refined == ["Why?"]
