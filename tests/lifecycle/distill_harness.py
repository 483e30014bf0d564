"""Distils in forked processes that die after chosen writes. A program for test_distill_kill, not a test.

    python distill_harness.py FOLDER   -> FOLDER/results.json

The parent imports everything once and computes nothing itself (threads do not survive a fork). The experts' part is
played by the scripted demonstrations; who was asked what is written to a file before the answer exists.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill import unify
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, DistillRecipe, ProblemsRecipe, ToolUseTask
from glmctl.rl import problems
from glmctl.rl.environment import StopReason
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import demonstrate
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.metrics import MetricsLog
from glmctl.training import session

TASKS = {"maths": ArithmeticTask(terms=(2, 2), max_value=9), "shop": ToolUseTask(max_value=9)}
LIVES = (3, 9, 14, 12, 16, 8, 3, 2, 6)
"""writes until the end, life after life; the last life goes to the end"""


def prepare(root: Path) -> None:
    """A tokenizer, an untrained base, and problems of two domains."""
    Tokenizer.train(["Compute 34+57. It is 91.", "Price of item xa in shop b?"] * 4, vocab_size=512, digits=1).save(
        root / "base"
    )
    config = ModelConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
    )
    save_model(GlmMoe(config, seed=0), root / "base")
    for name, task in TASKS.items():
        made = ProblemsRecipe(name="p", task=task, train=12, heldout=3, cold_start=0)
        with Run.open(made, root / f"{name}-problems") as run:
            problems.run(made, run)


def recipe_of(root: Path) -> DistillRecipe:
    """Two teachers, six prompts each, two samples of each, two steps."""
    teachers = [
        {
            "name": name,
            "model": str(root / "base"),
            "problems": [str(root / f"{name}-problems/export/train.jsonl")],
            "heldout": [str(root / f"{name}-problems/export/heldout.jsonl")],
            "prompts": 6,
            "samples_per_prompt": 2,
        }
        for name in TASKS
    ]
    return DistillRecipe.model_validate(
        {
            "name": "tiny",
            "teachers": teachers,
            "student": str(root / "base"),
            "sampling": {"max_tokens": 6, "temperature": 0.8},
            "mixture": {"maths": 0.5, "shop": 0.5},
            "steps": 2,
            "batch_tokens": 2048,
            "sequence_length": 1024,
            "checkpoint": {"every_steps": 1},
        }
    )


class Scripted:
    """An expert that knows every answer and gives three in four of them; it says aloud what it is asked."""

    def __init__(self, template: ChatTemplate, aloud: Callable[[str], None]) -> None:
        self.template, self.aloud = template, aloud

    def play(self, asked: Iterable[Any], *, sampling: Any, seed: int, finished: Any, stopped: Any) -> None:
        for problem, trajectory in asked:
            self.aloud(f"{seed} {problem.id} {trajectory.sample}")
            talk = demonstrate(problem)
            encoded = self.template.encode_training(talk.messages, talk.tools)
            trajectory.tokens, trajectory.loss_mask = encoded.tokens, encoded.loss_mask
            trajectory.logprobs = [0.0] * len(encoded.tokens)
            trajectory.messages, trajectory.tools, trajectory.well_formed = talk.messages, talk.tools, True
            trajectory.reward = float(derive_seed(problem.id, trajectory.sample) % 4 != 0)
            trajectory.stop_reason = StopReason.ANSWERED
            finished(trajectory, 7)


def arm(path: Path, writes: int | None) -> None:
    """Script the experts, say aloud what the engine is asked too, and die after so many durable writes."""

    def aloud(line: str) -> None:
        with path.with_suffix(".asked").open("a") as stream:
            stream.write(line + "\n")

    unify.open_expert = lambda teacher, base, **_: Scripted(ChatTemplate.load(base), aloud)  # type: ignore[assignment]
    session.SAMPLE_TOKENS = 4
    left = writes

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **settings: Any) -> Any:
            nonlocal left
            result = real(*args, **settings)
            if left is not None:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, wrapped)

    counted(MetricsLog, "append")
    counted(atomic, "write_bytes")


def child(root: Path, path: Path, writes: int | None) -> int:
    """One life; its exit code."""
    pid = os.fork()
    if pid == 0:
        console.configure(quiet=True)
        arm(path, writes)
        execute(recipe_of(root), path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def without_time(value: Any) -> Any:
    """The value without what may differ between two equal runs."""
    if isinstance(value, dict):
        return {k: without_time(v) for k, v in value.items() if "seconds" not in k and "per_second" not in k}
    return value


def outcome(path: Path, codes: list[int]) -> dict[str, Any]:
    """What a finished run left behind."""
    status = json.loads((path / "status.json").read_text())
    samples = {}
    for file in sorted([*path.glob("samples-*.jsonl"), *path.glob("heldout/*/*.jsonl")]):
        rows = [without_time(row) for row in MetricsLog(file).rows()]
        samples[str(file.relative_to(path))] = sorted(rows, key=lambda row: (row["problem_id"], row["sample"]))
    return {
        "codes": codes,
        "asked": path.with_suffix(".asked").read_text().splitlines(),
        "state": status["state"],
        "summary": without_time(status["summary"]),
        "samples": samples,
        "rows": [without_time(row) for row in MetricsLog(path / "metrics.jsonl").rows()],
        "files": {
            name: atomic.sha256_file(path / name)
            for name in ("mixture.jsonl", "comparison.json", "samples.jsonl", "export/model.safetensors")
        },
    }


def main(root: Path) -> None:
    """Once straight, once through every life."""
    setup = os.fork()
    if setup == 0:
        prepare(root)
        os._exit(0)
    assert os.waitpid(setup, 0)[1] == 0
    straight = outcome(root / "straight", [child(root, root / "straight", None)])
    codes = [child(root, root / "killed", writes) for writes in (*LIVES, None)]
    killed = outcome(root / "killed", codes)
    (root / "results.json").write_text(json.dumps({"straight": straight, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
