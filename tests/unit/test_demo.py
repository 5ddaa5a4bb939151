"""The demo's prompts and files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from router.adapters.configuration import lint
from router.adapters.price_catalogue import shipped_catalogue, shipped_policies
from router.core.errors import ConfigurationError
from router.demo import _local, choose, read_prompts


@pytest.mark.parametrize("count", [1, 7, 40, 200, 500])
def test_prompts_are_varied_and_the_same_every_time(count: int) -> None:
    groups = read_prompts()
    chosen = choose(groups, count)
    assert len(chosen) == count
    assert chosen == choose(groups, count)
    distinct = len({prompt.text for prompt in chosen})
    assert distinct == min(max(1, round(count * 0.75)), sum(len(group["prompts"]) for group in groups))
    if count >= 40:
        assert {prompt.kind for prompt in chosen} == {group["kind"] for group in groups}
        assert {prompt.team for prompt in chosen} == {"search", "support", "engineering", "demo"}
        assert {prompt.model for prompt in chosen} == {"auto", "gpt-4o"}
        assert 0.4 < Counter(prompt.stream for prompt in chosen)[True] / count < 0.6


@pytest.mark.parametrize("providers", ["providers.yaml", "providers-local.yaml"])
def test_files_of_the_demo_are_without_problem(tmp_path: Path, providers: str) -> None:
    folder = shipped_policies() / "demo"
    (tmp_path / "providers.yaml").write_text((folder / providers).read_text())
    (tmp_path / "policy.yaml").write_text((folder / "policy.yaml").read_text())
    assert list(map(str, lint(tmp_path, shipped_catalogue()).problems)) == []


@pytest.mark.parametrize(
    ("url", "model"),
    [("http://127.0.0.1:1/v1", None), (None, "x"), ("file:///etc/passwd", "x"), ("http://u:p@h/v1", "x")],
)
def test_bad_local_endpoint_is_refused(url: str | None, model: str | None) -> None:
    with pytest.raises(ConfigurationError, match="--local-url"):
        _local(url, model)
