"""What learning keeps of a prompt instead of its text: `success_features`, in a few hundred bytes.

The hashed n-grams are no secret to someone who tries words against them: treat packed features as the prompt's kin.
"""

from __future__ import annotations

import struct

import numpy as np

from classifiers import features, success_features
from classifiers.encoder import Encoder
from classifiers.success_features import PromptFeatures

FORMAT = 1
# Format, then how many numbers of structure, vector and n-grams follow.
_HEAD = struct.Struct("<BHHH")
_NUMBER, _GRAM, _COUNT = np.dtype("<f2"), np.dtype("<u2"), np.dtype("u1")


def read(text: str, encoder: Encoder) -> PromptFeatures:
    """Read a prompt of any length; a fraction of a millisecond for a short one."""
    return success_features.read(text, encoder.encode((features.focus(text),))[0])


def pack(prompt: PromptFeatures) -> bytes:
    """float16 structure and vector, uint16 n-gram buckets, uint8 counts (at most 255), little endian."""
    parts = (
        prompt.structure.astype(_NUMBER),
        prompt.vector.astype(_NUMBER),
        prompt.grams.astype(_GRAM),
        np.minimum(prompt.counts, 255).astype(_COUNT),
    )
    head = _HEAD.pack(FORMAT, len(prompt.structure), len(prompt.vector), len(prompt.grams))
    return head + b"".join(part.tobytes() for part in parts)


def unpack(packed: bytes) -> PromptFeatures:
    """Raises ValueError for another format, other structural features or a damaged value."""
    if len(packed) < _HEAD.size or packed[0] != FORMAT:
        raise ValueError("packed features of an unknown format")
    _, structure, vector, grams = _HEAD.unpack_from(packed)
    if structure != len(success_features.NAMES):
        raise ValueError(
            f"packed features hold {structure} structural numbers, this version reads {len(success_features.NAMES)}"
        )
    if len(packed) != _HEAD.size + _NUMBER.itemsize * (structure + vector) + 3 * grams:
        raise ValueError("packed features are damaged")
    at = _HEAD.size
    found = []
    for kind, count in ((_NUMBER, structure), (_NUMBER, vector), (_GRAM, grams), (_COUNT, grams)):
        found.append(np.frombuffer(packed, kind, count, at))
        at += kind.itemsize * count
    return PromptFeatures(
        structure=found[0].astype(np.float32),
        grams=found[2].astype(np.int64),
        counts=found[3].astype(np.float32),
        vector=found[1].astype(np.float32),
    )
