"""Server-sent events as bytes: where a frame ends and what it carries, without changing a byte of it.

Protocol: WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6. A line ends with LF, CRLF or CR and a blank
line ends a frame.
"""

from __future__ import annotations

import re

MAX_FRAME = 16 * 1024 * 1024
"""Bytes. The largest frames seen in practice carry one base64 image."""

# A CR that ends a blank line after LF may be the first half of CRLF: the splitter waits for one more byte.
# After a bare CR it does not wait, a stream of bare CRs would lag one frame behind for ever.
_FRAME_END = re.compile(rb"\n\n|\r\r|\n\r\n?")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class FrameTooLarge(ValueError):
    """A frame passed the size limit before its blank line came."""


class FrameSplitter:
    """Cuts a byte stream into whole frames, each with its blank line; how it was chunked makes no difference.

    The frames of all calls and `rest()` put together are the input, byte for byte.
    """

    __slots__ = ("_limit", "_pending", "_searched")

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self._limit = limit
        self._pending = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes. Raises FrameTooLarge when one passes the limit."""
        if not self._pending and b"\r" not in data:
            # What nearly every provider sends: LF only, chunks of whole frames.
            end = data.find(b"\n\n") + 2
            if end == len(data) and 2 <= end <= self._limit:
                return [data]
            frames: list[bytes] = []
            start = 0
            while end != 1:
                self._check(end - start)
                frames.append(data[start:end])
                start = end
                end = data.find(b"\n\n", start) + 2
            if start < len(data):
                self._keep(data[start:])
            return frames
        self._pending += data
        return self._cut()

    def rest(self) -> bytes:
        """What has come since the last whole frame."""
        return bytes(self._pending)

    def _cut(self) -> list[bytes]:
        pending = self._pending
        frames: list[bytes] = []
        start, search = 0, self._searched
        while match := _FRAME_END.search(pending, search):
            end = match.end()
            if end == len(pending) and match.group() == b"\n\r":
                break
            self._check(end - start)
            frames.append(bytes(pending[start:end]))
            start = search = end
        self._check(len(pending) - start)
        del pending[:start]
        # An end that is only half here starts at most two bytes back.
        self._searched = max(0, len(pending) - 2)
        return frames

    def _keep(self, data: bytes) -> None:
        self._check(len(data))
        self._pending += data
        self._searched = max(0, len(data) - 2)

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise FrameTooLarge(f"an event is larger than {self._limit} bytes")


def data_of(frame: bytes) -> bytes | None:
    """The frame's `data` lines joined with LF; None where it has none (a comment, a lone `event:`)."""
    if frame.startswith(b"data:"):
        line = frame.rstrip(b"\r\n")
        if b"\n" not in line and b"\r" not in line:
            return line[6:] if line.startswith(b"data: ") else line[5:]
    values = _values(frame, b"data")
    return b"\n".join(values) if values else None


def event_of(frame: bytes) -> bytes | None:
    """The frame's event name; None where it has none. The last one wins, as in the standard."""
    values = _values(frame, b"event")
    return values[-1] if values else None


def is_comment(frame: bytes) -> bool:
    """Whether the frame holds comment lines and nothing else (servers keep connections open with them)."""
    lines = [line for line in frame.removeprefix(_BYTE_ORDER_MARK).splitlines() if line]
    return bool(lines) and all(line.startswith(b":") for line in lines)


def _values(frame: bytes, field: bytes) -> list[bytes]:
    values: list[bytes] = []
    for line in frame.removeprefix(_BYTE_ORDER_MARK).splitlines():
        name, _, value = line.partition(b":")
        if name == field:
            values.append(value.removeprefix(b" "))
    return values
