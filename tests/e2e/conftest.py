"""One simulated provider and one gateway per session; a test that needs its own starts it with `start_gateway`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.sql_databases import postgresql_server, postgresql_url  # noqa: F401
from tests.contracts.valkey_server import valkey_server  # noqa: F401
from tests.e2e.gateway import Gateway
from tests.e2e.patient import PATIENT
from tests.e2e.provider import Provider
from tests.e2e.setting import FAULTS, MODELS, policy, providers

StartGateway = Callable[..., Gateway]


@pytest.fixture(scope="session")
def running_provider() -> Iterator[Provider]:
    provider = Provider(*MODELS, *(f"bad-{fault.replace('_', '-')}:fault={fault}" for fault in FAULTS))
    yield provider
    provider.close()


@pytest.fixture
def provider(running_provider: Provider) -> Provider:
    """The log is empty; only this test talks to it."""
    running_provider.clear()
    return running_provider


@pytest.fixture(scope="session")
def shared_gateway(running_provider: Provider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with Gateway(folder, providers(running_provider.url), policy(), python=PATIENT) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway, provider: Provider) -> Gateway:
    """The session's gateway: leave its configuration alone."""
    return shared_gateway


@pytest.fixture
def start_gateway(tmp_path: Path, provider: Provider) -> Iterator[StartGateway]:
    """Starts gateways of this test's own: `start_gateway(policy=..., workers=...)`. `python=()`: as they ship."""
    started: list[Gateway] = []

    def start(**options: Any) -> Gateway:
        files = (
            options.pop("providers", None) or providers(provider.url),
            options.pop("policy", None) or policy(),
        )
        options.setdefault("python", PATIENT)
        gateway = Gateway(tmp_path / f"gateway-{len(started)}", *files, **options)
        started.append(gateway)
        gateway.start()
        return gateway

    yield start
    for gateway in started:
        gateway.close()


@pytest.fixture
def unique() -> Callable[[str], str]:
    """A prompt nobody sent before, so that no cache answers it."""
    return lambda text: f"{text} [{secrets.token_hex(6)}]"
