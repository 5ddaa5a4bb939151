"""Reads the evaluation data: RouteLLM's MMLU, GSM8K and MT-Bench answers, LLMRouter's nine models."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


class DataError(ValueError):
    """A file of the evaluation data is missing or not in its form; the message names it."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Prompts and every model's score. `groups`: subject or task of each prompt. `scores`: 0..1, (rows, models);
    for MT-Bench 1..10. `cost`: USD per prompt and model, or None."""

    name: str
    texts: list[str]
    groups: NDArray[np.str_]
    models: tuple[str, ...]
    scores: Doubles
    cost: Doubles | None = None


def read_routellm(folder: Path, name: str) -> Answers:
    """Read `routellm/NAME.csv.gz`: weak model first. Raises DataError."""
    path = folder / "routellm" / f"{name}.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        scores = np.array([[float(row["mixtral"]), float(row["gpt4"])] for row in rows])
        texts, groups = [row["prompt"] for row in rows], np.array([row["subject"] for row in rows])
    except (OSError, EOFError, KeyError, ValueError, csv.Error) as error:
        raise _bad(path, error) from error
    return Answers(name, texts, groups, ("mixtral", "gpt4"), scores)


def read_mt_bench(folder: Path) -> Answers:
    """Read `routellm/mt_bench.jsonl`; both turns make one prompt. Raises DataError."""
    path = folder / "routellm" / "mt_bench.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        scores = np.array([[float(row["mixtral"]), float(row["gpt4"])] for row in rows])
        texts = ["\n".join(row["turns"]) for row in rows]
        groups = np.array([row["category"] for row in rows])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _bad(path, error) from error
    return Answers("mt_bench", texts, groups, ("mixtral", "gpt4"), scores)


def read_llmrouter(folder: Path, split: str) -> Answers:
    """Read `llmrouter/SPLIT.json.gz`; cost = (characters / 4 input + 200 output tokens) at list price."""
    path, price_path = folder / "llmrouter" / f"{split}.json.gz", folder / "llmrouter" / "prices.json"
    try:
        prices: dict[str, Any] = json.loads(price_path.read_text(encoding="utf-8"))
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = json.load(stream)
        models = tuple(sorted(prices))
        scores = np.array([[float(row["scores"][model]) for model in models] for row in rows])
        texts, groups = [row["question"] for row in rows], np.array([row["task"] for row in rows])
        into = np.array([float(prices[model]["input"]) for model in models])
        out = np.array([float(prices[model]["output"]) for model in models])
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise _bad(path, error) from error
    tokens = np.array([len(text) / 4.0 for text in texts])
    cost = (tokens[:, None] * into + 200.0 * out) / 1e6
    return Answers(f"llmrouter-{split}", texts, groups, models, scores, cost)


def _bad(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read as evaluation data ({type(error).__name__}: {error}); --data names the folder "
        "that holds routellm/ and llmrouter/"
    )


def folds_by(values: NDArray[np.str_] | list[str], seed: int, folds: int = 5) -> NDArray[np.int64]:
    """Return a fold id per row, equal values (prompts, subjects) in one fold; shuffled by `seed`."""
    unique, inverse = np.unique(values, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(unique)) % folds).astype(np.int64)[inverse]
