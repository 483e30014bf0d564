"""A run that is killed anywhere and started again is the run that was never killed, bit for bit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HARNESS = Path(__file__).with_name("training_harness.py")


def _names(attribute: str) -> list[str]:
    spec = importlib.util.spec_from_file_location("training_harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(getattr(module, attribute))


PRETRAIN, SFT = _names("DEATHS"), _names("SFT_DEATHS")
EXIT_CODES = {"sigterm": 143, "sigint": 130, "sigterm twice": 143, "sft sigterm": 143}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All trials, run once in one program with a fixed number of threads."""
    root = tmp_path_factory.mktemp("training")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(root)], capture_output=True, text=True, check=False, env=environment
    )
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


@pytest.mark.parametrize("death", PRETRAIN)
def test_a_killed_pretraining_continues_bit_for_bit(results: dict[str, Any], death: str) -> None:
    straight, found = results["straight"], results[death]
    expected = EXIT_CODES.get(death, -9)
    assert found["codes"] == [expected] * (len(found["codes"]) - 1) + [0]
    assert found["rows"] == straight["rows"]
    assert found["samples"] == straight["samples"]
    assert found["model"] == straight["model"]
    assert found["summary"] == straight["summary"]
    assert found["state"] == "finished"
    assert found["left"] == [], "temporary files of the killed process"
    assert found["checkpoints"] == straight["checkpoints"]


@pytest.mark.parametrize("death", SFT)
def test_a_killed_sft_continues_bit_for_bit(results: dict[str, Any], death: str) -> None:
    straight, found = results["straight sft"], results[death]
    assert found["codes"] == [EXIT_CODES.get(death, -9), 0]
    for key in ("rows", "samples", "model", "summary", "state", "checkpoints"):
        assert found[key] == straight[key], key
    assert straight["summary"]["loss_last"] < straight["summary"]["loss_first"]


def test_a_finished_run_is_not_done_again(results: dict[str, Any]) -> None:
    assert results["again"] == {"code": 0, "touched": False}


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(results: dict[str, Any]) -> None:
    found = results["damaged"]
    assert found["codes"] == [-9, 0]
    for key in ("rows", "samples", "model", "summary", "checkpoints"):
        assert found[key] == results["straight"][key], key
