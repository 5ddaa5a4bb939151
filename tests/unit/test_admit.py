"""Keys to callers, headers to wishes, and shedding load."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.adapters.memory import MemoryKeyDirectory
from router.api.data_plane import _headers
from router.core.errors import InvalidRequest, NotAuthenticated, Overloaded, UnavailableError
from router.core.types import Caller
from router.stages.admit import MAX_TAGS, Admission, key_hash, merge_tags, read_wishes

SECRET = b"0123456789abcdef"
ANN = Caller("key-1", "search", "faq")


def admission(**options: object) -> Admission:
    directory = MemoryKeyDirectory({key_hash(SECRET, "known"): ANN}, {key_hash(SECRET, "new"): ANN})
    return Admission(directory, SECRET, **options)  # type: ignore[arg-type]


async def caller(admission: Admission, header: str | None, *, loopback: bool) -> Caller:
    return await admission.caller(admission.hashed(header), loopback)


@pytest.mark.parametrize("header", ["Bearer known", "bearer known", "BEARER   known  ", "Bearer new"])
async def test_a_known_key_names_its_caller(header: str) -> None:
    assert await caller(admission(), header, loopback=False) is ANN


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "known",
        "Basic known",
        "Bearer",
        "Bearer ",
        "Bearer other",
        "Bearer " + "x" * 513,
        "Bearerknown",
    ],
)
async def test_everything_else_is_refused(header: str | None) -> None:
    with pytest.raises(NotAuthenticated) as caught:
        await caller(admission(), header, loopback=True)
    assert caught.value.status == 401
    assert "other" not in caught.value.message
    assert "farthing keys" in caught.value.message or "Bearer KEY" in caught.value.message


async def test_the_open_team_is_for_loopback_alone() -> None:
    demo = admission(open_team="demo")
    assert (await caller(demo, "Bearer anything", loopback=True)).team == "demo"
    assert (await caller(demo, None, loopback=True)).team == "demo"
    assert (await caller(demo, "Bearer known", loopback=True)).team == "search"
    with pytest.raises(NotAuthenticated):
        await caller(demo, "Bearer anything", loopback=False)


async def test_keys_that_cannot_be_checked_are_a_503() -> None:
    class Away(MemoryKeyDirectory):
        async def find_new(self, key_hash: str) -> Caller | None:
            raise UnavailableError("away")

    with pytest.raises(Overloaded):
        await caller(Admission(Away(), SECRET), "Bearer known", loopback=True)


def test_load_is_shed() -> None:
    busy = admission(max_in_flight=2)
    busy.in_flight = 1
    busy.check_room()
    busy.in_flight = 2
    with pytest.raises(Overloaded) as caught:
        busy.check_room()
    assert caught.value.retry
    assert caught.value.retry_after == 1
    busy.in_flight = 0
    busy.draining = True
    with pytest.raises(Overloaded):
        busy.check_room()


def test_the_hash_is_keyed() -> None:
    assert key_hash(SECRET, "known") != key_hash(b"another secret!!", "known")
    assert len(key_hash(SECRET, "\ud800")) == 64


@pytest.mark.parametrize(
    ("headers", "read", "write"),
    [
        ({}, True, True),
        ({"cache-control": "no-cache"}, False, True),
        ({"cache-control": "no-store"}, False, False),
        ({"cache-control": "No-Cache, max-age=0"}, False, True),
        ({"cache-control": "private, no-transform"}, True, True),
        ({"x-farthing-cache": "off"}, False, False),
        ({"x-farthing-cache": " OFF "}, False, False),
    ],
)
def test_cache_wishes(headers: Mapping[str, str], read: bool, write: bool) -> None:
    wishes = read_wishes(headers)
    assert (wishes.read_cache, wishes.write_cache) == (read, write)


def test_max_age() -> None:
    assert read_wishes({"cache-control": "max-age=60"}).max_age == 60
    for text in ("max-age=60, max-age=0", "max-age=0,max-age=60", "max-age=0, max-age=7, max-age=60"):
        assert read_wishes({"cache-control": text}).max_age == 0


def test_a_wish_in_a_second_header_counts() -> None:
    sent = [(b"cache-control", b"no-store"), (b"cache-control", b"max-age=60"), (b"x-request-id", b"one")]
    headers = _headers({"headers": [*sent, (b"x-request-id", b"two")]})
    wishes = read_wishes(headers)
    assert (wishes.read_cache, wishes.write_cache, wishes.max_age) == (False, False, 60)
    assert wishes.caller_request_id == "two"


def test_wishes_are_read() -> None:
    wishes = read_wishes(
        {
            "x-farthing-tags": "data=pii, data=eu ,project=x",
            "x-farthing-quality": "0.95",
            "x-farthing-max-cost": "0.02",
            "x-request-id": "abc-1",
        }
    )
    assert wishes.tags == {"data": {"pii", "eu"}, "project": {"x"}}
    assert wishes.min_quality == Decimal("0.95")
    assert wishes.max_cost == 20_000_000
    assert wishes.caller_request_id == "abc-1"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-farthing-cache", "on"),
        ("cache-control", "max-age=soon"),
        ("cache-control", "max-age=-1"),
        ("cache-control", "max-age=1234567890"),
        ("x-farthing-tags", "pii"),
        ("x-farthing-tags", "data="),
        ("x-farthing-tags", "=pii"),
        ("x-farthing-tags", "Data=pii"),
        ("x-farthing-tags", "data=a b"),
        ("x-farthing-tags", "data=" + "x" * 65),
        ("x-farthing-tags", ",".join(f"k{n}=v" for n in range(MAX_TAGS + 1))),
        ("x-farthing-quality", "high"),
        ("x-farthing-quality", "1.1"),
        ("x-farthing-quality", "-0.1"),
        ("x-farthing-quality", "NaN"),
        ("x-farthing-max-cost", "free"),
        ("x-farthing-max-cost", "-1"),
        ("x-farthing-max-cost", "Infinity"),
        ("x-farthing-max-cost", "1e99"),
        ("x-farthing-max-cost", "1_0"),
        ("x-farthing-max-cost", "1e-3"),
        ("x-farthing-max-cost", "\uff11"),
        ("x-farthing-max-cost", "+1"),
        ("x-farthing-max-cost", "0" * 31 + "100"),
        ("x-farthing-max-cost", ""),
        ("x-farthing-quality", "0_1"),
        ("x-farthing-quality", "1e-1"),
    ],
)
def test_a_bad_header_is_named(header: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_wishes({header: value})
    assert caught.value.param == header
    assert header.removesuffix("-control") in caught.value.message.lower()


@pytest.mark.parametrize("value", ["x" * 129, "a b", "a\nb", "\u00e9", ""])
def test_a_callers_odd_id_is_left_out(value: str) -> None:
    assert read_wishes({"x-request-id": value}).caller_request_id is None


_names = st.sampled_from(("data", "project", "env"))
_tags = st.dictionaries(_names, st.frozensets(st.sampled_from("abc"), min_size=1))


@given(_tags, _tags)
def test_a_caller_adds_tags_and_removes_none(
    base: dict[str, frozenset[str]], more: dict[str, frozenset[str]]
) -> None:
    merged = merge_tags(base, more)
    for name in {*base, *more}:
        assert merged[name] == base.get(name, frozenset()) | more.get(name, frozenset())
    assert set(merged) == {*base, *more}
