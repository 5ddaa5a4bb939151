"""The strict load: what is refused and how it is said, what is warned about, and that text is typed exactly."""

# ruff: noqa: E501

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.core.catalogue import Catalogue
from router.core.document import read
from router.core.lint import Loaded, load
from router.core.policy import LearnPolicy, Timeouts
from router.core.schema import PolicyFile, json_schema, json_schema_text, typed
from router.core.types import NanoUSD
from tests.unit.broken_variants import VARIANTS, Variant

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
CATALOGUE = shipped_catalogue()
POLICIES = shipped_policies()
PROVIDERS_TEXT = (POLICIES / "providers.yaml").read_text(encoding="utf-8")
POLICY_TEXT = (POLICIES / "policy.yaml").read_text(encoding="utf-8")

DESIGN_PROVIDERS = """\
apiVersion: farthing/v1
providers:
  openai:  { wire: openai, base_url: "https://api.openai.com/v1", api_key_env: OPENAI_API_KEY }
  vllm-a:  { wire: openai, base_url: "http://vllm-a:8000/v1", timeouts: { connect: 2s, first_token: 10s, idle: 20s, total: 300s } }
  bedrock: { wire: litellm }
models:
  small-local: { provider: vllm-a, name: qwen3-8b, context: 32768, max_output: 8192, supports: [tools, json_schema],
                 expect: { first_token: 300ms, tokens_per_second: 60 },
                 price: { gpu_hour: "2.40", gpus: 1, prefill_tps: 9000, decode_tps: 1800 },
                 quality: { simple: "0.95", medium: "0.80", complex: "0.45" } }
  mini:        { provider: openai, name: gpt-5-mini, context: 400000, max_output: 128000, supports: [tools, json_schema, vision],
                 rejects: [temperature, top_p, stop], rename: { max_tokens: max_completion_tokens }, price: catalog, quality: catalog }
  gpt-4o:      { provider: openai, name: gpt-4o, context: 128000, max_output: 16384, supports: [tools, json_schema, vision], price: catalog, quality: catalog }
  frontier:    { provider: openai, name: gpt-5.5, context: 400000, max_output: 128000, supports: [tools, json_schema, vision], price: catalog, quality: catalog }
"""
DESIGN_POLICY = """\
apiVersion: farthing/v1
currency: USD
organisation: { timezone: UTC, budget: { month: 20000, hard_cap: 25000 } }
baseline: frontier
aliases: { claude-sonnet-5: frontier }
unknown_model: auto
classes:
  simple:  { min_quality: 0.90, first_token_p95: 1500ms }
  medium:  { min_quality: 0.90, first_token_p95: 4s }
  complex: { min_quality: 0.90, first_token_p95: 15s, total_p95: 120s }
defaults:
  allow: [small-local, mini, gpt-4o, frontier]
  fallback: [mini, frontier]
  substitute: false
  max_cost_per_request: 0.25
  assume_max_output: 4096
  when_nothing_meets: best
  on_unpriced_model: block
  cache: { exact: true, semantic: shadow, max_error: 1%, ttl: 24h, scope: team }
teams:
  search:
    cost_center: "4711"
    budget: { month: 3000, warn_at: [50%, 80%], at_limit: downgrade, hard_cap: 3300 }
    apps:
      faq-bot: { cache: { semantic: enforce } }
      legal:   { allow: [frontier], tags: { data: [pii] }, cache: { semantic: never } }
unlisted_teams: { budget: { month: 50, at_limit: refuse } }
rules:
  - name: pii stays local
    when: { tag.data: [pii] }
    then: { allow: [small-local, frontier], cache: { semantic: never } }
  - name: nights and weekends may be slower
    when: { time: { days: [sat, sun], from: "20:00", to: "07:00" } }
    then: { classes: { simple: { first_token_p95: 10s } } }
contracts:
  - { provider: openai, models: [frontier], discount: 12%, from: "2026-07-01", until: "2027-07-01", reference: PO-1881 }
exceptions:
  - { name: launch, team: search, budget: { month: 6000 }, until: "2026-12-15", reason: product launch, approved_by: head of search }
"""


