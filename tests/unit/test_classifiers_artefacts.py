"""Loading of encoders, heads and manifests: what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from classifiers import artefact
from classifiers.artefact import Artefact
from classifiers.classifier import Classifier
from classifiers.encoder import (
    DATA_DIRECTORY,
    ArtefactError,
    EncoderUnavailableError,
    MiniLMEncoder,
    StaticEncoder,
)
from classifiers.sentence_transformer import SentenceTransformerEncoder


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A private copy of the shipped files without the large graph."""
    for path in DATA_DIRECTORY.iterdir():
        if path.is_file() and path.name != "minilm.onnx":
            shutil.copy(path, tmp_path / path.name)
    return tmp_path


def edit_manifest(directory: Path, change: Any) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_the_copy_loads(directory: Path) -> None:
    assert Classifier.load(directory).static.id == StaticEncoder.load().id


@pytest.mark.parametrize("name", ["static.npz", "tokenizer.json"])
def test_a_changed_encoder_file_is_refused(directory: Path, name: str) -> None:
    flip_byte(directory / name, 5000)
    with pytest.raises(ArtefactError, match=rf"{name} does not match the manifest.*reinstall farthing"):
        StaticEncoder.load(directory)


def test_a_missing_encoder_file_is_refused(directory: Path) -> None:
    with pytest.raises(ArtefactError, match=r"minilm\.onnx cannot be read"):
        MiniLMEncoder.load(directory)


def test_a_manifest_of_another_format_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda m: m.update(format=99))
    with pytest.raises(ArtefactError, match="unknown manifest format"):
        StaticEncoder.load(directory)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format": 1}', '{"format": 1, "encoders": {"static": 3}}']
)
def test_a_broken_manifest_is_refused(directory: Path, content: str) -> None:
    (directory / "manifest.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"manifest\.json"):
        StaticEncoder.load(directory)


def test_an_id_that_is_not_that_of_the_files_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda m: m["encoders"]["static"].update(id="static-000000000000"))
    with pytest.raises(ArtefactError, match="does not belong to its files"):
        StaticEncoder.load(directory)


def test_a_manifest_cannot_name_a_file_elsewhere(directory: Path) -> None:
    edit_manifest(directory, lambda m: m["encoders"]["static"]["files"].update({"../x": {"sha256": "0"}}))
    with pytest.raises(ArtefactError, match="not a plain file name"):
        StaticEncoder.load(directory)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"manifest\.json is missing"):
        Classifier.load(tmp_path)


def test_a_head_that_the_manifest_does_not_record_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda m: m["heads"].update(static="head-static-1-000000000000"))
    with pytest.raises(ArtefactError, match="the manifest records head-static-1-000000000000"):
        Classifier.load(directory)


def test_a_manifest_without_heads_is_refused(directory: Path) -> None:
    edit_manifest(directory, lambda m: m.pop("heads"))
    with pytest.raises(ArtefactError, match="names no heads"):
        Classifier.load(directory)


def write(path: Path, **changes: Any) -> str:
    given: dict[str, Any] = {
        "name": "head",
        "version": "3",
        "encoder_id": "static-abc",
        "metadata": {"words": ["a"]},
        "arrays": {"weights": np.arange(6, dtype=np.float32).reshape(2, 3)},
    }
    return artefact.save(path, **{**given, **changes})


def test_an_artefact_comes_back_as_saved(tmp_path: Path) -> None:
    id = write(tmp_path / "a.json")
    loaded = Artefact.load(tmp_path / "a.json", encoder_id="static-abc")
    assert loaded.id == id
    assert id.startswith("head-3-")
    assert loaded.metadata == {"words": ["a"]}
    np.testing.assert_array_equal(loaded.arrays["weights"], [[0, 1, 2], [3, 4, 5]])


def test_equal_content_gives_equal_bytes_and_other_content_another_id(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    assert first == second
    for suffix in (".json", ".npz"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert write(tmp_path / "c.json", arrays={"weights": np.zeros(3, dtype=np.float32)}) != first
    assert write(tmp_path / "d.json", metadata={"words": ["b"]}) != first


def test_an_artefact_for_another_encoder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    with pytest.raises(ArtefactError, match=r"made for encoder static-abc, not for minilm-1: train it again"):
        Artefact.load(tmp_path / "a.json", encoder_id="minilm-1")


def test_changed_arrays_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    flip_byte(tmp_path / "a.npz", 150)
    with pytest.raises(ArtefactError, match="do not match the hash"):
        Artefact.load(tmp_path / "a.json")


def test_an_edited_description_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    path = tmp_path / "a.json"
    path.write_text(path.read_text().replace("static-abc", "static-abd"))
    with pytest.raises(ArtefactError, match="damaged or edited"):
        Artefact.load(path)


def test_an_unknown_format_is_refused_before_its_hash(tmp_path: Path) -> None:
    write(tmp_path / "a.json")
    path = tmp_path / "a.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ArtefactError, match="format 2 is unknown, this version reads 1"):
        Artefact.load(path)


@pytest.mark.parametrize("content", ["", "null", "[1]", "{"])
def test_a_description_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtefactError):
        Artefact.load(tmp_path / "a.json")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", arrays={"weights": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(ArtefactError, match="incomplete artefact"):
        Artefact.load(tmp_path / "a.json")


def test_an_oversized_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.json")
    monkeypatch.setattr(artefact, "MAX_BYTES", 10)
    with pytest.raises(ArtefactError, match="larger than 10 bytes"):
        Artefact.load(tmp_path / "a.json")


def test_sentence_transformers_without_the_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(EncoderUnavailableError, match=r"pip install .*farthing\[sentence-transformers\]"):
        SentenceTransformerEncoder.load(tmp_path)


def test_a_folder_that_is_none_of_sentence_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no modules\.json"):
        SentenceTransformerEncoder.load(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"no \.safetensors"):
        SentenceTransformerEncoder.load(tmp_path)


def test_minilm_without_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EncoderUnavailableError, match="pip install 'onnxruntime"):
        MiniLMEncoder.load()
