"""The pipeline: nothing is done twice, a change repeats what depends on it and no more, a kill loses nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmctl import console
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.recipe.schema import EvalRecipe, PipelineRecipe, PipelineStage, ProblemsRecipe, RecipeBase, SftRecipe
from glmctl.run import atomic, pipeline
from glmctl.run.directory import Run
from glmctl.run.pipeline import run_pipeline


class House:
    """A stand-in for the drivers: problems -> sft -> eval, each writing what its recipe and inputs decide."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root, self.text = root, text
        self.ran: list[str] = []
        self.resumed: list[str] = []
        self.problems_seed = 0
        self.steps = 3
        self.rate = 1e-4
        self.limit = 5
        self.fail_in: str | None = None

    def recipe(self) -> PipelineRecipe:
        stages = [
            PipelineStage(name="problems", recipe="p", set={"seed": self.problems_seed}),
            PipelineStage(name="sft", recipe="s", set={"steps": self.steps, "schedule": {"peak_lr": self.rate}}),
            PipelineStage(name="eval", recipe="e", set={"limit": self.limit}),
        ]
        return PipelineRecipe(name="three", stages=stages)

    def load(self, name: str, overrides: dict[str, Any]) -> RecipeBase:
        if name == "p":
            return ProblemsRecipe.model_validate({"name": "p", "task": {"type": "arithmetic"}, **overrides})
        if name == "s":
            data = ["${problems}/export/cold_start.jsonl", str(self.text)]
            return SftRecipe.model_validate({"name": "s", "model": "base", "data": data, **overrides})
        return EvalRecipe.model_validate({"name": "e", "models": {"sft": "${sft}"}, **overrides})

    def execute(self, recipe: RecipeBase, path: Path, *, fresh: bool = False) -> dict[str, Any]:
        with Run.open(recipe, path, fresh=fresh) as run:
            if run.finished:
                return run.summary
            self.ran.append(path.name)
            if run.resumed:
                self.resumed.append(path.name)
            if self.fail_in == path.name:
                (run.checkpoints / "step-00000002").mkdir(parents=True, exist_ok=True)
                run.fail("stopped here", "interrupted")
                raise KeyboardInterrupt
            summary = self.work(recipe, run)
            run.finish(summary)
        return summary

    def work(self, recipe: RecipeBase, run: Run) -> dict[str, Any]:
        if isinstance(recipe, ProblemsRecipe):
            with atomic.publish(run.export) as folder:
                # seeds 0 and 1 give different problems, 2 the same as 0
                (folder / "cold_start.jsonl").write_text(f"problems {recipe.seed % 2}\n")
            return {"train": recipe.train}
        if isinstance(recipe, SftRecipe):
            source = Path(recipe.data[0]).read_text()
            with atomic.publish(run.export) as folder:
                (folder / "config.json").write_text(json.dumps({"steps": recipe.steps, "from": source}))
            return {"loss": 1.0 / recipe.steps, "steps": recipe.steps}
        assert isinstance(recipe, EvalRecipe)
        return {"sft/arithmetic": 0.5, "limit": recipe.limit}

    def run(self, **options: Any) -> tuple[list[str], dict[str, Any]]:
        """One call; returns the stages that ran in it and the summary."""
        self.ran, self.resumed = [], []
        summary = run_pipeline(self.recipe(), self.root, self.load, self.execute, **options)
        return self.ran, summary


@pytest.fixture
def house(tmp_path: Path) -> House:
    text = tmp_path / "text.jsonl"
    text.write_text("one\n")
    console.configure(quiet=True)
    return House(tmp_path / "root", text)


def test_a_second_call_does_nothing_and_says_the_same(house: House) -> None:
    first, summary = house.run()
    assert first == ["problems", "sft", "eval"]
    page = (house.root / "report.html").stat().st_mtime_ns
    again, same = house.run()
    assert again == []
    assert same == summary
    assert (house.root / "report.html").stat().st_mtime_ns == page
    assert json.loads((house.root / "summary.json").read_text()) == summary
    assert summary["model"] == str(house.root / "sft")
    assert summary["stages"]["sft"]["summary"] == {"loss": 1 / 3, "steps": 3}
    assert summary["seconds"] == pytest.approx(sum(s["seconds"] for s in summary["stages"].values()))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h: setattr(h, "limit", 6), ["eval"]),
        (lambda h: setattr(h, "steps", 4), ["sft", "eval"]),
        (lambda h: setattr(h, "problems_seed", 1), ["problems", "sft", "eval"]),
        (lambda h: h.text.write_text("two\n"), ["sft"]),
        (lambda h: os.utime(h.text), []),
        (lambda h: (h.root / "sft" / "export" / "config.json").unlink(), ["sft"]),
        (lambda h: atomic.write_text(h.root / "sft" / "export" / "manifest.json", "{}"), ["sft"]),
    ],
    ids=["last recipe", "middle recipe", "first recipe", "input file", "touched file", "lost output", "bad manifest"],
)
def test_a_change_repeats_only_what_depends_on_it(
    house: House, change: Callable[[House], None], expected: list[str]
) -> None:
    house.run()
    change(house)
    assert house.run()[0] == expected
    assert house.resumed == [], "a changed stage starts from scratch"
    assert house.run()[0] == []


