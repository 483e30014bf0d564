"""A run that is killed anywhere and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).with_name("training_harness.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All trials, run once in one program with a fixed number of threads."""
    return harness(tmp_path_factory.mktemp("training"))


def harness(root: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(HARNESS), str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def test_an_undisturbed_run_is_complete(results: dict[str, Any]) -> None:
    straight = results["straight"]
    assert straight["codes"] == [0]
    assert straight["state"] == "finished"
    assert [row["step"] for row in straight["rows"]] == list(range(1, len(straight["rows"]) + 1))
    assert straight["rows"][-1]["tokens"] == straight["summary"]["tokens"] == 970
    assert straight["summary"]["steps"] == len(straight["rows"]) >= 14
    assert straight["rows"][-1]["loss"] < straight["rows"][0]["loss"] - 1
    assert straight["left"] == []
    assert len(straight["model"]) == 2, "the export and the model of the first stage's end"
    by_domain = {row["step"] for row in straight["rows"] if "validation_loss_even" in row}
    ends = [row["step"] for row, after in pairwise(straight["rows"]) if row["stage"] != after["stage"]]
    assert by_domain == {*range(4, len(straight["rows"]), 4), *ends, len(straight["rows"])}
    in_last = [row["grad_norm"] for row in straight["rows"] if row["stage"] == "b"]
    assert straight["guard"]["norms"] == in_last, "a step is measured by its own stage's"


SAME = ("guard", "rows", "samples", "model", "summary", "state", "checkpoints", "left")


@pytest.mark.parametrize("key", SAME)
def test_a_pretraining_killed_nine_times_is_the_undisturbed_one_bit_for_bit(results: dict[str, Any], key: str) -> None:
    assert results["killed"]["codes"] == [-9] * 9 + [0]
    assert results["killed"][key] == results["straight"][key]


@pytest.mark.parametrize("key", SAME)
def test_a_pretraining_stopped_by_signals_is_the_undisturbed_one_bit_for_bit(results: dict[str, Any], key: str) -> None:
    assert results["asked to stop"]["codes"] == [143, 130, 143, 0]
    assert results["asked to stop"][key] == results["straight"][key]


@pytest.mark.parametrize("key", SAME)
def test_an_sft_killed_nine_times_is_the_undisturbed_one_bit_for_bit(results: dict[str, Any], key: str) -> None:
    assert results["sft killed"]["codes"] == [-9] * 9 + [0]
    assert results["sft killed"][key] == results["straight sft"][key]


@pytest.mark.parametrize("key", SAME)
def test_an_sft_stopped_by_signals_is_the_undisturbed_one_bit_for_bit(results: dict[str, Any], key: str) -> None:
    assert results["sft asked to stop"]["codes"] == [143, 130, 143, 0]
    assert results["sft asked to stop"][key] == results["straight sft"][key]


def test_an_undisturbed_sft_is_complete_and_learns(results: dict[str, Any]) -> None:
    straight = results["straight sft"]
    assert (straight["codes"], straight["state"], straight["left"]) == ([0], "finished", [])
    assert [row["step"] for row in straight["rows"]] == list(range(1, 14))
    summary = straight["summary"]
    assert summary["loss_last"] < summary["loss_first"]
    assert summary["conversations"] == 40


def test_a_finished_run_is_not_done_again(results: dict[str, Any]) -> None:
    assert results["again"] == {"code": 0, "touched": False}


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(results: dict[str, Any]) -> None:
    found = results["damaged"]
    assert found["codes"] == [-9, 0]
    for key in ("guard", "rows", "samples", "model", "summary", "checkpoints"):
        assert found[key] == results["straight"][key], key


def random_lives(root: Path, how: str, lives: int, codes: set[int]) -> None:
    """A run that ends `lives` times at random is the one left in peace, bit for bit."""
    results = harness(root, how, str(lives))
    *ended, last = results["ended"]["codes"]
    assert len(ended) == lives
    assert set(ended) == codes
    assert last == 0
    for key in SAME:
        assert results["ended"][key] == results["straight"][key], key


@pytest.mark.slow
def test_a_run_killed_at_random_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """Row T1 of the reliability plan; its long form is GLMCTL_SOAK_KILLS=200."""
    kills = int(os.environ.get("GLMCTL_SOAK_KILLS", "20"))
    random_lives(tmp_path, "kills", kills, {-signal.SIGKILL, -signal.SIGALRM})


@pytest.mark.slow
def test_a_run_asked_to_stop_at_random_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    """Row T4; its long form is GLMCTL_SOAK_SIGNALS=50."""
    signals = int(os.environ.get("GLMCTL_SOAK_SIGNALS", "10"))
    random_lives(tmp_path, "signals", signals, {128 + signal.SIGTERM, 128 + signal.SIGINT})
