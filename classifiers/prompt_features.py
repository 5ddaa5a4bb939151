"""What learning keeps of a prompt instead of its words: its static embedding and what can be counted in it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from classifiers import features
from classifiers.encoder import Encoder

Array = NDArray[np.float32]


def pack(text: str, encoder: Encoder) -> bytes:
    """float16, little endian: the encoder's vector, then `features.structure`. A fraction of a millisecond."""
    vector = encoder.encode((features.focus(text),))[0]
    return np.concatenate((vector, features.structure(text))).astype("<f2").tobytes()


def unpack(packed: bytes, dimensions: int) -> Array:
    """float32 of shape (dimensions + structural features,). Raises ValueError for another length."""
    found = np.frombuffer(packed, dtype="<f2").astype(np.float32)
    expected = dimensions + len(features.NAMES)
    if found.shape != (expected,):
        raise ValueError(f"packed features hold {found.size} numbers, expected {expected}")
    return found
