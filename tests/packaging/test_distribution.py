"""The built distribution, installed with the runtime lock alone into a clean environment, used elsewhere."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# One worker builds and installs; the other tests of this file wait for it there instead of doing it again.
pytestmark = pytest.mark.xdist_group("distribution")

# design.md, section 8: runtime only, no CUDA, no torch.
SIZE_BUDGET_MB = 700


@dataclass(frozen=True, slots=True)
class Installed:
    wheel: Path
    sdist: Path
    environment: Path
    elsewhere: Path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the clean environment in a folder that has nothing to do with the repository."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
        return subprocess.run(
            [str(self.environment / "bin" / command[0]), *command[1:]],
            cwd=self.elsewhere,
            env={**kept, "HOME": str(self.elsewhere), **variables},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def python(self, code: str, **variables: str) -> str:
        done = self.run("python", "-c", code, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def tool(name: str) -> str:
    """A program of the environment that runs the tests; ``make test`` installs uv and hatchling there."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing: run the tests with `make test`"
    return found


def succeed(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    work = tmp_path_factory.mktemp("distribution")
    succeed(tool("hatchling"), "build", "-d", work / "dist", cwd=ROOT)
    [sdist], [wheel] = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    # Installed is what was built from the sdist: so the sdist is known to be complete.
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "sdist", filter="data")
    [unpacked] = (work / "sdist").iterdir()
    succeed(tool("hatchling"), "build", "-t", "wheel", "-d", work / "dist-from-sdist", cwd=unpacked)
    [from_sdist] = (work / "dist-from-sdist").glob("*.whl")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(from_sdist) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())

    environment, elsewhere = work / "environment", work / "elsewhere"
    elsewhere.mkdir()
    succeed(tool("uv"), "venv", "--quiet", "--python", sys.executable, environment, cwd=work)
    install: list[str | Path] = [
        tool("uv"),
        "pip",
        "install",
        "--quiet",
        "--python",
        environment / "bin" / "python",
    ]
    succeed(*install, "--require-hashes", "-r", ROOT / "requirements.lock", cwd=work)
    succeed(*install, "--no-deps", from_sdist, cwd=work)
    return Installed(wheel=wheel, sdist=sdist, environment=environment, elsewhere=elsewhere)


def test_wheel_holds_the_two_packages_and_their_data(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"router", "classifiers", "farthing-0.1.0.dist-info"}
    assert "router/_data/migrations/env.py" in names
    assert any(name.startswith("router/_data/migrations/versions/") for name in names)
    assert "router/_data/policies/policy.yaml" in names
    assert "router/_data/policies/providers.yaml" in names
    assert any(name.startswith("classifiers/data/") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".pkl", ".joblib", ".sqlite"))]
    assert "farthing-0.1.0.dist-info/licenses/LICENSE" in names


def test_packages_come_from_the_environment(installed: Installed) -> None:
    files = installed.python(
        "import router, classifiers; print(router.__file__); print(classifiers.__file__)"
    )
    for file in files.splitlines():
        assert Path(file).is_relative_to(installed.environment), file


@pytest.mark.parametrize("name", ["tests", "migrations", "policies", "benchmarks"])
def test_nothing_else_can_be_imported(installed: Installed, name: str) -> None:
    found = installed.python(f"import importlib.util; print(importlib.util.find_spec({name!r}))")
    assert found == "None"


def test_help_lists_the_commands(installed: Installed) -> None:
    done = installed.run("farthing", "--help")
    assert done.returncode == 0, done.stderr
    for command in (
        "init",
        "serve",
        "demo",
        "simulate",
        "migrate",
        "doctor",
        "keys",
        "policy",
        "report",
        "ledger",
        "prices",
    ):
        assert command in done.stdout


def test_migrate_works_in_any_folder(installed: Installed) -> None:
    database = installed.elsewhere / "ledger.sqlite"
    variables = {
        "FARTHING_DATABASE_URL": f"sqlite:///{database}",
        "FARTHING_DATA_DIR": str(installed.elsewhere / "data"),
    }
    first = installed.run("farthing", "migrate", **variables)
    assert first.returncode == 0, first.stderr
    with contextlib.closing(sqlite3.connect(database)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "alembic_version" in tables
    assert len(tables) > 1
    again = installed.run("farthing", "migrate", **variables)
    assert again.returncode == 0, again.stderr


def test_the_composition_root_loads_nothing_heavy(installed: Installed) -> None:
    loaded = installed.python(
        "import router.app, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    assert "router" in loaded
    assert not {"litellm", "torch", "pandas", "sklearn", "scipy", "openai", "boto3", "transformers"} & set(
        loaded
    )


def test_the_command_line_loads_nothing_heavy(installed: Installed) -> None:
    loaded = installed.python(
        "import router.cli, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    ).split()
    assert not {"litellm", "torch", "pandas", "sklearn", "scipy", "openai", "fastapi", "onnxruntime"} & set(
        loaded
    )


def test_the_runtime_stays_inside_its_size(installed: Installed) -> None:
    # Hard links into the installer's cache count in full, as for someone who installs without that cache.
    files = [path for path in installed.environment.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files) / 1_000_000
    names = {path.name.lower() for path in (installed.environment / "lib").glob("python*/site-packages/*")}
    assert size < SIZE_BUDGET_MB, f"{size:.0f} MB"
    assert not [
        name for name in names if name.startswith(("torch", "nvidia", "pandas", "sklearn", "scikit_learn"))
    ]
