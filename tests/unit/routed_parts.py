"""The pipeline of `pipeline_parts` with models that are routed between, and a verdict that is always the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, cast

from classifiers.classifier import Verdict
from router.pipeline import Pipeline
from router.stages.classify import Classify
from tests.unit.pipeline_parts import DONE, Rig, chunk

_SIZE = "context: 100000, max_output: 1000, supports: [tools, json_schema]"
PROVIDERS = f"""\
apiVersion: farthing/v1
providers:
  one: {{ wire: openai, base_url: "http://127.0.0.1:1/v1",
         timeouts: {{ first_token: 300ms, idle: 300ms, total: 2s }} }}
  two: {{ wire: openai, base_url: "http://127.0.0.1:2/v1" }}
models:
  cheap:  {{ provider: one, name: cheap-1, {_SIZE}, price: {{ input: "1", output: "4" }},
            quality: {{ simple: "0.95", medium: "0.92", complex: "0.91" }} }}
  strong: {{ provider: two, name: strong-1, {_SIZE}, price: {{ input: "10", output: "40" }},
            quality: {{ simple: "0.99", medium: "0.98", complex: "0.97" }} }}
  third:  {{ provider: two, name: third-1, {_SIZE}, price: {{ input: "2", output: "8" }}, rejects: [temperature] }}
"""


def policy(cascade: str = "", more: str = "", defaults: str = "allow: [cheap, strong, third]") -> str:
    """`cascade` is the value of every class's key; `more` are lines at the top level."""
    entry = f", cascade: {{ verify: {cascade} }}" if cascade else ""
    classes = "\n".join(
        f"  {name}: {{ min_quality: 0.9{entry} }}" for name in ("simple", "medium", "complex")
    )
    return f"""\
apiVersion: farthing/v1
baseline: strong
classes:
{classes}
defaults: {{ {defaults}, fallback: [strong] }}
teams:
  alone: {{ fallback: [cheap] }}
  capped: {{ budget: {{ month: 0.01, at_limit: refuse, hard_cap: 0.01 }} }}
{more}
"""


class _SameVerdict:
    async def verdict(self, owner: str, text: str, could_change: Callable[[Verdict], bool]) -> Verdict:
        return Verdict("medium", 0.5, 0.9, 100, "a test", "static", "none")


class RoutedRig(Rig):
    """`ask(model="auto")` goes to cheap, and to strong where something fails."""

    def __init__(self, policy_text: str, **options: Any) -> None:
        super().__init__(PROVIDERS, policy_text, **options)
        self.use(classify=cast(Classify, _SameVerdict()))

    def use(self, **stages: Any) -> None:
        self.pipeline = cast(Pipeline, dataclasses.replace(self.pipeline, **stages))

    def models_called(self) -> list[str]:
        return [call.model.name for call in self.wire.calls]


def said(text: str, finish: str = "stop", **message: Any) -> bytes:
    """A whole answer; ten tokens in, two out."""
    whole = {"role": "assistant", "content": text, **message}
    return json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": whole, "finish_reason": finish}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        }
    ).encode()


def streamed(*pieces: str) -> tuple[bytes, ...]:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    return (*(chunk(piece) for piece in pieces), chunk(finish="stop"), chunk(usage=usage), DONE)
