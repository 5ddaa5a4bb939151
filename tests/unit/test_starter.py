"""`farthing init`: what it finds, what it writes, and that a gateway would take it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from router import starter
from router.adapters.configuration import lint
from router.adapters.price_catalogue import shipped_catalogue
from router.core.errors import ConfigurationError
from router.starter import _HOSTED, ENGINES, Engine, write_starter

OLLAMA, VLLM, LLAMA_CPP = ENGINES
TAGS = {
    "models": [
        {"name": "llama3.2:3b", "details": {"parameter_size": "3.2B"}},
        {"name": "mystery:latest", "details": {"parameter_size": "8.0B"}},
        {"name": "nomic-embed-text:latest", "details": {"parameter_size": "137M"}},
        {"name": "no name\nfor a file"},
    ]
}


class _Answers(BaseHTTPRequestHandler):
    pages: dict[str, bytes]

    def do_GET(self) -> None:
        body = self.server.pages.get(self.path)  # type: ignore[attr-defined]
        self.send_response(200 if body is not None else 404)
        self.end_headers()
        self.wfile.write(body or b"not here")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def engine_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setattr(starter, "LOOK_SECONDS", 60.0)  # a busy machine may let it run late
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.pages = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def _serving(server: ThreadingHTTPServer, engine: Engine, answer: object) -> Engine:
    server.pages[engine.path] = json.dumps(answer).encode()  # type: ignore[attr-defined]
    return replace(engine, port=server.server_address[1])


def _init(
    directory: Path, keys: list[str], engines: list[Engine] | None = None, force: bool = False
) -> tuple[int, str]:
    said: list[str] = []
    status = write_starter(directory, force, engines=engines or [], keys=keys, say=said.append)
    return status, "\n".join(said)


@pytest.mark.parametrize("keys", [[key] for key in _HOSTED] + [list(_HOSTED)])
def test_written_files_are_without_problem(tmp_path: Path, keys: list[str]) -> None:
    status, said = _init(tmp_path, keys)
    assert status == 0
    loaded = lint(tmp_path, shipped_catalogue())
    assert list(map(str, loaded.problems)) == []
    snapshot = loaded.snapshot
    assert snapshot is not None
    now = datetime.now(UTC)
    for name, model in snapshot.models.items():
        assert snapshot.price(name, now) is not None, name
        assert model.quality is not None, name
    assert snapshot.unknown_model == "auto"
    assert set(snapshot.required_key_variables) == set(keys)
    for name, target in snapshot.aliases.items():
        listed, served = snapshot.catalogue_price(name, now), snapshot.price(target, now)
        assert listed is not None
        assert served is not None
        assert served.unit_prices["input"] * 3 + served.unit_prices["output"] <= (
            listed.unit_prices["input"] * 3 + listed.unit_prices["output"]
        )
    for key in keys:
        assert f"{key:<24}set" in said
    for name in ("policy.schema.json", "providers.schema.json"):
        assert json.loads((tmp_path / name).read_text())["$schema"]
    assert "$schema=./policy.schema.json" in (tmp_path / "policy.yaml").read_text().splitlines()[0]


def test_a_key_is_never_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in _HOSTED:
        monkeypatch.setenv(key, "sk-very-secret-" + key)
    assert write_starter(tmp_path, force=False, engines=[]) == 0
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "very-secret" not in written + capsys.readouterr().out


def test_a_local_engine_is_enough(tmp_path: Path, engine_server: ThreadingHTTPServer) -> None:
    engine = _serving(engine_server, OLLAMA, TAGS)
    status, said = _init(tmp_path, [], [engine])
    assert status == 0
    assert "running with llama3.2:3b, mystery:latest" in said
    assert "left out: nomic-embed-text:latest, no namefor a file" in said
    loaded = lint(tmp_path, shipped_catalogue())
    assert list(map(str, loaded.problems)) == []
    assert loaded.snapshot is not None
    models = loaded.snapshot.models
    assert set(models) == {"llama3.2:3b", "mystery"}
    assert models["mystery"].upstream_name == "mystery:latest"
    assert models["mystery"].quality is not None
    assert str(models["mystery"].quality["simple"]) == "0.92"
    assert loaded.snapshot.providers["ollama"].base_url == f"http://127.0.0.1:{engine.port}/v1"
    # Where no model reaches what is usually asked for, the best one there is answers.
    assert (
        str(loaded.snapshot.resolve("team", None, {}, datetime.now(UTC)).classes["medium"].min_quality)
        == "0.70"
    )


def test_context_and_names_of_an_openai_wire_engine(
    tmp_path: Path, engine_server: ThreadingHTTPServer
) -> None:
    listed = {"data": [{"id": "Qwen/Qwen3-8B", "max_model_len": 40960}, {"id": "/models/x.gguf"}]}
    status, _ = _init(tmp_path, ["OPENAI_API_KEY"], [_serving(engine_server, VLLM, listed)])
    assert status == 0
    loaded = lint(tmp_path, shipped_catalogue())
    assert list(map(str, loaded.problems)) == []
    assert loaded.snapshot is not None
    assert loaded.snapshot.models["Qwen/Qwen3-8B"].context == 40960
    assert "gpt-4o" in loaded.snapshot.models
    assert len(loaded.snapshot.models) == 6


def test_two_engines_with_one_name(tmp_path: Path, engine_server: ThreadingHTTPServer) -> None:
    listed = {"data": [{"id": "qwen3-8b"}]}
    engines = [_serving(engine_server, VLLM, listed), _serving(engine_server, LLAMA_CPP, listed)]
    assert _init(tmp_path, [], engines)[0] == 0
    snapshot = lint(tmp_path, shipped_catalogue()).snapshot
    assert snapshot is not None
    assert {name: model.provider for name, model in snapshot.models.items()} == {
        "qwen3-8b": "vllm",
        "llama-cpp/qwen3-8b": "llama-cpp",
    }


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"data": 3}', b'{"data": [1, {"id": 2}]}'])
def test_something_else_on_the_port_is_no_engine(
    tmp_path: Path, engine_server: ThreadingHTTPServer, answer: bytes
) -> None:
    engine = _serving(engine_server, LLAMA_CPP, None)
    engine_server.pages[engine.path] = answer  # type: ignore[attr-defined]
    status, said = _init(tmp_path, [], [engine])
    assert status == 1
    assert "not running" in said


def test_nothing_found_says_what_to_do_and_writes_nothing(tmp_path: Path) -> None:
    status, said = _init(tmp_path / "new", [], [])
    assert status == 1
    assert "export OPENAI_API_KEY=" in said
    assert not (tmp_path / "new").exists()


def test_existing_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("mine")
    with pytest.raises(ConfigurationError, match="--force"):
        _init(tmp_path, ["OPENAI_API_KEY"])
    assert (tmp_path / "policy.yaml").read_text() == "mine"
    assert not (tmp_path / "providers.yaml").exists()
    assert _init(tmp_path, ["OPENAI_API_KEY"], force=True)[0] == 0
    assert "unknown_model: auto" in (tmp_path / "policy.yaml").read_text()
