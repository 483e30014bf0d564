"""Several recipes as one run: what is finished and unchanged is skipped, what was cut off goes on, the rest runs.

A stage is up to date when its run is finished and everything it was made from is the same: its recipe, the outputs
of the stages it names with `${stage}`, the files its recipe names, and the version of glmctl. What each stage was
made from stands in `<root>/pipeline.json`, written before the stage starts, so a kill at any moment loses nothing.
A stage that was cut off goes on even when its recipe has changed in what `changes.FREE` lists; where it has to start
again, what was cut off is moved aside if it has checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl import __version__, console
from glmctl.errors import DataError, RecipeError, unknown
from glmctl.recipe.schema import PipelineRecipe, RecipeBase
from glmctl.run import atomic
from glmctl.run.changes import Change, completed, differences
from glmctl.run.directory import changes_since, move_aside, read_status, saved_steps
from glmctl.run.fingerprint import input_files, outputs
from glmctl.run.headline import figure, headline, sentence, words
from glmctl.run.report import report

PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

Load = Callable[[str, dict[str, Any]], Any]
Execute = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage, resolved."""

    name: str
    recipe_name: str
    kind: str
    template: dict[str, Any]
    """the recipe as plain data, placeholders left in: where the pipeline lies is not part of what a stage is"""
    recipe: RecipeBase
    """the recipe to run, each `${stage}` replaced by that stage's run directory"""
    path: Path
    needs: list[str]
    """the earlier stages that the recipe names"""


@dataclass(frozen=True)
class Decision:
    """What is to be done with a stage, and why."""

    action: str
    """`skip`, `resume`, `run` (nothing there), `again` (replace what is there), `check` (an earlier one decides)"""
    reason: str


class State:
    """`<root>/pipeline.json`: by stage name, what it was made from (`basis`) and the digest of what it made."""

    forgotten = "its record is missing"

    def __init__(self, root: Path) -> None:
        self.path = root / "pipeline.json"
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{self.path}: not a pipeline state: {error}", hint="remove it to run every stage again"
                ) from error

    def put(self, name: str, entry: dict[str, Any] | None) -> None:
        """Set or (None) forget one stage's entry, on disk too."""
        self.stages = {k: v for k, v in self.stages.items() if k != name} | ({name: entry} if entry else {})
        atomic.write_json(self.path, {"version": 1, "stages": self.stages})

    def forget_all(self) -> None:
        """Make every stage run again, also when this call is killed before it has come to all of them."""
        self.forgotten = "--fresh"
        self.stages = {}
        atomic.write_json(self.path, {"version": 1, "stages": {}})


def run_pipeline(
    recipe: PipelineRecipe, root: Path, load: Load, execute: Execute, fresh: bool = False, *, mixed: bool = True
) -> dict[str, Any]:
    """Bring every stage under `root/<stage>/` up to date and return what also stands in `root/summary.json`.

    `load(name_or_path, overrides)` gives a resolved recipe, `execute(recipe, path, fresh=...)` runs or resumes one
    stage and returns its summary. `fresh` runs every stage again. Without `mixed` no stage is continued under another
    recipe than it began with, whatever differs: for figures that are to be of one setting.

    Raises RecipeError for an unknown or later `${stage}` before anything runs, and lets a stage's own error through:
    the next call continues there.
    """
    stages = resolve(recipe, root, load)
    with atomic.machine_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with atomic.locked(root / ".lock"):
        atomic.remove_stale(root)
        state = State(root)
        if fresh:
            state.forget_all()
        plan = foresee(stages, state, mixed)
        _show_plan(recipe, root, stages, plan)
        ran = 0
        for index, stage in enumerate(stages):
            if _advance(stage, index, stages, state, execute, mixed):
                ran += 1
                report(root)
        summary = summarise(recipe, root, stages)
        atomic.write_json(root / "summary.json", summary)
        if ran or not (root / "report.html").is_file():
            report(root)
    _show_result(summary, root, ran)
    return summary


