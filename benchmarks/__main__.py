"""Measures the gateway against its budgets, side by side with a direct call, nginx and litellm's proxy.

    python -m benchmarks [--seconds 4] [--rounds 3] [--only PART ...] [--out results/bench.json]

Everything runs on this machine in one run: a provider that answers at once (`mock_upstream.py`), nginx as a
reverse proxy before it, the gateway with everything on (exact cache, budgets, ledger, journal), and litellm's
proxy where FARTHING_BENCH_LITELLM names an environment that has it. Rounds alternate between them and medians
are compared. Every answer must be a 200, prompts are never sent twice (the ledger is asked whether the cache or
the other encoder answered after all), and the provider's own count of calls must agree with what was sent.

The exit status is 1 when a budget is missed or a run was not what it claims to be, and 2 when nothing could be
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import prompts
from benchmarks.gateway import Gateway, Installation, farthing
from benchmarks.installed import installed_size
from benchmarks.litellm_proxy import VARIABLE, LitellmProxy
from benchmarks.load import Load, LoadGenerator, own_client
from benchmarks.mock_upstream import MockUpstream, nginx, nginx_path
from benchmarks.processes import Process, free_port
from benchmarks.valkey import Valkey

PARTS = ("start", "named", "routed", "transformer", "hits", "valkey", "streams", "litellm", "installed")
NAMED = "middle"
MANY = 16
CLOSE_RATE = 300
"""Prompts for the transformer set apart for a second: more than one connection can ask it."""
STREAMS_AT_ONCE = 16
STARTS = 3


@dataclass(slots=True)
class Series:
    """The runs of one target in one scenario, a round each."""

    loads: list[Load] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    rss: float = 0.0

    @property
    def per_second(self) -> float:
        return statistics.median(load.per_second for load in self.loads)

    @property
    def p50(self) -> float:
        """Milliseconds."""
        return statistics.median(load.p50_us for load in self.loads) / 1000

    @property
    def p99(self) -> float:
        return statistics.median(load.p99_us for load in self.loads) / 1000

    def as_json(self) -> dict[str, Any]:
        return {
            "requests_per_second": self.per_second,
            "p50_ms": self.p50,
            "p99_ms": self.p99,
            "cpu_ms_per_request": statistics.median(self.cpu_ms),
            "rss_mib": self.rss,
            "rounds": [asdict(load) for load in self.loads],
        }


@dataclass(frozen=True, slots=True)
class Budget:
    """One line of the table. `measured` is None where it could not be measured, which `note` explains."""

    name: str
    measured: float | None
    bar: float
    unit: str
    at_least: bool
    note: str = ""

    @property
    def kept(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bar if self.at_least else self.measured <= self.bar


@dataclass(frozen=True, slots=True)
class Target:
    name: str
    url: str
    process: Process


class Run:
    """What one run of the benchmark shares and collects."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self.options = options
        self.folder = folder
        self.stack = stack
        self.series: dict[tuple[str, str, int], Series] = {}
        self.budgets: list[Budget] = []
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.extra: dict[str, Any] = {}

        self.upstream = MockUpstream(folder)
        stack.callback(self.upstream.process.close)
        self.direct = Target("direct", self.upstream.url, self.upstream.process)
        self.proxy: Target | None = None
        if nginx_path() is not None:
            port = free_port()
            process = nginx(
                folder,
                "proxy",
                f"""upstream provider {{ server {self.upstream.url.split("/")[2]}; keepalive 64;
                    keepalive_requests 1000000000; }}
                  server {{ listen 127.0.0.1:{port} backlog=2048;
                    location / {{ proxy_pass http://provider; proxy_http_version 1.1;
                                 proxy_set_header Connection ""; }} }}""",
            )
            stack.callback(process.close)
            process.wait_until_answers(f"http://127.0.0.1:{port}/count")
            self.proxy = Target("nginx", f"http://127.0.0.1:{port}/v1", process)
        else:
            self.notes.append("nginx is not installed: no reverse proxy beside it (apt-get install nginx)")
        simulated_port = free_port()
        self.simulator = Process(
            [
                *(*farthing(), "simulate", "--port", str(simulated_port)),
                *("fast-stream:typical=4000", "paced-stream:typical=4000,tps=60"),
            ],
            folder=folder,
            log="simulator.log",
        )
        stack.callback(self.simulator.close)
        self.simulated_url = f"http://127.0.0.1:{simulated_port}/v1"
        self.simulator.wait_until_answers(f"http://127.0.0.1:{simulated_port}/healthz")
        self.installation = Installation(
            folder / "gateway", upstream=self.upstream.url, simulated=self.simulated_url
        )
        self.key = self.installation.key()
        self.generator = LoadGenerator(folder, self.key)

    # -- load --

    def measure(
        self, scenario: str, target: Target, connections: int, model: str, templates: Sequence[str]
    ) -> Load:
        """One round on one target; what is wrong with it is added to `faults`."""
        cpu = target.process.cpu_seconds()
        load = self.generator.run(
            target.url,
            model=model,
            templates=templates,
            connections=connections,
            seconds=self.options.seconds,
            unique=target.name not in ("direct", "nginx", "litellm"),
        )
        series = self.series.setdefault((scenario, target.name, connections), Series())
        series.loads.append(load)
        series.cpu_ms.append(1000 * (target.process.cpu_seconds() - cpu) / max(load.completed, 1))
        series.rss = target.process.memory().rss
        where = f"{scenario}, {target.name}, {connections} connections"
        if load.non_2xx or load.broken:
            self.faults.append(
                f"{where}: {load.non_2xx} answers were no 2xx, {load.broken} connections broke"
            )
        if not load.completed:
            self.faults.append(f"{where}: nothing was answered")
        say(
            f"  {scenario:12} {target.name:9} {connections:3} connections: {load.per_second:8.0f}/s, "
            f"p50 {load.p50_us / 1000:7.3f} ms, {series.cpu_ms[-1]:.3f} ms CPU a request"
        )
        return load

    def check(
        self,
        scenario: str,
        gateway: Gateway,
        loads: list[Load],
        *,
        called: int,
        attempts: int,
        ledger: Counter[tuple[str, str]],
        expect: tuple[str, str],
        hits: bool = False,
    ) -> None:
        """Afterwards: calls the provider counted = calls the gateway booked = requests sent; and the ledger says
        that nearly all went the way the scenario is about. `called`, `attempts`, `ledger`: before it.
        """
        gateway.settled()
        calls, booked = self.upstream.calls() - called, gateway.attempts() - attempts
        completed, sent = sum(load.completed for load in loads), sum(load.sent for load in loads)
        # What the generator cut off at its end was sent, but may not have been read or forwarded any more.
        low, high = (0, 1) if hits else (completed, sent)
        if not low <= calls <= high:
            self.faults.append(
                f"{scenario}: {calls} calls at the provider for {completed} to {sent} requests"
            )
        if abs(calls - booked) > sent - completed:
            self.faults.append(f"{scenario}: {calls} calls at the provider, {booked} attempts booked")
        rows = gateway.ledger() - ledger
        total = sum(rows.values())
        if not completed <= total <= sent:
            self.faults.append(f"{scenario}: {total} ledger rows for {completed} to {sent} requests")
        share = rows[expect] / max(total, 1)
        bound = 0.8 if expect[1] == "minilm" else 0.999 if expect[1] == "none" else 0.99
        if share < bound:
            self.faults.append(
                f"{scenario}: only {share:.1%} of its requests were {expect}, see {dict(rows)}"
            )
        self.extra[scenario] = {
            "requests_completed": completed,
            "requests_sent": sent,
            "provider_calls": calls,
            "attempts_booked": booked,
            "ledger_rows": {"/".join(key): value for key, value in rows.items()},
        }

    def scenario(
        self,
        name: str,
        gateway: Gateway,
        model: str,
        templates: Sequence[str],
        connections: tuple[int, ...],
        expect: tuple[str, str],
        *,
        beside: Callable[[int], list[Target]],
        hits: bool = False,
    ) -> None:
        """Rounds of this scenario on the gateway, each beside other targets in the same round."""
        own = Target("farthing", gateway.url, gateway.process)
        if hits:
            self.generator.run(gateway.url, model=model, templates=templates, connections=1, seconds=1)
            gateway.settled()
        attempts, ledger = gateway.attempts(), gateway.ledger()
        loads: list[Load] = []
        called, others = self.upstream.calls(), 0
        for number in range(self.options.rounds):
            for count in connections:
                for target in beside(count):
                    before = self.upstream.calls()
                    self.measure(name, target, count, model, templates)
                    others += self.upstream.calls() - before
                # A list of whole prompts is split, a part for each round.
                part = templates[number :: self.options.rounds] if len(templates) > 100 else templates
                loads.append(self.measure(name, own, count, model, part))
                gateway.settled()
        self.check(
            name,
            gateway,
            loads,
            called=called + others,
            attempts=attempts,
            ledger=ledger,
            expect=expect,
            hits=hits,
        )

    def added(self, scenario: str) -> float:
        """Milliseconds of p50 at one connection above the direct call of the same scenario."""
        return self.series[scenario, "farthing", 1].p50 - self.series[scenario, "direct", 1].p50

    def ratios(self, scenario: str, connections: int) -> str:
        """Requests a second beside those of a direct call and of nginx in this run, for a note."""
        own = self.series[scenario, "farthing", connections].per_second
        found = []
        for other in ("direct", "nginx", "litellm"):
            base = self.series.get(("named", other, connections))
            if base is not None:
                found.append(f"{own / base.per_second:.3g} of {other}")
        return ", ".join(found)

    def beside_named(self, connections: int) -> list[Target]:
        return [self.direct, *([self.proxy] if self.proxy is not None else [])]

    def beside_routed(self, connections: int) -> list[Target]:
        return [self.direct] if connections == 1 else []

    # -- streams --

    def streams(self, gateway: Gateway, model: str, tokens: int) -> dict[str, float]:
        """CPU of the gateway for each chunk of long streams, 16 at a time."""
        given = {
            "url": gateway.url + "/chat/completions",
            "key": self.key,
            "model": model,
            "prompt": f"Tell a long story {time.time()}",
            "tokens": tokens,
            "count": STREAMS_AT_ONCE,
        }
        own_client("streams", {**given, "tokens": 10, "prompt": "warm up"})
        cpu = gateway.process.cpu_seconds()
        found = own_client("streams", given)
        used = gateway.process.cpu_seconds() - cpu
        if found["complete"] != STREAMS_AT_ONCE:
            self.faults.append(f"{model}: {found['complete']} of {STREAMS_AT_ONCE} streams ended with [DONE]")
        result = {
            "chunks": found["chunks"],
            "chunks_per_second": found["chunks"] / found["seconds"],
            "chunks_per_read": found["chunks"] / found["reads"],
            "cpu_us_per_chunk": 1e6 * used / found["chunks"],
        }
        say(
            f"  {model}: {result['chunks']} chunks, {result['chunks_per_second']:.0f}/s, "
            f"{result['cpu_us_per_chunk']:.1f} us CPU a chunk"
        )
        return result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(run: Run) -> None:
    parts, budgets = run.options.only, run.budgets
    if "litellm" in parts:
        _litellm(run)
    with contextlib.ExitStack() as stack:
        gateway = _start(run, stack)
        if "named" in parts:
            run.scenario(
                *("named", gateway, NAMED, prompts.STATIC, (1, MANY), ("miss", "none")),
                beside=run.beside_named,
            )
            rate = run.series["named", "farthing", MANY].per_second
            ratios = run.ratios("named", MANY)
            budgets.append(Budget(f"named model, {MANY} connections", rate, 1200, "requests/s", True, ratios))
            proxy = run.series.get(("named", "nginx", 1))
            note = f"nginx adds {proxy.p50 - run.series['named', 'direct', 1].p50:.3f}" if proxy else ""
            budgets.append(Budget("named model, added p50", run.added("named"), 1.0, "ms", False, note))
        if "routed" in parts:
            run.scenario(
                *("routed", gateway, "auto", prompts.sure_templates(), (1, MANY), ("miss", "static")),
                beside=run.beside_routed,
            )
            rate = run.series["routed", "farthing", MANY].per_second
            budgets.append(Budget("routed, static encoder, added p50", run.added("routed"), 1.5, "ms", False))
            name, ratios = f"routed, static encoder, {MANY} connections", run.ratios("routed", MANY)
            budgets.append(Budget(name, rate, 900, "requests/s", True, ratios))
        if "transformer" in parts:
            close = prompts.close_prompts(CLOSE_RATE * run.options.seconds * run.options.rounds)
            found = prompts.pieces(close[-1])
            if found != prompts.CLOSE_PIECES:
                run.faults.append(f"transformer: its prompts have {found} word pieces")
            run.scenario(
                *("transformer", gateway, "auto", close, (1,), ("miss", "minilm")),
                beside=run.beside_routed,
            )
            name = f"routed, transformer, {found} tokens, added p50"
            budgets.append(Budget(name, run.added("transformer"), 8.0, "ms", False))
        if "hits" in parts:
            run.scenario(
                *("hits", gateway, NAMED, prompts.SAME, (MANY,), ("exact", "none")),
                beside=lambda count: [],
                hits=True,
            )
            rate = run.series["hits", "farthing", MANY].per_second
            note = run.ratios("hits", MANY)
            budgets.append(Budget("exact cache hit, twin", rate, 2500, "requests/s", True, note))
        if "streams" in parts:
            fast = run.streams(gateway, "fast-stream", 2500)
            paced = run.streams(gateway, "paced-stream", 500)
            run.extra["streams"] = {"fast": fast, "paced": paced}
            note = f"{fast['chunks_per_read']:.1f} chunks a read; at 60/s each: {paced['cpu_us_per_chunk']:.0f} us"
            budgets.append(
                Budget("relaying a streamed chunk", fast["cpu_us_per_chunk"], 20, "us CPU", False, note)
            )
    if "valkey" in parts:
        _valkey(run)
    if "installed" in parts:
        size, how = installed_size(run.folder)
        budgets.append(Budget("installed size, runtime only", size, 700, "MiB", False, how))


