"""What the semantic cache may lose by looking with the static encoder first, and how often it asks the transformer.

    python -m benchmarks.semantic_prefilter [FOLDER]

FOLDER holds `pairs_dev.jsonl` (outside pairs; in neither the repository nor the wheel). Printed for Farthing's own
pairs and the outside ones: the share of good pairs the verifier would serve that the sketches' floor and the ceiling
keep, whether a stored prompt is found among strangers (`classifiers/data/prompts`), and how often prompts that have
no match at all make the cache ask the transformer.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from classifiers.classifier import Classifier
from classifiers.encoder import DATA_DIRECTORY
from classifiers.pairs import data
from router.stages.likeness import ShippedLikeness, Stored
from router.stages.semantic import FLOOR, LEAST, NEAREST

ASKED = 300


def main() -> None:
    likeness = ShippedLikeness(Classifier.load())
    likeness.load()
    sets = {"own": [(pair.a, pair.b, pair.same) for pair in data.read_pairs()]}
    if len(sys.argv) > 1:
        lines = (Path(sys.argv[1]) / "pairs_dev.jsonl").read_text(encoding="utf-8").splitlines()
        sets["outside"] = [(row["a"], row["b"], row["same_answer"]) for row in map(json.loads, lines)]
    strangers = _strangers()
    table = np.stack([likeness.sketch(text) for text in strangers])
    for name, pairs in sets.items():
        _kept(likeness, name, pairs, table)
    _asks(likeness, strangers, table)


def _strangers() -> list[str]:
    files = sorted((DATA_DIRECTORY / "prompts").glob("*.jsonl"))
    texts = (
        json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()
    )
    return list(dict.fromkeys(text for text in texts if len(text) <= 8000))


def _kept(
    likeness: ShippedLikeness, name: str, pairs: list[tuple[str, str, bool]], table: np.ndarray
) -> None:
    verifier = likeness.verifier
    rows = []
    for a, b, same in pairs:
        cosine = float(likeness.vector(a) @ likeness.vector(b))
        (opinion,) = verifier.opinions(b, [(a, cosine)])
        if opinion.refused or opinion.probability < LEAST:
            continue
        sketch = likeness.sketch(b)
        near = float(likeness.sketch(a) @ sketch)
        (ceiling,) = verifier.ceilings(b, [(a, near)])
        assert ceiling is not None
        rows.append((opinion.probability, near, ceiling, int((table @ sketch > near).sum()), same))
    probability, near, ceiling, rank, same = np.asarray(rows).T
    print(
        f"{name}: {len(pairs)} pairs; the ceiling keeps {np.mean(ceiling >= LEAST):.2%} of {len(rows)} candidates"
    )
    for max_error in (0.01, 0.02, 0.05):
        served = (probability >= verifier.threshold(max_error)) & (same == 1)
        above, found = near[served] >= FLOOR, rank[served] < NEAREST
        print(
            f"  max_error {max_error:.0%}: {served.sum()} good pairs served; above the floor {above.mean():.1%}, "
            f"and among the {NEAREST} nearest of {len(table):,} strangers {np.mean(above & found):.1%}"
        )


def _asks(likeness: ShippedLikeness, strangers: list[str], table: np.ndarray) -> None:
    chosen = np.random.default_rng(1).choice(len(strangers), ASKED, replace=False)
    for max_error, least in ((0.01, None), (0.05, None), (0.01, LEAST)):
        asked, seconds = 0, []
        for at in chosen:
            cosines = table @ table[at]
            cosines[at] = -1
            near = [i for i in np.argsort(-cosines)[:NEAREST] if cosines[i] >= FLOOR]
            candidates = [Stored(strangers[i], float(cosines[i]), b"") for i in near]
            began = time.process_time()
            ceilings = likeness.verifier.ceilings(
                strangers[at], [(one.prompt, one.near) for one in candidates]
            )
            seconds.append(time.process_time() - began)
            floor = likeness.threshold(max_error) if least is None else least
            asked += any(ceiling is not None and ceiling >= floor for ceiling in ceilings)
        what = f"at max_error {max_error:.0%}" if least is None else "in mode certified"
        print(
            f"strangers {what}: the transformer is asked for {asked / ASKED:.0%} of prompts; reading the nearest "
            f"takes {1000 * float(np.median(seconds)):.1f} ms CPU"
        )


if __name__ == "__main__":
    main()
