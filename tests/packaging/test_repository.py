"""What may not be in the repository: an index address, a path of one machine, an unhashed requirement."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
TEXT = {
    "",
    ".cfg",
    ".css",
    ".example",
    ".html",
    ".ini",
    ".js",
    ".json",
    ".lock",
    ".mako",
    ".md",
    ".py",
    ".sh",
    ".sql",
    ".toml",
    ".yaml",
    ".yml",
}


def repository_files() -> list[Path]:
    """Tracked files and untracked ones that git does not ignore; without git, all in the source folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        folders = ["router", "classifiers", "migrations", "policies", "tests", "deploy", "docs", "benchmarks"]
        names = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [path for path in names if path.is_file()]


def requirements(lock: Path) -> dict[str, list[str]]:
    """Maps each ``name==version`` of a lock to its hashes; a package with two versions has two entries."""
    text = lock.read_text()
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)
    return {block.split()[0]: re.findall(r"--hash=(\S+)", block) for block in blocks if "==" in block}


def test_there_are_locks_for_building_running_and_developing() -> None:
    assert {
        "requirements-build.lock",
        "requirements.lock",
        "requirements-dev.lock",
    } <= {lock.name for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_name_no_index(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert not re.search(r"^(-|--(?!hash))", text, re.MULTILINE), "an option such as --index-url"
    assert " @ " not in text, "a requirement by address"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_hashed(lock: Path) -> None:
    pinned = requirements(lock)
    assert pinned
    assert not [name for name, hashes in pinned.items() if not hashes]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", item) for hashes in pinned.values() for item in hashes)


def test_development_uses_the_runtime_versions() -> None:
    runtime, development = (
        requirements(ROOT / "requirements.lock"),
        requirements(ROOT / "requirements-dev.lock"),
    )
    assert runtime.keys() <= development.keys()


def test_the_locks_hold_every_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for lock, declared in {
        "requirements.lock": project["dependencies"],
        "requirements-dev.lock": project["optional-dependencies"]["dev"]
        + project["optional-dependencies"]["train"],
    }.items():
        locked = {entry.split("==")[0] for entry in requirements(ROOT / lock)}
        names = {re.split(r"[\[<>=!~; ]", item)[0].lower().replace("_", "-") for item in declared}
        assert names <= locked, f"run `make lock`: {lock} lacks {sorted(names - locked)}"


def test_the_runtime_brings_no_learning_framework() -> None:
    locked = {entry.split("==")[0] for entry in requirements(ROOT / "requirements.lock")}
    assert not {
        name for name in locked if name.startswith(("torch", "nvidia-", "triton", "pandas", "scikit-learn"))
    }


def test_no_backdoored_litellm() -> None:
    versions = [
        entry.split("==")[1]
        for entry in requirements(ROOT / "requirements.lock")
        if entry.startswith("litellm==")
    ]
    assert len(versions) == 1
    assert tuple(int(part) for part in versions[0].split(".")[:2]) >= (1, 84)


def test_no_machine_path_and_no_index_host() -> None:
    # Written in pieces, or this file would be the first finding.
    forbidden = re.compile(
        "|".join(
            [
                r"/ho" + r"me/[a-z]",
                r"/Us" + r"ers/[a-zA-Z]",
                r"(?<![\w.])/ro" + r"ot/",
                r"(?<![\w.])/wo" + r"rk/",
                r"py" + r"pi\.org",
                r"pythonhos" + r"ted\.org",
                r"registry\.npm" + r"js\.org",
                r"deb\.debi" + r"an\.org",
                r"--(?:extra-)?index-" + r"url[ =]\S",
            ]
        )
    )
    findings = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in repository_files()
        if path.suffix in TEXT and path.stat().st_size < 2_000_000
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (match := forbidden.search(line))
    ]
    assert not findings


# Modules that run only by hand, in the environment their docstring describes.
MAKERS = {"classifiers/make_encoders.py"}
# Parts that a declared distribution pins to exactly its own version.
PARTS = {"pydantic-core": "pydantic"}


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, those inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
    }
    return {name.split(".")[0] for name in plain | named}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(["router", "classifiers"], ["sentence-transformers", "train"]), (["migrations"], [])],
    ids=["packages", "migrations"],
)
def test_every_import_is_declared(folders: list[str], extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    items = project["dependencies"] + [
        item for extra in extras for item in project["optional-dependencies"][extra]
    ]
    declared = {re.split(r"[\[<>=!~; ]", item)[0].lower().replace("_", "-") for item in items}
    distributions = packages_distributions()
    undeclared = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if path.relative_to(ROOT).as_posix() in MAKERS:
            continue
        for name in imported(path) - sys.stdlib_module_names - {"router", "classifiers", "__future__"}:
            sources = {source.lower().replace("_", "-") for source in distributions.get(name, [name])}
            if not {PARTS.get(source, source) for source in sources} & declared:
                undeclared[name] = path.relative_to(ROOT).as_posix()
    assert not undeclared, "declare them in pyproject.toml and run `make lock`"