def test_an_equal_output_of_a_changed_stage_leaves_its_dependants_alone(house: House) -> None:
    house.run()
    house.problems_seed = 2
    assert house.run()[0] == ["problems"]


def test_undoing_a_change_repeats_again(house: House) -> None:
    house.run()
    house.steps = 4
    house.run()
    house.steps = 3
    assert house.run()[0] == ["sft", "eval"]


def test_an_interrupted_stage_is_resumed_and_the_earlier_ones_are_kept(house: House) -> None:
    house.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        house.run()
    assert house.ran == ["problems", "sft"]
    house.fail_in = None
    assert house.run()[0] == ["sft", "eval"]
    assert house.resumed == ["sft"]


def test_an_interrupted_stage_whose_recipe_changed_starts_again(house: House) -> None:
    house.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        house.run()
    house.fail_in, house.steps = None, 9
    assert house.run()[0] == ["sft", "eval"]
    assert house.resumed == []
    aside = house.root / "sft.old-1"
    assert (aside / "checkpoints" / "step-00000002").is_dir(), "what it had trained is not thrown away"
    house.limit = 6
    assert house.run()[0] == ["eval"]
    assert sorted(path.name for path in house.root.glob("*.old-*")) == [aside.name], "a finished stage is replaced"


def test_an_interrupted_stage_goes_on_under_another_rate(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a divergence; finished, it would be done again."""
    house.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        house.run()
    house.rate = 5e-5
    with pytest.raises(KeyboardInterrupt):
        house.run()
    assert house.resumed == ["sft"], "and is cut off once more"
    house.fail_in = None
    console.configure()
    assert house.run()[0] == ["sft", "eval"]
    assert house.resumed == ["sft"]
    changes = [json.loads(line) for line in (house.root / "sft" / "changes.jsonl").read_text().splitlines()]
    assert [(row["after_step"], row["key"], row["new"]) for row in changes] == [(2, "schedule.peak_lr", 5e-5)]
    assert house.run()[0] == []
    house.rate = 1e-4
    assert house.run()[0] == ["sft"], "the evaluation sees equal outputs"
    assert house.resumed == []
    assert "its recipe changed" in capsys.readouterr().out
    assert not list(house.root.glob("*.old-*"))


def test_a_stage_of_one_setting_is_not_continued_under_another(house: House) -> None:
    """A study compares settings: half a run of each would be a figure of neither."""
    house.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        house.run(mixed=False)
    house.fail_in, house.rate = None, 5e-5
    assert house.run(mixed=False)[0] == ["sft", "eval"]
    assert house.resumed == []
    assert (house.root / "sft.old-1").is_dir()


def test_a_stage_recorded_before_a_field_existed_is_up_to_date(house: House) -> None:
    house.run()
    record = house.root / "pipeline.json"
    state = json.loads(record.read_text())
    del state["stages"]["sft"]["basis"]["recipe"]["mtp_weight"]
    record.write_text(json.dumps(state))
    assert house.run()[0] == []


def test_fresh_runs_everything_again(house: House) -> None:
    house.run()
    assert house.run(fresh=True)[0] == ["problems", "sft", "eval"]
    assert house.resumed == []
    house.fail_in = "problems"
    with pytest.raises(KeyboardInterrupt):
        house.run(fresh=True)
    house.fail_in = None
    assert house.run()[0] == ["problems", "sft", "eval"], "a fresh run that was cut off is still owed"


def test_another_version_of_glmctl_repeats(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.run()
    monkeypatch.setattr(pipeline, "__version__", "9.9")
    assert house.run()[0] == ["problems", "sft", "eval"]


def test_a_moved_pipeline_is_still_up_to_date(house: House) -> None:
    house.run()
    house.root = house.root.rename(house.root.with_name("elsewhere"))
    assert house.run()[0] == []


def test_a_pipeline_that_was_cut_off_and_moved_goes_on(house: House) -> None:
    house.fail_in = "sft"
    with pytest.raises(KeyboardInterrupt):
        house.run()
    house.fail_in = None
    house.root = house.root.rename(house.root.with_name("elsewhere"))
    assert house.run()[0] == ["sft", "eval"]


def test_the_plan_and_the_result_are_shown(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure()
    house.run()
    house.steps = 5
    house.run()
    said = capsys.readouterr()
    assert "its recipe changed" in said.out
    assert "after 'sft'" in said.out
    assert "[2/3] sft: running sft (s)" in said.err
    assert "loss 0.2, steps 5" in said.err
    assert f"next: glmctl serve {house.root / 'sft'}" in said.err
    house.run()
    assert "everything was up to date" in capsys.readouterr().out


def test_two_calls_at_once_are_refused(house: House) -> None:
    house.root.mkdir()
    with atomic.locked(house.root / ".lock"), pytest.raises(EnvironmentProblem, match="in use"):
        house.run()


def test_a_foreign_folder_in_the_way_is_not_removed(house: House) -> None:
    mine = house.root / "sft" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    with pytest.raises(RecipeError, match="not a run directory"):
        house.run()
    assert mine.read_text() == "years of work"


def test_a_damaged_record_is_named(house: House) -> None:
    house.run()
    (house.root / "pipeline.json").write_text("{")
    with pytest.raises(DataError, match=r"pipeline\.json"):
        house.run()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("a", "${b}")], r"unknown stage 'b'"),
        ([("first", "x"), ("second", "${frist}")], r"did you mean 'first'"),
        ([("a", "${b}"), ("b", "x")], r"'\$\{b\}' is not an earlier stage"),
        ([("a", "${a}")], r"not an earlier stage"),
        ([("a", "x"), ("a", "x")], r"used twice"),
    ],
)
def test_wrong_placeholders_are_said_before_anything_runs(
    tmp_path: Path, stages: list[tuple[str, str]], message: str
) -> None:
    recipe = PipelineRecipe(
        name="wrong", stages=[PipelineStage(name=n, recipe="r", set={"models": {"m": m}}) for n, m in stages]
    )

    def load(name: str, overrides: dict[str, Any]) -> RecipeBase:
        return EvalRecipe.model_validate({"name": name, **overrides})

    def execute(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise AssertionError("nothing may run")

    with pytest.raises(RecipeError, match=message):
        run_pipeline(recipe, tmp_path / "root", load, execute)
    assert not (tmp_path / "root").exists()


def test_a_pipeline_in_a_pipeline_is_refused(tmp_path: Path) -> None:
    recipe = PipelineRecipe(name="outer", stages=[PipelineStage(name="inner", recipe="r")])
    with pytest.raises(RecipeError, match="is a pipeline"):
        run_pipeline(recipe, tmp_path / "root", lambda name, overrides: recipe, lambda *a, **k: {})


def killed(house: House, at: int) -> int:
    """Run the pipeline in a forked process that dies by SIGKILL at its `at`-th disk operation.

    Returns the exit code, or the number of operations when it lived to its end (as a positive number).
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def body() -> None:
        count = 0

        def deadly(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return None if name == "fsync" else real(*args, **kwargs)

            return call

        for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir", "open"):
            setattr(os, name, deadly(name))
        house.run()
        sender.send(count)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join()
    assert process.exitcode is not None
    return receiver.recv() if process.exitcode == 0 else process.exitcode


@pytest.mark.parametrize("again", [False, True], ids=["first run", "run after a change"])
def test_a_kill_at_any_disk_operation_is_continued(
    house: House, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before every n-th rename, removal, flush or opening; the next call ends with the right outputs."""
    # a killed process loses nothing that it wrote: only a power cut needs the flush
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    if again:
        house.run()
    house.steps = 4
    template = house.root
    operations = None
    at = -1
    while operations is None or at <= operations:
        house.root = tmp_path / f"killed-{at}"
        if again:
            shutil.copytree(template, house.root)
        result = killed(house, at)
        if operations is None:
            operations = result
            assert operations > 50
            at = 1
            continue
        assert result == -signal.SIGKILL
        house.run()
        assert json.loads((house.root / "sft" / "export" / "config.json").read_text())["steps"] == 4
        assert house.run()[1]["stages"]["sft"]["summary"] == {"loss": 1 / 4, "steps": 4}
        assert house.ran == []
        assert sorted(entry.name for entry in house.root.iterdir() if entry.name.startswith(".")) == [".lock"]
        at += 17


def test_nothing_heavy_is_imported_when_everything_is_up_to_date(house: House, tmp_path: Path) -> None:
    house.run()
    script = tmp_path / "second.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import glmctl.run.pipeline, glmctl.recipe.load
            heavy = [m for m in ("torch", "transformers", "accelerate", "lm_eval", "numpy") if m in sys.modules]
            assert not heavy, heavy
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