def loaded(providers: str = PROVIDERS_TEXT, policy: str = POLICY_TEXT, now: datetime = NOW) -> Loaded:
    return load(providers, policy, CATALOGUE, now)


def warning(found: Loaded, path: str) -> str:
    assert found.snapshot is not None, [str(problem) for problem in found.problems]
    (problem,) = [problem for problem in found.warnings if problem.path == path]
    return f"{problem.message}; {problem.remedy}"


def test_the_shipped_pair_loads_without_a_warning() -> None:
    assert loaded().problems == ()


def test_the_pair_of_the_design_loads_and_warns_about_what_it_says() -> None:
    found = loaded(DESIGN_PROVIDERS, DESIGN_POLICY)
    assert found.snapshot is not None
    assert {problem.path for problem in found.warnings} == {
        "models.frontier.context",
        "aliases.claude-sonnet-5",
        "exceptions[0].budget.month",
    }


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_broken_variant_is_refused_with_place_and_remedy(variant: Variant) -> None:
    original = POLICY_TEXT if variant.file == "policy.yaml" else PROVIDERS_TEXT
    assert variant.old in original
    broken = original.replace(variant.old, variant.new, 1)
    found = loaded(policy=broken) if variant.file == "policy.yaml" else loaded(providers=broken)
    assert found.snapshot is None
    edited_line = broken.rfind("\n", 0, original.index(variant.old)) + 1
    start = broken.find(variant.at, edited_line)
    start = start if start >= 0 else broken.index(variant.at)
    place = (broken.count("\n", 0, start) + 1, start - broken.rfind("\n", 0, start))
    matching = [
        problem
        for problem in found.errors
        if problem.path == variant.path
        and variant.message in problem.message
        and variant.remedy in problem.remedy
    ]
    assert matching, [str(problem) for problem in found.errors]
    assert (matching[0].line, matching[0].column) == place, str(matching[0])
    assert matching[0].file == variant.file
    assert matching[0].remedy


def test_no_secret_written_by_mistake_is_repeated() -> None:
    for wrong in ("api_key_env: sk-proj-123", "api_key: sk-proj-123"):
        found = loaded(providers=PROVIDERS_TEXT.replace("api_key_env: OPENAI_API_KEY", wrong))
        assert found.snapshot is None
        assert all("sk-proj" not in str(problem) for problem in found.problems)
    found = loaded(providers=PROVIDERS_TEXT.replace("http://vllm-a", "http://me:hunter2@vllm-a"))
    assert all("hunter2" not in str(problem) for problem in found.problems)


def test_all_problems_are_reported_at_once_in_the_order_of_the_files() -> None:
    broken = (
        POLICY_TEXT.replace("month: 3000", "month: $3000")
        .replace("ttl: 24h", "ttl: 24")
        .replace("baseline:", "baselin:")
    )
    lines = [problem.line for problem in loaded(policy=broken).errors]
    assert len(lines) == 3
    assert lines == sorted(lines)


def test_text_is_typed_exactly_quoted_or_not() -> None:
    plain = loaded(policy=POLICY_TEXT.replace("month: 3000", "month: 0.1"))
    quoted = loaded(policy=POLICY_TEXT.replace("month: 3000", 'month: "0.1"'))
    assert plain.snapshot is not None
    assert quoted.snapshot is not None
    assert plain.snapshot.policy == quoted.snapshot.policy
    budget = plain.snapshot.policy.teams["search"].budget
    assert budget is not None
    assert budget.month == Decimal("0.1")
    assert plain.snapshot.policy.teams["search"].cost_center == "4711"
    leading_zero = loaded(policy=POLICY_TEXT.replace('"4711"', "0471"))
    assert leading_zero.snapshot is not None
    assert leading_zero.snapshot.policy.teams["search"].cost_center == "0471"


