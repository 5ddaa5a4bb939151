"""Frames come out as they went in, whatever the chunking."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.sse import FrameSplitter, FrameTooLarge, data_of, event_of, is_comment

LINE_ENDS = ("\n", "\r\n", "\r")


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Streams of one line end each, and raw soups of line ends."""
    if draw(st.booleans()):
        soup = draw(st.lists(st.sampled_from(["\n", "\r", "data: x", "data:é", ":", "\n\n"]), max_size=25))
        return "".join(soup).encode()
    end = draw(st.sampled_from(LINE_ENDS))
    text = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)
    frames = draw(st.lists(st.lists(text.map(lambda t: f"data: {t}"), min_size=1, max_size=3), max_size=6))
    tail = draw(st.sampled_from(["", "data: half", "data: whole" + end]))
    return ("".join(end.join(frame) + end + end for frame in frames) + tail).encode()


@st.composite
def cut_streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    data = draw(streams())
    at = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return data, [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


def split(chunks: list[bytes]) -> tuple[list[bytes], bytes]:
    splitter = FrameSplitter()
    frames = [frame for chunk in chunks for frame in splitter.feed(chunk)]
    return frames, splitter.rest()


@given(cut_streams())
def test_chunking_makes_no_difference(case: tuple[bytes, list[bytes]]) -> None:
    data, chunks = case
    whole = split([data])
    assert split(chunks) == whole
    assert split([data[i : i + 1] for i in range(len(data))]) == whole


@given(streams())
def test_no_byte_is_lost_or_added(data: bytes) -> None:
    frames, rest = split([data])
    assert b"".join(frames) + rest == data


@pytest.mark.parametrize("end", LINE_ENDS)
def test_every_line_end(end: str) -> None:
    frames = [f"data: {n} ä😀{end}{end}".encode() for n in range(3)]
    data = b"".join(frames)
    assert split([data + b": trailing"]) == (frames, b": trailing")
    assert split([data[i : i + 1] for i in range(len(data))]) == (frames, b"")


def test_bare_cr_frames_are_not_held_back() -> None:
    assert FrameSplitter().feed(b"data: 1\r\r") == [b"data: 1\r\r"]


def test_a_chunk_of_one_whole_frame_is_not_copied() -> None:
    chunk = b"data: {}\n\n"
    assert FrameSplitter().feed(chunk)[0] is chunk


@pytest.mark.parametrize("chunks", [[b"data: " + b"x" * 95 + b"\n\n"], [b"data: ", b"x" * 95], [b"x" * 101]])
def test_a_frame_above_the_limit_is_refused(chunks: list[bytes]) -> None:
    splitter = FrameSplitter(limit=100)
    for chunk in chunks[:-1]:
        assert splitter.feed(chunk) == []
    with pytest.raises(FrameTooLarge, match="100 bytes"):
        splitter.feed(chunks[-1])


def test_the_limit_is_per_frame() -> None:
    frame = b"data: " + b"x" * 90 + b"\n\n"
    assert len(FrameSplitter(limit=100).feed(frame * 5)) == 5
    assert len(FrameSplitter(limit=100).feed(frame.replace(b"\n", b"\r\n") * 5)) == 5


@pytest.mark.parametrize(
    ("frame", "data"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data:  a\r\n\r\n", b" a"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b"data: a\ndata:b\n\n", b"a\nb"),
        (b"event: x\rdata: a\r\r", b"a"),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
        (b"\ndata: a\n\n", b"a"),
        (b": ping\n\n", None),
        (b"event: ping\n\n", None),
        (b"database: no\n\n", None),
        (b"", None),
    ],
)
def test_data_of(frame: bytes, data: bytes | None) -> None:
    assert data_of(frame) == data


def test_event_name_and_comments() -> None:
    assert event_of(b"event: error\ndata: {}\n\n") == b"error"
    assert event_of(b"event:a\nevent: b\n\n") == b"b"
    assert event_of(b"data: event: no\n\n") is None
    assert is_comment(b": ping\n\n")
    assert is_comment(b":\r\n:x\r\n\r\n")
    assert not is_comment(b": ping\ndata: 1\n\n")
    assert not is_comment(b"\n\n")
