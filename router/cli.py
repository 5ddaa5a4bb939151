"""The `farthing` command. Each command imports what it needs, so that a small one starts fast."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from router.core.errors import ConfigurationError, FarthingError, RequestError
from router.settings import Settings, read_settings

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 1: it found something wrong; 2: it could not run, and said why."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["evaluate"]:
        from classifiers.evaluate import main as evaluate

        return evaluate(given[1:])  # it has options of its own, and needs no settings
    parser = _parser()
    chosen = parser.parse_args(given)
    command: Command | None = getattr(chosen, "run", None)
    if command is None:
        parser.print_help()
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        return command(chosen)
    except FarthingError as error:
        print(f"farthing: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # `farthing report ... | head`: the reader has what it wanted
        return 0


# -- running --


def _serve(options: argparse.Namespace) -> int:
    from router.serve import serve

    settings = read_settings(
        config=options.config,
        host=options.host,
        port=options.port,
        admin_port=options.admin_port,
        workers=options.workers,
    )
    return serve(settings, lambda line: print(line, flush=True))


def _migrate(options: argparse.Namespace) -> int:
    from router.adapters.sql.database import migrate

    print(migrate(read_settings().database_url))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    from router.simulate import main as simulate

    return simulate(options.host, options.port, options.models, options.log)


# -- keys --


def _keys_create(options: argparse.Namespace) -> int:
    from router.adapters.sql.keys import create_key

    settings = read_settings()
    key, entry = create_key(_engine(settings), settings.secret, options.team, options.app, _tags(options.tag))
    if options.json:
        print(json.dumps({"key": key, "id": entry.id, "team": entry.team, "app": entry.app}))
    else:
        print(key)
        print(f"Key {entry.id} of team {entry.team}. It is shown only this once.", file=sys.stderr)
    return 0


def _keys_adopt(options: argparse.Namespace) -> int:
    from router.adapters.sql.keys import adopt_key

    settings = read_settings()
    if sys.stdin.isatty():
        from getpass import getpass

        key = getpass("The key the app already sends: ").strip()
    else:
        key = sys.stdin.readline().strip()
    entry = adopt_key(_engine(settings), settings.secret, key, options.team, options.app, _tags(options.tag))
    if options.json:
        print(json.dumps({"id": entry.id, "team": entry.team, "app": entry.app}))
    else:
        print(f"Key {entry.id} of team {entry.team} works here now. Only its keyed hash is stored.")
    return 0


def _keys_list(options: argparse.Namespace) -> int:
    from router.adapters.sql.keys import list_keys

    entries = list_keys(_engine(read_settings(reading=True)))
    rows = [
        {
            "id": entry.id,
            "team": entry.team,
            "app": entry.app,
            "adopted": entry.adopted,
            "created_at": entry.created_at.isoformat(),
            "revoked_at": entry.revoked_at.isoformat() if entry.revoked_at is not None else None,
        }
        for entry in entries
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        state = "revoked" if row["revoked_at"] else "adopted" if row["adopted"] else "active"
        print(f"{row['id']}  {row['team']}/{row['app'] or '-'}  {state}  {row['created_at']}")
    return 0


def _keys_revoke(options: argparse.Namespace) -> int:
    from router.adapters.sql.keys import revoke_key

    entry = revoke_key(_engine(read_settings(reading=True)), options.id)
    print(f"Key {entry.id} of team {entry.team} is revoked; running gateways refuse it within 5 seconds.")
    return 0


# -- policy --


def _policy_lint(options: argparse.Namespace) -> int:
    from router.adapters.configuration import lint
    from router.adapters.price_catalogue import shipped_catalogue

    loaded = lint(read_settings(config=options.config).config, shipped_catalogue())
    problems = [*loaded.errors, *loaded.warnings]
    if options.json:
        print(json.dumps([str(problem) for problem in problems]))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print("No problems found.")
    return 1 if loaded.errors else 0


def _policy_schema(options: argparse.Namespace) -> int:
    from router.core.schema import json_schema

    print(json.dumps(json_schema(options.file), indent=2))
    return 0


def _policy_explain(options: argparse.Namespace) -> int:
    from router.explain import explain_prompt, explain_request

    settings = read_settings(config=options.config)
    if options.request_id:
        print(
            explain_request(_engine(settings), settings.journals, options.request_id, json_form=options.json)
        )
        return 0
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    print(
        explain_prompt(
            settings,
            text,
            team=options.team,
            app=options.app,
            model=options.model,
            tags=_tags(options.tag),
            at=_at(options.at),
            json_form=options.json,
        )
    )
    return 0


def _policy_history(options: argparse.Namespace) -> int:
    from router.adapters.sql.policies import policy_history

    versions = policy_history(_engine(read_settings(reading=True)), options.limit)
    if options.json:
        print(json.dumps([{"hash": v.hash, "loaded_at": v.loaded_at.isoformat()} for v in versions]))
        return 0
    for version in versions:
        print(f"{version.hash}  {version.loaded_at.isoformat()}")
    if not versions:
        print("No version yet: a gateway records each one it loads.")
    return 0


def _policy_rollback(options: argparse.Namespace) -> int:
    from router.adapters.configuration import roll_back
    from router.adapters.price_catalogue import shipped_catalogue
    from router.adapters.sql.policies import policy_version

    settings = read_settings(config=options.config)
    version = policy_version(_engine(settings), options.hash)
    if version is None:
        raise ConfigurationError(
            f"No version begins with '{options.hash}'. 'farthing policy history' lists what gateways have loaded."
        )
    roll_back(settings.config, version.providers, version.policy, shipped_catalogue())
    print(f"{settings.config} holds version {version.hash} again; running gateways load it within seconds.")
    return 0


# -- reports, ledger, prices --


def _report(options: argparse.Namespace) -> int:
    from router.adapters.sql import reports

    if options.kind == "cache":
        return _cache_stats(options)
    if options.kind == "budgets":
        for name in ("by", "since", "until"):
            if getattr(options, name) is not None:
                raise ConfigurationError(
                    f"--{name} has no meaning for budgets: the report shows each budget of this month. Leave it out."
                )
    settings = read_settings(config=options.config, reading=True)
    engine = _engine(settings)
    by = _names(options.by or "team,model")
    now = datetime.now(UTC)
    since = reports.moment(options.since, now) if options.since else None
    until = reports.moment(options.until, now) if options.until else None
    if options.kind == "spend":
        report = reports.spend_report(engine, settings.journals, by, since, until)
    elif options.kind == "savings":
        report = reports.savings_report(engine, settings.journals, by, since, until)
    else:
        from router.adapters.configuration import load
        from router.adapters.price_catalogue import shipped_catalogue

        snapshot = load(settings.config, shipped_catalogue())
        limits, period = snapshot.budgets(now)
        report = reports.budgets_report(
            engine, settings.journals, limits, period, lambda team: snapshot.team_budget(team, now)
        )
    sys.stdout.write(reports.render(report, options.format))
    return 0


def _cache_stats(options: argparse.Namespace) -> int:
    from router import cache_command

    settings = read_settings(config=options.config, reading=True)
    sys.stdout.write(
        cache_command.stats(
            settings,
            _engine(settings),
            by=cache_command.BY if options.by is None else _names(options.by),
            since=options.since,
            until=options.until,
            form=options.format,
        )
    )
    return 0


def _cache_invalidate(options: argparse.Namespace) -> int:
    from router import cache_command
    from router.core.cached import INVALIDATION_KINDS, InvalidationKind

    if options.app is not None and options.team is None:
        raise ConfigurationError("--app: say whose app it is, with --team")
    given = [name for name in INVALIDATION_KINDS if name != "app"]
    kind: InvalidationKind = next(name for name in given if getattr(options, name) not in (None, False))
    value = "" if kind == "all" else getattr(options, kind)
    if options.app is not None:
        kind, value = "app", f"{options.team}/{options.app}"
    print(
        cache_command.invalidate(
            _engine(read_settings()), kind, value, options.reason, json_form=options.json
        )
    )
    return 0


def _cache_rules(options: argparse.Namespace) -> int:
    from router import cache_command

    print(cache_command.listing(_engine(read_settings(reading=True)), options.limit, json_form=options.json))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _ledger_verify(options: argparse.Namespace) -> int:
    from router.adapters.sql.verify import verify

    settings = read_settings(reading=True)
    found = verify(_engine(settings), settings.journals)
    for difference in found.differences:
        print(difference)
    print(
        f"{found.requests} requests recomputed with their attempts and cost lines: "
        f"{len(found.differences)} differences; {found.unsettled} unsettled."
    )
    return 1 if found.differences else 0


def _prices(options: argparse.Namespace) -> int:
    from router.adapters import price_catalogue

    if options.action == "list":
        for line in price_catalogue.listed(price_catalogue.shipped_catalogue(), options.match):
            print(line)
        return 0
    text = price_catalogue.catalogue_text(price_catalogue.catalogue_from_genai_prices())
    if options.out == "-":
        sys.stdout.write(text)
    else:
        Path(options.out).write_text(text, encoding="utf-8")
    return 0


# -- first steps --


def _init(options: argparse.Namespace) -> int:
    from router.starter import write_starter

    return write_starter(Path(options.config or "."), force=options.force)


def _demo(options: argparse.Namespace) -> int:
    from router.demo import demo

    return demo(
        once=options.once,
        port=options.port,
        requests=options.requests,
        local_url=options.local_url,
        local_model=options.local_model,
        store=options.store,
    )


def _doctor(options: argparse.Namespace) -> int:
    from router.doctor import examine

    return examine(lambda: read_settings(config=options.config))


def _learn(options: argparse.Namespace) -> int:
    from router import learn

    settings = read_settings(config=options.config)
    engine = _engine(settings)
    if options.list:
        print(learn.listing(engine, options.json))
        return 0
    if options.activate or options.rollback:
        print(learn.choose(engine, options.activate or options.rollback, rollback=bool(options.rollback)))
        return 0
    from router.adapters.configuration import load
    from router.adapters.price_catalogue import shipped_catalogue

    snapshot = load(settings.config, shipped_catalogue())
    status, text = learn.run(
        engine,
        snapshot,
        dry_run=options.dry_run,
        json_form=options.json,
        seed=options.seed,
        trusted=frozenset(options.trust or ()),
    )
    print(text)
    return status


def _evaluate(options: argparse.Namespace) -> int:
    raise AssertionError("main hands it on")


# -- shared --


def _engine(settings: Settings) -> Engine:
    """The database, migrated where it is the embedded one. Raises ConfigurationError with the remedy."""
    from router.adapters.sql.database import open_engine, prepare_schema

    engine = open_engine(settings.database_url)
    problem = prepare_schema(engine, settings.database_url, embedded=settings.embedded)
    if problem is not None:
        raise ConfigurationError(f"{problem}.")
    return engine


def _tags(pairs: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    from router.stages.admit import read_wishes

    try:
        tags = read_wishes({"x-farthing-tags": ",".join(pairs or ())}).tags
    except RequestError as error:
        raise ConfigurationError(f"--tag: {error.message}") from None
    return {key: tuple(sorted(values)) for key, values in tags.items()}


def _at(text: str | None) -> datetime:
    if text is None:
        return datetime.now(UTC)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigurationError("--at takes a moment such as 2026-12-05T21:30:00+00:00.") from None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="farthing", description="A cost-aware gateway for language models.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(
        group: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Command, text: str
    ) -> argparse.ArgumentParser:
        command = group.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def group(name: str, text: str) -> argparse._SubParsersAction[argparse.ArgumentParser]:
        return commands.add_parser(name, help=text, description=text).add_subparsers(
            title="commands", metavar="COMMAND", required=True
        )

    def config(command: argparse.ArgumentParser) -> None:
        command.add_argument("--config", metavar="DIR", help="folder of providers.yaml and policy.yaml")

    def grouped(command: argparse.ArgumentParser, dimensions: str, since: str | None = None) -> None:
        command.add_argument("--by", help=dimensions)
        command.add_argument("--since", default=since, help="7d, 12h, or a date")
        command.add_argument("--until", help="7d, 12h, or a date")
        command.add_argument("--format", choices=("table", "json", "csv", "html"), default="table")

    def owner(command: argparse.ArgumentParser) -> None:
        command.add_argument("--team", required=True)
        command.add_argument("--app")
        command.add_argument(
            "--tag", action="append", metavar="KEY=VALUE", help="a tag every request carries"
        )
        command.add_argument("--json", action="store_true")

    init = add(commands, "init", _init, "Write a starter pair of files from what is found on this machine")
    config(init)
    init.add_argument("--force", action="store_true", help="overwrite files that exist")

    serve = add(commands, "serve", _serve, "Serve the gateway")
    config(serve)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8400)
    serve.add_argument("--admin-port", type=int, help="without it there is no admin plane")
    serve.add_argument("--workers", type=_count, default=1)

    demo = add(
        commands, "demo", _demo, "Simulated models, the gateway and 200 prompts, on this machine alone"
    )
    demo.add_argument("--once", action="store_true", help="end after the report")
    demo.add_argument("--port", type=int, default=8400)
    demo.add_argument("--requests", type=_count, help="default: 200, with a local model 20")
    demo.add_argument("--local-url", help="an OpenAI-compatible endpoint of a real local model")
    demo.add_argument("--local-model", help="its name there (both together)")
    demo.add_argument(
        "--store",
        choices=("memory", "valkey"),
        default="memory",
        help="valkey: a server of its own, and two gateways that share it",
    )

    simulate = add(commands, "simulate", _simulate, "Serve simulated models on the OpenAI wire")
    simulate.add_argument("--host", default="127.0.0.1")
    simulate.add_argument("--port", type=int, default=8500)
    simulate.add_argument("--log", help="file that gets a JSON line for each call")
    simulate.add_argument("models", nargs="*", metavar="NAME[:first_token=50ms,tps=200,...]")

    add(commands, "migrate", _migrate, "Bring the database's schema up to date")
    doctor = add(commands, "doctor", _doctor, "Check every dependency and say what to do")
    config(doctor)

    keys = group("keys", "Keys of teams and apps")
    owner(add(keys, "create", _keys_create, "Make a key; it is shown once"))
    owner(add(keys, "adopt", _keys_adopt, "Take over a key the app already sends, read from stdin"))
    add(keys, "list", _keys_list, "List keys, never their text").add_argument("--json", action="store_true")
    add(keys, "revoke", _keys_revoke, "Refuse a key from now on").add_argument("id")

    policy = group("policy", "The two files")
    lint = add(policy, "lint", _policy_lint, "Check both files")
    config(lint)
    lint.add_argument("--json", action="store_true")
    schema = add(policy, "schema", _policy_schema, "Print the JSON Schema of a file")
    schema.add_argument("file", nargs="?", choices=("policy", "providers"), default="policy")
    explain = add(policy, "explain", _policy_explain, "Say which model would answer, or did, and why")
    config(explain)
    which = explain.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", help="a prompt; - reads it from stdin")
    which.add_argument("--request-id", help="the id at the end of x-farthing-decision")
    explain.add_argument("--team", default="default")
    explain.add_argument("--app")
    explain.add_argument("--model", default="auto")
    explain.add_argument("--tag", action="append", metavar="KEY=VALUE")
    explain.add_argument("--at", metavar="MOMENT", help="as if at this moment (ISO 8601)")
    explain.add_argument("--json", action="store_true")

    history = add(policy, "history", _policy_history, "The versions that gateways have loaded, newest first")
    history.add_argument("--limit", type=_count, default=20)
    history.add_argument("--json", action="store_true")
    rollback = add(policy, "rollback", _policy_rollback, "Write a recorded version back into the two files")
    config(rollback)
    rollback.add_argument("hash", help="its hash, or how it begins")

    report = add(commands, "report", _report, "Reports over the ledger")
    config(report)
    report.add_argument("kind", choices=("spend", "savings", "budgets", "cache"))
    grouped(
        report,
        "team,app,model,class,day,...; default team,model, of the cache team,app (it also knows scope)",
    )

    cache = group("cache", "The caches")
    stats = add(cache, "stats", _cache_stats, "Hits, what they saved, and how often likeness was wrong")
    config(stats)
    grouped(stats, "team,app,model,class,day,scope,...; default team,app", since="7d")
    invalidate = add(
        cache,
        "invalidate",
        _cache_invalidate,
        "Take stored answers back: what was stored until now is not served any more",
    )
    named = invalidate.add_mutually_exclusive_group(required=True)
    named.add_argument("--all", action="store_true", help="every stored answer")
    named.add_argument(
        "--epoch",
        action="store_true",
        dest="all",
        help="the same: begins a new epoch by hand (a policy that may choose otherwise begins one by itself)",
    )
    named.add_argument("--team", help="every answer of this team")
    named.add_argument("--model", help="every answer of this model (the policy's name)")
    named.add_argument("--tag", metavar="KEY=VALUE", help="every answer to a request with this tag")
    named.add_argument("--scope", metavar="HASH", help="as 'farthing cache stats --by scope' shows it")
    named.add_argument("--entry", metavar="ID", help="one answer: the request that made it, for good")
    invalidate.add_argument("--app", help="with --team: only this app's answers")
    invalidate.add_argument("--reason", help="kept with the rule")
    invalidate.add_argument("--json", action="store_true")
    rules = add(cache, "list-invalidations", _cache_rules, "What was taken back, when, by whom and why")
    rules.add_argument("--limit", type=_count, default=50)
    rules.add_argument("--json", action="store_true")

    ledger = group("ledger", "The ledger")
    add(ledger, "verify", _ledger_verify, "Recompute every figure from stored rows")

    learn = add(commands, "learn", _learn, "Learn from your own labels which model answers what well")
    config(learn)
    learn.add_argument("--dry-run", action="store_true", help="print the model card, store nothing")
    learn.add_argument("--list", action="store_true", help="every version with its figures")
    learn.add_argument("--activate", metavar="ID", help="make a stored version the one in force")
    learn.add_argument("--rollback", metavar="ID", help="back to an earlier version, or to the `priors`")
    learn.add_argument("--trust", action="append", metavar="KEY_ID", help="believe a key that was left out")
    learn.add_argument("--seed", type=_seed, default=0, help="draws the held-out rows (default 0)")
    learn.add_argument("--json", action="store_true")
    add(
        commands,
        "evaluate",
        _evaluate,
        "Measure routing quality on recorded answers: --data DIR [--json] [--predictions FILE] [--plot FILE]",
    )

    prices = add(commands, "prices", _prices, "The price catalogue")
    prices.add_argument("action", choices=("list", "import"))
    prices.add_argument("--match", default="", help="list: only names that hold this")
    prices.add_argument("--out", default="-", help="import: the file to write")
    return parser


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError("must be a whole number from 0 to 4294967295")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
