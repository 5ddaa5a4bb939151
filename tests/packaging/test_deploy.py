"""The compose file, Prometheus and Grafana fit together and hold no secret. Read here, not started."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

METRICS: dict[str, set[str]] = {
    "farthing_requests_total": {"team", "model", "prompt_class", "cache", "status"},
    "farthing_request_duration_seconds": {"model"},
    "farthing_time_to_first_token_seconds": {"model"},
    "farthing_tokens_total": {"model", "bucket"},
    "farthing_cost_nanousd_total": {"team", "model"},
    "farthing_avoided_nanousd_total": {"team"},
    "farthing_refused_total": {"reason"},
    "farthing_upstream_attempts_total": {"provider", "outcome"},
    "farthing_breaker_open": {"provider", "model"},
    "farthing_budget_spent_ratio": {"budget"},
    "farthing_journal_unsettled": set(),
    "farthing_sql_up": set(),
    "farthing_redis_up": set(),
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/farthing.json").read_text())
    return loaded


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def test_compose_has_every_service_and_each_can_be_waited_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"migrate", "gateway", "redis", "postgres", "prometheus", "grafana"}
    for name, service in services.items():
        for dependency, condition in service.get("depends_on", {}).items():
            assert dependency in services
            if condition["condition"] == "service_healthy":
                assert "test" in services[dependency]["healthcheck"], f"{name} waits for {dependency}"
    assert services["gateway"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_compose_mounts_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-([^}]*)\}", r"\1", mount).split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), mount
            else:
                assert source in compose["volumes"], mount


def test_compose_takes_every_secret_from_the_environment(compose: dict[str, Any]) -> None:
    asked = {line.split("=")[0] for line in (DEPLOY / "env.example").read_text().splitlines() if "=" in line}
    for name, service in compose["services"].items():
        for key, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|_KEY$", key):
                # No value hands the variable through as it is; anything else must be required and unset here.
                assert value is None or re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
        for variable in re.findall(r"(?<!\$)\$\{(\w+):\?", json.dumps(service)):
            assert variable in asked, f"{variable} is missing in deploy/env.example"
    assert not [
        line
        for line in (DEPLOY / "env.example").read_text().splitlines()
        if re.search(r"(KEY|SECRET|PASSWORD)=.", line)
    ]


def test_only_the_gateway_can_be_opened_to_other_machines(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or (name, port) == (
                "gateway",
                "${FARTHING_BIND:-127.0.0.1}:8400:8400",
            )


def test_the_gateway_runs_without_rights(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    assert gateway["read_only"] is True
    assert gateway["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in gateway["security_opt"]
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^USER farthing$", dockerfile, re.MULTILINE)
    assert dockerfile.count("--require-hashes") == 2


def test_the_image_gets_every_file_it_copies() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copies for source in line.split()]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


def test_prometheus_scrapes_the_gateway(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    command = compose["services"][host]["command"]
    assert command[command.index("--port") + 1] == port
    assert all((DEPLOY / "prometheus" / rule).exists() for rule in config["rule_files"])


def test_dashboard_and_alerts_use_known_metrics_and_labels(dashboard: dict[str, Any]) -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    queries = expressions(dashboard) + [rule["expr"] for group in groups for rule in group["rules"]]
    for query in queries:
        names = set(re.findall(r"farthing_\w+", query))
        known = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in METRICS else name for name in names}
        assert known <= METRICS.keys(), query
        allowed = {"le"}.union(*(METRICS[name] for name in known))
        used = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
        used |= {
            label
            for group in re.findall(r"farthing_\w+\{([^}]*)\}", query)
            for label in re.findall(r"(\w+)[=!]", group)
        }
        assert used <= allowed, query


def test_the_dashboard_shows_every_metric(dashboard: dict[str, Any]) -> None:
    shown = "\n".join(expressions(dashboard))
    assert not [name for name in METRICS if name not in shown]


def test_the_dashboard_reads_the_provisioned_source(
    dashboard: dict[str, Any], compose: dict[str, Any]
) -> None:
    [source] = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel}
    assert used == {source["uid"]}
    [provider] = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/farthing.yml").read_text())[
        "providers"
    ]
    path = provider["options"]["path"]
    assert any(mount.split(":")[1] == path for mount in compose["services"]["grafana"]["volumes"])


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
