"""Trackers beside metrics.jsonl, through Accelerate: one run of theirs is one of ours, however often it is resumed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.view import read_json

IDENTITY = "tracker.json"
"""file of a run with the id under which its trackers know it"""


class Tracking:
    """The trackers that a recipe names; without any, nothing happens."""

    def __init__(self, accelerator: Accelerator, run: Run, names: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._run = run
        self._names = names
        self._begun = False

    def begin(self, done: int) -> None:
        """Start them after `done` steps, with the recipe as their configuration.

        W&B and trackio go on with the run of an earlier life; TensorBoard hides what that one wrote after step `done`.
        W&B takes no step twice. trackio holds the steps between twice, as do Accelerate's other trackers, which begin a
        run of their own.
        """
        if not self._names:
            return
        identity = self._identity() if self._run.writer else ""
        name = self._run.path.name
        settings: dict[str, dict[str, Any]] = {
            "wandb": {"id": identity, "name": name, "resume": "allow"},
            "trackio": {"name": f"{name}-{identity}", "resume": "allow"},
            "tensorboard": {"purge_step": done + 1},
        }
        recipe = self._run.recipe
        self._accelerator.init_trackers(recipe.name, _flat(recipe.model_dump(mode="json")), settings)
        self._begun = True

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Tell them the numbers of one row of metrics."""
        if self._names:
            values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
            self._accelerator.log(values, step=step)

    def end(self) -> None:
        """Have them send what they hold. Accelerate's own way would end the process group too."""
        if self._begun:
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def _identity(self) -> str:
        file = self._run.path / IDENTITY
        known = read_json(file).get("id")
        if known is None:
            known = secrets.token_hex(8)
            atomic.write_json(file, {"id": known})
        return str(known)


def _flat(value: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """`schedule.peak_lr` and the like; lists as JSON, since trackers take numbers, texts and None."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= _flat(item, f"{key}{name}.")
        else:
            found[key + name] = json.dumps(item, ensure_ascii=False) if isinstance(item, list) else item
    return found
