"""Classifies a prompt: the static embedding always, the transformer only where it could change the decision."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from hashlib import blake2b

from classifiers.classifier import Classifier, Verdict

MEMORY = 10_000
"""Verdicts remembered, by a hash of the text and whose it is: time must not tell what others ask."""


class Classify:
    """`executor` runs the transformer off the event loop; at most `queue` prompts wait for it, and beyond that the
    static verdict decides.
    """

    def __init__(self, classifier: Classifier, executor: Executor, *, queue: int = 8) -> None:
        self._classifier = classifier
        self._executor = executor
        self._queue = queue
        self._waiting = 0
        self._known: OrderedDict[bytes, tuple[Verdict, bool]] = OrderedDict()

    async def verdict(self, owner: str, text: str, could_change: Callable[[Verdict], bool]) -> Verdict:
        """`could_change` says of the static verdict whether another one would lead to another model."""
        key = blake2b(f"{owner}\0{text}".encode("utf-8", "replace"), digest_size=16).digest()
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
        verdict, refined = known or (self._classifier.classify(text), False)
        if (
            not refined
            and self._waiting < self._queue
            and self._classifier.needs_transformer(verdict)
            and could_change(verdict)
        ):
            self._waiting += 1
            try:
                loop = asyncio.get_running_loop()
                verdict = await loop.run_in_executor(self._executor, self._classifier.refine, text, verdict)
                refined = True
            finally:
                self._waiting -= 1
        self._known[key] = (verdict, refined)
        if len(self._known) > MEMORY:
            self._known.popitem(last=False)
        return verdict

    def aside(self, text: str) -> asyncio.Future[Verdict]:
        """The static verdict, made off the event loop while the provider works on the answer."""
        return asyncio.get_running_loop().run_in_executor(self._executor, self._classifier.classify, text)
