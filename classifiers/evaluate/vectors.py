"""A cache of embeddings: one .npz per encoder, rows found by a hash of the text.

Encoders are deterministic, so a cached row equals a computed one. The file name carries the encoder's id, which
changes with its bytes. Texts themselves are not stored.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from classifiers.encoder import Encoder, Vectors

# A run that is interrupted loses at most this many texts' work.
SAVE_EVERY = 4000


def default_cache() -> Path:
    """Return the folder for cached embeddings: `farthing` under the user's cache folder (XDG basedir 0.8)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farthing"


def text_key(text: str) -> bytes:
    """Return the first 16 bytes of the text's SHA-256 (lone surrogates kept apart)."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class VectorCache:
    """Embeddings of one encoder on disk. Not for concurrent writers: the last one to finish wins, none corrupts."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self._encoder = encoder
        self._path = folder / f"vectors-{encoder.id}.npz"
        self._rows: dict[bytes, Vectors] = {}
        try:
            with np.load(self._path, allow_pickle=False) as stored:
                keys, vectors = stored["keys"], stored["vectors"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return  # Absent or damaged: computed again.
        if vectors.ndim == 2 and vectors.shape == (len(keys), encoder.dimensions):
            self._rows = {key.tobytes(): row for key, row in zip(keys, vectors, strict=True)}

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return float32 (len(texts), dimensions), computing and storing what is not there yet."""
        keys = [text_key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}
        for done, (key, text) in enumerate(missing.items(), 1):
            self._rows[key] = self._encoder.encode((text,))[0]
            if done % SAVE_EVERY == 0:
                self._save()
        if missing:
            self._save()
        result = np.empty((len(texts), self._encoder.dimensions), dtype=np.float32)
        for row, key in enumerate(keys):
            result[row] = self._rows[key]
        return result

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        keys = np.frombuffer(b"".join(self._rows), dtype=np.uint8).reshape(-1, 16)
        temporary = self._path.with_name(f"{self._path.stem}.{os.getpid()}.tmp.npz")
        np.savez(temporary, keys=keys, vectors=np.stack(list(self._rows.values())))
        temporary.replace(self._path)
