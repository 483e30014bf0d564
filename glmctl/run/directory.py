"""A run: a directory with its recipe, status, metrics, checkpoints, samples and export, owned by one process.

    recipe.yaml    the resolved recipe          status.json   state, summary, active seconds
    env.json       versions it was made with    metrics.jsonl one row a step
    checkpoints/   for resuming                 export/       what later stages use
    samples.jsonl  generated text               changes.jsonl what changed in the recipe, and after which step

Under torchrun only rank 0 locks and writes; the other ranks see the same paths and write nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from glmctl import __version__, console
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import RecipeBase
from glmctl.run import atomic
from glmctl.run.changes import Change, completed, differences
from glmctl.run.fingerprint import digest
from glmctl.run.metrics import MetricsLog, finite

State = Literal["running", "finished", "interrupted", "failed"]

_PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "tokenizers", "lm-eval", "transformers")


class Run:
    """An open run. Use `Run.open`; close it (or use it as a context manager) to give its lock back."""

    def __init__(self, recipe: RecipeBase, path: Path, *, resumed: bool, writer: bool, lock: int | None) -> None:
        self.recipe = recipe
        self.path = path
        self.resumed = resumed
        self.writer = writer
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.samples = path / "samples.jsonl"
        self.metrics = MetricsLog(path / "metrics.jsonl", writable=writer)
        self._lock = lock
        self._closing: list[Callable[[], None]] = []
        self._began = time.monotonic()
        self._status: dict[str, Any] = read_status(path) if resumed else {}
        self._seconds = float(self._status.get("seconds", 0.0))

    @classmethod
    def open(cls, recipe: RecipeBase, path: Path, *, fresh: bool = False) -> Run:
        """Create the run at `path`, or take up the one that is there with the same recipe.

        An unfinished run is also taken up by a recipe that differs in nothing but `changes.FREE`; each change is said
        and kept in changes.jsonl, and recipe.yaml is the new one.

        Args:
            fresh: move what is there aside to `<name>.old-<n>` and start again.

        Raises:
            RecipeError: another recipe's run, or something that is not a run, is at `path`.
            EnvironmentProblem: another process holds the run, or the disk does not take it.
        """
        path = Path(path)
        if not is_writer():
            # rank 0 decides and writes; a rank that misses its verdict is ended with it
            same = not fresh and (path / "recipe.yaml").is_file()
            return cls(recipe, path, resumed=same, writer=False, lock=None)
        if path.exists() and not path.is_dir():
            raise RecipeError(f"{path}: is a file, not a run directory")
        with atomic.machine_errors(path):
            if fresh:
                move_aside(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = atomic.acquire_lock(path / ".lock")
            try:
                changes = _check_recipe(recipe, path)
                for folder in (path, path / "checkpoints"):
                    atomic.remove_stale(folder)
                run = cls(recipe, path, resumed=changes is not None, writer=True, lock=lock)
                run._describe(changes or [])
            except BaseException:
                os.close(lock)
                raise
        return run

    @property
    def state(self) -> str | None:
        """running, finished, interrupted or failed; None before the first write of a non-writing rank."""
        return self._status.get("state")

    @property
    def finished(self) -> bool:
        """Whether the driver has nothing left to do."""
        return self.state == "finished"

    @property
    def summary(self) -> dict[str, Any]:
        """What the driver returned when it finished; empty before."""
        return dict(self._status.get("summary", {}))

    @property
    def seconds(self) -> float:
        """Seconds of work in this run over all restarts, as far as they were recorded before a kill."""
        return self._seconds + (0.0 if self.finished else time.monotonic() - self._began)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the summary and that the run is done."""
        self._write_status("finished", dict(summary))

    def fail(self, error: str, state: Literal["failed", "interrupted"] = "failed") -> None:
        """Record why the run ended before it was done. It stays resumable."""
        self._write_status(state, {}, error=error)

    def record_time(self) -> None:
        """Write the active seconds down, so that a kill after this loses only what follows. Called at checkpoints."""
        self._write_status("running", {})

    def before_close(self, call: Callable[[], None]) -> None:
        """Have `call` made before the lock is given back: whoever works in the background waits for its end there."""
        self._closing.append(call)

    def close(self) -> None:
        """Give the lock back, after everybody who asked to be waited for."""
        calls, self._closing = self._closing, []
        try:
            for call in calls:
                call()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _describe(self, changes: list[Change]) -> None:
        """Write env.json (of a new run), recipe.yaml (unless it is a resumed run's, unchanged) and the status."""
        if changes:
            self._record(changes)
        if not self.resumed:
            atomic.write_json(self.path / "env.json", environment())
        if changes or not self.resumed:
            text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            # last: from here on the directory counts as a run
            atomic.write_text(self.path / "recipe.yaml", text)
        if not self.finished:
            self._write_status("running", {})

    def _record(self, changes: list[Change]) -> None:
        """Say what the run is continued with and add it to changes.jsonl; a kill before recipe.yaml says it again."""
        after = max(saved_steps(self.path), default=0)
        log = MetricsLog(self.path / "changes.jsonl")
        rows = log.rows()
        for one in changes:
            console.note(f"{self.path}: goes on after step {after} with {one}")
            rows.append({"after_step": after, "key": one.key, "old": one.old, "new": one.new})
        atomic.write_text(log.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _write_status(self, state: State, summary: dict[str, Any], *, error: str | None = None) -> None:
        body: dict[str, Any] = {
            "state": state,
            "summary": finite(summary),
            "recipe_hash": recipe_hash(self.recipe),
            "seconds": self.seconds,
        }
        if error is not None:
            body["error"] = error
        if self.writer:
            atomic.write_json(self.path / "status.json", body)
        self._status = body
        if state == "finished":
            self._seconds = body["seconds"]


def is_writer() -> bool:
    """Whether this process is rank 0 of its job (or the only process). Read from torchrun's environment."""
    return int(os.environ.get("RANK", "0")) == 0


def recipe_hash(recipe: RecipeBase) -> str:
    """SHA-256 of the canonical JSON of the resolved recipe, its name left out."""
    return digest({key: value for key, value in recipe.model_dump(mode="json").items() if key != "name"})


def read_status(path: Path) -> dict[str, Any]:
    """The run's status.json, {} where there is none. DataError when it is not JSON."""
    file = path / "status.json"
    if not file.is_file():
        return {}
    try:
        status: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    return status


def environment() -> dict[str, Any]:
    """Versions and machine facts that explain why two runs may differ. Holds no names, paths or variables."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "glmctl": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.system(),
        "machine": platform.machine(),
        "byteorder": sys.byteorder,
        "cpus": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def resolve_model(path: str | Path) -> Path:
    """The model folder that `path` means: itself when it holds config.json, or a run's export.

    Raises:
        RecipeError: nothing is there.
        DataError: something is there, but no model.
    """
    return resolve_artifact(path, "config.json", "model")


def resolve_tokenizer(path: str | Path) -> Path:
    """The folder with tokenizer.json that `path` means: itself or a run's export. Errors as `resolve_model`."""
    return resolve_artifact(path, "tokenizer.json", "tokenizer")


def resolve_artifact(path: str | Path, marker: str, what: str) -> Path:
    """`path`, or its `export`, whichever holds the file `marker`."""
    given = Path(path)
    for folder in (given, given / "export"):
        if (folder / marker).is_file():
            return folder
    if not given.exists():
        raise RecipeError(f"{given}: no such {what}; give a {what} folder or a run directory")
    state = read_status(given).get("state") if (given / "recipe.yaml").is_file() else None
    if state is not None and state != "finished":
        raise DataError(f"{given}: this run is not finished (state: {state}), it has no {what} yet")
    raise DataError(f"{given}: no {marker} in it or in its export, so this is not a {what}")


def saved_steps(path: Path) -> list[int]:
    """Steps that the run at `path` has a checkpoint of, in no order."""
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in (path / "checkpoints").glob("step-*"))
    return [int(match[1]) for match in found if match is not None]


