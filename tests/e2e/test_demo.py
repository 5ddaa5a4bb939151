"""`farthing demo`, `simulate` and `init` as a newcomer runs them: real processes, a real client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from router.adapters.price_catalogue import shipped_policies

FARTHING = [sys.executable, "-m", "router.cli"]


def _environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("FARTHING_") and not k.endswith("_API_KEY")
    }
    # Temporary files of the demo come here, so that the test sees what is left of them.
    return {**kept, "TMPDIR": str(folder), "COLUMNS": "120", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **more}


@contextlib.contextmanager
def _started(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*FARTHING, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(environment),
        # A shell that runs the tests in the background has them ignore Ctrl-C, and what they start as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _line_with(process: subprocess.Popen[str], words: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        if words in line:
            return line
        said += line
    raise AssertionError(f"ended without saying {words!r}:\n{said}")


def _gets(url: str, seconds: float = 90) -> int:
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return int(answer.status)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_demo_once(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run = subprocess.run(
        [*FARTHING, "demo", "--once", "--requests", "40", "--port", "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=_environment(tmp_path),
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # Of the processor's: a machine that others use as well says nothing by its clock.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 40
    assert "40 of 40 requests answered" in run.stdout
    table: dict[str, list[str]] = {}
    for line in run.stdout.splitlines():
        row = re.split(r"\s{2,}", line.strip())
        table.setdefault(row[0], row[1:])
    assert table["class"] == ["small", "middle", "frontier", "cache", "requests", "cost USD", "saved"]
    # A hit has the class of the answer it repeats.
    by_class = [table[name] for name in ("simple", "medium", "complex")]
    for column in range(5):
        total = sum(int(row[column].replace("-", "0")) for row in by_class)
        assert total == int(table["all"][column].replace("-", "0"))
    assert table["all"][3:5] == ["10", "40"]
    assert {"search", "support", "engineering", "demo", "organisation"} <= set(table)
    _recomputed(run.stdout, 40)
    _reworded(run.stdout)
    assert "Traceback" not in run.stdout + run.stderr
    assert list(tmp_path.glob("farthing-*")) == []


def _recomputed(said: str, prompts: int) -> None:
    """The prompts, and 5 stored questions with what was asked later: once more where a look-up took too long."""
    found = re.search(r"(\d+) requests recomputed from tokens and prices: 0 differences; 0 unsettled\.", said)
    assert found is not None, said
    assert int(found[1]) - prompts in (10, 20, 30, 40)


def _reworded(said: str, first: str = "", last: str = "") -> None:
    """The demo's questions in other words were answered by the cache, and those that only look so were not."""
    assert "Team helpdesk, semantic: enforce, max_error: 2%" in said
    section = said.split("Asked before, in other words?")[1].split("Is the ledger right?")[0]
    shipped = (shipped_policies() / "demo" / "reworded.json").read_text()
    for example in json.loads(shipped):
        asked = f"  stored   {example['stored']}{first}\n  asked    {example['asked']}{last}\n"
        if example["same"]:
            outcome = r"  served   semantic cache hit: similarity 0\.\d\d, probability 0\.\d{3} "
            outcome += r"\(at least 0\.\d{3}\)\n +0 USD billed, 0\.0+[1-9]\d* USD avoided"
        else:
            outcome = r"  refused  (another|only one) .*\n +\w+ answered for 0\.0+[1-9]\d* USD"
        assert re.search(re.escape(asked) + outcome, section), section


def test_demo_with_valkey(tmp_path: Path) -> None:
    run = subprocess.run(
        [*FARTHING, "demo", "--once", "--requests", "24", "--port", "0", "--store", "valkey"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env=_environment(tmp_path),
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "24 of 24 requests answered" in run.stdout
    assert "a Valkey that both workers share" in run.stdout
    _reworded(run.stdout, " (worker 1)", " (worker 2)")
    _recomputed(run.stdout, 24)
    store = re.search(r"redis://127\.0\.0\.1:(\d+)/0", run.stdout)
    assert store is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(store[1])), 1)
    assert list(tmp_path.glob("farthing-*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    with _started(["demo", "--once", "--port", "0"], _environment(tmp_path)) as process:
        gateway = _line_with(process, "gateway  ").split()[-1].removesuffix("/v1")
        assert _gets(gateway + "/healthz") == 200
        _line_with(process, "sending")
        process.send_signal(number)
        process.wait(90)
        end = time.monotonic() + 90
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", int(gateway.rsplit(":", 1)[1])), 1).close()
            except OSError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the gateway outlived the demo")
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert list(tmp_path.glob("farthing-*")) == []


def test_a_local_endpoint_takes_the_place_of_the_small_model(tmp_path: Path) -> None:
    """A simulated endpoint stands in for the real one. The demo wants its port, too, and takes the next free one."""
    with _started(["simulate", "--port", "0", "tiny:typical=20"], _environment(tmp_path)) as engine:
        url = _line_with(engine, "Simulated models tiny at http").split()[-1]
        port = urlsplit(url).port
        run = subprocess.run(
            [
                *FARTHING,
                "demo",
                "--once",
                "--port",
                str(port),
                "--requests",
                "8",
                "--local-url",
                url,
                "--local-model",
                "tiny",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            env=_environment(tmp_path),
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert f"Port {port} is taken" in run.stdout
        assert "8 of 8 requests answered" in run.stdout
        assert f"small is tiny at {url}" in run.stdout
        booked = re.search(
            r"  (\d+) requests, (\d+) tokens read and (\d+) written: ([0-9.]+) USD", run.stdout
        )
        assert booked is not None
        # The assumed machine: 0.60 USD an hour, 200 tokens read or 40 written a second.
        hours = (int(booked[2]) / 200 + int(booked[3]) / 40) / 3600
        assert float(booked[4]) == pytest.approx(0.60 * hours, abs=0.00001)
        with urllib.request.urlopen(url.removesuffix("/v1") + "/log") as answer:
            assert len(answer.read().splitlines()) == int(booked[1]) > 0
        engine.send_signal(signal.SIGTERM)
        assert engine.wait(60) == 0


def test_init_then_serve(tmp_path: Path) -> None:
    environment = _environment(tmp_path, OPENAI_API_KEY="sk-x", FARTHING_DATA_DIR=str(tmp_path / "data"))
    config = tmp_path / "config"
    first = subprocess.run(
        [*FARTHING, "init", "--config", str(config)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "OPENAI_API_KEY" in first.stdout
    again = subprocess.run(
        [*FARTHING, "init", "--config", str(config)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert again.returncode == 2
    assert "--force" in again.stderr
    with _started(["serve", "--config", str(config), "--port", "0"], environment) as gateway:
        url = _line_with(gateway, "Farthing serves").split()[-1].removesuffix("/v1")
        assert _gets(url + "/readyz") == 200
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(60) == 0


def test_a_local_endpoint_that_is_away_fails_the_demo(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, and nobody listens
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        local = ["--local-url", url, "--local-model", "tiny"]
        run = subprocess.run(
            [*FARTHING, "demo", "--once", "--port", "0", "--requests", "6", *local],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            env=_environment(tmp_path),
            check=False,
        )
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"tiny answered nothing: does {url} work?" in run.stdout
    assert "after a call to the first failed" in run.stdout
