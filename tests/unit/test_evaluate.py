"""`farthing evaluate`: its measures against figures known by hand, a whole run on a small set of made-up answers."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest

from classifiers.encoder import StaticEncoder
from classifiers.evaluate import main, metrics
from classifiers.evaluate.data import folds_by, read_routellm
from classifiers.evaluate.vectors import VectorCache, text_key

MODELS = {"big": 1.0, "mid": 0.4, "small": 0.1}


def test_apgr_of_random_is_a_half_and_of_the_inverse_less() -> None:
    rng = np.random.default_rng(0)
    weak, strong = (rng.random(20000) < 0.6).astype(float), (rng.random(20000) < 0.8).astype(float)
    assert metrics.apgr(rng.random(20000), strong, weak) == pytest.approx(0.5, abs=0.02)
    assert metrics.apgr(strong - weak + 1e-6 * rng.random(20000), strong, weak) > 1.0
    assert metrics.apgr(weak - strong, strong, weak) < 0.2


def test_a_constant_score_is_the_straight_line() -> None:
    weak, strong = np.array([0.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert metrics.apgr(np.zeros(4), strong, weak) == pytest.approx(0.5)
    assert metrics.cpt(np.zeros(4), strong, weak, 0.5) == pytest.approx(0.5)


def test_apgr_by_hand() -> None:
    # 100 prompts; the first 20 gain, ranked first: the curve rises linearly to 1 at share .2 and stays.
    strong, weak = np.ones(100), np.r_[np.zeros(20), np.ones(80)]
    score = -np.arange(100.0)
    assert metrics.apgr(score, strong, weak) == pytest.approx(1.0 - 0.2 / 2, abs=0.011)
    assert metrics.cpt(score, strong, weak, 0.5) == pytest.approx(0.1, abs=0.011)


def test_auroc_and_ece_by_hand() -> None:
    score = np.array([0.1, 0.4, 0.35, 0.8])
    assert metrics.auroc(score, np.array([False, False, True, True])) == pytest.approx(0.75)
    assert metrics.auroc(np.ones(4), np.array([False, False, True, True])) == pytest.approx(0.5)
    # Bin .1: predicted .15, seen 0; bin .9: predicted .95, seen .5.
    assert metrics.ece(np.array([0.15, 0.15, 0.95, 0.95]), np.array([0.0, 0, 1, 0])) == pytest.approx(0.3)


def test_the_hull_drops_what_is_dominated_and_extends_flat() -> None:
    points = [(1.0, 0.2), (2.0, 0.25), (3.0, 0.6), (4.0, 0.5)]
    assert metrics.hull(points) == [(1.0, 0.2), (3.0, 0.6)]
    assert metrics.aiq(points, 4.0) == pytest.approx(((0.2 + 0.6) / 2 * 2 + 0.6) / 4)


def test_folds_never_part_equal_prompts() -> None:
    texts = ["a", "b", "a", "c", "d", "e", "f", "b"]
    fold = folds_by(texts, 3)
    assert fold[0] == fold[2]
    assert fold[1] == fold[7]
    assert set(fold.tolist()) == {0, 1, 2, 3, 4}


def test_vectors_are_cached_by_text_and_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    class Counting:
        id, dimensions, calls = "counting-1", 2, 0

        def encode(self, texts: list[str]) -> np.ndarray:
            self.calls += len(texts)
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    encoder = Counting()
    first = VectorCache(tmp_path, encoder).encode(["a", "bb", "a"])
    assert encoder.calls == 2
    assert np.array_equal(VectorCache(tmp_path, encoder).encode(["a", "bb", "a"]), first)
    assert encoder.calls == 2
    (tmp_path / "vectors-counting-1.npz").write_bytes(b"PK\x03\x04 damaged")
    assert np.array_equal(VectorCache(tmp_path, encoder).encode(["a"]), first[:1])
    assert encoder.calls == 3
    assert text_key("a") != text_key("\ud800")


def write_data(folder: Path) -> None:
    """Made-up answers: the weak model fails on sums of many numbers, prompts of two kinds of wording."""
    rng = np.random.default_rng(5)
    (folder / "routellm").mkdir(parents=True)
    (folder / "llmrouter").mkdir()

    def sums(count: int, topic: str) -> list[tuple[str, str, float, float]]:
        rows = []
        for number in range(count):
            hard = rng.random() < 0.5
            numbers = " plus ".join(str(rng.integers(10, 99)) for _ in range(9 if hard else 2))
            text = f"In the {topic} lesson no. {number}, what is {numbers}?"
            right = rng.random(2) < ((0.2, 0.85) if hard else (0.9, 0.92))
            rows.append((f"{topic}{number % 7}", text, float(right[0]), float(right[1])))
        return rows

    for name, count in (("mmlu", 200), ("gsm8k", 110)):
        with gzip.open(folder / "routellm" / f"{name}.csv.gz", "wt", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("subject", "prompt", "gpt4", "mixtral"))
            writer.writerows(
                (group, text, int(strong), int(weak)) for group, text, weak, strong in sums(count, name)
            )
    with (folder / "routellm" / "mt_bench.jsonl").open("w", encoding="utf-8") as lines:
        for _, text, weak, strong in sums(40, "talk"):
            row = {"category": "x", "turns": [text, "Why?"], "gpt4": 7 + strong, "mixtral": 6 + weak}
            lines.write(json.dumps(row) + "\n")
    prices = {model: {"input": price, "output": price} for model, price in MODELS.items()}
    (folder / "llmrouter" / "prices.json").write_text(json.dumps(prices))
    for split, count in (("train", 150), ("test", 80)):
        rows = [
            {"question": text, "task": group, "scores": {"small": weak, "mid": weak, "big": strong}}
            for group, text, weak, strong in sums(count, split)
        ]
        with gzip.open(folder / "llmrouter" / f"{split}.json.gz", "wt", encoding="utf-8") as stream:
            json.dump(rows, stream)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="evaluation needs the extra `train`")
    folder = tmp_path_factory.mktemp("evaluation")
    write_data(folder / "data")
    argv = ["--data", str(folder / "data"), "--json", "--cache", str(folder / "cache"), "--seeds", "0", "1"]
    argv += ["--predictions", str(folder / "predictions.csv.gz"), "--plot", str(folder / "plot.svg")]
    with pytest.MonkeyPatch.context() as patch:
        import sys

        patch.setattr("classifiers.evaluate.LEARNING_CURVE", (60,))
        patch.setattr(
            "classifiers.success.SuccessHeads.fit.__func__.__kwdefaults__", {"trees": 5, "at": None}
        )
        captured = io.StringIO()
        patch.setattr(sys, "stdout", captured)
        assert main(argv) == 0
    (folder / "results.json").write_text(captured.getvalue())
    return folder


def test_the_json_holds_every_protocol_beside_its_baselines(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    pair = {"apgr", "cpt50", "cpt80", "auroc", "ece", "random", "prior_only", "oracle", "best_single"}
    assert set(results["mmlu"]) == {"kfold", "leave_subjects_out", "out_of_domain"}
    for data in ("mmlu", "gsm8k", "mt_bench"):
        for row in results[data].values():
            assert pair <= set(row)
            assert len(row["seeds"]["apgr"]) == 2
    for row in results["llmrouter"].values():
        assert {"aiq", "zero_router", "best_single", "oracle", "random", "prior_only"} <= set(row)
    assert results["mmlu"]["kfold"]["apgr"] > 0.6
    assert results["mmlu"]["kfold"]["oracle"] > results["mmlu"]["kfold"]["apgr"]
    assert results["mmlu"]["kfold"]["prior_only"] == pytest.approx(0.5)
    assert results["llmrouter"]["in_domain"]["aiq"] > results["llmrouter"]["in_domain"]["zero_router"]
    assert results["mt_bench"]["out_of_domain"]["ece"] is None
    assert results["decision_ms"]["p50"] > 0


def test_the_figures_follow_from_the_predictions_file(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    with gzip.open(finished / "predictions.csv.gz", "rt", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if (row["data"], row["protocol"]) == ("mmlu", "kfold")]
    again = []
    for seed in ("0", "1"):
        by = {
            model: [row for row in rows if row["seed"] == seed and row["model"] == model]
            for model in ("gpt4", "mixtral")
        }
        p, y = (
            {model: np.array([float(row[key]) for row in by[model]]) for model in by}
            for key in ("predicted", "score")
        )
        again.append(metrics.apgr(p["gpt4"] - p["mixtral"], y["gpt4"], y["mixtral"]))
    assert again == pytest.approx(results["mmlu"]["kfold"]["seeds"]["apgr"])
    assert {row["fold"] for row in rows} == {"0", "1", "2", "3", "4"}
    assert "lesson" not in (finished / "plot.svg").read_text()


def test_the_plot_is_well_formed(finished: Path) -> None:
    from xml.etree import ElementTree

    root = ElementTree.fromstring((finished / "plot.svg").read_text())
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) >= 8 * 3


def test_the_table_shows_every_row(finished: Path) -> None:
    from rich.console import Console

    from classifiers.evaluate.report import show

    console = Console(record=True, width=160, file=io.StringIO())
    show(json.loads((finished / "results.json").read_text()), console)
    shown = console.export_text()
    for word in ("leave subjects out", "mt_bench", "tasks held out", "zero router", "oracle"):
        assert word in shown


def test_missing_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "mmlu.csv.gz" in capsys.readouterr().err
    (tmp_path / "routellm").mkdir()
    with gzip.open(tmp_path / "routellm" / "mmlu.csv.gz", "wt") as stream:
        stream.write("subject,prompt\nx,y\n")
    with pytest.raises(ValueError, match=r"mmlu\.csv\.gz cannot be read"):
        read_routellm(tmp_path, "mmlu")


def test_the_static_encoder_is_the_default() -> None:
    from classifiers.evaluate import ENCODERS

    assert list(ENCODERS["static"]) == [StaticEncoder.load]
