"""Every command and snippet of the README, run as a newcomer pastes it."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router.adapters.configuration import lint
from router.adapters.price_catalogue import shipped_catalogue
from tests.e2e.test_demo import _gets

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    section: str
    language: str
    text: str


def _blocks() -> list[Block]:
    blocks: list[Block] = []
    section = ""
    inside: list[str] | None = None
    language = ""
    for line in README.splitlines():
        if inside is None and line.startswith("## "):
            section = line[3:]
        elif inside is None and line.startswith("```"):
            inside, language = [], line[3:]
        elif inside is not None and line == "```":
            blocks.append(Block(section, language, "\n".join(inside)))
            inside = None
        elif inside is not None:
            inside.append(line)
    return blocks


BLOCKS = _blocks()


def _of(section: str, language: str) -> list[str]:
    return [block.text for block in BLOCKS if block.section == section and block.language == language]


def _environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("FARTHING_") and not k.endswith("_API_KEY") and k != "CI"
    }
    return {
        **kept,
        "FARTHING_DATA_DIR": str(folder / "data"),
        "TMPDIR": str(folder),
        "HOME": str(folder),
        **more,
    }


def _bash(text: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_every_block_is_run_by_a_test() -> None:
    run_here = {
        "Two commands",
        "Swap the base URL",
        "The first real run",
        "The two files",
        "Read the report",
        "Beyond one machine",
    }
    assert {block.section for block in BLOCKS} == run_here
    assert {block.language for block in BLOCKS} == {"sh", "python", "js", "yaml"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    commands = [line for text in _of("Two commands", "sh") for line in text.splitlines()]
    assert commands == ["make demo", "make test"]
    for command in commands:
        dry = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


@dataclass
class Demo:
    url: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`farthing demo` in a terminal, where it stays up."""
    folder = tmp_path_factory.mktemp("readme")
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "router.cli", "demo", "--port", "0", "--requests", "10"],
        stdin=side,
        stdout=side,
        stderr=side,
        env=_environment(folder, COLUMNS="120"),
        start_new_session=True,
    )
    os.close(side)
    said = ""
    try:
        end = time.monotonic() + 240
        while "Ctrl-C" not in said:
            assert time.monotonic() < end, said
            ready, _, _ = select.select([terminal], [], [], 1)
            if ready:
                said += os.read(terminal, 65536).decode("utf-8", "replace")
            assert process.poll() is None, said
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", said)
        assert found is not None, said
        yield Demo(f"http://127.0.0.1:{found.group(1)}/v1")
    finally:
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            ready, _, _ = select.select([terminal], [], [], 0.2)
            if ready:
                try:
                    os.read(terminal, 65536)
                except OSError:
                    break
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(terminal)


def _at(text: str, demo: Demo) -> str:
    return text.replace("http://127.0.0.1:8400/v1", demo.url)


def test_the_swap_in_python(demo: Demo, tmp_path: Path) -> None:
    (snippet,) = _of("Swap the base URL", "python")
    run = subprocess.run(
        [sys.executable, "-c", _at(snippet, demo)], capture_output=True, text=True, timeout=240, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_swap_in_the_shell(demo: Demo, tmp_path: Path) -> None:
    (snippet,) = _of("Swap the base URL", "sh")
    run = _bash(_at(snippet, demo), tmp_path, _environment(tmp_path))
    assert run.returncode == 0, run.stderr
    assert "HTTP/1.1 200" in run.stdout
    assert re.search(r"^x-farthing-model: (small|middle)\b", run.stdout, re.M), "by what it has measured"


def test_the_swap_in_javascript(demo: Demo, tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("node and npm are not installed: the JavaScript snippet is not run")
    install = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", "openai@6"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if install.returncode != 0:
        pytest.skip(f"npm could not install the openai package: {install.stderr[-200:]}")
    (snippet,) = _of("Swap the base URL", "js")
    (tmp_path / "swap.mjs").write_text(_at(snippet, demo), encoding="utf-8")
    run = subprocess.run([node, "swap.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


def test_the_first_real_run_the_report_and_the_doctor(tmp_path: Path) -> None:
    """In the README's order, in one folder, up to the report."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = _environment(tmp_path)
    first, serve, adopt = _of("The first real run", "sh")
    setup = "\n".join(line for line in first.splitlines() if not line.startswith("farthing"))

    run = _bash(first, tmp_path, environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "gateway" / "policy.yaml").is_file()

    keys, _, command = serve.rpartition("\n")
    run = _bash(f"{setup}\n{keys}", tmp_path, environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("fk-")

    assert command == "farthing serve --config gateway --port 8400"
    served = subprocess.Popen(
        ["bash", "-c", f"{setup}\nexec {command.replace('8400', '0')}"],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert served.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", served.stdout.readline())
        assert found is not None
        assert _gets(f"{found.group()}/readyz") == 200
        run = _bash(f"{setup}\n{adopt}", tmp_path, environment)
        assert run.returncode == 0, run.stderr
        assert "sk-the-key" not in run.stdout + run.stderr
        # Beside the running gateway, as a newcomer would.
        reports, explain = _of("Read the report", "sh")
        run = _bash(f"{setup}\n{reports}", tmp_path, environment)
        assert run.returncode == 0, run.stdout + run.stderr
        assert '"data_health"' in run.stdout
        run = _bash(f"{setup}\n{explain}", tmp_path, environment)
        assert run.returncode == 0, run.stderr
        (doctor,) = _of("Beyond one machine", "sh")
        run = _bash(f"{setup}\n{doctor}", tmp_path, environment)
        # Without a network the provider cannot be reached, which it has to say.
        assert run.returncode in (0, 1), run.stderr
        assert "database" in run.stdout.lower()
    finally:
        served.terminate()
        served.wait(timeout=60)


def test_the_two_files_load_as_printed(tmp_path: Path) -> None:
    providers, policy = _of("The two files", "yaml")
    (tmp_path / "providers.yaml").write_text(providers, encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(policy, encoding="utf-8")
    loaded = lint(tmp_path, shipped_catalogue(), datetime(2026, 11, 24, tzinfo=UTC))
    assert [str(error) for error in loaded.errors] == []
    assert [str(warning) for warning in loaded.warnings] == []
