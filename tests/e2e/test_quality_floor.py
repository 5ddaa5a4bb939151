"""A class that asks for confidence, on a live gateway: the reference answers, and what is missing is said."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from tests.e2e.conftest import StartGateway
from tests.e2e.setting import policy


def test_the_reference_answers_until_labels_allow_less(
    start_gateway: StartGateway, unique: Callable[[str], str]
) -> None:
    plain = policy(more="learn: {}")
    gateway = start_gateway(policy=plain.replace("min_quality: 0.90", "min_quality: 0.90, confidence: 95%"))
    answer = gateway.chat(gateway.key("search"), unique("What is the capital of France?"))
    assert answer.headers["x-farthing-model"] == "frontier"
    said = answer.headers["x-farthing-decision"]
    assert "labels missing for 95 % confidence" in said
    assert said.endswith(answer.headers["x-request-id"])
    gateway.settled()
    row = gateway.row(answer.headers["x-request-id"])
    assert "labels missing for 95 % confidence" in str(row["dropped"])
    explained = gateway.cli("policy", "explain", "--request-id", answer.headers["x-request-id"])
    assert "quality floor: " in explained.stdout
    metrics = httpx.get(f"{gateway.url}/metrics", timeout=60).text
    assert 'farthing_floor_labels_missing{model="small",prompt_class="simple"}' in metrics
