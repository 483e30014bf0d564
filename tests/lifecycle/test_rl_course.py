"""Tiny RL runs with all that changes in the course of one: pools, temperature, carried and FP8 rollouts, modes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from glmctl.cli import main
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, ProblemsRecipe, RlRecipe
from glmctl.rl import grpo, invariants, problems
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Episode
from glmctl.rl.policy import Policy
from glmctl.rl.recording import read_step, recorded_steps
from glmctl.run.atomic import sha256_file
from glmctl.run.directory import Run
from glmctl.run.report import report

TIMES = {"seconds_generate", "seconds_reward", "seconds_train"}

COURSE = {
    "oversample": 2.0,
    "rollouts": {"until_full": True, "unfinished": "carry"},
    "lengths": [{"from_step": 1, "max_tokens": 6}, {"from_step": 4, "max_tokens": 8}],
    "dynamic_temperature": {
        "grid": [0.8, 1.0, 1.2],
        "plateau": {"window": 1, "min_gain": 1.0},
        "samples": 1,
        "problems": 3,
    },
    "curriculum": {
        "stages": [
            {"type": "moderate", "name": "some", "samples": 4, "low": 0.25, "high": 0.75, "group_size": None}
            | {"measure": 24, "until": {"type": "steps", "steps": 3}},
            {"type": "hard", "name": "hard", "failed": 2, "solved": 16, "group_size": 6, "measure": 24},
        ]
    },
}
"""all of it at once"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    """A model folder and problem files."""
    folder = tmp_path_factory.mktemp("course")
    save_model(GlmMoe(tiny_config, seed=0), folder / "model")
    tiny_tokenizer.save(folder / "model")
    recipe = ProblemsRecipe(name="p", task=ArithmeticTask(terms=(2, 2), max_value=9), train=60, heldout=8, cold_start=0)
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
        "prompts_per_step": 3,
        "group_size": 4,
        "sampling": {"max_tokens": 8},
        "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3, "warmup_fraction": 0.0},
        "evaluate_every": 6,
        "checkpoint": {"every_steps": 2},
    }
    return RlRecipe.model_validate(settings | changes)


@pytest.fixture(autouse=True)
def paid(monkeypatch) -> None:
    """An untrained model earns nothing by arithmetic; here it is paid for an answer that begins with a small token id.

    Its answers are all as long as they may be, so only with few slots does one end before another.
    """
    monkeypatch.setattr("glmctl.rl.rollout.MAX_SLOTS", 10)
    real_turn = Episode.finish_turn

    def finish_turn(episode: Episode, reason: str, version: int) -> None:
        real_turn(episode, reason, version)
        one = episode.trajectory
        if episode.done:
            first = one.tokens[one.loss_mask.index(1)]
            one.reward, one.stop_reason = float(first < 200), StopReason.ANSWERED

    monkeypatch.setattr(Episode, "finish_turn", finish_turn)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def train(recipe: RlRecipe, path: Path) -> dict[str, Any]:
    with Run.open(recipe, path) as run:
        summary = grpo.run(recipe, run)
        run.finish(summary)
        return summary


def weights(path: Path) -> str:
    return sha256_file(path / "export/model.safetensors")


class KilledAt:
    """Ends the run in the middle of a step: after the rollouts, before the update."""

    def __init__(self, step: int, real: Any) -> None:
        self.step, self.seen, self.real = step, 0, real

    def __get__(self, policy: Policy, owner: object) -> Any:
        self.seen += 1
        if self.seen == self.step:
            raise KeyboardInterrupt
        return partial(self.real, policy)


def test_everything_that_changes_resumes_bit_for_bit(place, tmp_path, monkeypatch) -> None:
    """Reliability R6 with pools, temperatures and carried rollouts in the checkpoint."""
    recipe = recipe_of(place, **COURSE)
    straight = train(recipe, tmp_path / "straight")
    rows = rows_of(tmp_path / "straight")
    assert [row.get("stage") for row in rows] == [None, "some", "some", "some", "hard", "hard", "hard"]
    assert rows[0]["curriculum"]["stage"] == "some"
    assert rows[0]["curriculum"]["kept"] == rows[1]["pool"] > 0
    assert rows[3]["curriculum"]["kept"] == rows[4]["pool"] > 0
    assert [row["max_tokens"] for row in rows[1:]] == [6, 6, 6, 8, 8, 8]
    assert len([row for row in rows if "temperature_scores" in row]) >= 2
    assert len({row["temperature"] for row in rows[1:]}) > 1
    assert max(row["staleness"] for row in rows[1:]) == 1
    assert sum(row["groups_carried"] for row in rows[1:]) > 0
    real = Policy.learn
    for death in (2, 2, 3):
        monkeypatch.setattr(Policy, "learn", KilledAt(death, real))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "killed")
    monkeypatch.setattr(Policy, "learn", real)
    assert train(recipe, tmp_path / "killed") == straight
    assert rows_of(tmp_path / "killed") == rows
    assert weights(tmp_path / "killed") == weights(tmp_path / "straight")


def test_training_on_recorded_rollouts_is_the_run_that_made_them(place, tmp_path) -> None:
    """Same rollouts in the same order: the same weights, bit for bit, without generating a token."""
    made = recipe_of(place, rollouts={"record": True}, steps=4)
    train(made, tmp_path / "made")
    assert recorded_steps(tmp_path / "made") == [1, 2, 3, 4]
    again = recipe_of(place, mode="train_only", recorded=str(tmp_path / "made"), steps=4)
    train(again, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "made")
    for one, other in zip(rows_of(tmp_path / "made")[1:], rows_of(tmp_path / "again")[1:], strict=True):
        for key in ("loss", "grad_norm", "reward_mean", "entropy", "groups_kept"):
            assert one.get(key) == other.get(key)
    # another objective on the very same rollouts
    other = recipe_of(
        place,
        mode="train_only",
        recorded=str(tmp_path / "made"),
        steps=2,
        objective={"type": "grpo", "aggregation": "sequence"},
    )
    train(other, tmp_path / "other")
    with pytest.raises(RecipeError, match="holds rollouts of 4 steps, 6 are asked for"):
        train(recipe_of(place, mode="train_only", recorded=str(tmp_path / "made")), tmp_path / "more")


@pytest.mark.slow
def test_rollouts_alone_change_no_weight_and_can_be_trained_on(place, tmp_path) -> None:
    train(recipe_of(place, mode="rollout_only", steps=3), tmp_path / "only")
    assert weights(tmp_path / "only") == sha256_file(place / "model/model.safetensors")
    rows = rows_of(tmp_path / "only")
    assert all("loss" not in row for row in rows)
    for step in (1, 2, 3):
        found = read_step(tmp_path / "only", step)
        assert {version for group in found.groups for one in group for version in one.versions} == {0}
        assert len(found.groups) == rows[step]["groups_kept"]
    train(recipe_of(place, mode="train_only", recorded=str(tmp_path / "only"), steps=3), tmp_path / "trained")
    assert weights(tmp_path / "trained") != weights(tmp_path / "only")


def test_fp8_rollouts_are_a_little_off_and_the_gap_is_bounded(place, tmp_path) -> None:
    fp8 = {"rollouts": {"precision": "fp8-block"}, "objective": {"type": "grpo", "importance_cap": 2.0}}
    train(recipe_of(place, steps=3, **fp8), tmp_path / "fp8")
    gaps = [row["logprob_gap"] for row in rows_of(tmp_path / "fp8")[1:]]
    assert all(1e-5 < gap < 0.2 for gap in gaps)
    assert len(set(gaps)) == 3
    train(recipe_of(place, steps=3), tmp_path / "fp32")
    assert max(row["logprob_gap"] for row in rows_of(tmp_path / "fp32")[1:]) < min(gaps) / 10
    with pytest.raises(invariants.LogprobMismatch):
        train(recipe_of(place, rollouts={"precision": "fp8-block", "fp8_gap_limit": 1e-6}), tmp_path / "tight")


@pytest.mark.slow
def test_drafts_change_nothing_that_is_checked(place, tmp_path) -> None:
    """Speculation in the rollouts: fresh tokens still have ratio 1."""
    train(recipe_of(place, steps=2, rollouts={"speculative": 1}), tmp_path / "drafted")
    assert all(row["logprob_gap"] < 1e-3 for row in rows_of(tmp_path / "drafted")[1:])


def test_a_curriculum_without_problems_says_what_it_measured(place, tmp_path) -> None:
    stages = [{"type": "moderate", "name": "all-right", "samples": 2, "low": 1.0, "high": 1.0, "measure": 4}]
    with pytest.raises(DataError, match=r"stage 'all-right'.*measured 4"):
        train(recipe_of(place, curriculum={"stages": stages}, sampling={"max_tokens": 2}), tmp_path / "run")


@pytest.fixture
def sampled(place, tmp_path) -> Path:
    train(recipe_of(place, steps=2, objective={"type": "grpo", "overlong": {"cache_tokens": 4}}), tmp_path / "run")
    return tmp_path / "run"


def test_rollouts_are_shown_with_what_became_of_their_rewards(sampled: Path, capsys) -> None:
    rows = [json.loads(line) for line in (sampled / "trajectories.jsonl").read_text().splitlines()]
    parts = next(row["breakdown"] for row in rows if row["breakdown"] is not None)
    assert parts.keys() == {"verifier", "overlong", "shaped", "advantage"}
    assert parts["shaped"] == parts["verifier"] + parts["overlong"]
    page = report(sampled).read_text()
    assert "Rollouts and their rewards" in page
    assert "advantage" in page
    assert main(["rl", "replay", str(sampled), "--limit", "2"]) == 0
    text = capsys.readouterr().out
    assert "Compute" in text
    assert "advantage" in text
    assert f"2 of {len(rows)} rollouts" in text
    assert main(["rl", "replay", str(sampled), "--json", "--below", "0.5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["found"] == sum(row["reward"] < 0.5 for row in rows)


def test_judging_again_finds_rewards_that_are_others_now(sampled: Path, capsys) -> None:
    """The rewards of this run are not arithmetic's, so every 1 among what parsed is found."""
    assert main(["rl", "replay", str(sampled), "--judge", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["judged"] >= found["changed"]
    assert main(["rl", "replay", str(sampled / "nowhere")]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert main(["rl", "replay", str(sampled), "--step", "77"]) == 2
    assert "no rollouts of step 77" in capsys.readouterr().err
    shutil.rmtree(sampled / "checkpoints")
