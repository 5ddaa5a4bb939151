"""Learned files: a JSON description beside one .npz of plain arrays.

The description carries the SHA-256 of the arrays and of itself; loading refuses a wrong hash, an unknown format
and an artefact made for another encoder. Nothing is unpickled. The hash in the file guards against damage and
mixed-up files; against replacement the id is compared with one recorded elsewhere (`manifest.json`, the ledger).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import ArtefactError

FORMAT = 1
MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Artefact:
    """Arrays learned on one encoder's vectors. `id` is name-version-hash."""

    id: str
    name: str
    version: str
    encoder_id: str
    metadata: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]

    @classmethod
    def load(cls, path: Path, *, encoder_id: str | None = None) -> Artefact:
        """Load `path` (the .json; the arrays lie beside it under the same name with .npz).

        Raises ArtefactError when a file is missing, larger than 64 MiB, damaged or of an unknown format, or when
        `encoder_id` is given and is not the one the artefact was made for.
        """
        arrays_path = path.with_suffix(".npz")
        try:
            if max(path.stat().st_size, arrays_path.stat().st_size) > MAX_BYTES:
                raise ArtefactError(f"{path.name}: larger than {MAX_BYTES} bytes, not an artefact")
            described: Any = json.loads(path.read_text(encoding="utf-8"))
            content = arrays_path.read_bytes()
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{path.name} or its arrays are missing or unreadable: reinstall farthing, or train again"
            ) from error
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            found = described.get("format") if isinstance(described, dict) else None
            raise ArtefactError(
                f"{path.name}: artefact format {found!r} is unknown, this version reads {FORMAT}: upgrade farthing, "
                "or train again"
            )
        claimed = described.pop("sha256", None)
        if claimed != _digest(described):
            raise ArtefactError(
                f"{path.name}: the description does not match its hash; it was damaged or edited"
            )
        if described.get("arrays_sha256") != hashlib.sha256(content).hexdigest():
            raise ArtefactError(f"{arrays_path.name}: the arrays do not match the hash in {path.name}")
        if encoder_id is not None and described.get("encoder") != encoder_id:
            raise ArtefactError(
                f"{path.name} was made for encoder {described.get('encoder')}, not for {encoder_id}: train it again "
                "on this encoder"
            )
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            name, version = str(described["name"]), str(described["version"])
            return cls(
                id=f"{name}-{version}-{str(claimed)[:12]}",
                name=name,
                version=version,
                encoder_id=str(described["encoder"]),
                metadata=described["metadata"],
                arrays=arrays,
            )
        except (KeyError, ValueError, OSError) as error:
            raise ArtefactError(f"{path.name}: incomplete artefact ({error})") from error


def save(
    path: Path,
    *,
    name: str,
    version: str,
    encoder_id: str,
    metadata: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> str:
    """Write the .json `path` and the .npz beside it; return the id. Equal input gives equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{key: arrays[key] for key in sorted(arrays)})  # type: ignore[arg-type]
    content = buffer.getvalue()
    described: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "version": version,
        "encoder": encoder_id,
        "arrays_sha256": hashlib.sha256(content).hexdigest(),
        "metadata": dict(metadata),
    }
    # Through JSON once, so that the hash is over what a reader will see.
    described = json.loads(json.dumps(described))
    digest = _digest(described)
    path.with_suffix(".npz").write_bytes(content)
    path.write_text(json.dumps({**described, "sha256": digest}, indent=1) + "\n", encoding="utf-8")
    return f"{name}-{version}-{digest[:12]}"


def _digest(described: Mapping[str, Any]) -> str:
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
