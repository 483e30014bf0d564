"""`glmctl pretrain` as a person runs it, on CUDA beside a CPU, resumed, compiled, under torchrun: the curves agree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# one worker makes the runs, and compares them
pytestmark = [pytest.mark.cuda, pytest.mark.xdist_group("pretrain")]

Rows = list[dict[str, Any]]
Said = dict[str, str | AssertionError]
# rendezvous on a port of its own, so that two of them on a machine do not meet
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
TORCHRUN = (*TORCHRUN, "--nproc-per-node", "1", "-m")
ON = os.environ.get("GLMCTL_CUDA_TESTS_ON", "cuda")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# 24 steps or so; the second stage has packed rows of several lengths
LONGER = ["--set", "stages.0.tokens=32768", "--set", "stages.1.tokens=8192", "--set", "mtp.switch_tokens=24576"]
LONGER += ["--set", "schedule.peak_lr=0.003"]
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "cpu": ([], NO_GPU),
    "cuda": ([], {}),
    "again": ([], {}),
    "bf16": (["--set", "precision=bf16"], {}),
    "compiled": (["--set", "compile=true"], {}),
    "compiled-bf16": (["--set", "compile=true", "--set", "precision=bf16", "--set", "recompute=true"], {}),
    # no MTP loss in the second stage: DDP, which wraps what torchrun starts, must not miss those gradients
    "torchrun": (["--set", "precision=bf16", "--set", "mtp.then_weight=0"], {"launcher": TORCHRUN}),
    "torchrun-fp32": ([], {"launcher": TORCHRUN}),
    "interrupted": ([], {}),
    "killed": ([], {}),
}


def words(name: str, folder: Path) -> list[str]:
    inputs = ["--set", f"tokenizer={folder}/tokenizer"]
    inputs += [f for n in (0, 1) for f in ("--set", f"stages.{n}.data={folder}/data")]
    # not --run: torchrun, which reads its script's options too, takes it for one of its own
    return ["pretrain", "smoke/pretrain", *inputs, *LONGER, *RUNS[name][0], "--set", f"name={name}"]


@pytest.fixture(scope="module")
def said(command: Any) -> Said:
    """What every run printed; all of them at once, as they take seconds of starting each."""
    folder = command.folder
    command("data", "tokenizer", "smoke/tokenizer", "--run", str(folder / "tokenizer"), **NO_GPU)
    prepare = ["--set", f"tokenizer={folder}/tokenizer", "--run", str(folder / "data")]
    command("data", "prepare", "smoke/data", *prepare, **NO_GPU)

    def run(name: str) -> str | AssertionError:
        try:
            if name in ("interrupted", "killed"):
                stop_after(command, name, 9)
            return str(command(*words(name, folder), GLMCTL_RUNS=str(folder), **RUNS[name][1]))
        except AssertionError as problem:
            # of the tests that look at this run
            return problem

    # compiling takes a CPU minutes
    wanted = [name for name in RUNS if ON == "cuda" or not name.startswith("compiled")]
    with ThreadPoolExecutor(min(len(wanted), max(1, (os.cpu_count() or 1) // 2))) as pool:
        return dict(zip(wanted, pool.map(run, wanted), strict=True))


def stop_after(command: Any, name: str, rows: int) -> None:
    """Start a run and end it, by a signal or by a kill, once it has logged so many steps."""
    log = command.folder / name / "metrics.jsonl"
    process: subprocess.Popen[str] = command.start(*words(name, command.folder), GLMCTL_RUNS=str(command.folder))
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") >= rows:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM if name == "interrupted" else signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if name == "interrupted" else -9), text


def read(said: Said, command: Any, metrics: Callable[[Path], Rows], name: str) -> Rows:
    found = said[name]
    if isinstance(found, AssertionError):
        raise found
    rows = metrics(command.folder / name)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) > 15
    assert not any(row.get("skipped") for row in rows)
    return rows


def furthest(a: Rows, b: Rows, key: str = "loss") -> float:
    assert len(a) == len(b)
    return max(abs(x[key] - y[key]) / max(abs(y[key]), 1e-9) for x, y in zip(a, b, strict=True))


def exact(rows: Rows) -> list[list[Any]]:
    keys = ("loss", "mtp_loss", "grad_norm", "validation_loss", "max_vio")
    return [[row.get(key) for key in keys] for row in rows]


@pytest.mark.parametrize(
    ("name", "beside", "tolerance"),
    [
        # Muon's Newton-Schulz is bf16 on CUDA and fp32 on a CPU
        ("cuda", "cpu", 0.02),
        ("bf16", "cuda", 0.03),
        ("compiled", "cuda", 2e-3),
        ("compiled-bf16", "bf16", 0.03),
        ("torchrun-fp32", "cuda", 2e-3),
    ],
)
def test_the_curve_is_that_of(
    name: str,
    beside: str,
    tolerance: float,
    said: Said,
    command: Any,
    metrics: Callable[[Path], Rows],
    observe: Callable[..., None],
) -> None:
    """Share of the loss by which any step may differ."""
    if name not in said:
        pytest.skip("not run on a CPU")
    rows, right = read(said, command, metrics, name), read(said, command, metrics, beside)
    observe(furthest=furthest(rows, right), end=[rows[-1]["loss"], right[-1]["loss"]])
    assert furthest(rows[:1], right[:1]) < 2e-3
    assert furthest(rows, right) < tolerance
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_under_torchrun_in_bf16(said: Said, command: Any, metrics: Callable[[Path], Rows]) -> None:
    """DDP of one process over NCCL, with an MTP layer that stops being trained on the way."""
    rows = read(said, command, metrics, "torchrun")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert rows[-1]["mtp_loss"] == 0
    assert (command.folder / "torchrun" / "export" / "config.json").is_file()


@pytest.mark.parametrize("name", ["interrupted", "killed"])
def test_resumed_is_uninterrupted(
    name: str, said: Said, command: Any, metrics: Callable[[Path], Rows], observe: Callable[..., None]
) -> None:
    """As near as two undisturbed runs are to each other: the same bits wherever those are."""
    straight, again, resumed = (read(said, command, metrics, run) for run in ("cuda", "again", name))
    observe(
        twice_is_the_same_bits=exact(straight) == exact(again),
        resumed_is_the_same_bits=exact(resumed) == exact(straight),
        twice=furthest(again, straight),
        resumed=furthest(resumed, straight),
    )
    assert "resuming after step" in str(said[name])
    if exact(straight) == exact(again):
        assert exact(resumed) == exact(straight)
    assert furthest(resumed, straight) < max(1e-3, 3 * furthest(again, straight))


def test_it_ran_on_the_device(said: Said, command: Any) -> None:
    """A checkpoint holds the device's random state, and a run on a CPU none."""
    from safetensors import safe_open

    for name in ("cuda", "cpu"):
        assert isinstance(said[name], str)
    for name, expected in (("cuda", ON == "cuda"), ("cpu", False)):
        newest = max((command.folder / name / "checkpoints").iterdir())
        with safe_open(newest / "tensors.safetensors", "pt") as file:
            assert any(key.startswith("rng.cuda") for key in file.keys()) == expected  # noqa: SIM118