def resolve(recipe: PipelineRecipe, root: Path, load: Load) -> list[Stage]:
    """Load every stage's recipe and check its placeholders; nothing on disk is touched."""
    names = [stage.name for stage in recipe.stages]
    stages: list[Stage] = []
    for index, entry in enumerate(recipe.stages):
        where = f"{recipe.name}: stage '{entry.name}'"
        if entry.name in names[:index]:
            raise RecipeError(f"{where}: this name is used twice")
        loaded = load(entry.recipe, dict(entry.set))
        if isinstance(loaded, PipelineRecipe):
            raise RecipeError(f"{where}: '{entry.recipe}' is a pipeline; a stage has to be a single recipe")
        template = loaded.model_dump(mode="json")
        needs: list[str] = []
        for name in _placeholders(template):
            if name not in names:
                raise unknown("stage", name, names, where=where)
            if name not in names[:index]:
                raise RecipeError(f"{where}: '${{{name}}}' is not an earlier stage; stages run in the order given")
            needs.append(name)
        resolved = type(loaded).model_validate(
            _map_strings(template, lambda text: PLACEHOLDER.sub(lambda found: str(root / found[1]), text))
        )
        stages.append(Stage(entry.name, entry.recipe, template["type"], template, resolved, root / entry.name, needs))
    return stages


def summarise(recipe: PipelineRecipe, root: Path, stages: list[Stage]) -> dict[str, Any]:
    """Every stage's state, active seconds (over all restarts) and summary, with the total and the last model."""
    body: dict[str, Any] = {"name": recipe.name, "path": str(root), "seconds": 0.0, "model": None, "stages": {}}
    for stage in stages:
        status = read_status(stage.path)
        body["stages"][stage.name] = {
            "type": stage.kind,
            "recipe": stage.recipe_name,
            "path": str(stage.path),
            "state": status.get("state", "not run"),
            "seconds": status.get("seconds", 0.0),
            "summary": status.get("summary", {}),
        }
        body["seconds"] += status.get("seconds", 0.0)
        if (stage.path / "export" / "config.json").is_file():
            body["model"] = str(stage.path)
    return body


# ----------------------------------------------------------------------------- deciding


def basis(stage: Stage, state: State) -> dict[str, Any]:
    """What the stage is made from. Stages it needs count by the digest of their outputs."""
    return {
        "recipe": stage.template,
        "glmctl": __version__,
        "files": input_files(stage.template),
        "stages": {name: state.stages.get(name, {}).get("outputs") for name in stage.needs},
    }


def decide(stage: Stage, state: State, mixed: bool = True) -> Decision:
    """Compare what the stage would be made from now with what it was made from; `mixed` as in `run_pipeline`."""
    entry = state.stages.get(stage.name)
    status = read_status(stage.path)
    if not status:
        if entry is None and (stage.path / "recipe.yaml").is_file():
            return Decision("again", state.forgotten)
        return Decision("run", "")
    if entry is None:
        return Decision("again", state.forgotten)
    unfinished = status.get("state") != "finished"
    changes = differences(completed(entry["basis"]["recipe"], type(stage.recipe)), stage.template)
    if not _may_go_on(changes, mixed and unfinished):
        return Decision("again", "its recipe changed")
    why = difference(entry["basis"], basis(stage, state))
    if why:
        return Decision("again", why)
    if unfinished:
        if not _may_go_on(changes_since(stage.path, stage.recipe), mixed):
            # the same basis but for where the pipeline lies: the run would refuse to go on
            return Decision("again", "it was cut off, then moved")
        return Decision("resume", f"with {changes[0]}" if changes else f"was {status.get('state', 'cut off')}")
    made = outputs(stage.path)
    if made is None or (entry.get("outputs") is not None and made != entry["outputs"]):
        return Decision("again", "its outputs were changed or removed")
    return Decision("skip", "")


