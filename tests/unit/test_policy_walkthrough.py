"""docs/finops.md: every printed command runs when pasted, and every printed edit is the one of its example."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "finops.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "policies" / "examples"


def test_every_command_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 5
    script = "\n".join(blocks).replace("/tmp/farthing-trial", str(tmp_path / "trial"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FARTHING_DATA_DIR": str(tmp_path / "data"),
    }
    done = subprocess.run(
        ["bash", "-eu"], input=script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No problems found.") == 5
    assert "Traceback" not in done.stderr


def test_each_printed_edit_is_the_one_of_its_example() -> None:
    printed = re.findall(r"```diff\n(.*?)```.*?policies/examples/([\w-]+)/after", TEXT, re.S)
    assert len(printed) == 4
    for diff, folder in printed:
        sides = [
            (EXAMPLES / folder / f"{side}.policy.yaml").read_text(encoding="utf-8").splitlines()
            for side in ("before", "after")
        ]
        changed = [line for line in difflib.ndiff(*sides) if line[0] in "+-"]
        assert [line[0] + line[2:] for line in changed] == [
            line for line in diff.splitlines() if line[0] in "+-"
        ]


def test_every_example_folder_is_named() -> None:
    for folder in EXAMPLES.iterdir():
        if folder.is_dir():
            assert folder.name in TEXT
