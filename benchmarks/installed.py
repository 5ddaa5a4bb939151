"""How much disk a runtime-only installation takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"


def installed_size(folder: Path) -> tuple[float, str]:
    """(MiB, how it was found). Installs the runtime lock and this project into a new environment with uv, compiled
    to bytecode as pip does it; where that fails (no network, no uv) it adds up the files of the lock's packages in
    this environment.
    """
    uv = shutil.which("uv") or shutil.which(str(Path(sys.executable).parent / "uv"))
    if uv is not None:
        venv = folder / "runtime"
        python = venv / "bin" / "python"
        install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
        try:
            for command in (
                [uv, "venv", "--quiet", "--python", sys.executable, str(venv)],
                [*install, "--require-hashes", "-r", str(LOCK)],
                [*install, "--no-deps", str(ROOT)],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=600)  # noqa: S603
        except (subprocess.SubprocessError, OSError):
            pass
        else:
            size = _folder_bytes(venv)
            shutil.rmtree(venv)
            return size / 2**20, "a new environment from requirements.lock, with bytecode"
    return _recorded_bytes() / 2**20, "files of the lock's packages in this environment, without bytecode"


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            total += (Path(path) / name).lstat().st_size
    return total


def _recorded_bytes() -> int:
    names = [*re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(), re.MULTILINE)]
    total = sum(_folder_bytes(ROOT / name) for name in ("router", "classifiers", "migrations", "policies"))
    for name in names:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue  # locked for another platform
        for file in files:
            path = Path(str(file.locate()))
            if path.is_file() and path.suffix != ".pyc":
                total += path.stat().st_size
    return total
