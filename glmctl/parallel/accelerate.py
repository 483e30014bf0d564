"""The Accelerator every training driver uses: one process, several under torchrun, on CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from glmctl.errors import EnvironmentProblem, unknown


def make_accelerator(
    precision: Literal["fp32", "bf16"] = "fp32", trackers: Sequence[str] = (), run_path: Path | None = None
) -> Accelerator:
    """An Accelerator for this process and its ranks (RANK, WORLD_SIZE... as torchrun sets them).

    fp32 master weights in both precisions; bf16 is autocast. `trackers` are Accelerate's (tensorboard, wandb,
    trackio...) and log below `run_path`.

    Raises:
        RecipeError: Accelerate knows no tracker of that name.
        EnvironmentProblem: a tracker is not installed.
    """
    # stages of one pipeline share a process; each may want another precision
    AcceleratorState._reset_state(reset_partial_state=False)
    _check_trackers(trackers)
    # router biases are buffers that every rank moves alike from summed counts: nothing to broadcast
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(trackers) or None,
        project_dir=None if run_path is None else str(run_path),
        kwargs_handlers=[ddp],
    )


def share(count: int, accelerator: Accelerator) -> tuple[int, int]:
    """This rank's part of `count` things, as (start, stop); the parts are contiguous and differ by at most one."""
    rank, world = accelerator.process_index, accelerator.num_processes
    return count * rank // world, count * (rank + 1) // world


def sum_over_ranks(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The tensor summed over all ranks; with one process, itself."""
    if accelerator.num_processes == 1:
        return tensor
    total: torch.Tensor = accelerator.reduce(tensor.to(accelerator.device), reduction="sum")
    return total


def _check_trackers(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name.value if hasattr(name, "value") else name) for name in get_available_trackers()}
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS, where="trackers")
        if name not in available:
            raise EnvironmentProblem(f"trackers: '{name}' is not installed", hint=f"pip install {name}")
