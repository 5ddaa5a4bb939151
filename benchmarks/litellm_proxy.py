"""litellm's proxy beside the gateway, from an environment of its own.

python3 -m venv /tmp/litellm && /tmp/litellm/bin/pip install "litellm[proxy]"
FARTHING_BENCH_LITELLM=/tmp/litellm make bench
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.processes import Process, free_port

VARIABLE = "FARTHING_BENCH_LITELLM"
_CONFIG = """
model_list:
  - model_name: middle
    litellm_params: {{ model: openai/middle, api_base: "{upstream}", api_key: "sk-none" }}
general_settings: {{ master_key: "{key}" }}
litellm_settings: {{ telemetry: false }}
"""
# As its documentation asks for in production; nothing is fetched.
_ENVIRONMENT = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
    "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS": "True",
    "LITELLM_LOCAL_BLOG_POSTS": "True",
    "LITELLM_LOCAL_POLICY_TEMPLATES": "True",
}


class LitellmProxy:
    """One worker, without database and budgets: less than what the gateway does."""

    def __init__(self, venv: Path, folder: Path, upstream: str, key: str) -> None:
        folder.mkdir()
        config = folder / "config.yaml"
        config.write_text(_CONFIG.format(upstream=upstream, key=key))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/v1"
        self.process = Process(
            [
                *(venv / "bin" / "litellm", "--config", config, "--host", "127.0.0.1"),
                *("--port", str(port), "--num_workers", "1"),
            ],
            folder=folder,
            log="litellm.log",
            environment=_ENVIRONMENT,
        )
        self.ready_after = self.process.wait_until_answers(
            f"http://127.0.0.1:{port}/health/readiness", seconds=180
        )

    def close(self) -> None:
        self.process.close()
