"""The classifier the gateway uses: a verdict from the static encoder, refined by the transformer on demand."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classifiers import features, phrases
from classifiers.artefact import Artefact
from classifiers.encoder import DATA_DIRECTORY, ArtefactError, Encoder, MiniLMEncoder, StaticEncoder
from classifiers.head import Head, Judgement, border_distance

MAX_REASON = 80


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is thought of one prompt.

    `prompt_class`: simple, medium or complex; follows from `difficulty` (0..1, borders 1/3 and 2/3).
    `confidence`: 0..1, the calibrated probability of this class (see `Judgement`), lowered for a prompt unlike
    those the head was trained on. `output_tokens`: expected length of the answer. `reason`: at most 80 ASCII
    characters, names the nearest kind of task and what stands out, never words of the prompt. `encoder`: static
    or minilm. `artefact`: id of the head.
    """

    prompt_class: str
    difficulty: float
    confidence: float
    output_tokens: int
    reason: str
    encoder: str
    artefact: str


class Classifier:
    """Both encoders with their heads. Safe to use from several threads.

    The work for one prompt is bounded: the encoders read at most 600 of its characters, the counters its
    first 3,000 and last 1,500, and its length is known without reading.
    """

    def __init__(
        self, *, directory: Path, static: StaticEncoder, static_head: Head, head_ids: dict[str, str]
    ) -> None:
        self.static = static
        self._static_head = static_head
        self._directory = directory
        self._head_ids = head_ids
        self._lock = threading.Lock()
        self._minilm: tuple[MiniLMEncoder, Head] | None = None

    @classmethod
    def load(cls, directory: Path | None = None) -> Classifier:
        """Load the static encoder and its head; the transformer is loaded when it is first asked for.

        Raises ArtefactError when a file is missing, damaged, or made for another encoder.
        """
        directory = directory or DATA_DIRECTORY
        static = StaticEncoder.load(directory)
        head_ids = _recorded_heads(directory)
        head = _load_head(directory, "static", static, head_ids)
        return cls(directory=directory, static=static, static_head=head, head_ids=head_ids)

    @property
    def minilm(self) -> MiniLMEncoder:
        """The transformer. The first access loads it (a fraction of a second): touch it before serving."""
        return self._transformer()[0]

    def classify(self, text: str) -> Verdict:
        """Judge a prompt by the static encoder; a fraction of a millisecond, never blocks, accepts any text."""
        return _verdict(text, self.static, self._static_head, "static")

    def needs_transformer(self, verdict: Verdict) -> bool:
        """Say whether the static verdict is too close to the border of its class to rely on it."""
        return (
            verdict.encoder == "static"
            and border_distance(verdict.difficulty) < self._static_head.transformer_within
        )

    def refine(self, text: str, verdict: Verdict) -> Verdict:
        """Judge the prompt again by MiniLM; takes milliseconds, call it in a thread.

        Returns `verdict` itself where the transformer is less sure than a verdict it should improve.
        Raises ArtefactError or EncoderUnavailableError when the transformer cannot be loaded.
        """
        encoder, head = self._transformer()
        refined = _verdict(text, encoder, head, "minilm")
        return refined if refined.confidence >= verdict.confidence or verdict.encoder == "minilm" else verdict

    def _transformer(self) -> tuple[MiniLMEncoder, Head]:
        with self._lock:
            if self._minilm is None:
                encoder = MiniLMEncoder.load(self._directory)
                self._minilm = encoder, _load_head(self._directory, "minilm", encoder, self._head_ids)
            return self._minilm


def _recorded_heads(directory: Path) -> dict[str, str]:
    try:
        manifest: Any = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        return {str(name): str(id) for name, id in manifest["heads"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtefactError(
            f"{directory / 'manifest.json'} names no heads: run `python -m classifiers.train`"
        ) from error


def _load_head(directory: Path, name: str, encoder: Encoder, head_ids: dict[str, str]) -> Head:
    artefact = Artefact.load(directory / f"head-{name}.json", encoder_id=encoder.id)
    if artefact.id != head_ids.get(name):
        raise ArtefactError(
            f"head-{name}.json is {artefact.id}, the manifest records {head_ids.get(name)}: reinstall farthing"
        )
    return Head(artefact, dimensions=encoder.dimensions)


def _verdict(text: str, encoder: Encoder, head: Head, name: str) -> Verdict:
    counted, task = features.read(text)
    described = features.describe(counted, task)
    vector = encoder.encode((task,))[0]
    judgement = head.judge(vector, described, phrases.said(task))
    return Verdict(
        prompt_class=judgement.prompt_class,
        difficulty=judgement.difficulty,
        confidence=judgement.confidence,
        output_tokens=judgement.output_tokens,
        reason=_reason(len(text), described, judgement),
        encoder=name,
        artefact=head.id,
    )


_INDEX = {name: index for index, name in enumerate(features.NAMES)}


def _reason(characters: int, described: np.ndarray[Any, np.dtype[np.float32]], judgement: Judgement) -> str:
    """Say in words what the judgement rests on: the nearest kind of task, the size and what stands out."""

    def count(name: str) -> int:
        return round(math.expm1(described.item(_INDEX[name])))

    size = "short" if characters < 80 else "long" if characters > 1500 else ""
    kind = judgement.kind if judgement.familiar else "unfamiliar prompt"
    parts = [f"{size} {kind}".strip()]
    if described.item(_INDEX["non_latin_share"]) > 0.3:
        parts.append("non-Latin script")
    if described.item(_INDEX["code_fence"]) or count("code_signs") >= 3:
        parts.append("contains code")
    if count("reasoning_words") >= 2:
        parts.append("asks for reasoning")
    for name in ("instructions", "questions"):
        if (several := count(name)) >= 3:
            parts.append(f"{several} {name}")
    return "; ".join(parts)[:MAX_REASON]
