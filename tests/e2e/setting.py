"""The configuration most end-to-end tests run on."""

from __future__ import annotations

from tests.e2e.gateway import providers_yaml

MODELS = ("small:typical=12", "middle:typical=12", "frontier:typical=12", "slow:tps=20,typical=200")
FAULTS = (
    "400",
    "401",
    "402",
    "403",
    "429",
    "500",
    "stall",
    "stall_after_headers",
    "silence",
    "cut",
    "reset",
    "disconnect",
    "error_first",
    "error_midstream",
    "no_usage",
    "redirect",
    "not_json",
    # odd, and yet whole answers
    "crlf",
    "bytewise",
    "gzip",
    "no_done",
    "usage_with_choices",
)
PRICES = {"small": ("0.10", "0.40"), "middle": ("1", "4"), "frontier": ("5", "20")}
_QUALITY = {
    "small": ("0.95", "0.80", "0.45"),
    "middle": ("0.97", "0.93", "0.75"),
    "frontier": ("0.99", "0.97", "0.94"),
}
_TIMEOUTS = "timeouts: {{ connect: 20s, first_token: {first_token}, idle: {idle}, total: 40s }}"
_SIZE = "context: 128000, max_output: 16384, supports: [tools, json_schema, vision]"


def model(name: str, provider: str = "sim") -> str:
    """`name` as in PRICES, with its price and quality."""
    bought, sold = PRICES[name]
    simple, medium, complex_ = _QUALITY[name]
    return (
        f'{{ provider: {provider}, name: {name}, {_SIZE}, price: {{ input: "{bought}", output: "{sold}" }}, '
        f'quality: {{ simple: "{simple}", medium: "{medium}", complex: "{complex_}" }} }}'
    )


def providers(url: str) -> str:
    """Three good models, one slow one, and one for each fault, at a provider of its own each."""
    named = {"sim": f'{{ wire: openai, base_url: "{url}", timeouts: {{ connect: 20s }} }}'}
    models = {name: model(name) for name in PRICES}
    models["slow"] = f'{{ provider: sim, name: slow, {_SIZE}, price: {{ input: "1", output: "4" }} }}'
    for fault in FAULTS:
        name = f"bad-{fault.replace('_', '-')}"
        # Short only where waiting is the fault: a busy machine may hold up any other answer for a second.
        timeouts = _TIMEOUTS.format(
            first_token="1s" if fault.startswith("stall") else "20s",
            idle="1s" if fault == "silence" else "20s",
        )
        named[name] = f'{{ wire: openai, base_url: "{url}", {timeouts} }}'
        models[name] = f'{{ provider: {name}, name: {name}, {_SIZE}, price: {{ input: "1", output: "4" }} }}'
    return providers_yaml(models, named)


def policy(defaults: str = "", teams: str = "", more: str = "") -> str:
    """`defaults` continues the mapping of that name; `teams` and `more` are whole lines.

    No class asks for speed: a machine that stands still for a moment would change the choice of the model.
    """
    bad = ", ".join(f"bad-{fault.replace('_', '-')}" for fault in FAULTS)
    return f"""\
apiVersion: farthing/v1
currency: USD
baseline: frontier
aliases: {{ gpt-4o: middle }}
classes:
  simple:  {{ min_quality: 0.90, first_token_p95: none }}
  medium:  {{ min_quality: 0.90, first_token_p95: none }}
  complex: {{ min_quality: 0.90, first_token_p95: none }}
defaults:
  allow: [small, middle, frontier, slow, {bad}]
  fallback: [middle]
{defaults}
teams:
  search: {{ cost_center: "4711" }}
  solo: {{ fallback: [] }}
  swap: {{ substitute: true }}
{teams}
rules:
  - {{ name: pii stays, when: {{ tag.data: [pii] }}, then: {{ allow: [frontier] }} }}
{more}
"""
