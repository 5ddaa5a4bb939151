"""The two files on disk: read, compiled, and watched. A load that fails leaves the last good snapshot active."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from router.core.catalogue import Catalogue
from router.core.compile import CompiledSnapshot
from router.core.document import MAX_CHARACTERS, Problem
from router.core.errors import ConfigurationError
from router.core.lint import POLICY_FILE, PROVIDERS_FILE, Loaded
from router.core.lint import load as load_texts

POLL_SECONDS = 2.0
SETTLE_SECONDS = 0.1

_log = logging.getLogger(__name__)
_Stamp = tuple[tuple[int, int, int], ...]


_Contents = tuple[bytes, bytes]


def lint(directory: Path, catalogue: Catalogue, now: datetime | None = None) -> Loaded:
    """Both files of `directory` with every problem. Raises ConfigurationError where one cannot be read at all."""
    return _lint(_contents(directory), catalogue, now or datetime.now(UTC))


def load(directory: Path, catalogue: Catalogue, now: datetime | None = None) -> CompiledSnapshot:
    """The snapshot of both files. Raises ConfigurationError that lists every error as `policy.yaml:12:5 ...`."""
    return _accepted(lint(directory, catalogue, now))


def roll_back(directory: Path, providers: str, policy: str, catalogue: Catalogue) -> None:
    """Writes both files of an earlier version, each in one step, after they were checked.

    Raises ConfigurationError where they no longer load (a model that left the catalogue, an older format).
    """
    _accepted(_lint((providers.encode("utf-8"), policy.encode("utf-8")), catalogue, datetime.now(UTC)))
    for name, text in ((PROVIDERS_FILE, providers), (POLICY_FILE, policy)):
        fresh = directory / f".{name}.new"
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(directory / name)
        except OSError as error:
            raise ConfigurationError(f"{directory / name} cannot be written ({error.strerror})") from None


def _lint(contents: _Contents, catalogue: Catalogue, now: datetime) -> Loaded:
    providers, policy = contents
    return load_texts(_decoded(PROVIDERS_FILE, providers), _decoded(POLICY_FILE, policy), catalogue, now)


def _accepted(loaded: Loaded) -> CompiledSnapshot:
    if loaded.snapshot is None:
        raise ConfigurationError("\n".join(str(problem) for problem in loaded.errors))
    return loaded.snapshot


def _contents(directory: Path) -> _Contents:
    return _read(directory / PROVIDERS_FILE), _read(directory / POLICY_FILE)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(4 * MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path} does not exist; run `farthing init`, or name the folder of {PROVIDERS_FILE} and {POLICY_FILE} "
            "with --config or FARTHING_CONFIG"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if len(content) > 4 * MAX_CHARACTERS:
        raise ConfigurationError(f"{path.name}:1:1 error: the file is too large; split or shorten it")
    return content


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise ConfigurationError(f"{name}:{line}:{column} error: not UTF-8; save the file as UTF-8") from None


class ConfigurationWatch:
    """Keeps the snapshot of a folder current.

    `run` looks every two seconds whether a file changed (size, time, inode, then content); `reload` looks at once,
    for SIGHUP. A half-written file is a failed load like any other: the last good snapshot stays active, `last_error`
    says why, and the next change is tried again.
    """

    def __init__(
        self,
        directory: Path,
        catalogue: Catalogue,
        *,
        on_change: Callable[[CompiledSnapshot], None] | None = None,
        on_error: Callable[[str], None] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Loads once. Raises ConfigurationError: a gateway does not start with a configuration it cannot read."""
        self._directory = directory
        self._catalogue = catalogue
        self._now = now
        self._on_change: list[Callable[[CompiledSnapshot], None]] = [on_change] if on_change else []
        self._on_error: list[Callable[[str], None]] = [on_error] if on_error else []
        self._stamp = self._look()
        contents = _contents(directory)
        loaded = _lint(contents, catalogue, now())
        self._contents: _Contents | None = contents
        self.current: CompiledSnapshot = _accepted(loaded)
        self._taken: _Contents = contents
        self.warnings: Sequence[Problem] = loaded.warnings
        self.last_error: str | None = None
        self.loaded_at: datetime = now()

    @property
    def texts(self) -> tuple[str, str]:
        """providers.yaml and policy.yaml as the current snapshot was read from them."""
        providers, policy = self._taken
        return providers.decode("utf-8"), policy.decode("utf-8")

    def subscribe(self, on_change: Callable[[CompiledSnapshot], None]) -> None:
        """`on_change` is called with every new snapshot, after it has become current."""
        self._on_change.append(on_change)

    async def run(self) -> None:
        """Polls until cancelled. A file that is still being written is left until it stands still, as the first half
        of a policy can be a policy too.
        """
        while True:
            await asyncio.sleep(POLL_SECONDS)
            stamp = self._look()
            while stamp != self._stamp:
                await asyncio.sleep(SETTLE_SECONDS)
                before, stamp = stamp, self._look()
                if stamp == before:
                    self._poll_safely()
                    break

    def _poll_safely(self) -> None:
        try:
            self.poll()
        except Exception:
            # A subscriber's failure must not end the watch.
            _log.exception("a new configuration was not taken up everywhere")

    def poll(self) -> bool:
        """One look: True where a changed and good configuration became current."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        return self._try(stamp)

    def reload(self) -> bool:
        """Reads the files now, changed or not. True where a changed and good configuration became current."""
        return self._try(self._look())

    def _try(self, stamp: _Stamp) -> bool:
        # Taken before reading: a write that falls between the two is seen by the next look.
        self._stamp = stamp
        try:
            contents = _contents(self._directory)
        except ConfigurationError as error:
            self._contents = None
            return self._failed(error)
        if contents == self._contents:
            return False
        self._contents = contents
        try:
            loaded = _lint(contents, self._catalogue, self._now())
            snapshot = _accepted(loaded)
        except ConfigurationError as error:
            return self._failed(error)
        self.warnings, self.last_error, self.loaded_at = loaded.warnings, None, self._now()
        if snapshot.hash == self.current.hash:
            return False
        self.current, self._taken = snapshot, contents
        _log.info("configuration %s is active", snapshot.hash)
        for tell in self._on_change:
            tell(snapshot)
        return True

    def _failed(self, error: ConfigurationError) -> bool:
        self.last_error = str(error)
        _log.error("configuration not reloaded, the last good one stays active:\n%s", error)
        for report in self._on_error:
            report(self.last_error)
        return False

    def _look(self) -> _Stamp:
        found = []
        for name in (PROVIDERS_FILE, POLICY_FILE):
            try:
                status = (self._directory / name).stat()
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                found.append((0, 0, 0))
        return tuple(found)
