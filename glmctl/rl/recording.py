"""Every rollout of a run on disk, one file a step, so that it can be looked at, judged again and trained on.

rollouts/step-00000012.jsonl   one trajectory a line, with what the trainer knew of the step: whether it was trained on
                               (`trained`: the place of its group in the batch, or null) and the sampling temperature
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl.errors import DataError, RecipeError
from glmctl.rl.episode import Trajectory
from glmctl.run import atomic

FOLDER = "rollouts"
_NAME = re.compile(r"^step-(\d{8,})\.jsonl$")
_OURS = ("trained", "temperature")


@dataclass(frozen=True)
class Recorded:
    """One step's rollouts."""

    step: int
    temperature: float
    groups: list[list[Trajectory]]
    """those that were trained on, in the trainer's order"""
    others: list[Trajectory]


def write_step(
    run: Path, step: int, groups: Sequence[Sequence[Trajectory]], ended: Sequence[Trajectory], temperature: float
) -> None:
    """Publish the file of `step`, over one that a killed run left."""
    chosen = {id(one): place for place, group in enumerate(groups) for one in group}
    rows = [one for group in groups for one in group] + [one for one in ended if id(one) not in chosen]
    lines = (
        json.dumps({**one.to_row(), "trained": chosen.get(id(one)), "temperature": temperature}, ensure_ascii=False)
        for one in rows
    )
    folder = run / FOLDER
    with atomic.machine_errors(folder):
        folder.mkdir(exist_ok=True)
    atomic.write_text(folder / f"step-{step:08d}.jsonl", "".join(line + "\n" for line in lines))


def remove_stale(run: Path) -> None:
    """Remove a file that a kill left half-written."""
    atomic.remove_stale(run / FOLDER)


def read_step(run: Path, step: int) -> Recorded:
    """The rollouts of `step`. RecipeError when none were recorded, DataError naming file and line for a bad one."""
    path = run / FOLDER / f"step-{step:08d}.jsonl"
    if not path.is_file():
        known = recorded_steps(run)
        found = f"steps {known[0]} to {known[-1]}" if known else "none at all (set rollouts.record)"
        raise RecipeError(f"{run}: no rollouts of step {step} were recorded; there are {found}")
    groups: dict[int, list[Trajectory]] = {}
    others, temperature = [], 1.0
    for one, row in _rows(path):
        temperature = float(row["temperature"])
        if row["trained"] is None:
            others.append(one)
        else:
            groups.setdefault(int(row["trained"]), []).append(one)
    return Recorded(step, temperature, [groups[place] for place in sorted(groups)], others)


def recorded_steps(run: Path) -> list[int]:
    """The steps whose rollouts are there, in order."""
    folder = run / FOLDER
    names = (_NAME.match(path.name) for path in folder.iterdir()) if folder.is_dir() else iter(())
    return sorted(int(found[1]) for found in names if found)


def _rows(path: Path) -> Iterator[tuple[Trajectory, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            yield Trajectory.from_row({k: v for k, v in row.items() if k not in _OURS}), {k: row[k] for k in _OURS}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a recorded trajectory: {error}") from error
