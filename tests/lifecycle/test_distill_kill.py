"""A distillation that is killed after any write and started again asks nobody anything twice and ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).with_name("distill_harness.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("distill-kill")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(root)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def test_every_life_but_the_last_ended_by_sigkill(results: dict[str, Any]) -> None:
    assert results["straight"]["codes"] == [0]
    *killed, last = results["killed"]["codes"]
    assert len(killed) >= 8
    assert set(killed) == {-9}
    assert last == 0


def test_nothing_was_sampled_twice(results: dict[str, Any]) -> None:
    """Two domains of six prompts twice, and each expert scored on three held-out problems of both domains."""
    asked = results["killed"]["asked"]
    assert len(asked) == 2 * 6 * 2 + 2 * 2 * 3
    assert asked == results["straight"]["asked"]


@pytest.mark.parametrize("key", ["state", "summary", "samples", "rows", "files"])
def test_what_it_leaves_is_what_the_undisturbed_run_leaves(results: dict[str, Any], key: str) -> None:
    assert results["killed"][key] == results["straight"][key]
