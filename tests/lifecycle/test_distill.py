"""Two experts into one hybrid, tiny: what is sampled once stays sampled, and the student is trained on what passed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import read_conversations
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill import sample, unify
from glmctl.errors import DataError, Interrupted, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, DistillRecipe, ProblemsRecipe, ToolUseTask
from glmctl.rl import problems
from glmctl.rl.environment import Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import demonstrate
from glmctl.run.directory import Run

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
        "steps": 3,
        "batch_tokens": 2048,
        "sequence_length": 1024,
    }
    return DistillRecipe.model_validate(settings | changes)


def expert(problem: Problem, template: ChatTemplate, index: int, number: int) -> Trajectory:
    """What a good expert would have written; every fifth answer is wrong."""
    conversation = demonstrate(problem)
    encoded = template.encode_training(conversation.messages, conversation.tools)
    wrong = derive_seed(problem.id, number) % 5 == 0
    return Trajectory(
        problem.id,
        problem.task,
        index,
        number,
        tokens=[*encoded.tokens, number],
        loss_mask=[*encoded.loss_mask, 0],
        logprobs=[0.0] * (len(encoded.tokens) + 1),
        reward=float(not wrong),
        stop_reason=StopReason.ANSWERED,
        well_formed=True,
        messages=conversation.messages,
        tools=conversation.tools,
    )


@pytest.fixture
def experts(monkeypatch) -> list[str]:
    """Untrained experts know nothing: their part is played by the scripted demonstrations. Yields the ids asked."""
    asked: list[str] = []

    def rollout(engine, template, problems, *, samples, **settings) -> list[Trajectory]:
        asked.extend(p.id for p in problems)
        return [expert(p, template, i, n) for i, p in enumerate(problems) for n in range(samples)]

    monkeypatch.setattr(sample, "rollout", rollout)
    monkeypatch.setattr(sample, "PROMPTS_AT_ONCE", 4)
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


def test_an_interrupted_run_asks_nothing_twice_and_ends_the_same(place, tmp_path, experts, monkeypatch) -> None:
    straight = distill(recipe_of(place), tmp_path / "straight")
    asked_straight = sorted(experts)
    experts.clear()

    flags = iter([None, None, 130])

    class Raised:
        """Asked after every chunk: a signal comes in the middle of the second teacher."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        @property
        def raised(self):
            return next(flags, None)

    with monkeypatch.context() as patch:
        patch.setattr(unify, "StopFlag", Raised)
        with pytest.raises(Interrupted):
            distill(recipe_of(place), tmp_path / "run")
    # the kill was in the middle of a line, and of a prompt's samples
    path = tmp_path / "run" / "samples-maths.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-2]) + lines[-2][:100])
    redone = json.loads(lines[-1])["problem_id"]
    again = distill(recipe_of(place), tmp_path / "run")
    assert sorted(experts) == sorted([*asked_straight, redone])
    timing = {"sft_tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in straight.items() if k not in timing}
    for name in ("mixture.jsonl", "samples-maths.jsonl", "export/model.safetensors"):
        left, right = ((tmp_path / run / name).read_bytes() for run in ("straight", "run"))
        assert left == right, name


def test_an_expert_with_nothing_to_teach_is_named(place, tmp_path) -> None:
    """The untrained experts themselves: not one sample survives."""
    with pytest.raises(DataError, match="teacher maths: none of 20 samples"):
        distill(recipe_of(place), tmp_path / "run")


def test_two_teachers_of_one_name_are_refused(place, tmp_path) -> None:
    teachers = [{**t.model_dump(), "name": "same"} for t in recipe_of(place).teachers]
    with pytest.raises(RecipeError, match="same name"):
        distill(recipe_of(place, teachers=teachers), tmp_path / "run")


def test_prompts_are_chosen_by_the_seed_alone(place) -> None:
    teacher = recipe_of(place).teachers[0]
    pool = [Problem(str(i), "arithmetic", "", 0) for i in range(30)]
    assert sample.choose_prompts(teacher, pool, 1) == sample.choose_prompts(teacher, pool, 1)
    assert sample.choose_prompts(teacher, pool, 1) != sample.choose_prompts(teacher, pool, 2)
    random.seed(0)
    assert len({p.id for p in sample.choose_prompts(teacher, pool, 1)}) == 10
    assert len(sample.choose_prompts(teacher, pool[:3], 1)) == 3
