"""The Accelerator of a training process: trackers by name, precision by stage, rows shared out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking
from torch.distributed.launcher import api

from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.parallel.accelerate import make_accelerator, share
from glmctl.parallel.launch import SAVE_SECONDS, relaunch


def test_an_unknown_tracker_is_a_recipe_error_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        make_accelerator(trackers=["tensorbord"])


def test_a_tracker_that_is_not_installed_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(EnvironmentProblem, match="wandb"):
        make_accelerator(trackers=["wandb"])


def test_stages_of_one_process_may_differ_in_precision() -> None:
    assert make_accelerator("bf16").mixed_precision == "bf16"
    assert make_accelerator("fp32").mixed_precision == "no"
    assert make_accelerator("bf16").mixed_precision == "bf16"
    make_accelerator("fp32")


def test_torchrun_gives_ranks_that_are_asked_to_stop_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own 30 seconds would kill rank 0 in the middle of a large checkpoint."""
    given: list[Any] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(api, "elastic_launch", lambda config, entry: given.append(config) or (lambda *words: {}))
    assert relaunch(2, ["pretrain", "x"]) == 0
    assert given[0].shutdown_timeout == SAVE_SECONDS >= 3600


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_cover_everything_once(count: int, world: int) -> None:
    parts = [share(count, SimpleNamespace(process_index=rank, num_processes=world)) for rank in range(world)]  # type: ignore[arg-type]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(count))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1
