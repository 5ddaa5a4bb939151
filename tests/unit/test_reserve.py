"""Which budgets a request is held in, at which bound, and what is never traded for money."""

from __future__ import annotations

from typing import Any

import pytest

from router.core.errors import BudgetExceeded, InvalidRequest, UpstreamFailed
from tests.unit.pipeline_parts import POLICY, PROVIDERS, Rig, Script

CAPPED = "capped: { budget: { month: 0.01, at_limit: refuse, hard_cap: 0.01 }, fallback: [] }"


def policy(capped: str, more: str = "") -> str:
    return POLICY.replace(CAPPED, f"capped: {capped}") + more


async def test_a_budget_that_refuses_does_so_though_another_one_downgrades() -> None:
    rig = Rig(
        policy=policy(
            "{ budget: { month: 0.001, hard_cap: 1, at_limit: refuse } }",
            "organisation: { budget: { month: 5, hard_cap: 6, at_limit: downgrade } }\n",
        )
    )
    with pytest.raises(BudgetExceeded) as refused:
        await rig.ask("capped", max_tokens=1_000)  # 0.0042 at worst
    assert "team:capped" in refused.value.message
    assert rig.wire.calls == []


async def test_a_budget_that_downgrades_goes_on_to_its_hard_cap() -> None:
    rig = Rig(policy=policy("{ budget: { month: 0.001, hard_cap: 1, at_limit: downgrade } }"))
    await rig.ask("capped", max_tokens=1_000)
    assert rig.record.served_model == "first"


async def test_a_model_asked_for_by_name_is_not_traded_for_its_fallback_when_money_is_short() -> None:
    rig = Rig(policy=policy("{ budget: { month: 0.005, at_limit: refuse }, fallback: [first] }"))
    with pytest.raises(BudgetExceeded):
        await rig.ask("capped", model="second", max_tokens=1_000)  # 0.0084 at worst; 0.0042 on its fallback
    assert rig.wire.calls == []


async def test_a_fallback_without_a_price_is_not_tried_under_a_hard_cap() -> None:
    unpriced = PROVIDERS.replace(', price: { input: "2", output: "8" }', "")
    text = policy(
        "{ budget: { month: 1, at_limit: refuse }, fallback: [second], on_unpriced_model: allow }",
    )
    rig = Rig(providers=unpriced, policy=text)
    rig.wire.scripts["first"] = [Script(b"{}", status=500)]
    with pytest.raises(UpstreamFailed):
        await rig.ask("capped")
    assert [call.model.name for call in rig.wire.calls] == ["first"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"web_search_options": {}}, "web_search_options"),
        ({"tools": [{"type": "function"}, {"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": ["function"]}]}, "tools"),
    ],
)
async def test_fees_beside_the_tokens_are_refused_under_a_hard_cap(
    fields: dict[str, Any], param: str
) -> None:
    rig = Rig(providers=PROVIDERS.replace("max_output: 1000,", "max_output: 1000, supports: [tools],"))
    with pytest.raises(InvalidRequest) as refused:
        await rig.ask("capped", **fields)
    assert (refused.value.code, refused.value.param) == ("unbounded_cost", param)
    assert rig.wire.calls == []
    await rig.ask("alone", **fields)
    for free in ({"web_search_options": None}, {"tools": [{"type": "function"}, {"type": "custom"}, {}]}):
        await rig.ask("capped", max_tokens=10, **free)
    assert len(rig.wire.calls) == 3
