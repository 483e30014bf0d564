"""Two experts into one hybrid, tiny: what is sampled once stays sampled, and the student is trained on what passed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import read_conversations
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill import sample, unify
from glmctl.errors import DataError, EnvironmentProblem, Interrupted
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, DistillRecipe, ProblemsRecipe, ToolUseTask
from glmctl.rl import problems
from glmctl.rl.environment import Problem, StopReason, read_problems
from glmctl.rl.episode import Trajectory
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import demonstrate
from glmctl.run.directory import Run
from glmctl.training import session

TASKS = {"maths": ArithmeticTask(terms=(2, 2), max_value=9), "shop": ToolUseTask(max_value=9)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    config = tiny_config.model_copy(update={"max_position_embeddings": 1024})
    for seed, name in enumerate(("base", "maths", "shop")):
        save_model(GlmMoe(config, seed=seed), folder / name)
        tiny_tokenizer.save(folder / name)
    for name, task in TASKS.items():
        recipe = ProblemsRecipe(name="p", task=task, train=30, heldout=4, cold_start=0)
        with Run.open(recipe, folder / f"{name}-problems") as run:
            problems.run(recipe, run)
    return folder


def recipe_of(place: Path, **changes: Any) -> DistillRecipe:
    teachers = [
        {
            "name": name,
            "model": str(place / name),
            "problems": [str(place / f"{name}-problems/export/train.jsonl")],
            "heldout": [str(place / f"{name}-problems/export/heldout.jsonl")],
            "prompts": 10,
            "samples_per_prompt": 2,
            "direct_fraction": 0.25,
        }
        for name in TASKS
    ]
    settings = {
        "name": "distill",
        "teachers": teachers,
        "student": str(place / "base"),
        "sampling": {"max_tokens": 6, "temperature": 0.8},
        "steps": 2,
        "batch_tokens": 2048,
        "sequence_length": 1024,
    }
    return DistillRecipe.model_validate(settings | changes)


class ScriptedExpert:
    """What a good expert would have written; every fifth answer is wrong."""

    def __init__(self, template: ChatTemplate, asked: list[str]) -> None:
        self.template = template
        self.asked = asked

    def play(self, asked, *, sampling, seed, finished, stopped) -> None:
        for problem, trajectory in asked:
            if stopped():
                return
            self.asked.append(f"{problem.id} {trajectory.sample} {sampling.temperature}")
            conversation = demonstrate(problem)
            encoded = self.template.encode_training(conversation.messages, conversation.tools)
            number = trajectory.sample
            trajectory.tokens, trajectory.loss_mask = [*encoded.tokens, number], [*encoded.loss_mask, 0]
            trajectory.logprobs = [0.0] * len(trajectory.tokens)
            trajectory.messages, trajectory.tools = conversation.messages, conversation.tools
            trajectory.reward = float(derive_seed(problem.id, number) % 5 != 0)
            trajectory.stop_reason, trajectory.well_formed = StopReason.ANSWERED, True
            finished(trajectory, 3)


@pytest.fixture
def experts(monkeypatch) -> list[str]:
    """Untrained experts know nothing: the scripted demonstrations play their part. Yields what they are asked."""
    asked: list[str] = []
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(unify, "open_expert", lambda teacher, base, **_: ScriptedExpert(ChatTemplate.load(base), asked))
    return asked


def distill(recipe: DistillRecipe, path: Path) -> dict[str, Any]:
    with Run.open(recipe, path) as run:
        return unify.run(recipe, run)


def test_the_whole_stage(place, tmp_path, experts) -> None:
    summary = distill(recipe_of(place), tmp_path / "run")
    for name in TASKS:
        assert {
            f"{name}_{what}" for what in ("expert", "hybrid", "ratio", "direct", "kept", "rejected")
        } <= summary.keys()
        assert summary[f"{name}_kept"] + summary[f"{name}_rejected"] == 20
        rejections = json.loads((tmp_path / "run" / f"rejections-{name}.json").read_text())
        kind = "wrong_answer" if name == "maths" else "terminal_state"
        assert rejections.keys() == {kind}
        assert rejections[kind]["count"] == summary[f"{name}_rejected"] > 0
    assert {"direct_obeyed", "thinking_obeyed"} <= summary.keys()
    mixture = read_conversations([tmp_path / "run" / "mixture.jsonl"])
    assert len(mixture) == summary["mixture"] == summary["maths_kept"] + summary["shop_kept"]
    assert sum(not row.enable_thinking for row in mixture) == sum(round(summary[f"{n}_kept"] / 4) for n in TASKS)
    assert json.loads(json.dumps(summary)) == summary
    base, hybrid = load_model(place / "base"), load_model(tmp_path / "run" / "export")
    assert not base.embed_tokens.weight.equal(hybrid.embed_tokens.weight)


def test_every_model_is_compared_on_every_domain(place, tmp_path, experts) -> None:
    summary = distill(recipe_of(place), tmp_path / "run")
    table = json.loads((tmp_path / "run/comparison.json").read_text())
    assert list(table) == [*TASKS, "base", "hybrid", "hybrid, /nothink"]
    assert table == summary["comparison"]
    for name in TASKS:
        assert list(table[name]) == list(TASKS)
        right = [derive_seed(p.id, 0) % 5 != 0 for p in read_problems(place / f"{name}-problems/export/heldout.jsonl")]
        assert table[name][name]["accuracy"] == summary[f"{name}_expert"] == sum(right) / len(right)
        assert summary[f"{name}_gain_points"] == 100 * (summary[f"{name}_expert"] - summary[f"{name}_base"])
        assert summary["cost"][name]["samples"] == 20
        assert summary["cost"][name]["prompt_tokens"] == 60
        assert summary["cost"][name]["tokens"] > 0
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    shown = {(row["model"], row["domain"]) for row in rows if "model" in row}
    assert shown == {(model, domain) for model in table for domain in TASKS}


def test_shares_of_the_mixture_are_of_trained_tokens(place, tmp_path, experts) -> None:
    recipe = recipe_of(place, mixture={"maths": 0.75, "shop": 0.25})
    distill(recipe, tmp_path / "run")
    template = ChatTemplate.load(place / "base")
    tokens = dict.fromkeys((True, False), 0)
    for row in read_conversations([tmp_path / "run/mixture.jsonl"]):
        made = template.encode_training(row.messages, row.tools, enable_thinking=row.enable_thinking)
        tokens[row.tools is None] += sum(made.loss_mask)
    # a conversation is shown a whole number of times
    assert tokens[True] / sum(tokens.values()) == pytest.approx(0.75, abs=0.02)


def test_an_interrupted_run_asks_nothing_twice_and_ends_the_same(place, tmp_path, experts, monkeypatch) -> None:
    straight = distill(recipe_of(place), tmp_path / "straight")
    asked_straight = list(experts)
    experts.clear()

    class Raised:
        """A signal comes when the second teacher has given five answers."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        @property
        def raised(self):
            return 130 if len(experts) >= 20 + 8 + 5 else None

    with monkeypatch.context() as patch:
        patch.setattr(unify, "StopFlag", Raised)
        with pytest.raises(Interrupted, match="sample shop") as stopped:
            distill(recipe_of(place), tmp_path / "run")
    assert stopped.value.exit_code == 130
    # and the machine went down in the middle of a line
    path = tmp_path / "run" / "samples-shop.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    again = distill(recipe_of(place), tmp_path / "run")
    torn = asked_straight[20 + 8 + 4]
    assert sorted(experts) == sorted([*asked_straight, torn])

    def timeless(summary: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in summary.items() if k not in ("sft_tokens_per_second", "cost")}

    assert timeless(again) == timeless(straight)
    for name in ("mixture.jsonl", "comparison.json", "export/model.safetensors"):
        left, right = ((tmp_path / run / name).read_bytes() for run in ("straight", "run"))
        assert left == right, name


