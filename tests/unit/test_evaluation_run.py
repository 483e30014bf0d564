"""The eval driver: what it writes, what it refuses, and that lm-eval finds our model by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import make_table

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.evaluation.compare import compare
from glmctl.evaluation.harness import Settings, run_tasks
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.run import run
from glmctl.evaluation.tasks import TaskInputs, build_task
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, EvalRecipe, Sampling, ToolUseTask
from glmctl.rl.tasks import arithmetic, tool_use
from glmctl.run.directory import Run

GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture
def folders(tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> dict[str, str]:
    """Two model folders and one problem file for each task."""
    paths = {}
    rng = random.Random(0)
    problems = [
        *arithmetic.generate(ArithmeticTask(max_value=20), 3, rng),
        *tool_use.generate(ToolUseTask(max_value=20), 3, rng),
    ]
    config = tiny_config.model_copy(update={"max_position_embeddings": 1024})
    for name, one in (("small", GlmMoe(config, seed=1)), ("other", GlmMoe(config, seed=2))):
        tiny_tokenizer.save(tmp_path / f"tokenizer-{name}")
        (tmp_path / name).mkdir()
        save_model(one, tmp_path / name, tokenizer_folder=tmp_path / f"tokenizer-{name}")
        paths[name] = str(tmp_path / name)
    for task in ("arithmetic", "tool_use"):
        rows = [json.dumps(problem.to_row()) for problem in problems if problem.task == task]
        (tmp_path / f"{task}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        paths[task] = str(tmp_path / f"{task}.jsonl")
    return paths


def test_the_driver_scores_every_model_on_everything(folders: dict[str, str], tmp_path: Path) -> None:
    console.configure(quiet=True)
    recipe = EvalRecipe(
        name="all",
        models={"small": folders["small"], "other": folders["other"]},
        tasks=["glmctl_cloze", "glmctl_arithmetic"],
        problems={"sums": folders["arithmetic"], "shop": folders["tool_use"]},
        limit=2,
        sampling=GREEDY,
        max_slots=4,
    )
    with Run.open(recipe, tmp_path / "run") as opened:
        summary = run(recipe, opened)
        assert json.loads(json.dumps(summary)) == summary
        for name in ("small", "other"):
            for key in ("glmctl_cloze", "glmctl_arithmetic", "sums", "shop", "mtp_acceptance"):
                assert 0.0 <= summary[f"{name}/{key}"] <= 1.0
            assert summary[f"{name}/mtp_identical"] is True
            results = json.loads((opened.export / name / "results.json").read_text())
            assert set(results["results"]) == {"glmctl_cloze", "glmctl_arithmetic", "sums", "shop"}
            assert results["config"]["model_args"] == {"pretrained": folders[name]}
            assert results["n-samples"]["sums"] == {"original": 2, "effective": 2}
            assert "sums" in make_table(results)
            assert len((opened.export / name / "samples_glmctl_cloze.jsonl").read_text().splitlines()) == 2
        rows = [json.loads(line) for line in opened.samples.read_text().splitlines()]
        assert {(row["model"], row["task"]) for row in rows} == {
            (name, task) for name in ("small", "other") for task in ("arithmetic", "tool_use")
        }
        assert (opened.export / "manifest.json").is_file()
        assert run(recipe, opened) == summary, "nothing is drawn from the surroundings"


def test_samples_of_every_problem_give_avg_and_pass_at_k_and_compare_with_themselves(
    folders: dict[str, str], tmp_path: Path
) -> None:
    console.configure(quiet=True)
    recipe = EvalRecipe(
        name="repeated",
        models={"small": folders["small"]},
        problems={"sums": folders["arithmetic"]},
        limit=2,
        sampling=Sampling(temperature=1.0, max_tokens=4),
        samples_per_problem=4,
        speculative_limit=0,
    )
    with Run.open(recipe, tmp_path / "run") as opened:
        summary = run(recipe, opened)
        assert {"small/sums_avg@4", "small/sums_pass@1", "small/sums_pass@2", "small/sums_pass@4"} <= summary.keys()
        rows = [json.loads(x) for x in (opened.export / "small" / "samples_sums.jsonl").read_text().splitlines()]
        assert len(rows) == 8
        assert len({row["reply"] for row in rows}) > 1, "every sample draws from its own stream"
        same = compare(opened.export / "small", opened.export / "small")["sums"]
        assert (same.documents, same.difference) == (2, 0.0)
    with pytest.raises(ValueError, match="the same answer again"):
        EvalRecipe(name="x", models={"a": "b"}, sampling=GREEDY, samples_per_problem=2)


def test_results_and_samples_have_lm_eval_s_layout(folders: dict[str, str], tmp_path: Path) -> None:
    """Rows as its own writer puts them down, and no key of its results file missing."""
    console.configure(quiet=True)
    tasks = ["glmctl_cloze", "glmctl_nothink", "glmctl_perplexity"]
    recipe = EvalRecipe(name="r", models={"m": folders["small"]}, tasks=tasks, limit=3, sampling=GREEDY)
    with Run.open(recipe, tmp_path / "run") as opened:
        run(recipe, opened)
        home = opened.export / "m"
    lm = GlmctlLM(folders["small"], max_gen_toks=GREEDY.max_tokens)
    settings = Settings(limit=3, bootstrap_iters=recipe.bootstrap_iters)
    found = run_tasks(lm, tasks, TaskInputs(lm.template, GREEDY), settings)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    tracker.general_config_tracker.log_experiment_args("glmctl", {"pretrained": "m"}, None, None, True)
    samples = found.pop("samples")
    tracker.save_results_aggregated(found, samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task, rows)
        (theirs,) = (tmp_path / "theirs").rglob(f"samples_{task}_2*.jsonl")
        assert lines(home / f"samples_{task}.jsonl") == lines(theirs)
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    expected, ours = json.loads(theirs.read_text()), json.loads((home / "results.json").read_text())
    assert set(expected) <= set(ours)
    for key in ("results", "n-shot", "higher_is_better", "n-samples", "versions", "task_hashes"):
        assert ours[key] == expected[key], key
    again = EvalRecipe.model_validate(ours["reproduce"]["recipe"])
    assert again == recipe, "the whole recipe is in the results"
    assert set(ours["reproduce"]["weights"]) == {"config.json", "model.safetensors"}


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": [], "problems": {}}, "nothing to evaluate"),
        ({"tasks": ["glmctl_clozes"]}, "did you mean 'glmctl_cloze'"),
        ({"tasks": ["sums"]}, "rename the latter"),
        ({"problems": {"sums": "nowhere.jsonl"}}, r"nowhere\.jsonl: no such problem file"),
        ({"models": {"a": "nowhere"}}, "nowhere"),
        ({"models": {"a/b": "x"}}, "names files"),
        ({"perplexity_texts": ["nowhere.txt"]}, r"nowhere\.txt: no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_a_model_is_loaded(
    folders: dict[str, str], tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmctl.evaluation.run.load_model", lambda folder, **options: pytest.fail("loaded"))
    given: dict[str, Any] = {
        "name": "wrong",
        "models": {"a": folders["small"]},
        "tasks": ["glmctl_cloze"],
        "problems": {"sums": folders["arithmetic"]},
    }
    recipe = EvalRecipe.model_validate({**given, **change})
    with Run.open(recipe, tmp_path / "run") as opened, pytest.raises(RecipeError, match=message):
        run(recipe, opened)


@pytest.mark.parametrize("tasks", [["glmctl_code"], ["glmctl_verified"]])
def test_code_without_a_sandbox_is_refused_before_a_model_is_loaded(
    folders: dict[str, str], tmp_path: Path, tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmctl.evaluation.run.load_model", lambda folder, **options: pytest.fail("loaded"))
    monkeypatch.setattr("glmctl.rl.sandbox.boxes.missing", lambda level: ("bubblewrap",))
    recipe = EvalRecipe(name="code", models={"a": folders["small"]}, tasks=tasks)
    with Run.open(recipe, tmp_path / "run") as opened, pytest.raises(EnvironmentProblem, match="it lacks bubblewrap"):
        run(recipe, opened)


def test_the_model_is_registered_by_name_and_matches_simple_evaluate(
    folders: dict[str, str], tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`simple_evaluate(model="glmctl")` on the folder gives the figures of our harness on the model in memory."""
    inputs = TaskInputs(ChatTemplate(tiny_tokenizer), GREEDY)
    # it runs a dozen programs to describe the machine
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    found = lm_eval.simple_evaluate(
        model="glmctl",
        model_args=f"pretrained={folders['small']}",
        tasks=[build_task("glmctl_cloze", inputs)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        limit=8,
        bootstrap_iters=0,
    )
    ours = run_tasks(GlmctlLM(folders["small"], batch_tokens=100), ["glmctl_cloze"], inputs, Settings(limit=8))
    assert found is not None
    assert found["results"]["glmctl_cloze"] == ours["results"]["glmctl_cloze"]
