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
import torch
import yaml

from glmctl.model.folder import load_model

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


def test_a_bad_step_of_one_rank_changes_no_rank_and_three_in_a_row_stop_all(root: Path) -> None:
    """Row T5: an infinite gradient, a loss a thousand times too large, then NaN three times; see poisoned_rank.py."""
    bad = {6: "gradient", 20: "huge", 24: "loss", 25: "gradient", 26: "loss"}
    program = [str(HARNESS.with_name("poisoned_rank.py")), str(root), "poisoned", *(f"{k}:{n}" for n, k in bad.items())]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HARNESS.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    told = [root / f"poisoned-rank{rank}.json" for rank in (0, 1)]
    assert all(path.is_file() for path in told), done.stderr[-3000:]
    assert done.returncode != 0
    ranks = [json.loads(path.read_text()) for path in told]
    assert [rank["code"] for rank in ranks] == [5, 5]
    for rank in ranks:
        assert [row["step"] for row in rank["steps"]] == list(range(1, 27))
        unchanged = [row["step"] for row in rank["steps"] if row["before"] == row["after"]]
        assert unchanged == list(bad)
    assert [row["after"] for row in ranks[0]["steps"]] == [row["after"] for row in ranks[1]["steps"]]
    run = root / "poisoned"
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == list(bad)
    assert [row["reason"] for row in skipped] == ["not finite", "spike", *["not finite"] * 3]
    assert all(row["sequences"] >= 1 for row in skipped), "the batches are named"
    assert max(path.name for path in (run / "checkpoints").iterdir()) <= "step-00000025"


def test_without_mtp_weight_two_processes_leave_the_mtp_layer_alone_as_one_does(root: Path) -> None:
    """DDP wants the layer's pass all the same; nothing of it may count, and nothing of the layer may move."""
    words = ["--set", "mtp.weight=0", "--set", "mtp.then_weight=0", "--set", "mtp.switch_tokens=null"]
    words += ["--set", "balance.sequence_loss_weight=0.1"]
    runs = {"silent-one": words, "silent-two": [*words, "--processes", "2"]}
    for run, options in runs.items():
        done = glmctl(root, run, *options)
        assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(*(rows(root, run) for run in runs), strict=True):
        for key in ("loss", "balance_loss", "max_vio"):
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] <= 5 else 1e-3), (a["step"], key)
    layers = [load_model(root / run / "export").mtp for run in runs]
    states = [layer.state_dict() for layer in layers if layer is not None]
    assert len(states) == 2
    assert [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])] == []