def test_defaults_are_those_the_design_shows() -> None:
    found = loaded(
        'apiVersion: farthing/v1\nproviders: { p: { base_url: "http://h/v1" } }\n'
        "models: { m: { provider: p, context: 8000 } }\n",
        "apiVersion: farthing/v1\nclasses: {}\ndefaults: { allow: [m] }\n",
    )
    assert found.snapshot is not None
    effective = found.snapshot.resolve("any", None, {}, NOW)
    assert effective.classes["simple"].first_token_p95 == 1.5
    assert effective.classes["complex"].total_p95 == 120
    assert effective.classes["medium"].min_quality == Decimal("0.9")
    assert (effective.cache.exact, effective.cache.semantic, effective.cache.scope) == (True, "never", "team")
    assert (effective.assume_max_output, effective.when_nothing_meets) == (4096, "best")
    assert effective.max_cost_per_request is None
    assert effective.budgets == ()
    assert found.snapshot.unknown_model == "auto"
    assert found.snapshot.providers["p"].timeouts == Timeouts()
    assert found.snapshot.models["m"].max_output == 8000
    assert found.snapshot.price("m", NOW) is None
    assert {problem.path for problem in found.warnings} == {"models.m"}


def test_every_key_of_providers_is_understood() -> None:
    found = loaded(
        """
apiVersion: farthing/v1
providers:
  p: { base_url: "http://h/v1/", stream_usage: false, deny_fields: [models, provider], drain: true,
       timeouts: { connect: 1s, first_token: 2s, idle: 3s, total: 4m } }
  cloud: { wire: litellm, api_key_env: CLOUD_KEY, options: { aws_region_name: eu-central-1 } }
models:
  a: { provider: p, context: 1000, max_output: 100, supports: [tools, file], rejects: [seed], rename: { x: y },
       price: { input: 1, output: "2.5", cached_input: 0.1, cache_write: 1.25, reasoning: 3, audio_input: 4,
                audio_output: 5, image_input: 6 } }
  b: { provider: cloud, name: bedrock/anthropic.claude-sonnet-4-5-20250929-v1:0, context: 1000, price: catalog, quality: catalog }
  c: { provider: p, context: 1000, price: { gpu_hour: 3.6, gpus: 2, prefill_tps: 2000, decode_tps: 100, marginal_share: 10% } }
""",
        "apiVersion: farthing/v1\nclasses: {}\ndefaults: { allow: [a, b, c] }\n",
    )
    snapshot = found.snapshot
    assert snapshot is not None, [str(problem) for problem in found.errors]
    provider = snapshot.providers["p"]
    assert provider.base_url == "http://h/v1"
    assert (provider.stream_usage, provider.drain) == (False, True)
    assert provider.deny_fields == {"models", "provider"}
    assert provider.timeouts == Timeouts(connect=1, first_token=2, idle=3, total=240)
    assert snapshot.providers["cloud"].options == {"aws_region_name": "eu-central-1"}
    assert snapshot.required_key_variables == ("CLOUD_KEY",)
    fixed, gpu, cloud = (snapshot.price(name, NOW) for name in ("a", "c", "b"))
    assert fixed is not None
    assert gpu is not None
    assert cloud is not None
    assert [str(price) for price in fixed.unit_prices.values()] == [
        "1",
        "0.1",
        "1.25",
        "4",
        "6",
        "2.5",
        "3",
        "5",
    ]
    # 3.6 USD x 2 GPUs / 3600 s = 0.002 USD a second, at 2000 tokens a second: 1 USD per million tokens.
    assert (gpu.unit_prices["input"], gpu.unit_prices["output"]) == (Decimal(1), Decimal(20))
    assert gpu.unit_prices["input_cached"] == 0
    assert gpu.marginal_prices["output"] == 2
    assert fixed.marginal_prices == fixed.unit_prices


@pytest.mark.parametrize(
    ("old", "new", "path", "says"),
    [
        ("    price: catalog   ", "    # ", "models.mini", "no price, so no request is sent to it"),
        ("name: gpt-5-mini", "name: gpt-5-maxi", "models.mini.price", "no price for 'gpt-5-maxi'"),
        ("context: 272000  ", "context: 400000  ", "models.frontier.context", "charges more above 272000"),
        (
            "supports: [tools, json_schema]",
            "supports: [tool]",
            "models.small-local.supports[0]",
            "did you mean 'tools'",
        ),
    ],
)
def test_what_providers_will_not_do_as_meant_is_warned_about(
    old: str, new: str, path: str, says: str
) -> None:
    assert old in PROVIDERS_TEXT
    assert says in warning(loaded(providers=PROVIDERS_TEXT.replace(old, new, 1)), path)


