"""Trains the verifier on the near-miss set and writes `classifiers/data/verifier.json` and `.npz`.

    python -m classifiers.pairs.train [--folder classifiers/data]

Needs scikit-learn and onnxruntime. One thread; about two minutes, most of it embedding. Nothing outside
`classifiers/data` is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers import artefact
from classifiers.encoder import DATA_DIRECTORY, Encoder, MiniLMEncoder, StaticEncoder
from classifiers.pairs import data, features
from classifiers.pairs.lexicon import Lexicon
from classifiers.pairs.verifier import MISSING, REFUSING, Trees

VERSION = "1"
SETTINGS: dict[str, Any] = {
    "max_iter": 250,
    "learning_rate": 0.08,
    "max_leaf_nodes": 16,
    "max_depth": 7,
    "min_samples_leaf": 15,
    "l2_regularization": 3.0,
    "max_features": 0.3,
}


def fit(
    table: NDArray[np.float32], same: NDArray[np.bool_], weights: NDArray[np.float64], seed: int = 0
) -> Any:
    """Fit boosted trees; rows with NaN are filled with `MISSING`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    trees = HistGradientBoostingClassifier(random_state=seed, early_stopping=False, **SETTINGS)
    return trees.fit(np.nan_to_num(table, nan=MISSING), same, sample_weight=weights)


def log_odds(fitted: Any, table: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the fitted trees' log-odds of each row."""
    result: NDArray[np.float64] = fitted.decision_function(np.nan_to_num(table, nan=MISSING))
    return result


def cosines(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """Return the cosine of each pair's two texts."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    return np.asarray([vectors[a] @ vectors[b] for a, b in pairs], dtype=np.float32)


def refused(table: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which rows the guard refuses."""
    columns = [i for i, name in enumerate(features.names()) if name.removeprefix("guard_") in REFUSING]
    return np.asarray((table[:, columns] > 0).any(axis=1))


def platt(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> tuple[float, float]:
    """Return slope and intercept of the logistic map from log-odds to probability (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], same)
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def sigmoid(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = 1.0 / (1.0 + np.exp(-np.clip(scores, -40, 40)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=DATA_DIRECTORY)
    folder = parser.parse_args().folder
    pairs = data.read_pairs()
    static, minilm = StaticEncoder.load(), MiniLMEncoder.load()
    texts = [(p.a, p.b) for p in pairs]
    table = features.PairFeatures(Lexicon.load(), static).table(texts, cosines(minilm, texts).tolist())
    same = np.asarray([p.same for p in pairs])
    splits = np.asarray([p.split for p in pairs])
    weights = np.ones(len(pairs))

    held_out = np.empty(len(pairs))
    for split in range(data.SPLITS):
        inside = splits != split
        held_out[~inside] = log_odds(fit(table[inside], same[inside], weights[inside]), table[~inside])
    slope, intercept = platt(held_out, same)
    probability = np.where(refused(table), 0.0, sigmoid(slope * held_out + intercept))
    trees = Trees.from_sklearn(fit(table, same, weights))
    rows = hashlib.sha256("\n".join(sorted(p.id for p in pairs)).encode()).hexdigest()
    made = artefact.save(
        folder / "verifier.json",
        name="verifier",
        version=VERSION,
        encoder_id=minilm.id,
        metadata={
            "features": list(features.names()),
            "word_encoder": static.id,
            "depth": trees.depth,
            "offset": trees.offset,
            "calibration": [slope, intercept],
            "settings": SETTINGS,
            "rows": len(pairs),
            "rows_sha256": rows,
        },
        arrays={
            **trees.arrays(),
            "held_out_probability": probability.astype(np.float32),
            "held_out_same": same,
        },
    )
    wrong = np.sort(probability[~same])[::-1]
    shares = {
        f"{e:.0%}": float((probability[same] > wrong[int(e * len(wrong))]).mean()) for e in (0.01, 0.02, 0.05)
    }
    print(
        json.dumps({"id": made, "rows": len(pairs), "held out: good served at traps wrong": shares}, indent=1)
    )


if __name__ == "__main__":
    main()
