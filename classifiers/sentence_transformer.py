"""An encoder for users who bring their own folder in sentence-transformers' format.

Needs the extra `farthing[sentence-transformers]`, which brings torch; nothing else in the package does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from classifiers.encoder import ArtefactError, EncoderUnavailableError, Vectors, bounded, file_sha256

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

REMEDY = (
    "the sentence-transformers encoder needs an extra that is not installed: "
    "pip install torch==2.13.0 'farthing[sentence-transformers]'"
)


class SentenceTransformerEncoder:
    """A local folder run by sentence-transformers on the CPU. The network is never asked."""

    def __init__(self, *, id: str, dimensions: int, transformer: SentenceTransformer) -> None:
        self._id = id
        self._dimensions = dimensions
        self._transformer = transformer

    @classmethod
    def load(cls, directory: Path) -> SentenceTransformerEncoder:
        """Load a folder as `SentenceTransformer.save` writes it. Code in the folder is not executed.

        Raises EncoderUnavailableError without the extra; ArtefactError when the folder is missing, is not such a
        folder, or would have to be completed from the network.
        """
        directory = Path(directory)
        if not (directory / "modules.json").is_file():
            raise ArtefactError(
                f"{directory} is not a sentence-transformers folder (no modules.json): give the folder that "
                "SentenceTransformer.save() wrote"
            )
        # Pickled weights can run code when they are loaded; the same weights exist as safetensors.
        if not any(directory.rglob("*.safetensors")):
            raise ArtefactError(
                f"{directory} holds no .safetensors weights: load and save it once with a current "
                "sentence-transformers"
            )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EncoderUnavailableError(REMEDY) from error
        digest = hashlib.sha256()
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(directory).as_posix()} {file_sha256(path)}\n".encode())
        try:
            transformer = SentenceTransformer(
                str(directory),
                device="cpu",
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ArtefactError(f"{directory} cannot be loaded by sentence-transformers: {error}") from error
        probe = np.asarray(transformer.encode(["probe"], show_progress_bar=False))
        return cls(
            id=f"sentence-transformers-{digest.hexdigest()[:12]}",
            dimensions=int(probe.shape[1]),
            transformer=transformer,
        )

    @property
    def id(self) -> str:
        return self._id

    @property
    def dimensions(self) -> int:
        return self._dimensions

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See `Encoder.encode`. How much of a text is read is set by the folder (`max_seq_length`)."""
        result = np.empty((len(texts), self._dimensions), dtype=np.float32)
        for row, text in enumerate(texts):
            # One at a time: padding to a neighbour's length moves the last bits of a vector.
            vector: Any = self._transformer.encode(
                [bounded(text)], normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
            )
            result[row] = vector[0]
        return result
