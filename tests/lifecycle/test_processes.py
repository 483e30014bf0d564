"""Several processes train what one process trains, and end the way one process ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.multiprocess

HARNESS = Path(__file__).with_name("training_harness.py")


def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_harness", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    module = harness()
    module.prepare(folder)
    recipe = module.pretrain_recipe(folder).model_dump(mode="json")
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def glmctl(root: Path, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "glmctl", "pretrain", str(root / "pretrain.yaml"), "--run", str(root / run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *words, "--quiet"], capture_output=True, text=True, check=False, env=environment, timeout=280
    )


def rows(root: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_have_the_losses_of_one(root: Path) -> None:
    """Only the order of fp32 sums differs: 1e-5 relative, growing slowly with the steps."""
    one, two = glmctl(root, "one"), glmctl(root, "two", "--processes", "2")
    assert one.returncode == 0, one.stderr[-3000:]
    assert two.returncode == 0, two.stderr[-3000:]
    alone, together = rows(root, "one"), rows(root, "two")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for a, b in zip(alone, together, strict=True):
        for key in ("tokens", "lr", "targets", "stage"):
            assert a[key] == b[key], (a["step"], key)
        for key in ("loss", "mtp_loss", "balance_loss", "validation_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] <= 5 else 1e-3), (a["step"], key)
    lengths = {"a": 16, "b": 32}
    assert any(row["batch_tokens"] == lengths[row["stage"]] for row in alone), "a step with one row, for one rank"
    status = json.loads((root / "two" / "status.json").read_text())
    assert status["state"] == "finished"
    assert json.loads((root / "two" / "env.json").read_text())["processes"] == 2
    assert len((root / "two" / "samples.jsonl").read_text().splitlines()) == 3, "only one rank writes"
    assert not [p for p in (root / "two").rglob(".*") if p.name != ".lock"]


def test_a_diverging_job_ends_with_its_own_exit_code(root: Path) -> None:
    words = ("--set", "schedule.peak_lr=1e30", "--set", "schedule.final_lr=1e29", "--set", "grad_clip=1e30")
    done = glmctl(root, "diverged", "--processes", "2", *words)
    assert done.returncode == 5, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert json.loads((root / "diverged" / "status.json").read_text())["state"] == "failed"


# ----------------------------------------------------------------------------- row T5: one rank's bad step


def poisoned(root: Path, kind: str, first: int, last: int) -> tuple[int, list[dict[str, Any]]]:
    """Exit code of the job, and what each of two ranks saw: see poisoned_rank.py."""
    run = f"poisoned-{kind}-{first}-{last}"
    program = [str(HARNESS.with_name("poisoned_rank.py")), str(root), run, kind, str(first), str(last)]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HARNESS.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    ranks = [root / f"{run}-rank{rank}.json" for rank in (0, 1)]
    assert all(path.is_file() for path in ranks), done.stderr[-3000:]
    return done.returncode, [json.loads(path.read_text()) for path in ranks]


@pytest.mark.parametrize("kind", ["gradient", "huge"])
def test_a_bad_step_of_one_rank_changes_no_rank_and_training_goes_on(root: Path, kind: str) -> None:
    bad = 20
    code, ranks = poisoned(root, kind, bad, bad)
    assert code == 0
    for rank in ranks:
        assert [row["step"] for row in rank["steps"] if row["skipped"]] == [bad]
        for row in rank["steps"]:
            assert (row["before"] == row["after"]) == (row["step"] == bad), row["step"]
    assert [row["after"] for row in ranks[0]["steps"]] == [row["after"] for row in ranks[1]["steps"]]
    run = root / f"poisoned-{kind}-{bad}-{bad}"
    (skipped,) = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert skipped["step"] == bad
    assert skipped["sequences"] >= 1
    assert skipped["reason"] == ("spike" if kind == "huge" else "not finite")
    assert json.loads((run / "status.json").read_text())["summary"]["skipped_steps"] == 1


def test_three_bad_steps_in_a_row_stop_every_rank_before_they_are_saved(root: Path) -> None:
    code, ranks = poisoned(root, "gradient", 6, 1000)
    assert code != 0
    assert [rank["code"] for rank in ranks] == [5, 5]
    for rank in ranks:
        assert len(rank["steps"]) == 8
        assert all(row["before"] == row["after"] for row in rank["steps"][5:])
    run = root / "poisoned-gradient-6-1000"
    assert [json.loads(line)["step"] for line in (run / "skipped.jsonl").read_text().splitlines()] == [6, 7, 8]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004"]
