"""Unmodified scripts, with the key they always used, work after their base URL alone was changed.

Each script is written once, for a provider: it reads OPENAI_BASE_URL and OPENAI_API_KEY as the clients do. It runs
against the gateway with `model="gpt-4o"` (a named model) and, where the policy makes `gpt-4o` unknown, under `auto`
on each class; and once against the provider directly, which says what the provider must see. Bar: no parameter
lost, no value changed but the model's name. `--venvs DIR`: where newest openai and LangChain are (made if missing).
"""

# ruff: noqa: E501, S603

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.acceptance.common import Verdict, folder, run
from tests.e2e.gateway import Gateway
from tests.e2e.provider import Provider
from tests.e2e.setting import policy, providers

OPENAI_SCRIPT = """
import json, os, sys
from openai import OpenAI

client = OpenAI()
prompt, stream = sys.argv[1], sys.argv[2] == "stream"
answer = client.chat.completions.create(
    model=os.environ.get("APP_MODEL", "gpt-4o"),
    messages=[{"role": "system", "content": "You are brief."}, {"role": "user", "content": prompt}],
    temperature=0.2,
    max_tokens=32,
    top_p=0.9,
    presence_penalty=0.1,
    seed=7,
    stop=["\\n\\n"],
    user="user-1",
    logit_bias={"50256": -100},
    stream=stream,
    extra_body={"brand_new_parameter": {"kept": [1, 2.5, None]}},
)
if stream:
    text = "".join(c.choices[0].delta.content or "" for c in answer if c.choices)
else:
    text = answer.choices[0].message.content
print(json.dumps({"text": text}))
"""
LANGCHAIN_SCRIPT = """
import json, os, sys
from langchain_openai import ChatOpenAI

prompt, stream = sys.argv[1], sys.argv[2] == "stream"
model = ChatOpenAI(
    model=os.environ.get("APP_MODEL", "gpt-4o"), temperature=0.2, max_tokens=32, top_p=0.9, seed=7, max_retries=0
)
messages = [("system", "You are brief."), ("user", prompt)]
text = "".join(p.content for p in model.stream(messages)) if stream else model.invoke(messages).content
print(json.dumps({"text": text}))
"""
CURL_SCRIPT = """
curl -sS -N "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" \
  -H 'Content-Type: application/json' \
  -d '{"model":"'"${APP_MODEL:-gpt-4o}"'","messages":[{"role":"user","content":"'"$1"'"}],"temperature":0.2,"max_tokens":32,"stream":'"$2"'}'
"""
CLASSES = {
    "simple": (
        "What is the capital of France?",
        "Is 17 a prime number?",
        "Translate 'good morning' to Spanish.",
    ),
    "medium": (
        "Write a product description of a waterproof hiking boot for a web shop, friendly, in about 80 words.",
        "Summarise the main arguments for and against remote work in five bullet points.",
    ),
    "complex": (
        "Prove that there are infinitely many primes congruent to 3 modulo 4, and discuss where the argument fails for 1 modulo 4.",
        "Design a sharded multi-region database with failure analysis of every component, consistency proofs and trade-offs.",
    ),
}


def interpreter(verdict: Verdict, venvs: Path, name: str, package: str) -> str | None:
    python = venvs / name / "bin" / "python"
    if not python.exists():
        verdict.say(f"installing {package} into {venvs / name}")
        made = subprocess.run([sys.executable, "-m", "venv", str(venvs / name)]).returncode == 0
        if not made or subprocess.run([str(python), "-m", "pip", "install", "-q", package]).returncode:
            return None
    return str(python)


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def sent(raw: str) -> dict[str, Any]:
    """What the provider saw, without what may differ: the model's name and the gateway asking for usage."""
    body = json.loads(raw)
    body.pop("model")
    body.pop("stream_options", None)
    return dict(body)


