"""Broken edits of the shipped pair. Each is refused with the place, what is wrong, and the remedy.

`old` is replaced by `new` in the file; the problem must be reported where `at` first stands from the edited line on
(from the beginning, where it does not stand after it).
"""

# ruff: noqa: E501

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    name: str
    file: str
    old: str
    new: str
    at: str
    path: str
    message: str
    remedy: str


POLICY, PROVIDERS = "policy.yaml", "providers.yaml"

VARIANTS: tuple[Variant, ...] = (
    Variant(
        "octal number", POLICY, "month: 3000", "month: 03000", "03000",
        "teams.search.budget.month", "'03000' is not a plain number", "write 3000",
    ),
    Variant(
        "underscore", POLICY, "month: 3000", "month: 3_000", "3_000",
        "teams.search.budget.month", "not a plain number", "write 3000",
    ),
    Variant(
        "exponent", POLICY, "month: 3000", "month: 3e3", "3e3",
        "teams.search.budget.month", "not a plain number", "write 3000",
    ),
    Variant(
        "currency sign", POLICY, "month: 3000", "month: $3000", "$3000",
        "teams.search.budget.month", "not a plain number", "write 3000",
    ),
    Variant(
        "thousands comma", POLICY, "month: 3000", 'month: "3,000.50"', '"3,000.50"',
        "teams.search.budget.month", "not a plain number", "write 3000.5",
    ),
    Variant(
        "negative amount", POLICY, "month: 3000", "month: -3000", "-3000",
        "teams.search.budget.month", "is negative", "at least 0",
    ),
    Variant(
        "too many decimals", POLICY, "max_cost_per_request: 0.25", "max_cost_per_request: 0.12345678912",
        "0.12345678912", "defaults.max_cost_per_request", "nine decimals", "write 0.123456789",
    ),
    Variant(
        "share above one", POLICY, "{ min_quality: 0.90, first_token_p95: 4s }", "{ min_quality: 90, first_token_p95: 4s }",
        "90, first", "classes.medium.min_quality", "above 1", "write 90% or 0.9",
    ),
    Variant(
        "duration without unit", POLICY, "ttl: 24h", "ttl: 24", "24, scope",
        "defaults.cache.ttl", "has no unit", "write 24s",
    ),
    Variant(
        "duration in words", POLICY, "first_token_p95: 15s", "first_token_p95: 15 sec", "15 sec",
        "classes.complex.first_token_p95", "not a duration", "write 15s",
    ),
    Variant(
        "yes for true", POLICY, "substitute: false", "substitute: yes", "yes",
        "defaults.substitute", "not true or false", "write true",
    ),
    Variant(
        "unknown key", POLICY, "hard_cap: 3300", "hardcap: 3300", "hardcap",
        "teams.search.budget.hardcap", "unknown key 'hardcap'", "did you mean 'hard_cap'?",
    ),
    Variant(
        "unknown section", POLICY, "\nteams:\n", "\nteam:\n", "team:",
        "team", "unknown key 'team'", "did you mean 'teams'?",
    ),
    Variant(
        "shadow without budget", POLICY, "contracts: []", "contracts: []\nlearn: { shadow: 2% }", "learn: { shadow: 2% }",
        "learn", "no budget bounds them", "add budget: { month: 100 }",
    ),
    Variant(
        "shadow above one", POLICY, "contracts: []", "contracts: []\nlearn: { shadow: 2, budget: { month: 100 } }", "2, budget",
        "learn.shadow", "'2' is above 1", "write 2% or 0.02",
    ),
    Variant(
        "learning budget as a number", POLICY, "contracts: []", "contracts: []\nlearn: { shadow: 2%, budget: 100 }", "100 }",
        "learn.budget", "expected a mapping", "month",
    ),
    Variant(
        "unknown judge", POLICY, "contracts: []",
        "contracts: []\nlearn: { shadow: 2%, budget: { month: 100 }, judge: frontir }", "frontir",
        "learn.judge", "unknown model 'frontir'", "did you mean 'frontier'?",
    ),
    Variant(
        "unknown learning key", POLICY, "contracts: []", "contracts: []\nlearn: { keep_prompt: true }", "keep_prompt",
        "learn.keep_prompt", "unknown key 'keep_prompt'", "did you mean 'keep_prompts'?",
    ),
    Variant(
        "confidence without learning", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, confidence: 95%,",
        "95%", "classes.medium.confidence", "without learn", "add learn: {}",
    ),
    Variant(
        "confidence without learning, in a rule", POLICY, "{ first_token_p95: 10s }", "{ first_token_p95: 10s, confidence: 0.95 }",
        "0.95 }", "rules[1].then.classes.simple.confidence", "without learn", "add learn: {}",
    ),
    Variant(
        "confidence above one", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, confidence: 95,",
        "95, first", "classes.medium.confidence", "above 1", "write 95% or 0.95",
    ),
    Variant(
        "certainty", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, confidence: 100%,",
        "100%", "classes.medium.confidence", "endlessly many labels", "less than 100%, such as 95%",
    ),
    Variant(
        "coin toss", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, confidence: 0.05,",
        "0.05", "classes.medium.confidence", "coin toss", "at least 50%",
    ),
    Variant(
        "unknown verifier", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, cascade: { verify: signal },",
        "signal }", "classes.medium.cascade.verify", "unknown model 'signal'", "did you mean 'signals'?",
    ),
    Variant(
        "cascade as text", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, cascade: signals,",
        "signals", "classes.medium.cascade", "expected a mapping", "verify",
    ),
    Variant(
        "cascade without a verifier", POLICY, "medium:  { min_quality: 0.90,", "medium:  { min_quality: 0.90, cascade: {},",
        "cascade", "classes.medium.cascade.verify", "'verify' is missing", "add verify",
    ),
    Variant(
        "duplicate key", POLICY, 'cost_center: "4711"', 'cost_center: "4711"\n    cost_center: "4712"',
        'cost_center: "4712"', "teams.search.cost_center", "already set on line 26", "keep one",
    ),
    Variant(
        "missing section", POLICY, "\nclasses: ", "\nclases: ", "apiVersion",
        "classes", "'classes' is missing", "add classes",
    ),
    Variant(
        "unknown model", POLICY, "fallback: [mini, frontier]", "fallback: [mini, fronteer]", "fronteer",
        "defaults.fallback[1]", "unknown model 'fronteer'", "did you mean 'frontier'?",
    ),
    Variant(
        "unknown baseline", POLICY, "baseline: frontier", "baseline: gpt-9", "gpt-9",
        "baseline", "unknown model 'gpt-9'", "did you mean 'gpt-4o'?",
    ),
    Variant(
        "alias of an alias", POLICY, "{ claude-sonnet-4-5: gpt-4o }", "{ claude-sonnet-4-5: gpt-4o, best: claude-sonnet-4-5 }",
        "claude-sonnet-4-5 }", "aliases.best", "is an alias itself", "write gpt-4o instead",
    ),
    Variant(
        "list expected", POLICY, "allow: [frontier]", "allow: frontier", "frontier, tags",
        "teams.search.apps.legal.allow", "expected a list", "write [frontier]",
    ),
    Variant(
        "mapping expected", POLICY, "budget: { month: 50, at_limit: refuse }", "budget: 50", "50 }",
        "unlisted_teams.budget", "expected a mapping", "month",
    ),
    Variant(
        "wrong choice", POLICY, "at_limit: refuse", "at_limit: deny", "deny",
        "unlisted_teams.budget.at_limit", "not one of: downgrade, refuse", "use one of",
    ),
    Variant(
        "hard cap below month", POLICY, "hard_cap: 3300", "hard_cap: 330", "budget: { month: 3000",
        "teams.search.budget", "below month 3000", "raise hard_cap",
    ),
    Variant(
        "tab", POLICY, "    cost_center:", "\tcost_center:", "\tcost_center",
        "", "tab", "two spaces",
    ),
    Variant(
        "unclosed bracket", POLICY, "fallback: [mini, frontier]", "fallback: [mini, frontier", ": false",
        "", "not valid YAML", "close the bracket",
    ),
    Variant(
        "anchor", POLICY, "allow: [small-local, mini, gpt-4o, frontier]", "allow: &all [small-local, mini]", "&all",
        "", "anchor", "remove it",
    ),
    Variant(
        "yaml tag", POLICY, "unknown_model: auto", "unknown_model: !!str auto", "!!str",
        "", "tag", "plain value",
    ),
    Variant(
        "second document", POLICY, "\nteams:\n", "\n---\nteams:\n", "---",
        "", "second document", "keep one",
    ),
    Variant(
        "german date", POLICY, "exceptions: []",
        "exceptions: [{ name: a, team: search, until: 15.12.2026, reason: b, budget: { month: 1 } }]", "15.12.2026",
        "exceptions[0].until", "not a date", 'write "2026-12-15"',
    ),
    Variant(
        "date before anything", POLICY, "contracts: []",
        'contracts: [{ provider: openai, discount: 5%, from: "0001-01-01", reference: R }]', '"0001-01-01"',
        "contracts[0].from", "out of range", "a year from 2000",
    ),
    Variant(
        "exception without end", POLICY, "exceptions: []",
        "exceptions: [{ name: a, team: search, reason: b, budget: { month: 1 } }]", "{ name: a",
        "exceptions[0].until", "'until' is missing", "add until",
    ),
    Variant(
        "null for a reason", POLICY, "exceptions: []",
        "exceptions: [{ name: a, team: search, until: 2026-12-15, reason: null, budget: { month: 1 } }]", "null",
        "exceptions[0].reason", "YAML's word for none", "or remove the line",
    ),
    Variant(
        "tilde for a cost centre", POLICY, 'cost_center: "4711"', "cost_center: ~", "~",
        "teams.search.cost_center", "YAML's word for none", "write a few words",
    ),
    Variant(
        "exception without reason", POLICY, "exceptions: []",
        'exceptions: [{ name: a, team: search, until: "2026-12-15" }]', "{ name: a",
        "exceptions[0].reason", "'reason' is missing", "add reason",
    ),
    Variant(
        "time of day", POLICY, 'from: "20:00"', 'from: "8pm"', '"8pm"',
        "rules[1].when.time[1].from", "not a time of day", 'write "20:00"',
    ),
    Variant(
        "weekday in full", POLICY, "days: [sat, sun]", "days: [Saturday, sun]", "Saturday",
        "rules[1].when.time[0].days[0]", "not a day", "write sat",
    ),
    Variant(
        "time window that never holds", POLICY, 'to: "07:00"', 'to: "20:00"', '{ from: "20:00", to: "20:00"',
        "rules[1].when.time[1]", "never holds", "whole day",
    ),
    Variant(
        "rule without condition", POLICY, "when: { tag.data: [pii] }", "when: {}", "when: {}",
        "rules[0].when", "no condition", "tag.data",
    ),
    Variant(
        "tag without prefix", POLICY, "tag.data: [pii]", "data: [pii]", "data: [pii]",
        "rules[0].when.data", "unknown key 'data'", "did you mean 'tag.data'?",
    ),
    Variant(
        "rule without effect", POLICY, "then: { allow: [small-local], cache: { semantic: never } }", "then: {}",
        "- name: pii".removeprefix("- "), "rules[0]", "changes nothing", "allow",
    ),
    Variant(
        "unknown time zone", POLICY, "timezone: UTC", "timezone: Berlin", "Berlin",
        "organisation.timezone", "not a known time zone", "Europe/Berlin",
    ),
    Variant(
        "empty value", POLICY, "baseline: frontier ", "baseline: ", "baseline",
        "baseline", "empty", "remove the line",
    ),
    Variant(
        "contract of another provider", POLICY, "contracts: []",
        "contracts: [{ provider: openai, models: [small-local], discount: 5%, reference: R }]", "small-local], discount",
        "contracts[0].models[0]", "belongs to provider vllm-a", "correct the contract's provider",
    ),
    Variant(
        "wrong version", POLICY, "apiVersion: farthing/v1", "apiVersion: farthing/v2", "farthing/v2",
        "apiVersion", "'farthing/v2' is not one of", "did you mean 'farthing/v1'?",
    ),
    Variant(
        "unknown provider", PROVIDERS, "provider: vllm-a", "provider: vllm-b", "vllm-b",
        "models.small-local.provider", "unknown provider 'vllm-b'", "did you mean 'vllm-a'?",
    ),
    Variant(
        "prior above one", PROVIDERS, 'simple: "0.95"', 'simple: "1.95"', '"1.95"',
        "models.small-local.quality.simple", "above 1", "write 1.95%",
    ),
    Variant(
        "prior missing", PROVIDERS, ', complex: "0.45"', "", "quality: { simple",
        "models.small-local.quality.complex", "'complex' is missing", "add complex",
    ),
    Variant(
        "half a price", PROVIDERS, "prefill_tps: 9000, ", "", "price: { gpu_hour",
        "models.small-local.price.prefill_tps", "'prefill_tps' is missing", "add prefill_tps",
    ),
    Variant(
        "password in a URL", PROVIDERS, "http://vllm-a:8000/v1", "http://user:secret@vllm-a:8000/v1", '"http://user',
        "providers.vllm-a.base_url", "holds a user name or password", "api_key_env",
    ),
    Variant(
        "URL without scheme", PROVIDERS, "http://vllm-a:8000/v1", "vllm-a:8000/v1", '"vllm-a:8000',
        "providers.vllm-a.base_url", "not an http or https URL", "https://api.openai.com/v1",
    ),
    Variant(
        "key instead of variable", PROVIDERS, "api_key_env: OPENAI_API_KEY", "api_key_env: sk-proj-123", "sk-proj-123",
        "providers.openai.api_key_env", "not the name of an environment variable", "keep the key itself out",
    ),
    Variant(
        "key in the file", PROVIDERS, "api_key_env: OPENAI_API_KEY", "api_key: sk-proj-123", "api_key",
        "providers.openai.api_key", "unknown key 'api_key'", "did you mean 'api_key_env'?",
    ),
    Variant(
        "answer longer than the context", PROVIDERS, "max_output: 8192", "max_output: 81920", "81920",
        "models.small-local.max_output", "above context 32768", "at most 32768",
    ),
    Variant(
        "tag value in capitals", POLICY, "when: { tag.data: [pii] }", "when: { tag.data: [PII] }", "PII",
        "rules[0].when.tag.data[0]", "not a tag", "such as pii",
    ),
    Variant(
        "tag in capitals", POLICY, "when: { tag.data: [pii] }", "when: { tag.Data: [pii] }", "when: { tag.Data",
        "rules[0].when", "lower case", "write tag.data",
    ),
    Variant(
        "tag of an app in capitals", POLICY, "tags: { data: [contract] }", "tags: { data: [Contract] }", "Contract",
        "teams.search.apps.legal.tags.data[0]", "not a tag", "such as pii",
    ),
    Variant(
        "team no key can have", POLICY, "  search:", "  data science:", "data science",
        "teams.data science", "not a name that a key can carry", "letters, digits",
    ),
    Variant(
        "bare one as a bound", POLICY, "max_error: 1%", "max_error: 1", "1, ttl",
        "defaults.cache.max_error", "can mean 1% or all", "write 1% or 100%",
    ),
    Variant(
        "a call longer than a hold", PROVIDERS, "total: 300s", "total: 1h", "timeouts: {",
        "providers.vllm-a.timeouts", "15 minutes at most", "write total: 15m or less",
    ),
    Variant(
        "path of a call", PROVIDERS, "https://api.openai.com/v1", "https://api.openai.com/v1/chat/completions",
        '"https://api.openai.com/v1/chat/completions"',
        "providers.openai.base_url", "the gateway adds /chat/completions itself", "end the URL before",
    ),
    Variant(
        "model called auto", PROVIDERS, "  gpt-4o:", "  auto:", "auto",
        "models.auto", "let the gateway choose", "name the model otherwise",
    ),
    Variant(
        "rename of the stream", PROVIDERS, "{ max_tokens: max_completion_tokens }", "{ max_tokens: stream }", "mini:",
        "models.mini", "stream is the gateway's own", "remove it from rename",
    ),
)  # fmt: skip
