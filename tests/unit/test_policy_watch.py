"""Reading the files from disk, and keeping them current."""

from __future__ import annotations

import asyncio
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router.adapters import configuration
from router.adapters.configuration import ConfigurationWatch, lint, load
from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.core.compile import CompiledSnapshot
from router.core.errors import ConfigurationError
from router.core.ports import Snapshot

CATALOGUE = shipped_catalogue()
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("providers.yaml", "policy.yaml"):
        shutil.copy(shipped_policies() / name, tmp_path / name)
    return tmp_path


def edit(directory: Path, old: str, new: str, name: str = "policy.yaml") -> None:
    path = directory / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_folder_loads_to_a_snapshot(directory: Path) -> None:
    found: Snapshot = load(directory, CATALOGUE, NOW)
    assert list(found.models) == ["small-local", "mini", "gpt-4o", "frontier"]


def test_problems_are_listed_with_their_place(directory: Path) -> None:
    edit(directory, "month: 3000", "month: $3000")
    edit(directory, "wire: openai", "wire: opneai", "providers.yaml")
    with pytest.raises(ConfigurationError) as caught:
        load(directory, CATALOGUE, NOW)
    first, second = str(caught.value).splitlines()
    assert first.startswith("providers.yaml:7:11 error: providers.openai.wire: 'opneai'")
    assert second.startswith("policy.yaml:27:22 error: teams.search.budget.month: '$3000'")
    assert second.endswith("write 3000")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="farthing init"):
        load(tmp_path, CATALOGUE, NOW)


def test_a_file_that_is_not_text_is_refused_with_its_place(directory: Path) -> None:
    (directory / "policy.yaml").write_bytes(b"apiVersion: farthing/v1\n# \xff\n")
    with pytest.raises(ConfigurationError, match=r"policy.yaml:2:3 error: not UTF-8"):
        lint(directory, CATALOGUE, NOW)


def test_a_huge_file_is_not_read_to_its_end(directory: Path) -> None:
    with (directory / "policy.yaml").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ConfigurationError, match="too large"):
        load(directory, CATALOGUE, NOW)


def test_a_good_change_becomes_current_and_is_told(directory: Path) -> None:
    told: list[CompiledSnapshot] = []
    watch = ConfigurationWatch(directory, CATALOGUE, on_change=told.append)
    first = watch.current
    assert not watch.poll()
    edit(directory, "substitute: false", "substitute: true")
    assert watch.poll()
    assert watch.current is not first
    assert told == [watch.current]
    assert watch.current.resolve("search", None, {}, NOW).substitute
    # A request that began under the first snapshot still finds it as it was.
    assert not first.resolve("search", None, {}, NOW).substitute


def test_a_broken_change_keeps_the_last_good_one_until_it_is_mended(directory: Path) -> None:
    errors: list[str] = []
    watch = ConfigurationWatch(directory, CATALOGUE, on_error=errors.append)
    first = watch.current
    edit(directory, "substitute: false", "substitute: maybe")
    assert not watch.poll()
    assert watch.current is first
    assert watch.last_error is not None
    assert "defaults.substitute" in watch.last_error
    assert errors == [watch.last_error]
    assert not watch.poll()
    assert len(errors) == 1
    edit(directory, "substitute: maybe", "substitute: false")
    assert not watch.poll()
    assert watch.last_error is None
    assert watch.current is first


def test_every_half_written_file_keeps_the_last_good_one(directory: Path) -> None:
    watch = ConfigurationWatch(directory, CATALOGUE)
    path = directory / "policy.yaml"
    whole = path.read_bytes().replace(b"month: 3000", b"month: 3200")
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        watch.reload()
        assert watch.current.models
        assert watch.current.resolve("search", None, {}, NOW).allow
    path.write_bytes(whole)
    watch.reload()
    assert watch.last_error is None
    assert watch.current.resolve("search", None, {}, NOW).budgets[1].limit == 3200 * 10**9