@pytest.mark.parametrize(
    ("old", "new", "path", "says"),
    [
        ("allow: [frontier]", "allow: [frontier], deny: [frontier]", "teams.search.apps.legal.allow", "leaves no model"),
        ("  allow: [small-local, mini, gpt-4o, frontier]", "  allow: [small-local, mini, frontier]", "models.gpt-4o", "no allow list"),
        ("fallback: [mini, frontier]", "deny: [mini]\n  fallback: [mini, frontier]", "defaults.fallback[0]", "never serves as fallback"),
        (", at_limit: downgrade, hard_cap: 3300", ", at_limit: downgrade", "teams.search.budget", "no upper bound"),
        ("complex: { min_quality: 0.90", "complex: { min_quality: 0.99", "classes.complex.min_quality", "best prior is 0.94"),
        ("{ claude-sonnet-4-5: gpt-4o }", "{ claude-sonnet-5: frontier }", "aliases.claude-sonnet-5", "costs more"),
        ("rules:  ", "rules:\n  - { name: all, when: { tag.data: [pii, x] }, then: { substitute: true } }\n"
         "  - { name: some, when: { tag.data: [pii] }, then: { substitute: false } }\n#", "rules[1]", "unreachable"),
        ("tag.data: [pii] ", "tag.data: [pii], team: [serch] ", "rules[0].when.team[0]", "did you mean 'search'"),
        ("exceptions: []", "exceptions: [{ name: a, team: search, until: \"2026-11-24\", reason: b, budget: { month: 9, hard_cap: 9 } }]",
         "exceptions[0].until", "ended on 2026-11-24"),
        ("exceptions: []", "exceptions: [{ name: a, team: search, until: \"2027-01-01\", reason: b, allow: [mini] }]",
         "exceptions[0].allow[0]", "rule 'pii stays local' still excludes mini"),
        ("exceptions: []", "exceptions: [{ name: a, team: other, until: \"2027-01-01\", reason: b, allow: [mini] }]",
         "exceptions[0].team", "names no team 'other'"),
        ("contracts: []", "contracts: [{ provider: openai, discount: 5%, until: \"2026-01-01\", reference: R }]",
         "contracts[0].until", "ended on 2026-01-01"),
    ],
)  # fmt: skip
def test_what_the_policy_will_not_do_as_meant_is_warned_about(
    old: str, new: str, path: str, says: str
) -> None:
    assert old in POLICY_TEXT
    assert says in warning(loaded(policy=POLICY_TEXT.replace(old, new, 1)), path)


def test_a_prior_outside_its_measured_interval_is_warned_about() -> None:
    quality = {"models": {"qwen3-8b": {"simple": "0.9", "medium": "0.8", "complex": "0.5",
               "measured": {"simple": ["0.85", "0.93"], "medium": ["0.7", "0.9"], "complex": ["0.4", "0.6"]}}}}  # fmt: skip
    prices = json.loads((POLICIES / "prices.json").read_text(encoding="utf-8"))
    found = load(PROVIDERS_TEXT, POLICY_TEXT, Catalogue(prices, quality), NOW)
    assert "outside the measured interval 0.85 to 0.93" in warning(found, "models.small-local.quality.simple")


@pytest.mark.parametrize("name", ["policy", "providers"])
def test_the_tracked_json_schema_is_current_and_accepts_the_shipped_file(
    name: Literal["policy", "providers"],
) -> None:
    assert (POLICIES / f"{name}.schema.json").read_text(encoding="utf-8") == json_schema_text(name)
    validator = jsonschema.Draft202012Validator(json_schema(name))
    jsonschema.Draft202012Validator.check_schema(json_schema(name))
    shipped = yaml.safe_load((POLICIES / f"{name}.yaml").read_text(encoding="utf-8"))
    assert list(validator.iter_errors(shipped)) == []
    design = yaml.safe_load(DESIGN_POLICY if name == "policy" else DESIGN_PROVIDERS)
    assert list(validator.iter_errors(design)) == []
    assert list(validator.iter_errors({**shipped, "surplus": 1})) != []


