"""Measures the semantic cache's hit decision on near misses, conversations and streams with known answers.

    python -m benchmarks.cache --data ../shared/data/near_miss [--repeats 20] [--splits 200] [--out FILE]

Printed side by side: the plain cosine threshold, the guard on top of it, the verifier by the protocol of
`classifiers/pairs/evaluate.py`, the verifier and thresholds as they ship, conversations, the time of a decision, and
how well the certified bound holds. Needs scikit-learn (`make bench-cache` brings it). The exit status is 1 when a
target is missed. Data stays where it is; nothing of it is written anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# One thread, also for the arithmetic below numpy: the machine is shared with what is measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks import cache_bound
from classifiers.encoder import MiniLMEncoder, StaticEncoder
from classifiers.pairs import data, evaluate, features, train
from classifiers.pairs.lexicon import Lexicon
from classifiers.pairs.verifier import REFUSING, Verifier

WRONGS = (0.01, 0.02, 0.05)
COSINES = (0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.98)
DEFAULT_MAX_ERROR = 0.01
TARGETS = {"served at 1 %": 0.30, "served at 5 %": 0.55, "default served": 0.30, "default wrong": 0.02}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def conversation_key(messages: list[dict[str, str]]) -> str:
    """Return a hash of everything before the last message: in default mode it must be equal."""
    return hashlib.sha256(json.dumps(messages[:-1], sort_keys=True).encode()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with pairs_dev.jsonl and conversations_dev.jsonl"
    )
    parser.add_argument(
        "--repeats", type=int, default=evaluate.REPEATS, help="cross-validations (the protocol: 20)"
    )
    parser.add_argument("--splits", type=int, default=200, help="streams of the bound's simulation (200)")
    parser.add_argument("--out", type=Path, default=Path("results/cache.json"))
    asked = parser.parse_args()
    result: dict[str, Any] = {}
    failed: list[str] = []

    outside = rows_of(asked.data / "pairs_dev.jsonl")
    same = np.asarray([bool(row["same_answer"]) for row in outside])
    texts = [(row["a"], row["b"]) for row in outside]
    own = data.read_pairs()
    static, minilm = StaticEncoder.load(), MiniLMEncoder.load()
    pairs = features.PairFeatures(Lexicon.load(), static)
    verifier = Verifier.load(static, encoder_id=minilm.id)
    cosine = train.cosines(minilm, texts).astype(np.float64)
    table = pairs.table(texts, cosine.tolist())
    print(
        f"{len(outside)} pairs ({int(same.sum())} good, {int((~same).sum())} traps), {len(own)} own pairs to train on"
    )

    outside_prompts = {data.normal(t) for pair in texts for t in pair}
    shared = [p for p in own if data.normal(p.a) in outside_prompts or data.normal(p.b) in outside_prompts]
    both = [p for p in shared if data.normal(p.a) in outside_prompts and data.normal(p.b) in outside_prompts]
    print(
        f"own pairs with a prompt of the outside set: {len(shared)} (left out below), with both prompts: {len(both)}"
    )
    left_out = {p.id for p in shared}
    own = [p for p in own if p.id not in left_out]
    result["own"] = {"pairs": len(own), "left_out": len(shared)}

    print("\nplain cosine (MiniLM), thresholds looked up on these very pairs")
    print("  threshold   good served   traps wrong")
    result["cosine"] = {"auc": evaluate.auc(cosine, same), "thresholds": {}}
    for threshold in COSINES:
        rates = evaluate.at_threshold(cosine, same, threshold)
        result["cosine"]["thresholds"][threshold] = [rates.served, rates.wrong]
        print(f"  {threshold:9.2f} {rates.served:13.1%} {rates.wrong:13.1%}")
    for wrong, rates in zip(WRONGS, evaluate.curve(cosine, same, WRONGS), strict=True):
        print(f"  at most {wrong:.0%} of traps wrong: {rates.served:.1%} served")
    by_cosine = evaluate.protocol(
        same, lambda rows: lambda asked_rows: cosine[asked_rows], WRONGS, repeats=asked.repeats
    )
    for wrong in WRONGS:
        rates = by_cosine.rates[wrong]
        print(
            f"  by the protocol, aim {wrong:.0%}: {rates.served:.1%} served, {rates.wrong:.2%} of traps wrong"
        )
    result["cosine"]["protocol"] = {w: [r.served, r.wrong] for w, r in by_cosine.rates.items()}

    print("\nguard before the cosine (all reasons refuse / only those that refuse in Farthing)")
    found = [features.reasons(pairs.read(a), pairs.read(b)) for a, b in texts]
    any_reason = np.asarray([bool(r) for r in found])
    refusing = np.asarray([not REFUSING.isdisjoint(r) for r in found])
    result["guard"] = {}
    for name, stops in (("all", any_reason), ("refusing", refusing)):
        print(
            f"  {name}: stops {stops[~same].mean():.1%} of traps and {stops[same].mean():.1%} of good pairs"
        )
        for threshold in (0.80, 0.90):
            rates = evaluate.at_threshold(np.where(stops, -1.0, cosine), same, threshold)
            result["guard"][f"{name} {threshold}"] = [rates.served, rates.wrong]
            print(f"    cosine {threshold:.2f}: {rates.served:.1%} served, {rates.wrong:.1%} of traps wrong")

    own_texts = [(p.a, p.b) for p in own]
    own_table = pairs.table(own_texts, train.cosines(minilm, own_texts).tolist())
    own_same = np.asarray([p.same for p in own])
    alone = train.fit(own_table, own_same, np.ones(len(own)))
    own_scores = np.where(refusing, -99.0, train.log_odds(alone, table))
    print("\nverifier trained on the own set alone (nothing of the outside pairs), thresholds looked up")
    result["own_only"] = {"auc": evaluate.auc(own_scores, same), "curve": {}}
    print(f"  AUC {result['own_only']['auc']:.3f} (cosine {result['cosine']['auc']:.3f})")
    for wrong, rates in zip(WRONGS, evaluate.curve(own_scores, same, WRONGS), strict=True):
        result["own_only"]["curve"][wrong] = [rates.served, rates.wrong]
        print(f"  at most {wrong:.0%} of traps wrong: {rates.served:.1%} served")

    def fit(rows: Any) -> Any:
        fitted = train.fit(
            np.concatenate([own_table, table[rows]]),
            np.concatenate([own_same, same[rows]]),
            np.concatenate([np.ones(len(own)), np.full(len(rows), evaluate.WEIGHT)]),
        )
        return lambda asked_rows: np.where(
            refusing[asked_rows], -99.0, train.log_odds(fitted, table[asked_rows])
        )

    started = time.perf_counter()
    pooled = evaluate.protocol(same, fit, WRONGS, repeats=asked.repeats)
    print(
        f"\nverifier by the protocol ({asked.repeats} cross-validations, {time.perf_counter() - started:.0f} s)"
    )
    print(f"  AUC {pooled.auc:.3f}")
    for wrong in WRONGS:
        rates, deviation = pooled.rates[wrong], pooled.served_deviation[wrong]
        print(
            f"  aim {wrong:.0%}: {rates.served:.1%} of good pairs served (sd {deviation:.1%}), "
            f"{rates.wrong:.2%} of traps answered wrong; cosine {by_cosine.rates[wrong].served:.1%}"
        )
    result["protocol"] = {w: [r.served, r.wrong] for w, r in pooled.rates.items()} | {"auc": pooled.auc}
    for wrong, target in ((0.01, TARGETS["served at 1 %"]), (0.05, TARGETS["served at 5 %"])):
        if pooled.rates[wrong].served < target or pooled.rates[wrong].wrong > wrong:
            failed.append(f"protocol at {wrong:.0%}")

    print("\nas shipped (trained and calibrated on the own set alone)")
    opinions = [verifier.opinions(a, [(b, float(c))])[0] for (a, b), c in zip(texts, cosine, strict=True)]
    probability = np.asarray([0.0 if o.refused else o.probability for o in opinions])
    result["shipped"] = {"id": verifier.id}
    for max_error in (0.01, 0.02, 0.05):
        threshold = verifier.threshold(max_error)
        rates = evaluate.at_threshold(probability, same, threshold)
        passed = probability >= threshold
        share = float((passed & ~same).sum() / max(passed.sum(), 1))
        result["shipped"][max_error] = {
            "threshold": threshold,
            "served": rates.served,
            "wrong": rates.wrong,
            "error": share,
        }
        print(
            f"  max_error {max_error:.0%} (probability >= {threshold:.3f}): {rates.served:.1%} of good pairs served, "
            f"{rates.wrong:.2%} of traps answered wrong, wrong / served {share:.2%}"
        )
    default = result["shipped"][DEFAULT_MAX_ERROR]
    if default["served"] < TARGETS["default served"] or default["wrong"] > TARGETS["default wrong"]:
        failed.append("shipped default")
    bins = np.clip((probability * 10).astype(int), 0, 9)
    ece = sum(
        abs(same[bins == i].mean() - probability[bins == i].mean()) * (bins == i).mean()
        for i in range(10)
        if (bins == i).any()
    )
    print(f"  calibration error of the probability on these pairs (10 bins): {ece:.3f}")
    result["shipped"]["ece"] = float(ece)

    conversations = rows_of(asked.data / "conversations_dev.jsonl")
    threshold = verifier.threshold(DEFAULT_MAX_ERROR)
    served = {True: 0, False: 0}
    by_last = {True: 0, False: 0}
    for row in conversations:
        a, b, label = row["a"], row["b"], bool(row["same_answer"])
        last_a, last_b = a[-1]["content"], b[-1]["content"]
        cos = float(np.dot(*minilm.encode([last_a, last_b])))
        alike = last_a == last_b
        if not alike:
            opinion = verifier.opinions(last_a, [(last_b, cos)])[0]
            alike = not opinion.refused and opinion.probability >= threshold
        by_last[label] += alike
        served[label] += alike and conversation_key(a) == conversation_key(b)
    counts = {label: sum(bool(r["same_answer"]) == label for r in conversations) for label in (True, False)}
    print(f"\nconversations ({counts[True]} good, {counts[False]} traps)")
    print(f"  identical history (default): {served[True]} good served, {served[False]} traps answered wrong")
    print(
        f"  by the last message alone:   {by_last[True]} good served, {by_last[False]} traps answered wrong"
    )
    result["conversations"] = {
        "good": counts[True],
        "traps": counts[False],
        "default": served[False],
        "last": by_last[False],
    }
    if served[False]:
        failed.append("conversations")

    result["time_ms"] = decision_time(verifier, texts, cosine)
    print("\ntime of a decision, CPU, readings of stored prompts in memory (p50)")
    for name, value in result["time_ms"].items():
        print(f"  {name}: {value:.3f} ms")

    result["bound"], missed = cache_bound.report(asked.splits)
    failed += missed
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{asked.out} written; " + ("missed: " + ", ".join(failed) if failed else "all targets met"))
    return 1 if failed else 0


def decision_time(verifier: Verifier, texts: list[tuple[str, str]], cosine: Any) -> dict[str, float]:
    """Return the median CPU milliseconds of reading a new prompt and of judging one and four read candidates."""
    stored = [b for _, b in texts]
    for text in stored:
        verifier.read(text)
    times: dict[str, list[float]] = {"prompt unseen, 1 candidate": [], "prompt unseen, 4 candidates": []}
    for i, (a, _) in enumerate(texts):
        for count, name in ((1, "prompt unseen, 1 candidate"), (4, "prompt unseen, 4 candidates")):
            candidates = [(stored[(i + k) % len(stored)], float(cosine[i])) for k in range(count)]
            # A space more makes it a prompt that was never read.
            prompt = a + " " * (count + 1)
            start = time.process_time()
            verifier.opinions(prompt, candidates)
            times[name].append((time.process_time() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


if __name__ == "__main__":
    sys.exit(main())
