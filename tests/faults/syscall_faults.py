"""Saves checkpoints in forked processes whose system calls fail one at a time, or are written down. Not a test.

    python syscall_faults.py FOLDER EVERY   -> FOLDER/results.json; every EVERY-th fault point is tried

Everything is imported once. A child waits until strace is attached to it, saves, and ends; strace makes its k-th fsync
(open, write, rename, mkdir) fail as a full or failing disk would, or follows all of them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.errors import EnvironmentProblem, GlmctlError
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import MuonSpec
from glmctl.run import atomic
from glmctl.training import checkpoint
from glmctl.training.optim import MixedOptimizer, build_optimizer

FAULTS = {
    "openat": "EMFILE",
    "write": "ENOSPC",
    "fsync": "EIO",
    "rename": "ENOSPC",
    "mkdir": "ENOSPC",
    "unlinkat": "EIO",
}
"""system call -> the error it fails with"""
PR_SET_PTRACER = 0x59616D61
ANY_TRACER = ctypes.c_ulong(-1)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
)


def trained() -> tuple[GlmMoe, MixedOptimizer]:
    """A model after one step, so that there is optimizer state."""
    model = GlmMoe(CONFIG, seed=0)
    optimizer = build_optimizer(model, MuonSpec())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_lr(0.01)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def traced(work: Callable[[], None], options: list[str], told: Path) -> int:
    """The exit code of a forked child that does `work` under strace with `options`. SystemExit without strace."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY_TRACER, 0, 0, 0)
        os.close(writing)
        os.read(reading, 1)
        code = 1
        try:
            work()
            code = 0
        except EnvironmentProblem as problem:
            code = problem.exit_code
            # in one write: what strace makes fail has failed by now
            told.write_text(problem.message)
        except GlmctlError as other:
            told.write_text(f"{type(other).__name__}: {other.message}")
        except OSError as other:
            told.write_text(f"untold: {other!r}")
        finally:
            os._exit(code)
    os.close(reading)
    tracer = subprocess.Popen(["strace", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_tracer(pid, tracer)
    except SystemExit:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise
    os.write(writing, b"x")
    os.close(writing)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    tracer.communicate()
    return code


def wait_for_tracer(pid: int, tracer: subprocess.Popen[str]) -> None:
    """Return once the process is traced."""
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        if tracer.poll() is not None:
            said = tracer.stderr.read() if tracer.stderr is not None else ""
            print(f"strace cannot attach: {said.strip()}")
            raise SystemExit(77)
        time.sleep(0.001)


def points(counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    """(system call, which of its calls fails)."""
    for call in FAULTS:
        yield from ((call, number) for number in range(1, counts.get(call, 0) + 1))


def trial(root: Path, call: str, number: int) -> dict[str, Any]:
    """One fault: checkpoints 5 and 10 are there, saving 15 meets it; what is left and loadable afterwards."""
    folder = Path(shutil.copytree(root / "base", root / f"{call}-{number}"))
    told = root / f"{call}-{number}.txt"
    model, optimizer = trained()
    inject = f"inject={call}:error={FAULTS[call]}:when={number}"

    def work() -> None:
        checkpoint.save(folder, model, optimizer, {"step": 15}, keep=2)

    code = traced(work, ["-f", "-o", os.devnull, "-e", f"trace={call}", "-e", inject], told)
    fresh = GlmMoe(CONFIG, seed=3)
    found = checkpoint.load_latest(folder, fresh, build_optimizer(fresh, MuonSpec()))
    atomic.remove_stale(folder)
    return {
        "call": call,
        "number": number,
        "error": os.strerror(getattr(errno, FAULTS[call])),
        "code": code,
        "message": told.read_text() if told.is_file() else "",
        "loaded": None if found is None else found[0]["step"],
        "left": sorted(path.name for path in folder.iterdir()),
    }


def follow(root: Path) -> list[str]:
    """The system calls of replacing one checkpoint, adding another and writing a status file, as strace writes them."""
    folder = Path(shutil.copytree(root / "base", root / "followed"))
    model, optimizer = trained()

    def work() -> None:
        checkpoint.save(folder, model, optimizer, {"step": 10}, keep=2)
        checkpoint.save(folder, model, optimizer, {"step": 15}, keep=2)
        atomic.write_json(folder / "status.json", {"state": "running"})

    log = root / "strace.txt"
    calls = ",".join([*FAULTS, "fdatasync", "renameat", "renameat2", "rmdir"])
    assert traced(work, ["-f", "-y", "-o", str(log), "-e", f"trace={calls}"], root / "followed.txt") == 0
    return log.read_text().splitlines()


def count(root: Path, lines: list[str]) -> dict[str, int]:
    """How often one save of checkpoint 15 makes each system call: between the renames of 10 and 15, and its pruning."""
    names = [re.match(r"\d+ +(\w+)\(", line) for line in lines]
    first = next(at for at, line in enumerate(lines) if "step-00000015.tmp" in line and "mkdir" in line)
    last = next(at for at, line in enumerate(lines) if ".status.json.tmp" in line)
    found: dict[str, int] = {}
    for match in names[first:last]:
        if match is not None:
            found[match[1]] = found.get(match[1], 0) + 1
    return found


def main(root: Path, every: int) -> None:
    console.configure(quiet=True)
    root.mkdir(parents=True, exist_ok=True)
    model, optimizer = trained()
    for step in (5, 10):
        checkpoint.save(root / "base", model, optimizer, {"step": step})
    lines = follow(root)
    counts = count(root, lines)
    trials = [trial(root, call, number) for call, number in list(points(counts))[::every]]
    (root / "results.json").write_text(json.dumps({"counts": counts, "trials": trials, "strace": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
