"""The journal's files: frames, locks, rotation, damage and a full disk."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.adapters.journal import (
    ATTEMPT,
    OPEN,
    SETTLE,
    Frame,
    JournalFile,
    JournalReader,
    adopt,
    decode_attempt,
    decode_open,
    decode_settle,
    journal_folders,
    remove_folder,
    segment_numbers,
    segment_path,
)
from router.core.errors import UnavailableError
from tests.contracts.ledger_records import attempted, new_id, opened, settled


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[JournalFile]:
    journal = JournalFile(tmp_path)
    yield journal
    journal.close()


def read(journal: JournalFile) -> list[Frame]:
    return list(JournalReader(journal.folder).frames(journal.end))


def only_segment(journal: JournalFile) -> Path:
    [number] = segment_numbers(journal.folder)
    return segment_path(journal.folder, number)


@contextmanager
def full_disk(path: Path, spare: int) -> Iterator[None]:
    """The kernel refuses to let the file grow by more than `spare` bytes, in the middle of a write if need be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_records_come_back_as_they_went_in(journal: JournalFile) -> None:
    request_id = new_id()
    records = (opened(request_id), attempted(request_id), settled(request_id, failed_first=True))
    journal.open(records[0])
    journal.attempt(records[1])
    assert journal.in_flight == 1
    journal.settle(records[2])
    assert (journal.in_flight, journal.settled, journal.appended) == (0, 1, 3)
    frames = read(journal)
    assert [frame.kind for frame in frames] == [OPEN, ATTEMPT, SETTLE]
    assert {frame.request_id for frame in frames} == {request_id}
    found = (
        decode_open(frames[0].payload),
        decode_attempt(frames[1].payload),
        decode_settle(frames[2].payload),
    )
    assert found == records


def test_any_text_and_any_mapping_can_be_settled(journal: JournalFile) -> None:
    journal.settle(
        settled(new_id(), requested_model="\ud800 \0 ü", tags=MappingProxyType({"a": ("\udfff",)}))
    )
    [frame] = read(journal)
    record = decode_settle(frame.payload)
    assert record.requested_model == "? \0 ü"
    assert record.tags == {"a": ("?",)}


def test_the_reader_goes_on_where_it_stopped_and_over_segments(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path, segment_bytes=3000)
    reader = JournalReader(journal.folder)
    ids = [new_id() for _ in range(20)]
    seen: list[str] = []
    for request_id in ids:
        journal.settle(settled(request_id))
        seen.extend(frame.request_id for frame in reader.frames(journal.end))
    assert seen == ids
    assert reader.segment > 3
    assert [frame.request_id for frame in read(journal)] == ids
    reader.close()
    journal.close()


def test_a_record_larger_than_the_readers_buffer(journal: JournalFile) -> None:
    journal.settle(settled(new_id(), decision="x" * 600_000))
    journal.settle(settled(new_id()))
    assert len(read(journal)) == 2


def test_a_folder_is_adopted_only_when_its_owner_is_gone(tmp_path: Path) -> None:
    journal = JournalFile(tmp_path)
    assert adopt(journal.folder) is None
    journal.settle(settled(new_id()))
    journal.close()
    assert journal_folders(tmp_path) == [journal.folder], "it holds a record: closing does not remove it"
    lock = adopt(journal.folder)
    assert lock is not None
    assert adopt(journal.folder) is None, "nobody else at the same time"
    remove_folder(journal.folder)
    os.close(lock)
    assert adopt(journal.folder) is None
    assert journal_folders(tmp_path) == []


def test_a_lock_on_a_removed_file_is_no_adoption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalFile(tmp_path)
    journal.settle(settled(new_id()))
    journal.close()
    flock = fcntl.flock

    def removed_meanwhile(fd: int, operation: int) -> None:
        path = journal.folder / "lock"
        path.unlink()
        path.touch()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    assert adopt(journal.folder) is None