def test_an_alias_bomb_is_refused_without_being_expanded() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (problem,) = read("policy.yaml", bomb).problems
    assert (problem.line, problem.column) == (1, 4)
    assert "anchor" in problem.message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("- a\n- b\n", "mapping"),
        ("[" * 5000, "deeper"),
        ("a: \x00", "control character"),
        ("x" * 1_000_001, "longer than"),
        ("{[1]: 2}", "a key must be text"),
    ],
)
def test_what_cannot_be_read_at_all_is_one_clear_problem(text: str, says: str) -> None:
    document = read("policy.yaml", text)
    assert document.root is None
    (problem,) = document.problems
    assert says in problem.message
    assert problem.remedy


@given(st.text(max_size=300))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_the_load_fail_in_any_other_way(text: str) -> None:
    found = loaded(policy=text)
    assert found.snapshot is None
    assert found.errors
    assert all(problem.line >= 1 and problem.column >= 1 and problem.remedy for problem in found.errors)


_LINES = POLICY_TEXT.splitlines(keepends=True)


@given(
    st.integers(0, len(POLICY_TEXT) - 1),
    st.integers(0, 12),
    st.sampled_from(["", "x", "0", ": ", "{", "]", "\t", "\n", "- ", '"', "&a ", "*a", "1e9", "~", "null"]),
)
@settings(max_examples=300, deadline=None)
def test_no_edit_of_a_good_file_makes_the_load_fail_in_any_other_way(at: int, cut: int, put: str) -> None:
    found = loaded(policy=POLICY_TEXT[:at] + put + POLICY_TEXT[at + cut :])
    assert (found.snapshot is None) == bool(found.errors)
    for problem in found.problems:
        assert problem.line >= 1
        assert problem.column >= 1
        assert problem.message
        assert problem.remedy


def test_the_hash_follows_the_content_not_the_layout() -> None:
    base = loaded().snapshot
    commented = loaded(policy="# a comment\n" + POLICY_TEXT.replace("month: 3000", 'month: "3000"')).snapshot
    changed = loaded(policy=POLICY_TEXT.replace("month: 3000", "month: 3001")).snapshot
    other = loaded(providers=PROVIDERS_TEXT.replace("context: 128000", "context: 127000")).snapshot
    assert base is not None
    assert commented is not None
    assert changed is not None
    assert other is not None
    assert base.hash == commented.hash
    assert len({base.hash, changed.hash, other.hash}) == 3


def test_a_typed_file_is_frozen() -> None:
    policy, problems = typed(read("policy.yaml", POLICY_TEXT), PolicyFile)
    assert problems == ()
    assert policy is not None
    with pytest.raises(ValueError, match="frozen"):
        policy.unknown_model = "refuse"  # type: ignore[misc]


def test_the_wheel_and_the_checkout_hold_the_same_files() -> None:
    names = {path.name for path in Path(POLICIES).iterdir()}
    assert names >= {"policy.yaml", "providers.yaml", "prices.json", "quality.json", "examples"}


# -- learning --

LEARN = "\nlearn: { shadow: 2%, budget: { month: 100 }, judge: frontier }\n"


def test_learning_is_off_unless_the_policy_says_so() -> None:
    assert loaded().snapshot is not None
    assert loaded().snapshot.learn is None  # type: ignore[union-attr]
    found = loaded(policy=POLICY_TEXT + "\nlearn: {}\n")
    assert found.problems == ()
    assert found.snapshot is not None
    assert found.snapshot.learn == LearnPolicy(Decimal(0), None, None, keep_prompts=False)


def test_learning_is_compiled_to_exact_amounts() -> None:
    found = loaded(policy=POLICY_TEXT + LEARN.replace(" }\n", ", keep_prompts: true }\n"))
    assert found.problems == ()
    assert found.snapshot is not None
    assert found.snapshot.learn == LearnPolicy(
        Decimal("0.02"), NanoUSD(100_000_000_000), "frontier", keep_prompts=True
    )


