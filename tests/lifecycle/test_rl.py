"""A tiny RL run from folder to folder: it learns what it is paid for, and resumes bit for bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, EnvironmentProblem, Interrupted, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, ProblemsRecipe, RlRecipe, Sampling
from glmctl.rl import grpo, problems
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Episode, Trajectory
from glmctl.rl.policy import Policy
from glmctl.rl.prompts import Prompts
from glmctl.rl.score import score, summarize
from glmctl.run.atomic import sha256_file
from glmctl.run.directory import Run
from glmctl.training import session

TIMES = {"seconds_generate", "seconds_reward", "seconds_train"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    """A model folder and problem files."""
    folder = tmp_path_factory.mktemp("rl")
    save_model(GlmMoe(tiny_config, seed=0), folder / "model")
    tiny_tokenizer.save(folder / "model")
    recipe = ProblemsRecipe(
        name="p", task=ArithmeticTask(terms=(2, 2), max_value=9), train=60, heldout=10, cold_start=0
    )
    with Run.open(recipe, folder / "problems") as run:
        problems.run(recipe, run)
    return folder


def recipe_of(place: Path, **changes: Any) -> RlRecipe:
    settings = {
        "name": "rl",
        "model": str(place / "model"),
        "problems": [str(place / "problems/export/train.jsonl")],
        "heldout": [str(place / "problems/export/heldout.jsonl")],
        "steps": 6,
        "prompts_per_step": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 8},
        "schedule": {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_fraction": 0.0},
        "evaluate_every": 3,
        "checkpoint": {"every_steps": 2},
    }
    return RlRecipe.model_validate(settings | changes)


@pytest.fixture
def paid(monkeypatch) -> None:
    """An untrained model earns nothing by arithmetic; here it is paid for the share of small token ids it writes."""
    real = Episode.finish_turn

    def finish_turn(episode: Episode, reason: str, version: int) -> None:
        real(episode, reason, version)
        one = episode.trajectory
        if episode.done:
            made = [t for t, m in zip(one.tokens, one.loss_mask, strict=True) if m]
            one.reward, one.stop_reason = sum(t < 128 for t in made) / len(made), StopReason.ANSWERED

    monkeypatch.setattr(Episode, "finish_turn", finish_turn)


def rows_without_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def train(recipe: RlRecipe, path: Path) -> dict[str, Any]:
    with Run.open(recipe, path) as run:
        return grpo.run(recipe, run)


class KilledAt:
    """Ends the run in the middle of a step, as a kill would: after the rollouts, before the update."""

    def __init__(self, step: int) -> None:
        self.step, self.seen = step, 0

    def __get__(self, policy: Policy, owner: object) -> Any:
        self.seen += 1
        if self.seen == self.step:
            raise KeyboardInterrupt
        return partial(real_learn, policy)


real_learn = Policy.learn


@pytest.mark.parametrize("updates", [1, 2])
def test_a_killed_run_continues_bit_for_bit(place, tmp_path, paid, monkeypatch, updates: int) -> None:
    """Reliability R6: the same metrics (floats bit-identical) and the same exported bytes as a run left alone."""
    recipe = recipe_of(
        place,
        objective={"type": "grpo", "updates_per_batch": updates, "kl_weight": 0.01 * (updates - 1)},
        mtp_weight=0.1,
    )
    straight = train(recipe, tmp_path / "straight")
    for death in (2, 4):
        # steps 2 (no checkpoint yet) and then, counted from the start or from a checkpoint, the fourth
        monkeypatch.setattr(Policy, "learn", KilledAt(death))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed")
    monkeypatch.setattr(Policy, "learn", real_learn)
    resumed = train(recipe, tmp_path / "killed")
    assert resumed == straight
    assert rows_without_times(tmp_path / "killed") == rows_without_times(tmp_path / "straight")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        left, right = (sha256_file(tmp_path / run / "export" / name) for run in ("killed", "straight"))
        assert left == right, name
    for name in ("trajectories.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_reward_rises(place, tmp_path, paid) -> None:
    recipe = recipe_of(place, steps=20, group_size=8, evaluate_every=20)
    summary = train(recipe, tmp_path / "run")
    rows = rows_without_times(tmp_path / "run")[1:]
    assert summary["reward_last"] > summary["reward_first"] + 0.2
    assert all(row["logprob_gap"] < 1e-3 and abs(row["ratio_mean"] - 1) < 1e-3 for row in rows)
    assert all(row["groups_kept"] <= 4 for row in rows)
    before, after = load_model(place / "model"), load_model(tmp_path / "run" / "export")
    for old, new in zip(before.routers(), after.routers(), strict=True):
        assert old.e_score_correction_bias.equal(new.e_score_correction_bias)
    # the MTP layer was not trained: mtp_weight is 0
    assert before.mtp.eh_proj.weight.equal(after.mtp.eh_proj.weight)


def test_what_a_run_writes_down(place, tmp_path, paid) -> None:
    recipe = recipe_of(place, steps=2, evaluate_every=1)
    summary = train(recipe, tmp_path / "run")
    assert summary.keys() == {
        "heldout_start", "heldout_end", "heldout_gain_points", "reward_first", "reward_last", "steps", "well_formed",
        "well_formed_start",
    }  # fmt: skip
    rows = rows_without_times(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all("heldout" in row for row in rows)
    lines = (tmp_path / "run" / "trajectories.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 1
    assert len(first["tokens"]) == len(first["loss_mask"]) == len(first["logprobs"])
    assert (
        Trajectory.from_row({k: first[k] for k in vars(Trajectory("p", "t", 0, 0))}).stop_reason is StopReason.ANSWERED
    )
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 1, 2}
    assert all(row["prompt"].startswith("Compute") for row in samples)


def test_without_signal_nothing_is_learnt_and_nothing_breaks(place, tmp_path) -> None:
    """An untrained model earns 0 on every sample: dynamic sampling drops all groups and the weights stay."""
    summary = train(recipe_of(place, steps=2), tmp_path / "run")
    assert summary["reward_last"] == 0.0
    assert [row.get("groups_kept") for row in rows_without_times(tmp_path / "run")] == [None, 0, 0]
    before, after = load_model(place / "model"), load_model(tmp_path / "run" / "export")
    assert all(a.equal(b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


def test_a_signal_saves_and_stops(place, tmp_path, paid, monkeypatch) -> None:
    recipe = recipe_of(place, steps=5, checkpoint={"every_steps": 5})

    class Raised:
        raised = 143

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    with monkeypatch.context() as patch:
        patch.setattr(session, "StopFlag", Raised)
        with pytest.raises(Interrupted) as caught:
            train(recipe, tmp_path / "run")
    assert caught.value.exit_code == 143
    assert (tmp_path / "run" / "checkpoints" / "step-00000001").is_dir()
    straight = train(recipe, tmp_path / "straight")
    assert train(recipe, tmp_path / "run") == straight


def test_failing_machinery_stops_the_run_instead_of_teaching_zeros(place, tmp_path, monkeypatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("judge is down")

    monkeypatch.setattr("glmctl.rl.tasks.arithmetic.ArithmeticEnvironment.reset", broken)
    with pytest.raises(EnvironmentProblem, match="judge is down"):
        train(recipe_of(place), tmp_path / "run")


def test_recipes_that_cannot_learn_are_refused(place, tmp_path) -> None:
    with pytest.raises(RecipeError, match="temperature"):
        train(recipe_of(place, sampling={"temperature": 0.0}), tmp_path / "a")
    heldout = [str(place / "problems/export/heldout.jsonl")]
    with pytest.raises(DataError, match="also trained on"):
        train(recipe_of(place, problems=heldout), tmp_path / "b")
    with pytest.raises(RecipeError, match="no such problem file"):
        train(recipe_of(place, problems=["nowhere.jsonl"]), tmp_path / "c")


def test_prompts_are_a_function_of_seed_and_place_and_cover_every_epoch(place) -> None:
    train_problems, _ = grpo.load_problems(recipe_of(place))
    prompts = Prompts(train_problems, seed=0)
    epochs = [[p.id for p in prompts.take(60)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(p.id for p in train_problems)
    assert epochs[0] != epochs[1]
    again = Prompts(train_problems, seed=0, drawn=57)
    assert [p.id for p in again.take(6)] == epochs[0][57:] + epochs[1][:3]
    assert [p.id for p in Prompts(train_problems, seed=0, name="hard").take(60)] != epochs[0]


def test_scores_of_a_folder_and_of_a_live_model_agree(place) -> None:
    heldout = place / "problems/export/heldout.jsonl"
    sampling = Sampling(temperature=0.0, max_tokens=6)
    stored = score(place / "model", [heldout], limit=7, sampling=sampling)
    template = ChatTemplate.load(place / "model")
    live = score(load_model(place / "model"), [heldout], limit=7, sampling=sampling, template=template)
    assert stored == live
    assert len(stored.samples) == 7
    assert stored.by_task == {"arithmetic": stored.accuracy}
    with pytest.raises(RecipeError, match="no such model"):
        score(place / "nowhere", [heldout])


def test_a_score_is_the_mean_over_what_was_judged() -> None:
    def one(reward: float | None, reasoning: str, well_formed: bool = True) -> Trajectory:
        turns = [{"role": "assistant", "content": "5", "reasoning_content": reasoning}] if well_formed else []
        stop = StopReason.INFRASTRUCTURE if reward is None else StopReason.ANSWERED
        return Trajectory(
            "p", "t", 0, 0, reward=reward, stop_reason=stop, well_formed=well_formed, messages=turns, loss_mask=[0, 1]
        )

    found = summarize([one(1.0, "x"), one(0.0, ""), one(0.0, "", False), one(1.0, ""), one(None, "x")])
    assert (found.accuracy, found.well_formed, found.thinking_rate, found.direct_rate) == (0.5, 0.75, 0.25, 0.5)
    assert found.mean_tokens == 1.0