def _start(run: Run, stack: contextlib.ExitStack) -> Gateway:
    """Starts the gateway some times over; the last one stays for what follows."""
    times: list[float] = []
    for number in range(STARTS if "start" in run.options.only else 1):
        gateway = run.installation.start()
        times.append(gateway.ready_after)
        if number + 1 < STARTS and "start" in run.options.only:
            gateway.close()
    stack.callback(gateway.close)
    if "start" in run.options.only:
        time.sleep(2)  # the transformer is loaded beside the first requests
        memory = gateway.process.memory()
        ready = statistics.median(times)
        run.extra["start"] = {"ready_seconds": times, "memory": asdict(memory)}
        run.budgets.append(
            Budget("memory, encoders loaded", memory.rss, 300, "MiB RSS", False, f"PSS {memory.pss:.0f} MiB")
        )
        run.budgets.append(Budget("ready after start", ready, 2.0, "s", False, f"median of {STARTS}"))
    return gateway


def _valkey(run: Run) -> None:
    name = "exact cache hit, Valkey"
    try:
        valkey = Valkey(run.folder)
    except RuntimeError as error:
        run.budgets.append(Budget(name, None, 1500, "requests/s", True, str(error)))
        return
    with contextlib.ExitStack() as stack:
        stack.callback(valkey.close)
        installation = Installation(
            *(run.folder / "gateway-valkey",),
            upstream=run.upstream.url,
            simulated=run.simulated_url,
            redis_url=valkey.url,
        )
        key, run.generator.key = run.generator.key, installation.key()
        gateway = installation.start()
        stack.callback(gateway.close)
        run.scenario(
            *("named-valkey", gateway, NAMED, prompts.STATIC, (1, MANY), ("miss", "none")),
            beside=run.beside_routed,
        )
        run.scenario(
            *("hits-valkey", gateway, NAMED, prompts.SAME, (MANY,), ("exact", "none")),
            beside=lambda count: [],
            hits=True,
        )
        run.generator.key = key
    rate = run.series["hits-valkey", "farthing", MANY].per_second
    run.budgets.append(Budget(name, rate, 1500, "requests/s", True, run.ratios("hits-valkey", MANY)))


