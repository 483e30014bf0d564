"""The loop of spec section 3.4 at its smallest: RL, its answers in place of the cold start's, SFT of the base, harder
RL, and again. The loop's stages, what flows between them and the recipes are the shipped ones; sizes are not."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from glmctl.commands._stage import execute
from glmctl.distill.experts import open_expert
from glmctl.distill.sample import SampleJournal, choose_prompts, collect
from glmctl.recipe.load import load
from glmctl.recipe.schema import DistillRecipe, PipelineRecipe, PipelineStage
from glmctl.rl.episode import Trajectory
from glmctl.rl.score import load_heldout
from glmctl.rl.seeds import derive_seed
from glmctl.run import atomic
from glmctl.run.pipeline import run_pipeline
from glmctl.run.signals import StopFlag
from glmctl.training import session

pytestmark = pytest.mark.slow

SUMS = {"train": 40, "heldout": 8, "cold_start": 20, "task.max_value": 6, "task.hasty": 0.0}
RL = {
    "steps": 3,
    "prompts_per_step": 16,
    "group_size": 8,
    "dynamic_sampling": False,
    "heldout_limit": 8,
    "evaluate_every": 3,
    "schedule.peak_lr": 0.0005,
    "sampling.max_tokens": 48,
}
SFT = {"steps": 45, "batch_tokens": 1024, "sequence_length": 128}
REPLACE = {
    **SFT,
    "teachers.0.prompts": 40,
    "teachers.0.samples_per_prompt": 2,
    "heldout_limit": 8,
    "sampling.max_tokens": 48,
}
SMALL: dict[str, dict[str, Any]] = {
    "math": {**SUMS, "task.terms": [2, 2], "task.operators": "+"},
    "harder": {**SUMS, "task.terms": [2, 3], "task.operators": "+"},
    "hardest": {**SUMS, "task.terms": [3, 3], "task.operators": "+"},
    "sft-reasoning": SFT,
    "rl-1": RL,
    "sft-2": REPLACE,
    "rl-2": RL,
    "sft-3": REPLACE,
    "rl-3": RL,
    "eval": {"limit": 4, "sampling.max_tokens": 16, "speculative_limit": 0},
}
"""stage -> settings that make it small, beside its own"""
BASE = ("tokenizer", "data", "pretrain")
"""the base model's stages, which are not the loop's: those of the smoke pipeline"""


def shrunk() -> PipelineRecipe:
    recipe = load("laptop/self-distillation")
    assert isinstance(recipe, PipelineRecipe)
    loop = {stage.name: stage for stage in recipe.stages}
    small = {name: loop[name].model_copy(update={"set": {**loop[name].set, **SMALL[name]}}) for name in SMALL}
    base = [PipelineStage(name=name, recipe=f"smoke/{name}") for name in BASE]
    return recipe.model_copy(update={"stages": [*base, *small.values()]})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("loop") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 2)
        run_pipeline(shrunk(), folder, load, execute)
    return folder


def recipe_of(root: Path, stage: str) -> Any:
    return load(str(root / stage / "recipe.yaml"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples_of(root: Path, stage: str) -> dict[tuple[str, int], Trajectory]:
    found = SampleJournal(root / stage / "samples-reasoning.jsonl").samples
    assert found
    return found


def weights(root: Path, stage: str) -> str:
    return atomic.sha256_file(root / stage / "export" / "model.safetensors")


def is_right(messages: list[dict[str, Any]]) -> bool:
    """Without the verifier: the last word is the sum that was asked for."""
    asked = re.fullmatch(r"Compute ([\d+]+)\.", messages[0]["content"])
    assert asked is not None
    return str(messages[-1]["content"]).strip().removesuffix(".") == str(sum(map(int, asked[1].split("+"))))


def replayed(root: Path, stage: str, model: Path, tmp_path: Path) -> dict[tuple[str, int], Trajectory]:
    """The samples of `stage`, asked of `model` again: a sample is a function of weights, seed, problem and number."""
    recipe = recipe_of(root, stage)
    assert isinstance(recipe, DistillRecipe)
    teacher = recipe.teachers[0].model_copy(update={"model": str(model)})
    limits = {"episode_tokens": recipe.episode_tokens, "max_turns": recipe.max_turns}
    journal = SampleJournal(tmp_path / f"{model.name}.jsonl")
    with StopFlag() as stop:
        collect(
            journal,
            lambda: open_expert(teacher, Path(recipe.student), device=torch.device("cpu"), **limits),
            choose_prompts(teacher, load_heldout(teacher.problems, None), recipe.seed),
            label="again",
            samples=teacher.samples_per_prompt,
            sampling=recipe.sampling,
            seed=derive_seed(recipe.seed, "distill", teacher.name),
            stop=stop,
        )
    return journal.samples


ROUNDS = [("sft-reasoning", "rl-1", "sft-2"), ("sft-2", "rl-2", "sft-3")]
"""what RL began from, RL, the SFT on its answers"""


@pytest.mark.parametrize(("start", "policy", "tuned"), ROUNDS)
def test_the_sfts_data_are_responses_of_the_rl_policy(
    root: Path, tmp_path: Path, start: str, policy: str, tuned: str
) -> None:
    """Token for token what that policy writes, and not what the model wrote that RL began from."""
    assert weights(root, policy) != weights(root, start)
    kept = samples_of(root, tuned)
    again = replayed(root, tuned, root / policy, tmp_path)
    assert {key: one.tokens for key, one in again.items()} == {key: one.tokens for key, one in kept.items()}
    assert all(again[key].logprobs == pytest.approx(one.logprobs, abs=1e-5) for key, one in kept.items())
    before = replayed(root, tuned, root / start, tmp_path)
    assert any(before[key].logprobs != pytest.approx(one.logprobs, abs=1e-3) for key, one in kept.items())


@pytest.mark.parametrize(("start", "policy", "tuned"), ROUNDS)
def test_the_sft_sees_what_the_verifier_passed_and_nothing_else(
    root: Path, start: str, policy: str, tuned: str
) -> None:
    kept = samples_of(root, tuned)
    passed = [one.messages for one in kept.values() if one.well_formed and is_right(one.messages)]
    assert 0 < len(passed) < len(kept)
    # the same answer twice is taught once
    distinct = {json.dumps(messages, sort_keys=True) for messages in passed}
    taught = [json.dumps(row["messages"], sort_keys=True) for row in rows(root / tuned / "mixture.jsonl")]
    assert sorted(taught) == sorted(distinct)
    status = json.loads((root / tuned / "status.json").read_text())["summary"]
    assert status["sft_conversations"] == status["reasoning_kept"] == len(taught)
    assert status["reasoning_rejected"] == len(kept) - len(passed)


@pytest.mark.parametrize(("start", "policy", "tuned"), ROUNDS)
def test_the_answers_take_the_demonstrations_place_and_the_base_learns_anew(
    root: Path, start: str, policy: str, tuned: str
) -> None:
    recipe = recipe_of(root, tuned)
    assert recipe.student == str(root / "pretrain"), "not the model that answered, nor the one before"
    assert [teacher.model for teacher in recipe.teachers] == [str(root / policy)]
    assert "cold_start" not in json.dumps(recipe.model_dump(mode="json"))
    first = rows(root / tuned / "metrics.jsonl")[0]["loss"]
    assert first > 5, "an untaught model of 512 tokens: ln 512 = 6.2"


HARDER = [("math", "rl-1", "sft-reasoning"), ("harder", "rl-2", "sft-2"), ("hardest", "rl-3", "sft-3")]
"""problems, RL on them, what it begins from"""


def test_every_round_of_rl_is_on_harder_problems_than_the_last(root: Path) -> None:
    lengths, solved = [], []
    for place, stage, start in HARDER:
        recipe = recipe_of(root, stage)
        assert recipe.model == str(root / start)
        assert recipe.problems == [str(root / place / "export" / "train.jsonl")]
        assert recipe.heldout == [str(root / place / "export" / "heldout.jsonl")]
        problems = {row["id"]: row["prompt"] for row in rows(root / place / "export" / "train.jsonl")}
        tried = {row["problem_id"] for row in rows(root / stage / "trajectories.jsonl")}
        assert tried
        assert tried <= problems.keys(), "rollouts are of these problems"
        lengths.append([prompt.count("+") + 1 for prompt in problems.values()])
        solved.append(next(row["reward_mean"] for row in rows(root / stage / "metrics.jsonl") if row["step"] == 1))
    for easier, harder in pairwise(lengths):
        assert mean(harder) > mean(easier)
        assert max(harder) >= max(easier)
        assert min(harder) >= min(easier)
    assert solved[0] > solved[-1], "harder for the model that meets them too"


def test_the_shipped_rounds_rise_too() -> None:
    recipe = load("laptop/self-distillation")
    assert isinstance(recipe, PipelineRecipe)
    made: dict[str, Any] = {stage.name: load(stage.recipe, stage.set) for stage in recipe.stages}
    terms = [made[place].task.terms for place, _, _ in HARDER]
    assert all(low < higher and high < highest for (low, high), (higher, highest) in pairwise(terms))
    for place, stage, start in HARDER:
        assert made[stage].model == f"${{{start}}}"
        assert made[stage].problems == [f"${{{place}}}/export/train.jsonl"]
    for _, policy, tuned in ROUNDS:
        assert made[tuned].student == "${pretrain}"
        assert [teacher.model for teacher in made[tuned].teachers] == [f"${{{policy}}}"]


def test_a_second_call_repeats_nothing(root: Path) -> None:
    def nothing(recipe: Any, path: Path, **options: Any) -> dict[str, Any]:
        raise AssertionError(f"{path.name} ran again")

    run_pipeline(shrunk(), root, load, nothing)