def test_what_the_machinery_failed_is_asked_again(place, tmp_path, experts, monkeypatch) -> None:
    """Over a fifth of failures ends the run; the next call asks those again and only those."""
    real = ScriptedExpert.play
    failing = {"left": 5}

    def play(self, asked, *, finished, **settings) -> None:
        def sometimes(trajectory: Trajectory, tokens: int) -> None:
            if failing["left"]:
                failing["left"] -= 1
                trajectory.reward, trajectory.stop_reason = None, StopReason.INFRASTRUCTURE
            finished(trajectory, tokens)

        real(self, asked, finished=sometimes, **settings)

    monkeypatch.setattr(ScriptedExpert, "play", play)
    with pytest.raises(EnvironmentProblem, match="5 of 20"):
        distill(recipe_of(place), tmp_path / "run")
    first = list(experts)
    experts.clear()
    distill(recipe_of(place), tmp_path / "run")
    assert experts[:5] == first[:5]
    assert not set(experts[5:]) & set(first)


def test_an_expert_with_nothing_to_teach_is_named(place, tmp_path) -> None:
    """The untrained experts themselves: not one sample survives."""
    with pytest.raises(DataError, match="teacher maths: none of 20 samples"):
        distill(recipe_of(place), tmp_path / "run")


@pytest.mark.parametrize("names", [("same", "same"), ("maths", "hybrid")])
def test_teachers_need_names_of_their_own(place, names) -> None:
    teachers = [{**t.model_dump(), "name": name} for t, name in zip(recipe_of(place).teachers, names, strict=True)]
    with pytest.raises(ValidationError, match=r"same name|calls another model"):
        recipe_of(place, teachers=teachers)


def test_prompts_are_chosen_by_the_seed_alone(place) -> None:
    teacher = recipe_of(place).teachers[0]
    pool = [Problem(str(i), "arithmetic", "", 0) for i in range(30)]
    assert sample.choose_prompts(teacher, pool, 1) == sample.choose_prompts(teacher, pool, 1)
    assert sample.choose_prompts(teacher, pool, 1) != sample.choose_prompts(teacher, pool, 2)
    random.seed(0)
    assert len({p.id for p in sample.choose_prompts(teacher, pool, 1)}) == 10
    assert len(sample.choose_prompts(teacher, pool[:3], 1)) == 3