async def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--venvs", type=Path, default=Path(tempfile.gettempdir()) / "farthing-clients")
    options = parser.parse_args()
    verdict = Verdict("clients")
    options.venvs.mkdir(parents=True, exist_ok=True)
    newest = interpreter(verdict, options.venvs, "openai3", "openai>=3")
    langchain = interpreter(verdict, options.venvs, "langchain", "langchain-openai")
    clients: list[tuple[str, list[str]]] = [
        (f"openai {version(sys.executable, 'openai')}", [sys.executable, "-c", OPENAI_SCRIPT]),
        ("curl", ["bash", "-c", CURL_SCRIPT, "curl"]),
    ]
    if newest:
        clients.insert(0, (f"openai {version(newest, 'openai')}", [newest, "-c", OPENAI_SCRIPT]))
    if langchain:
        name = f"langchain-openai {version(langchain, 'langchain-openai')}"
        clients.append((name, [langchain, "-c", LANGCHAIN_SCRIPT]))
    verdict.check(bool(newest and langchain), "newest openai and LangChain are installed")

    app_key = f"sk-proj-{secrets.token_hex(24)}"
    # Direct calls need the provider to know the name the app sends.
    models = ("small", "middle", "frontier", "slow", "gpt-4o", "auto")
    with (
        folder() as where,
        contextlib.closing(Provider(*models)) as provider,
        Gateway(where, providers(provider.url), policy()) as gateway,
    ):
        adopted = gateway.cli("keys", "adopt", "--team", "search", stdin=f"{app_key}\n")
        verdict.check(adopted.returncode == 0, f"keys adopt: {adopted.stdout.strip()}")

        def one(
            command: list[str], base: str, prompt: str, stream: bool, model: str | None
        ) -> tuple[str, str, str]:
            """(output, the body the provider saw, the request's id there)."""
            how = (
                ("true" if stream else "false") if command[0] == "bash" else ("stream" if stream else "whole")
            )
            environment = {
                "PATH": os.environ["PATH"],
                "HOME": str(where),
                "OPENAI_BASE_URL": base,
                "OPENAI_API_KEY": app_key,
                **({"APP_MODEL": model} if model else {}),
            }
            provider.clear()
            ended = subprocess.run(
                [*command, prompt, how], env=environment, capture_output=True, text=True, timeout=60
            )
            if ended.returncode or not provider.bodies():
                return f"failed: {ended.stderr[-300:]}{ended.stdout[-300:]}", "{}", ""
            request_id, body = provider.bodies()[-1]
            return ended.stdout, body, request_id

        for name, command in clients:
            for stream in (False, True):
                form = "streaming" if stream else "not streaming"
                prompt = f"Say hello to {secrets.token_hex(4)}"
                _, direct, _ = one(command, provider.url, prompt, stream, None)
                output, seen, request_id = one(command, f"{gateway.url}/v1", prompt, stream, None)
                same = json.loads(direct) and sent(direct) == sent(seen)
                row = gateway.row(request_id) if request_id else {}
                verdict.check(
                    bool(same) and row.get("served_model") == "middle" and row["status"] == "complete",
                    f"{name}, {form}, gpt-4o (alias of middle): provider saw {sorted(json.loads(seen))}"
                    + ("" if same else f" instead of {sorted(json.loads(direct))} {output}"),
                )
        tally: dict[str, set[str]] = {}
        for name, command in clients:
            for stream in (False, True):
                for kind, prompts in CLASSES.items():
                    for text in prompts:
                        prompt = f"{text} ({secrets.token_hex(2)})".replace("'", "")
                        _, direct, _ = one(command, provider.url, prompt, stream, "auto")
                        output, seen, request_id = one(command, f"{gateway.url}/v1", prompt, stream, "auto")
                        row = gateway.row(request_id) if request_id else {}
                        if row.get("prompt_class") != kind and text is not prompts[-1]:
                            continue
                        form = "streaming" if stream else "not streaming"
                        same = json.loads(direct) and sent(direct) == sent(seen)
                        tally.setdefault(str(row.get("prompt_class")), set()).add(
                            str(row.get("served_model"))
                        )
                        verdict.check(
                            bool(same) and row.get("status") == "complete",
                            f"{name}, {form}, auto: {row.get('prompt_class')} -> {row.get('served_model')}"
                            + ("" if same else f": {output}"),
                        )
                        break
        verdict.check(set(tally) >= set(CLASSES), f"every class was met under auto: {tally}")
    return verdict.finish()


if __name__ == "__main__":
    run(main)
