"""Measures a look-up of the semantic cache as the gateway does it, without the embedding: CPU per request and memory
per entry.

    python -m benchmarks.semantic_lookup [--entries 100000] [--partitions 20] [--lookups 2000]

Stored and asked are the prompts of `classifiers/data/near_misses` (asked: the other side of a stored pair), with
their static sketches; the cache's vectors are sketches turned into 384 numbers with some noise, which costs the same
as MiniLM's. Measured are the index alone and the look-up of `router/stages/semantic.py`: the sixteen nearest by
sketch, guard and ceiling on each, the verifier on those that could be served at `max_error` 2 %. What the verifier
remembers of stored prompts depends on what was asked before: "any" asks all alike, so that hardly one is in its
memory of a thousand; "popular" draws a question's rank by Zipf's law, as users do; "read before" has all of them
there. CPU is that of the whole process, so that threads of BLAS would show. The exit status is 1 where a look-up
misses the target.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from classifiers.classifier import Classifier
from classifiers.encoder import StaticEncoder
from classifiers.pairs import data
from router.core.cached import Origin, SemanticEntry
from router.stages.likeness import ShippedLikeness, Stored, Vector
from router.stages.semantic import FLOOR, NEAREST
from router.stages.vector_index import VectorIndex

TARGET_MS = 1.5
NOISE = 0.3
MAX_ERROR = 0.02


class Embedded(ShippedLikeness):
    """The transformer's work is done already."""

    def __init__(self) -> None:
        super().__init__(Classifier.load())
        self.known: dict[str, Vector] = {}

    def vector(self, text: str, owner: str = "") -> Vector:
        return self.known[text]


class WallClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


def resident() -> int:
    """Bytes of this process in memory, without what was freed."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def prompts_of_pairs() -> list[tuple[str, str]]:
    """Distinct prompts, each with the other side of a pair it is in."""
    pairs: dict[str, str] = {}
    for pair in data.read_pairs():
        pairs.setdefault(pair.a, pair.b)
        pairs.setdefault(pair.b, pair.a)
    return list(pairs.items())


def entry_of(
    number: int, partition: int, prompt: str, vector: np.ndarray, sketch: np.ndarray, now: float
) -> SemanticEntry:
    return SemanticEntry(
        origin=Origin(f"{number:032x}", 3, "search", "faq-bot", "mini", ("env=prod",), f"{partition:064x}"),
        tenant=f"{partition % 5:064x}",
        partition=f"{partition:064x}",
        prompt=prompt,
        vector=vector.astype("<f2").tobytes(),
        sketch=sketch.astype("<f2").tobytes(),
        encoder_id="minilm-0123456789ab",
        stored_at=now,
        expires_at=now + 86_400,
        provider="openai",
        upstream_model="gpt-5-mini",
        prompt_class="simple",
        usage=(120, 0, 0, 240, 0, 0, 0),
        cost=510_000 + number,
        policy_hash="0123456789abcdef",
        stream=False,
        body_bytes=1200,
    )


def measured(work: Callable[[Any], object], asked: Sequence[Any]) -> tuple[float, float]:
    """CPU of one call in milliseconds: p50 and p95."""
    spent = []
    for query in asked:
        began = time.process_time()
        work(query)
        spent.append((time.process_time() - began) * 1000)
    return float(np.percentile(spent, 50)), float(np.percentile(spent, 95))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=20)
    parser.add_argument("--lookups", type=int, default=2000)
    arguments = parser.parse_args()

    rng = np.random.default_rng(7)
    static = StaticEncoder.load()
    likeness = Embedded()
    texts = prompts_of_pairs()
    sketches = static.encode([text for text, _ in texts])
    turn = np.linalg.qr(rng.standard_normal((384, 256)))[0].astype(np.float32)
    vectors = sketches @ turn.T + NOISE / np.sqrt(384) * rng.standard_normal((len(texts), 384)).astype(
        np.float32
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    each = arguments.entries // arguments.partitions
    if each > len(texts):
        parser.error(f"at most {len(texts)} entries a partition: more --partitions or fewer --entries")
    clock = WallClock()
    now = clock.now().timestamp()
    index = VectorIndex(clock, max_bytes=1 << 30)
    draw = random.Random(7)  # noqa: S311
    chosen = [draw.sample(range(len(texts)), each) for _ in range(arguments.partitions)]

    def entries(partition: int) -> Iterator[SemanticEntry]:
        for place, i in enumerate(chosen[partition]):
            yield entry_of(partition * each + place, partition, texts[i][0], vectors[i], sketches[i], now)

    before = resident()
    for partition in range(arguments.partitions):
        index.replace(f"{partition:064x}", entries(partition))
    grown = resident() - before

    queries = []
    for _ in range(arguments.lookups):
        partition = draw.randrange(arguments.partitions)
        text = texts[draw.choice(chosen[partition])][1]
        sketch, likeness.known[text] = _encoded(text, static, turn, rng)
        queries.append((f"{partition:064x}", text, sketch))

    def near(query: tuple[str, str, Vector]) -> list[Stored]:
        partition, _, sketch = query
        found = index.near(partition, sketch, NEAREST, FLOOR)
        return [Stored(one.entry.prompt, one.similarity, one.entry.vector) for one in found]

    def look_up(query: tuple[str, str, Vector]) -> None:
        if stored := near(query):
            likeness.rank(query[1], stored, MAX_ERROR, owner=query[0])

    likeness.verifier  # noqa: B018 - reading it loads it
    found = [len(near(query)) for query in queries[:200]]
    print(
        f"{index.entries:,} entries in {index.partitions} partitions; near by sketch: {np.mean(found):.1f} of "
        f"{NEAREST}"
    )
    print(
        f"memory per entry: {grown / index.entries:,.0f} bytes by RSS, {index.bytes / index.entries:,.0f} as counted"
    )
    print(f"{'CPU, ms':24} {'p50':>6} {'p95':>6}")
    popular = [
        queries[int(rank) - 1] for rank in rng.zipf(1.1, 20 * arguments.lookups) if rank <= len(queries)
    ]
    slowest = 0.0
    rows: list[tuple[str, Callable[[tuple[str, str, Vector]], object], list[tuple[str, str, Vector]]]] = [
        ("index alone", near, queries),
        ("look-up, any", look_up, queries),
        ("look-up, popular", look_up, popular[: arguments.lookups]),
        ("look-up, read before", look_up, queries[:50] * (arguments.lookups // 50)),
    ]
    for name, work, asked in rows:
        p50, p95 = measured(work, asked)
        slowest = max(slowest, p50)
        print(f"{name:24} {p50:6.2f} {p95:6.2f}")
    return int(slowest > TARGET_MS)


def _encoded(
    text: str, static: StaticEncoder, turn: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    sketch = static.encode([text])[0]
    vector = turn @ sketch + NOISE / np.sqrt(384) * rng.standard_normal(384).astype(np.float32)
    return sketch, vector / np.linalg.norm(vector)


if __name__ == "__main__":
    sys.exit(main())
