"""The Accelerator every training driver uses: one process, several under torchrun, on CPU or GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from glmctl.errors import EnvironmentProblem, unknown

PATIENCE = timedelta(hours=6)
"""how long ranks wait for one that works alone; terabytes are hashed or written in that time"""


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
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(trackers) or None,
        project_dir=None if run_path is None else str(run_path),
        kwargs_handlers=[ddp],
    )
    if accelerator.num_processes > 1:
        # made here, where all ranks come at the same time: connecting has a timeout too
        _patient_group()
    return accelerator


def wait_for_all(accelerator: Accelerator) -> None:
    """Return when every rank has come here, however long one of them works alone first (up to PATIENCE).

    Collectives of the default group give up after 10 (NCCL) or 30 minutes (gloo), less than it takes to verify or
    write what is large. A rank that dies is noticed at once all the same: its connections close. RuntimeError then,
    and when PATIENCE is over; on rank 0 it names the rank that has not come.
    """
    if accelerator.num_processes > 1:
        torch.distributed.monitored_barrier(_patient_group(), timeout=PATIENCE)


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


@functools.cache
def _patient_group() -> Any:
    """All ranks once more, over gloo, which every machine has and where a peer's death ends a wait."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _check_trackers(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(name.value if hasattr(name, "value") else name) for name in get_available_trackers()}
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise unknown("tracker", name, LOGGER_TYPE_TO_CLASS, where="trackers")
        if name not in available:
            raise EnvironmentProblem(f"trackers: '{name}' is not installed", hint=f"pip install {name}")
