"""A pretraining of several ranks in which one of them meets a NaN, an infinity or a huge loss. Not a test.

    torchrun --nproc-per-node 2 poisoned_rank.py ROOT RUN KIND:STEP ...

In each STEP the last rank's loss (KIND `loss`, `huge`) or its gradient (`gradient`) is spoilt.
Every rank writes ROOT/RUN-rankN.json: for each step whether it was skipped, and a digest of all weights, biases and
optimizer states before and after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_harness as harness

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.errors import GlmctlError
from glmctl.training.loss import Losses, LossModule
from glmctl.training.step import StepMetrics, Stepper


def digest(stepper: Stepper) -> str:
    """SHA-256 of everything that a step may change."""
    found = hashlib.sha256()
    tensors = [*stepper.model.parameters(), *stepper.model.buffers(), *stepper.optimizer.state_tensors().values()]
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def poison(kind_now: Callable[[], str | None]) -> None:
    """Spoil this rank's losses or gradients as `kind_now()` says."""
    forward = LossModule.forward

    def losses(self: LossModule, *args: Any, **kwargs: Any) -> Losses:
        found = forward(self, *args, **kwargs)
        kind = kind_now()
        if kind is None:
            return found
        if kind == "gradient":
            # the loss stays finite: only the gradient that the other rank is sent is not
            return found._replace(main=found.main + _InfiniteBackward.apply(found.main))
        return found._replace(main=found.main * (float("nan") if kind == "loss" else 1000.0))

    LossModule.forward = losses  # type: ignore[method-assign]


class _InfiniteBackward(torch.autograd.Function):
    """Zero whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(grad, float("inf"))


def watch(rows: list[dict[str, Any]], counter: list[int]) -> None:
    """Write down what each step did."""
    step = Stepper.lm_step

    def lm_step(self: Stepper, *args: Any, **kwargs: Any) -> StepMetrics:
        counter[0] += 1
        row: dict[str, Any] = {"step": counter[0], "before": digest(self)}
        rows.append(row)
        try:
            metrics = step(self, *args, **kwargs)
            row["skipped"] = metrics.skipped
            return metrics
        finally:
            row["after"] = digest(self)

    Stepper.lm_step = lm_step  # type: ignore[method-assign]


def main(root: Path, run: str, spoilt: dict[int, str]) -> int:
    console.configure(quiet=True)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows: list[dict[str, Any]] = []
    counter = [0]
    watch(rows, counter)
    if rank == 0:
        # the last checkpoint before the end is still being written when the ranks give up
        harness.slow_write(8)()
    if rank == world - 1:
        poison(lambda: spoilt.get(counter[0]))
    code = 0
    try:
        execute(harness.pretrain_recipe(root, more=96 * 24), root / run)
    except GlmctlError as error:
        code = error.exit_code
    (root / f"{run}-rank{rank}.json").write_text(json.dumps({"code": code, "steps": rows}))
    return code


if __name__ == "__main__":
    steps = {int(step): kind for kind, _, step in (word.partition(":") for word in sys.argv[3:])}
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], steps))