def _litellm(run: Run) -> None:
    venv = os.environ.get(VARIABLE)
    if not venv or not (Path(venv) / "bin" / "litellm").exists():
        run.notes.append(
            f"litellm's proxy was left out: {VARIABLE} names no environment that has it "
            '(pip install "litellm[proxy]" in one of its own)'
        )
        return
    with contextlib.ExitStack() as stack:
        try:
            proxy = LitellmProxy(Path(venv), run.folder / "litellm", run.upstream.url, run.key)
        except RuntimeError as error:
            run.notes.append(f"litellm's proxy was left out, it did not start: {error}")
            return
        stack.callback(proxy.close)
        target = Target("litellm", proxy.url, proxy.process)
        for _ in range(run.options.rounds):
            for count in (1, MANY):
                run.measure("named", target, count, NAMED, prompts.STATIC)
        memory = proxy.process.memory()
        run.extra["litellm"] = {"ready_seconds": proxy.ready_after, "memory": asdict(memory)}
        run.notes.append(
            f"litellm's proxy, one worker, no ledger: ready after {proxy.ready_after:.1f} s, {memory.rss:.0f} MiB RSS"
        )


# -- what is shown --


def _table(run: Run) -> str:
    lines = [f"{'budget':44} {'measured':>12} {'bar':>10}  {'unit':11} result"]
    for budget in run.budgets:
        sign = ">=" if budget.at_least else "<="
        measured = "-" if budget.measured is None else f"{budget.measured:,.2f}"
        result = {True: "kept", False: "MISSED", None: "not measured"}[budget.kept]
        note = f" ({budget.note})" if budget.note else ""
        lines.append(
            f"{budget.name:44} {measured:>12} {sign} {budget.bar:>7,.0f}  {budget.unit:11} {result}{note}"
            if budget.bar >= 2
            else f"{budget.name:44} {measured:>12} {sign} {budget.bar:>7.1f}  {budget.unit:11} {result}{note}"
        )
    head = f"{'scenario':14} {'target':9} {'conn.':>5} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8}"
    lines += ["", f"{head} {'CPU ms':>7} {'RSS MiB':>8}   requests/s beside direct, beside nginx"]
    for (scenario, target, count), series in sorted(
        run.series.items(), key=lambda item: (item[0][0], item[0][2])
    ):
        ratios = []
        for other in ("direct", "nginx"):
            base = run.series.get(("named", other, count))
            ratios.append(f"{series.per_second / base.per_second:8.3f}" if base is not None else "       -")
        lines.append(
            f"{scenario:14} {target:9} {count:5} {series.per_second:11,.0f} {series.p50:8.3f} {series.p99:8.3f} "
            f"{statistics.median(series.cpu_ms):7.3f} {series.rss:8.0f}   {ratios[0]} {ratios[1]}"
        )
    lines += ["", "Requests, calls at the provider and attempts booked:"]
    for name, found in run.extra.items():
        if "provider_calls" in found:
            lines.append(
                f"  {name}: {found['requests_completed']} answered of {found['requests_sent']} sent, "
                f"{found['provider_calls']} calls, {found['attempts_booked']} booked; ledger {found['ledger_rows']}"
            )
    lines += [*run.notes, *(f"NOT AS IT SHOULD BE: {fault}" for fault in run.faults)]
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("results/bench.json"))
    options = parser.parse_args()
    if sys.platform != "linux":
        say("The benchmark reads CPU and memory from /proc: it needs Linux.")
        return 2
    machine, started = _machine(), datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="farthing-bench-") as folder, contextlib.ExitStack() as stack:
        run = Run(options, Path(folder), stack)
        say(f"Load from {run.generator.name}, provider: {run.upstream.name}, results: {options.out}")
        _measure(run)
    print(
        f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"load before {machine['load_before']:.2f}; medians of {options.rounds} rounds of {options.seconds} s; "
        f"load from {run.generator.name}\n"
    )
    print(_table(run))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "started": started.isoformat(),
        "machine": machine,
        "generator": run.generator.name,
        "provider": run.upstream.name,
        "budgets": [{**asdict(budget), "kept": budget.kept} for budget in run.budgets],
        "series": {
            f"{name}, {target}, {count}": series.as_json()
            for (name, target, count), series in run.series.items()
        },
        "details": run.extra,
        "notes": run.notes,
        "faults": run.faults,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if run.faults or any(budget.kept is False for budget in run.budgets) else 0


if __name__ == "__main__":
    sys.exit(main())