def test_what_a_class_asks_for_comes_from_the_nearest_place_that_says_it() -> None:
    text = (
        (POLICY_TEXT + LEARN)
        .replace(
            "medium:  { min_quality: 0.90,",
            "medium:  { min_quality: 0.90, confidence: 95%, cascade: { verify: signals },",
        )
        .replace(
            "faq-bot: { cache: { semantic: enforce } }",
            "faq-bot: { classes: { medium: { confidence: none, cascade: { verify: frontier } } } }",
        )
        .replace(
            "    cost_center:", "    classes: { medium: { cascade: { verify: none } } }\n    cost_center:", 1
        )
    )
    found = loaded(policy=text)
    assert found.problems == (), [str(problem) for problem in found.problems]
    snapshot = found.snapshot
    assert snapshot is not None

    def asked(team: str, app: str | None) -> tuple[Decimal | None, str | None]:
        requirement = snapshot.resolve(team, app, {}, NOW).classes["medium"]
        return requirement.confidence, requirement.cascade

    assert asked("elsewhere", None) == (Decimal("0.95"), "signals")
    assert asked("search", None) == (Decimal("0.95"), None)
    assert asked("search", "faq-bot") == (None, "frontier")
    plain = loaded(policy=POLICY_TEXT).snapshot
    assert plain is not None
    assert (
        plain.resolve("elsewhere", None, {}, NOW).fingerprint
        != snapshot.resolve("elsewhere", None, {}, NOW).fingerprint
    ), "an answer made under other demands is not taken from the cache"


def test_learning_that_does_nothing_or_cannot_be_bounded_is_warned_about() -> None:
    def policy(learn: str, old: str = "", new: str = "") -> str:
        return POLICY_TEXT.replace(old, new) + f"\nlearn: {learn}\n"

    found = loaded(policy=policy("{ judge: frontier }"))
    assert "no shadow answers to judge; add shadow" in warning(found, "learn.judge")
    found = loaded(policy=policy("{ budget: { month: 100 } }"))
    assert "nothing is spent on learning; add shadow" in warning(found, "learn.budget")
    sure = ("medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, confidence: 95%,")
    found = loaded(policy=policy("{}", *sure))
    assert "stays with its reference; add shadow" in warning(found, "learn")
    check = ("scope: team }", "scope: team, check: 5% }")
    found = loaded(policy=policy("{ budget: { month: 100 }, judge: frontier }", *check))
    assert not [w for w in found.warnings if w.path in ("learn.budget", "learn.judge")], (
        "checks are paid from it"
    )
    found = loaded(policy=policy("{}", *check))
    assert "no served answer is checked; add learn" in warning(found, "defaults.cache.check")
    certified = ("semantic: shadow", "semantic: certified")
    found = loaded(policy=policy("{}", *certified))
    assert "an error that grows goes unnoticed; add check" in warning(found, "defaults.cache.semantic")
    unpriced = PROVIDERS_TEXT + "\n  free: { provider: openai, context: 8000 }\n"
    found = loaded(unpriced, policy("{ shadow: 2%, budget: { month: 1 }, judge: free }"))
    assert "free has no price" in warning(found, "learn.judge")
    medium = "medium:  { min_quality: 0.90,"
    found = loaded(unpriced, policy("{}", medium, "medium:  { cascade: { verify: free },"))
    assert "what checking costs is unknown; price it" in warning(found, "classes.medium.cascade.verify")


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://api.example.com/v1", True),
        ("http://93.184.216.34/v1", True),
        ("http://[2606:2800:220:1::1]/v1", True),
        ("https://api.example.com/v1", False),
        ("http://127.0.0.1:8000/v1", False),
        ("http://10.1.2.3:8000/v1", False),
        ("http://vllm:8000/v1", False),
        ("http://vllm.models.svc.cluster.local/v1", False),
    ],
)
def test_a_key_that_would_cross_the_network_in_the_open_is_warned_about(url: str, warned: bool) -> None:
    found = loaded(providers=PROVIDERS_TEXT.replace("https://api.openai.com/v1", url))
    assert found.snapshot is not None
    paths = {problem.path for problem in found.warnings}
    assert ("providers.openai.base_url" in paths) is warned
