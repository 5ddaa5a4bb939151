"""Who is asking, and is there room: keys to callers, tags, and shedding load. Never asks SQL for a known key."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from decimal import Decimal
from hashlib import sha256

from msgspec import Struct

from router.core.errors import InvalidRequest, NotAuthenticated, Overloaded, UnavailableError
from router.core.ports import KeyDirectory
from router.core.types import NANO_PER_USD, TAG, Caller, NanoUSD

MAX_KEY_LENGTH = 512
MAX_CALLER_REQUEST_ID = 128
MAX_TAGS = 16
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
_PLAIN_DECIMAL = re.compile(r"[0-9]{1,16}(\.[0-9]{1,16})?")


class Wishes(Struct, frozen=True):
    """What a caller may tighten with headers, never loosen."""

    tags: Mapping[str, frozenset[str]]
    read_cache: bool
    write_cache: bool
    max_age: float | None
    min_quality: Decimal | None
    max_cost: NanoUSD | None
    caller_request_id: str | None


def key_hash(secret: bytes, key: str) -> str:
    """HMAC-SHA256 (RFC 2104), hex: what is stored of a key, and the only thing it is looked up by."""
    return hmac.new(secret, key.encode("utf-8", "replace"), sha256).hexdigest()


class Admission:
    """`open_team`: the team of callers with a key nobody knows, on loopback, in the demo only."""

    def __init__(
        self, keys: KeyDirectory, secret: bytes, *, max_in_flight: int = 2_000, open_team: str | None = None
    ) -> None:
        self._keys = keys
        self._secret = secret
        self._max_in_flight = max_in_flight
        self._open_team = open_team
        self.in_flight = 0
        self.draining = False

    def check_room(self) -> None:
        """Raises Overloaded when this worker holds as many requests as it can serve well."""
        if self.draining:
            raise Overloaded("The gateway is shutting down. Send the request again.", retry_after=1)
        if self.in_flight >= self._max_in_flight:
            raise Overloaded("The gateway is at its limit of requests in flight. Try again.", retry_after=1)

    def hashed(self, authorization: str | None) -> str | None:
        """The hash of the key in this header; None where it holds none."""
        key = _bearer(authorization)
        return key_hash(self._secret, key) if key is not None else None

    async def caller(self, hashed: str | None, loopback: bool) -> Caller:
        """`hashed`: see the method of this name. Raises NotAuthenticated where the key is missing, malformed, unknown
        or revoked.
        """
        if hashed is not None:
            try:
                found = self._keys.find(hashed) or await self._keys.find_new(hashed)
            except UnavailableError:
                raise Overloaded(
                    "The gateway cannot check this key right now: its database is away. Try again.",
                    retry_after=5,
                ) from None
            if found is not None:
                return found
        if self._open_team is not None and loopback:
            return Caller("demo", self._open_team)
        if hashed is None:
            raise NotAuthenticated("No API key. Send it as 'Authorization: Bearer KEY'.")
        raise NotAuthenticated(
            "This API key is not known here, or was revoked. Create one with 'farthing keys create', or adopt "
            "the one your app already uses with 'farthing keys adopt'."
        )


def _bearer(authorization: str | None) -> str | None:
    if not authorization:
        return None
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key or len(key) > MAX_KEY_LENGTH:
        return None
    return key


def read_wishes(headers: Mapping[str, str]) -> Wishes:
    """Raises InvalidRequest naming the header. Header names are lower case."""
    control = headers.get("cache-control", "").lower()
    directives = {part.strip() for part in control.split(",") if part.strip()}
    off = headers.get("x-farthing-cache", "").strip().lower()
    if off not in ("", "off"):
        raise InvalidRequest("'x-farthing-cache' takes only: off.", param="x-farthing-cache")
    no_store = off == "off" or "no-store" in directives
    max_age: float | None = None
    for directive in directives:
        if directive.startswith("max-age="):
            text = directive.removeprefix("max-age=")
            if not text.isdecimal() or len(text) > 9:
                raise InvalidRequest("'Cache-Control: max-age' takes whole seconds.", param="cache-control")
            # Given twice, the stricter one holds.
            max_age = float(text) if max_age is None else min(max_age, float(text))
    return Wishes(
        tags=_tags(headers.get("x-farthing-tags")),
        read_cache=not no_store and "no-cache" not in directives,
        write_cache=not no_store,
        max_age=max_age,
        min_quality=_share(headers.get("x-farthing-quality")),
        max_cost=_money(headers.get("x-farthing-max-cost")),
        caller_request_id=_request_id(headers.get("x-request-id")),
    )


def _tags(text: str | None) -> dict[str, frozenset[str]]:
    """`data=pii, project=x`: pairs split by commas; a key given twice adds values."""
    if not text:
        return {}
    tags: dict[str, set[str]] = {}
    pairs = [pair.strip() for pair in text.split(",") if pair.strip()]
    if len(pairs) > MAX_TAGS:
        raise InvalidRequest(f"'x-farthing-tags' holds more than {MAX_TAGS} tags.", param="x-farthing-tags")
    for pair in pairs:
        key, separator, value = pair.partition("=")
        key, value = key.strip(), value.strip()
        if not separator or not TAG.fullmatch(key) or not TAG.fullmatch(value):
            raise InvalidRequest(
                "'x-farthing-tags' takes pairs like data=pii, split by commas; names hold a-z, 0-9, '_', '.', '-'.",
                param="x-farthing-tags",
                code="invalid_tag",
            )
        tags.setdefault(key, set()).add(value)
    return {key: frozenset(values) for key, values in tags.items()}


def _share(text: str | None) -> Decimal | None:
    if text is None:
        return None
    value = _decimal(text)
    if value is None or not 0 <= value <= 1:
        raise InvalidRequest(
            "'x-farthing-quality' takes a plain number from 0 to 1, such as 0.9.", param="x-farthing-quality"
        )
    return value


def _money(text: str | None) -> NanoUSD | None:
    if text is None:
        return None
    value = _decimal(text)
    if value is None or not 0 <= value <= 1_000_000:
        raise InvalidRequest(
            "'x-farthing-max-cost' takes USD as a plain number, such as 0.02.", param="x-farthing-max-cost"
        )
    return NanoUSD(int(value * NANO_PER_USD))


def _decimal(text: str) -> Decimal | None:
    plain = text.strip()
    return Decimal(plain) if _PLAIN_DECIMAL.fullmatch(plain) else None


def _request_id(text: str | None) -> str | None:
    """A caller's own id is kept beside ours when it is short and printable, and left out otherwise."""
    if text is None or len(text) > MAX_CALLER_REQUEST_ID or not _PRINTABLE.fullmatch(text):
        return None
    return text


def merge_tags(
    base: Mapping[str, frozenset[str]], more: Mapping[str, frozenset[str]]
) -> Mapping[str, frozenset[str]]:
    """A caller adds tags and never removes one."""
    if not more:
        return base
    merged = dict(base)
    for key, values in more.items():
        merged[key] = merged.get(key, frozenset()) | values
    return merged