def test_a_file_that_goes_away_keeps_the_last_good_one(directory: Path) -> None:
    watch = ConfigurationWatch(directory, CATALOGUE)
    text = (directory / "policy.yaml").read_bytes()
    (directory / "policy.yaml").unlink()
    assert not watch.poll()
    assert watch.last_error is not None
    assert "does not exist" in watch.last_error
    (directory / "policy.yaml").write_bytes(text)
    watch.poll()
    assert watch.last_error is None


def test_a_file_replaced_by_rename_is_seen(directory: Path) -> None:
    watch = ConfigurationWatch(directory, CATALOGUE)
    status = (directory / "policy.yaml").stat()
    text = (directory / "policy.yaml").read_text(encoding="utf-8").replace("month: 3000", "month: 3001")
    new = directory / "policy.yaml.new"
    new.write_text(text, encoding="utf-8")
    # The same size and time: only the inode tells.
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(new, directory / "policy.yaml")
    assert watch.poll()


def test_reload_looks_at_once_and_touching_alone_changes_nothing(directory: Path) -> None:
    watch = ConfigurationWatch(directory, CATALOGUE)
    first = watch.current
    (directory / "policy.yaml").touch()
    assert not watch.reload()
    edit(directory, "# What FinOps owns", "# What they own")
    assert not watch.reload()
    assert watch.current is first
    edit(directory, "substitute: false", "substitute: true")
    assert watch.reload()


def test_a_gateway_does_not_start_with_a_broken_file(directory: Path) -> None:
    edit(directory, "substitute: false", "substitute: maybe")
    with pytest.raises(ConfigurationError):
        ConfigurationWatch(directory, CATALOGUE)


async def test_a_file_is_not_loaded_while_it_is_being_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "POLL_SECONDS", 0.01)
    watch = ConfigurationWatch(directory, CATALOGUE)
    seen: list[tuple[str, ...]] = []
    whole = asyncio.Event()

    def told(snapshot: CompiledSnapshot) -> None:
        seen.append(tuple(rule.name for rule in snapshot.policy.rules))
        whole.set()

    watch.subscribe(told)
    task = asyncio.create_task(watch.run())
    path = directory / "policy.yaml"
    text = path.read_text(encoding="utf-8").replace("substitute: false", "substitute: true")
    # Everything before the rules is a valid policy, and a more permissive one.
    head, rest = text.split("\nrules:", 1)
    with path.open("w", encoding="utf-8") as file:
        file.write(head + "\n")
        for line in ("rules:" + rest).splitlines(keepends=True):
            file.flush()
            await asyncio.sleep(0.02)
            file.write(line)
    await asyncio.wait_for(whole.wait(), 5)
    task.cancel()
    assert seen == [("pii stays local", "nights and weekends may be slower")]


async def test_a_failing_subscriber_does_not_end_the_watch(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(configuration, "SETTLE_SECONDS", 0.01)
    watch = ConfigurationWatch(directory, CATALOGUE)
    calls: asyncio.Queue[CompiledSnapshot] = asyncio.Queue()

    def failing(snapshot: CompiledSnapshot) -> None:
        calls.put_nowait(snapshot)
        raise RuntimeError("no room")

    watch.subscribe(failing)
    task = asyncio.create_task(watch.run())
    edit(directory, "substitute: false", "substitute: true")
    await asyncio.wait_for(calls.get(), 5)
    edit(directory, "substitute: true", "substitute: false")
    await asyncio.wait_for(calls.get(), 5)
    assert not task.done()
    task.cancel()


async def test_run_polls_until_it_is_cancelled(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.POLL_SECONDS == 2.0
    monkeypatch.setattr(configuration, "POLL_SECONDS", 0.01)
    changed = asyncio.Event()
    watch = ConfigurationWatch(directory, CATALOGUE)
    watch.subscribe(lambda _: changed.set())
    task = asyncio.create_task(watch.run())
    edit(directory, "substitute: false", "substitute: true")
    await asyncio.wait_for(changed.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
