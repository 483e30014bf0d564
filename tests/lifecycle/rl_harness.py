"""Runs one tiny RL run in peace and one that is killed again and again. A program for test_rl_kill, not a test.

    python rl_harness.py FOLDER KILLS [SEED]   -> FOLDER/results.json; SEED decides where they strike

Everything that a checkpoint has to hold is in use: pools of a curriculum, a moving temperature, rollouts carried over
with their weight versions, two updates a batch, a reference. As in training_harness, lives are forks of one process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, ProblemsRecipe, RlRecipe
from glmctl.rl import grpo, problems, rollout  # noqa: F401 - the driver, imported before the forks
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Episode
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.metrics import MetricsLog


def training_harness() -> ModuleType:
    """How lives are ended is said there."""
    path = Path(__file__).with_name("training_harness.py")
    spec = importlib.util.spec_from_file_location("training_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(root: Path, harness: ModuleType) -> None:
    """A model with its tokenizer, and problems."""
    config = ModelConfig.model_validate({**harness.MODEL, "max_position_embeddings": 256})
    save_model(GlmMoe(config, seed=0), root / "model")
    Tokenizer.train(harness.TEXTS, vocab_size=512, digits=1).save(root / "model")
    recipe = ProblemsRecipe(name="p", task=ArithmeticTask(terms=(2, 2), max_value=9), train=60, heldout=4, cold_start=0)
    with Run.open(recipe, root / "problems") as run:
        problems.run(recipe, run)


def recipe_of(root: Path, steps: int) -> RlRecipe:
    """`steps` steps with everything that changes."""
    some = {"type": "moderate", "name": "some", "samples": 4, "low": 0.0, "high": 0.75, "group_size": None}
    hard = {"type": "hard", "name": "hard", "failed": 1, "solved": 8, "group_size": 6, "measure": 24}
    return RlRecipe.model_validate(
        {
            "name": "tiny-rl",
            "model": str(root / "model"),
            "problems": [str(root / "problems/export/train.jsonl")],
            "heldout": [str(root / "problems/export/heldout.jsonl")],
            "steps": steps,
            "prompts_per_step": 3,
            "group_size": 4,
            "oversample": 2.0,
            "sampling": {"max_tokens": 6},
            "rollouts": {"until_full": True, "unfinished": "carry", "record": True},
            "objective": {"type": "grpo", "updates_per_batch": 2, "kl_weight": 0.01},
            "dynamic_temperature": {"grid": [0.8, 1.0, 1.2], "samples": 1, "plateau": {"window": 2, "min_gain": 0.5}},
            "curriculum": {"stages": [{**some, "measure": 24, "until": {"type": "steps", "steps": steps // 2}}, hard]},
            "schedule": {"peak_lr": 1e-3, "final_lr": 1e-3, "warmup_fraction": 0.0},
            "evaluate_every": 7,
            "checkpoint": {"every_steps": 2},
        }
    )


def pay() -> None:
    """Pay for a small first token, so that an untrained model has something to learn; few slots, so that some wait."""
    rollout.MAX_SLOTS = 10
    real = Episode.finish_turn

    def finish_turn(episode: Episode, reason: str, version: int) -> None:
        real(episode, reason, version)
        one = episode.trajectory
        if episode.done:
            one.reward, one.stop_reason = float(one.tokens[one.loss_mask.index(1)] < 200), StopReason.ANSWERED

    Episode.finish_turn = finish_turn  # type: ignore[method-assign]


def outcome(path: Path, codes: list[int]) -> dict[str, Any]:
    """What a finished run left, without the seconds that two equal runs differ in."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith("seconds")}
        for row in MetricsLog(path / "metrics.jsonl").rows()
    ]
    status = json.loads((path / "status.json").read_text())
    return {
        "codes": codes,
        "rows": rows,
        "samples": (path / "samples.jsonl").read_text(),
        "trajectories": (path / "trajectories.jsonl").read_text(),
        "rollouts": {p.name: atomic.sha256_file(p) for p in sorted((path / "rollouts").iterdir())},
        "model": atomic.sha256_file(path / "export" / "model.safetensors"),
        "state": status["state"],
        "summary": status["summary"],
        "left": sorted(p.name for p in path.rglob(".*") if p.name != ".lock"),
    }


def main(root: Path, kills: int, seed: int) -> None:
    """One run in peace, one killed `kills` times: half of them at a random moment, half inside a save."""
    harness = training_harness()
    setup = os.fork()
    if setup == 0:
        prepare(root, harness)
        os._exit(0)
    assert os.waitpid(setup, 0)[1] == 0
    pay()
    recipe, rng = recipe_of(root, 8 + 4 * kills), random.Random(seed)
    straight = outcome(root / "straight", [harness.child(recipe, root / "straight", None)])
    codes = [harness.child(recipe, root / "killed", harness.random_death(rng)) for _ in range(kills)]
    codes.append(harness.child(recipe, root / "killed", None))
    results = {"straight": straight, "killed": outcome(root / "killed", codes)}
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