def changes_since(path: Path, recipe: RecipeBase) -> list[Change]:
    """How `recipe` differs from the one that the run at `path` has; DataError when that is not readable."""
    file = path / "recipe.yaml"
    try:
        old = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: not a recipe: {error}") from error
    return differences(completed(old, type(recipe)), recipe.model_dump(mode="json"))


def _check_recipe(recipe: RecipeBase, path: Path) -> list[Change] | None:
    """What changed in the recipe of the run at `path` that `recipe` may continue; None when there is no run yet.

    RecipeError when it is another recipe's run, or no run at all.
    """
    if not (path / "recipe.yaml").is_file():
        ours = {".lock", "env.json"}
        others = sorted(e.name for e in path.iterdir() if e.name not in ours and not e.name.startswith("."))
        if others:
            raise RecipeError(
                f"{path}: not a run directory (it holds '{others[0]}' and no recipe.yaml)",
                hint="choose another folder with --run",
            )
        return None
    found = changes_since(path, recipe)
    finished = read_status(path).get("state") == "finished"
    refused = [one for one in found if finished or not one.free]
    if refused:
        shown = "; ".join(map(str, refused[:3])) + (f"; and {len(refused) - 3} more" if len(refused) > 3 else "")
        raise RecipeError(
            f"{path}: holds a run of another recipe: {shown}",
            hint="--fresh moves it aside and starts again; --run names another folder",
        )
    return found


def move_aside(path: Path) -> None:
    """Rename an existing run to `<name>.old-<n>`, unless another process holds it."""
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "recipe.yaml").is_file():
        _check_recipe(RecipeBase(name="fresh"), path)
    with atomic.locked(path / ".lock"):
        number = 1
        while path.with_name(f"{path.name}.old-{number}").exists():
            number += 1
        aside = path.with_name(f"{path.name}.old-{number}")
        os.rename(path, aside)
    console.note(f"moved the earlier run to {aside}")