def test_records_survive_kill_9(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from router.adapters.journal import JournalFile\n"
        "from tests.contracts.ledger_records import opened\n"
        "journal = JournalFile(Path(sys.argv[1]))\n"
        "for number in range(100): journal.open(opened(f'request-{number}'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert process.returncode == -signal.SIGKILL
    [folder] = journal_folders(tmp_path)
    lock = adopt(folder)
    assert lock is not None
    os.close(lock)
    assert [frame.request_id for frame in JournalReader(folder).frames()] == [
        f"request-{n}" for n in range(100)
    ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_stops_a_reader(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    journal = JournalFile(tmp_path_factory.mktemp("journal"))
    for number in range(5):
        journal.open(opened(f"request-{number}"))
    path = only_segment(journal)
    content = bytearray(path.read_bytes())
    size = len(content)
    at = data.draw(st.integers(0, size - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    reader = JournalReader(journal.folder)
    found = [decode_open(frame.payload).id for frame in reader.frames()]
    whole_before = at // (size // 5)
    assert found[:whole_before] == [f"request-{number}" for number in range(whole_before)]
    assert len(found) < 5
    assert reader.skipped >= (1 if len(content) % (size // 5) else 0)
    reader.close()
    journal.close()


def test_one_damaged_frame_costs_only_itself(journal: JournalFile) -> None:
    for number in range(3):
        journal.open(opened(f"request-{number}"))
    path = only_segment(journal)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    reader = JournalReader(journal.folder)
    assert [frame.request_id for frame in reader.frames()] == ["request-0", "request-2"]
    assert reader.skipped == 1


@pytest.mark.parametrize("spare", [0, 1, 8, 100])
def test_a_full_disk_refuses_before_dispatch_and_damages_nothing(journal: JournalFile, spare: int) -> None:
    first, refused, later = new_id(), new_id(), new_id()
    journal.open(opened(first))
    with full_disk(only_segment(journal), spare):
        with pytest.raises(UnavailableError, match="journal cannot be written"):
            journal.open(opened(refused))
        with pytest.raises(UnavailableError):
            journal.attempt(attempted(first))
        journal.settle(settled(first))
        assert journal.waiting == 1
        journal.retry()
        assert journal.waiting == 1
    journal.open(opened(later))
    journal.retry()
    assert (journal.waiting, journal.in_flight, journal.settled) == (0, 1, 1)
    frames = [(frame.kind, frame.request_id) for frame in read(journal)]
    assert frames == [(OPEN, first), (OPEN, later), (SETTLE, first)]


def test_an_opening_goes_to_the_disk_with_its_first_attempt(journal: JournalFile) -> None:
    called, ended = new_id(), new_id()
    journal.open(opened(called), attempt_follows=True)
    journal.open(opened(ended), attempt_follows=True)
    assert (journal.in_flight, journal.appended, read(journal)) == (2, 0, [])
    with full_disk(only_segment(journal), 100), pytest.raises(UnavailableError):
        journal.attempt(attempted(called))
    assert read(journal) == []
    assert (journal.in_flight, journal.waiting, len(journal._held)) == (1, 0, 1), "nothing of it is kept"
    journal.open(opened(called), attempt_follows=True)
    journal.attempt(attempted(called))
    journal.attempt(attempted(called, 1))
    journal.settle(settled(ended))
    frames = [(frame.kind, frame.request_id) for frame in read(journal)]
    assert frames == [(OPEN, called), (ATTEMPT, called), (ATTEMPT, called), (SETTLE, ended)]
    assert (journal.in_flight, journal.appended) == (1, 4)


def test_a_torn_frame_that_cannot_be_cut_off_ends_its_segment(
    journal: JournalFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.open(opened("first"))

    def refuse(fd: int, length: int) -> None:
        raise OSError(5, "no")

    with full_disk(only_segment(journal), 50), monkeypatch.context() as patched:
        patched.setattr(os, "ftruncate", refuse)
        with pytest.raises(UnavailableError):
            journal.open(opened("torn"))
    journal.open(opened("later"))
    assert [frame.request_id for frame in read(journal)] == ["first", "later"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="journal cannot be written: Not a directory"):
        JournalFile(tmp_path / "file" / "journal")


def test_files_are_the_owners_alone(journal: JournalFile) -> None:
    journal.open(opened("first"))
    assert journal.folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in journal.folder.iterdir())
