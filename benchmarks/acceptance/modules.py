"""Which heavy modules a running gateway has imported, after it served requests of every kind.

The worker is started with a hook that writes `sys.modules` at its end. Bar: none of those listed, unless a provider
needs litellm. FastAPI comes with the first request to the admin plane, if there is one.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from benchmarks.acceptance.common import Verdict, folder, run
from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

HEAVY = ("litellm", "torch", "pandas", "sklearn", "transformers", "sentence_transformers", "openai", "httpx")
NEVER = ("litellm", "torch", "pandas", "sklearn")
HOOK = """\
import atexit, json, sys
def _write():
    with open({path!r}, "w") as file:
        json.dump(sorted(sys.modules), file)
atexit.register(_write)
from router.cli import main
sys.exit(main())
"""


def imported(where: Path, provider: Provider, *, admin: bool) -> set[str]:
    """Top-level modules of a gateway that served a named, a routed, a streamed and a cached request."""
    where.mkdir(parents=True, exist_ok=True)
    listing = where / "modules.json"
    gateway = Gateway(
        where,
        providers(provider.url),
        policy(),
        admin=admin,
        python=[sys.executable, "-c", HOOK.format(path=str(listing))],
    )
    with gateway:
        key = gateway.key("search")
        for fields in (
            {"model": "small"},
            {"model": "auto"},
            {"model": "auto", "stream": True},
            {"model": "small"},
        ):
            answer = gateway.chat(key, f"What is {fields}?", **fields)
            assert answer.status_code == 200, answer.text
        if admin:
            import httpx

            httpx.get(
                f"http://127.0.0.1:{gateway.admin_port}/admin/keys",
                headers={"authorization": "Bearer admin-key-for-tests"},
            ).raise_for_status()
        assert gateway.stop() == 0
    return {name.split(".")[0] for name in json.loads(listing.read_text())}


async def main() -> int:
    verdict = Verdict("modules")
    with folder() as where, contextlib.closing(Provider("small", "middle", "frontier", "slow")) as provider:
        plain = imported(where / "plain", provider, admin=False)
        for name in HEAVY:
            verdict.say(f"{name}: {'imported' if name in plain else 'not in sys.modules'}")
        verdict.say(
            f"fastapi without an admin plane: {'imported' if 'fastapi' in plain else 'not in sys.modules'}"
        )
        verdict.check(not plain & set(NEVER), f"none of {', '.join(NEVER)} in {len(plain)} top-level modules")
        verdict.check("fastapi" not in plain, "fastapi stays away from a gateway without an admin plane")
        administered = imported(where / "admin", provider, admin=True)
        verdict.check(not administered & set(NEVER), "none of them with an admin plane that was asked either")
        verdict.say(f"fastapi with one: {'imported' if 'fastapi' in administered else 'not in sys.modules'}")
    return verdict.finish()


if __name__ == "__main__":
    run(main)