def _may_go_on(changes: list[Change], mixed: bool) -> bool:
    return all(mixed and one.free for one in changes)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In words, the first thing beside the recipe that is not the same, or None."""
    if old["glmctl"] != new["glmctl"]:
        return f"made by glmctl {old['glmctl']}"
    for what, label in (("stages", "stage"), ("files", "input")):
        for name in sorted({*old[what], *new[what]}):
            if old[what].get(name) != new[what].get(name):
                return f"{label} '{name}' changed"
    return None


def foresee(stages: list[Stage], state: State, mixed: bool = True) -> list[Decision]:
    """`decide` for every stage, as far as it can be known before the earlier ones have run."""
    plan: dict[str, Decision] = {}
    for stage in stages:
        decision = decide(stage, state, mixed)
        moving = [name for name in stage.needs if plan[name].action != "skip"]
        if moving and decision.action in ("skip", "resume"):
            decision = Decision("check", f"after '{moving[0]}'")
        plan[stage.name] = decision
    return list(plan.values())


# ----------------------------------------------------------------------------- doing


def _advance(stage: Stage, index: int, stages: list[Stage], state: State, execute: Execute, mixed: bool) -> bool:
    """Bring one stage up to date; True when something had to run."""
    decision = decide(stage, state, mixed)
    head = f"[{index + 1}/{len(stages)}] {stage.name}"
    if decision.action == "skip":
        if state.stages[stage.name].get("outputs") is None:
            # killed between the end of the run and this record
            state.put(stage.name, {**state.stages[stage.name], "outputs": outputs(stage.path)})
        return False
    made_from = basis(stage, state)
    if decision.action == "again":
        # forgotten first: were this killed half-way, the rest of the folder must not pass for a run of the old recipe
        state.put(stage.name, None)
        _clear(stage.path)
    verb = "resuming" if decision.action == "resume" else "running"
    console.note(f"{head}: {verb} {stage.kind} ({stage.recipe_name})")
    state.put(stage.name, {"basis": made_from, "outputs": None})
    summary = execute(stage.recipe, stage.path, fresh=False)
    state.put(stage.name, {"basis": made_from, "outputs": outputs(stage.path)})
    seconds = read_status(stage.path).get("seconds", 0.0)
    figures = sentence(stage.kind, summary)
    console.note(f"{head}: done in {console.duration(seconds)}{'; ' + figures if figures else ''}")
    return True


def _clear(path: Path) -> None:
    """Make room for a stage that starts again; what an unfinished one has trained is kept aside."""
    with atomic.machine_errors(path):
        if read_status(path).get("state") != "finished" and saved_steps(path):
            move_aside(path)
            return
        with atomic.locked(path / ".lock"):
            atomic.remove(path)


def _show_plan(recipe: PipelineRecipe, root: Path, stages: list[Stage], plan: list[Decision]) -> None:
    waiting = sum(decision.action != "skip" for decision in plan)
    console.note(f"{recipe.name}: {len(stages)} stages in {root}, {waiting or 'none'} to run")
    words = {"skip": "up to date", "resume": "resume", "run": "run", "again": "run again", "check": "depends"}
    rows = [
        [str(index + 1), stage.name, stage.recipe_name, words[decision.action], decision.reason]
        for index, (stage, decision) in enumerate(zip(stages, plan, strict=True))
    ]
    console.table("plan", ["", "stage", "recipe", "to do", "because"], rows)


def _show_result(summary: dict[str, Any], root: Path, ran: int) -> None:
    rows = []
    for name, stage in summary["stages"].items():
        figures = headline(stage["type"], stage["summary"], 6)
        measured = "  ".join(f"{words(key)} {figure(key, value)}" for key, value in figures.items())
        rows.append([name, console.duration(stage["seconds"]), measured])
    console.table(f"{summary['name']}: measured", ["stage", "time", "result"], rows)
    done = f"{ran} of {len(rows)} stages ran" if ran else "everything was up to date"
    total = console.duration(summary["seconds"])
    text = f"{done}; {total} of work in all; report: {root / 'report.html'}"
    model = summary["model"]
    console.result(summary, text=text, next_command=f"glmctl serve {model}" if model else None)


def _placeholders(value: Any) -> list[str]:
    """Names inside `${...}` anywhere in the value, each once, in order."""
    found: dict[str, None] = {}

    def collect(text: str) -> str:
        found.update(dict.fromkeys(PLACEHOLDER.findall(text)))
        return text

    _map_strings(value, collect)
    return list(found)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
