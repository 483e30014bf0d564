"""Reliability R6: an RL run that is killed anywhere and started again is the one that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("rl_harness.py")


@pytest.mark.slow
def test_an_rl_run_killed_at_random_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """Its long form is GLMCTL_SOAK_RL_KILLS=50."""
    kills = int(os.environ.get("GLMCTL_SOAK_RL_KILLS", "5"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(HARNESS), str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    straight, killed = results["straight"], results["killed"]
    *deaths, last = killed["codes"]
    assert (len(deaths), last) == (kills, 0)
    assert set(deaths) <= {-signal.SIGKILL, -signal.SIGALRM}
    rows = straight["rows"]
    # what there was to lose
    assert len({row.get("stage") for row in rows}) == 3
    assert len({row["temperature"] for row in rows[1:]}) > 1
    assert sum(row["groups_carried"] for row in rows[1:]) > 0
    assert max(row["staleness"] for row in rows[1:]) == 1
    for key in ("rows", "samples", "trajectories", "rollouts", "model", "state", "summary", "left"):
        assert killed[key] == straight[key], key
