"""`replace` for the values of the gateway, whichever way they are made."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import msgspec
from msgspec import structs

V = TypeVar("V")


def replace(value: V, /, **changes: Any) -> V:
    """`dataclasses.replace`, for a msgspec Struct as well."""
    if isinstance(value, msgspec.Struct):
        return structs.replace(value, **changes)
    return dataclasses.replace(value, **changes)  # type: ignore[type-var]
