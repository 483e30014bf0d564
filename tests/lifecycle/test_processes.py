"""Several processes train what one process trains, and end the way one process ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from glmctl.model.folder import load_model

pytestmark = pytest.mark.multiprocess

HARNESS = Path(__file__).with_name("training_harness.py")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, training_harness: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    training_harness.prepare(folder)
    recipe = training_harness.pretrain_recipe(folder).model_dump(mode="json")
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def glmctl(root: Path, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "glmctl", "pretrain", str(root / "pretrain.yaml"), "--run", str(root / run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *words, "--quiet"], capture_output=True, text=True, check=False, env=environment, timeout=280
    )


def life(root: Path, run: str, stop: int, processes: int) -> list[dict[str, Any]]:
    """One life of `run` in so many processes, asked to stop in step `stop` (0: never); what each rank told."""
    program = [str(HARNESS.with_name("one_life.py")), str(root), run, str(stop)]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-P", *(several if processes > 1 else []), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HARNESS.parents[2])}
    for old in root.glob("life-*.json"):
        old.unlink()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    told = [root / f"life-{stop}-rank{rank}.json" for rank in range(processes)]
    assert all(path.is_file() for path in told), done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in told]


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
    # a spike can be told once 16 steps of its stage are made, and the second begins with step 11
    bad = {6: "gradient", 30: "huge", 34: "loss", 35: "gradient", 36: "loss"}
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
        assert [row["step"] for row in rank["steps"]] == list(range(1, 37))
        unchanged = [row["step"] for row in rank["steps"] if row["before"] == row["after"]]
        assert unchanged == list(bad)
    assert [row["after"] for row in ranks[0]["steps"]] == [row["after"] for row in ranks[1]["steps"]]
    run = root / "poisoned"
    skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == list(bad)
    assert [row["reason"] for row in skipped] == ["not finite", "spike", *["not finite"] * 3]
    assert all(row["sequences"] >= 1 for row in skipped), "the batches are named"
    assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-00000032", "no rank left before it was"


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


def test_a_run_goes_on_in_one_process_and_in_two_again(root: Path) -> None:
    """Row T7: the same weights after each load, the same rows of data, the losses but for the order of fp32 sums.

    Asked to stop, no rank leaves before rank 0's checkpoint is on its slow disk: torchrun would end rank 0 with it.
    """
    straight = life(root, "straight", 0, 1)
    assert straight[0]["code"] == 0
    lives = [life(root, "elastic", stop, count) for stop, count in ((3, 2), (9, 1), (0, 2))]
    assert [[rank["code"] for rank in ranks] for ranks in lives] == [[143, 143], [143], [0, 0]]
    assert [[rank["done"] for rank in ranks] for ranks in lives] == [[0, 0], [3], [9, 9]]
    for before, after in pairwise(lives):
        states = {rank["left"] for rank in before} | {rank["loaded"] for rank in after}
        assert len(states) == 1, "the state that was left is the one that every rank has loaded"
    alone, together = rows(root, "straight"), rows(root, "elastic")
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for a, b in zip(alone, together, strict=True):
        for key in ("tokens", "lr", "targets", "stage", "filled_tokens"):
            assert a[key] == b[key], (a["step"], key)
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5), a["step"]


def test_ranks_that_see_different_checkpoints_do_not_train(root: Path) -> None:
    """A run folder that is not shared: one rank would go on from step 3, the other begin."""
    assert life(root, "apart-{rank}", 3, 1)[0]["code"] == 143
    shutil.copytree(root / "apart-0", root / "apart-1")
    shutil.rmtree(root / "apart-1" / "checkpoints" / "step-00000003")
    before = (root / "apart-0" / "metrics.jsonl").read_bytes()
    for rank in life(root, "apart-{rank}", 0, 2):
        assert rank["code"] == 4
        assert "rank 0 finds step 3, rank 1 finds step 0" in rank["message"]
    assert (root / "apart-0" / "metrics.jsonl").read_bytes() == before


def processes_of(path: Path) -> list[int]:
    """Living processes with `path` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(path).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_job_that_is_asked_to_stop_saves_and_leaves_no_process(root: Path) -> None:
    """Row T4 with several processes, asked as GNU timeout asks: the launcher, then all that it has started."""
    run = root / "stopped"
    command = [sys.executable, "-P", "-m", "glmctl", "pretrain", str(root / "pretrain.yaml"), "--run", str(run)]
    command += [
        "--processes",
        "2",
        "--quiet",
        "--set",
        "stages.1.tokens=2000000",
        "--set",
        "checkpoint.every_steps=1000",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as launcher:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in [launcher.pid, *processes_of(run)]:
            os.kill(process, signal.SIGTERM)
        _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 143, said[-3000:]
    assert processes_of(run) == []
    last = rows(root, "stopped")[-1]["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in said


@pytest.mark.parametrize(("other", "told"), [("time.sleep(3)", "all here"), ("os.kill(os.getpid(), 9)", "noticed")])
def test_ranks_wait_for_one_that_works_alone_and_not_for_one_that_died(tmp_path: Path, other: str, told: str) -> None:
    """Three seconds are longer than the collectives of this job may take; the wait itself would last for hours."""
    program = tmp_path / "waiting.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, sys, time
            from datetime import timedelta
            import torch
            from glmctl.parallel.accelerate import make_accelerator, wait_for_all

            rank = int(os.environ["RANK"])
            torch.distributed.init_process_group(
                "gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2, timeout=timedelta(seconds=2)
            )
            accelerator = make_accelerator()
            wait_for_all(accelerator)
            if rank == 1:
                {other}
            try:
                wait_for_all(accelerator)
                print("all here")
            except RuntimeError:
                print("noticed")
            sys.stdout.flush()
            os._exit(0)
            """
        )
    )
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HARNESS.parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", str(program)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [rank.communicate(timeout=120) for rank in ranks]
    assert ends[0][0].split("\n")[0] == told, ends[0][1][-2000:]
