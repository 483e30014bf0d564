"""Runs tiny trainings in forked processes that die at chosen points. A program for test_resume, not a test.

    python training_harness.py FOLDER          -> FOLDER/results.json
    python training_harness.py FOLDER kills N      the same of one long run that is killed N times at random
    python training_harness.py FOLDER signals N    or asked to stop N times at random

The parent imports everything once and computes nothing itself (threads do not survive a fork), so a trial costs a
fork and not an import of torch. Every child ends by its own failpoint or runs to the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.data.shards import ShardWriter
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import GlmctlError
from glmctl.recipe.schema import PretrainRecipe, RecipeBase, SftRecipe
from glmctl.run import atomic
from glmctl.run.metrics import MetricsLog
from glmctl.training import checkpoint, pretrain, session, sft  # noqa: F401 - pretrain: imported before the forks

TEXTS = ["def add(a, b):\n    return a + b\n", "Compute 34+57. It is 91.", "The quick brown fox jumps."] * 4
MODEL = {
    "vocab_size": 512,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


def prepare(root: Path) -> None:
    """A tokenizer, two splits of shards and some conversations."""
    tokenizer = Tokenizer.train(TEXTS, vocab_size=512, digits=1)
    (root / "tokenizer").mkdir()
    tokenizer.save(root / "tokenizer")
    rng = random.Random(0)
    for split, count in (("train", 120), ("validation", 10)):
        with ShardWriter(
            root / "data" / split,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            end_of_document=tokenizer.pad_id,
            shard_tokens=1000,
            domains=("even", "odd"),
        ) as writer:
            for number in range(count):
                text = " ".join(rng.choice(TEXTS) for _ in range(rng.randrange(1, 4)))
                writer.add([*tokenizer.encode_plain(text), tokenizer.pad_id], domain=number % 2)
    with (root / "chats.jsonl").open("w") as stream:
        for a in range(40):
            answer = {"role": "assistant", "reasoning_content": f"{a}+1={a + 1}", "content": str(a + 1)}
            stream.write(json.dumps({"messages": [{"role": "user", "content": f"{a}+1"}, answer]}) + "\n")


def pretrain_recipe(root: Path, more: int = 0) -> PretrainRecipe:
    """Two stages, a ramp, micro-batches, MTP and balance that switch: 15 steps, and one for each 96 tokens `more`."""
    stages = [
        {"name": "a", "data": str(root / "data"), "tokens": 640, "sequence_length": 16, "export": True},
        {"name": "b", "data": str(root / "data" / "train"), "tokens": 330 + more, "sequence_length": 32}
        | {"rope_theta": 1e5, "packing": "best_fit"},
    ]
    return PretrainRecipe.model_validate(
        {
            "name": "tiny",
            "model": MODEL,
            "tokenizer": str(root / "tokenizer"),
            "stages": stages,
            "batch": {"tokens": 96, "start_tokens": 32, "ramp_tokens": 300, "micro_tokens": 48},
            "schedule": {"peak_lr": 0.01, "final_lr": 0.001, "warmup_fraction": 0.1},
            "balance": {"bias_update_rate": 0.01, "until_tokens": 640},
            "mtp": {"switch_tokens": 640},
            "validation": {"every_steps": 4, "tokens": 128},
            "checkpoint": {"every_steps": 4},
            "sample_prompts": ["def "],
        }
    )


def sft_recipe(root: Path) -> SftRecipe:
    """Thirteen steps on the pretrained model, in two micro-batches each, over several epochs of packed rows."""
    return SftRecipe.model_validate(
        {
            "name": "tiny-sft",
            "model": str(root / "straight"),
            "data": [str(root / "chats.jsonl")],
            "steps": 13,
            "batch_tokens": 256,
            "micro_tokens": 128,
            "sequence_length": 64,
            "checkpoint": {"every_steps": 3},
            "schedule": {"peak_lr": 0.01, "final_lr": 0.001, "warmup_fraction": 0.1},
        }
    )


# ----------------------------------------------------------------------------- dying


def die() -> None:
    """As by `kill -9`, no handler, no cleanup."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_row(step: int, act: Callable[[], None]) -> Callable[[], None]:
    """Before the metrics row of `step` is written."""

    def arm() -> None:
        real = MetricsLog.append

        def append(self: MetricsLog, row: Any) -> None:
            if row.get("step") == step and "loss" in row:
                act()
            real(self, row)

        MetricsLog.append = append  # type: ignore[method-assign]

    return arm


def on_call(owner: Any, name: str, number: int, act: Callable[[], None] = die) -> Callable[[], None]:
    """At the beginning of the `number`-th call of `owner.name`."""

    def arm() -> None:
        real, calls = getattr(owner, name), 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                act()
            return real(*args, **kwargs)

        setattr(owner, name, wrapped)

    return arm


def slow_write(number: int) -> Callable[[], None]:
    """The `number`-th checkpoint of this process takes longer than torchrun waits to see that a rank has ended."""
    return on_call(checkpoint, "write", number, lambda: time.sleep(1.5))


def ask(number: int) -> Callable[[], None]:
    """A signal to oneself, which the trainer answers at the end of its step."""
    return lambda: os.kill(os.getpid(), number)


def impatient(number: int) -> Callable[[], None]:
    """Asked politely by another signal, then by this one: it ends the process there and then."""

    def act() -> None:
        ask(signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM)()
        ask(number)()

    return act


def torn_row(step: int) -> Callable[[], None]:
    """Half a metrics row reaches the file, then the process is gone."""

    def arm() -> None:
        real = MetricsLog.append

        def append(self: MetricsLog, row: Any) -> None:
            if row.get("step") == step and "loss" in row:
                with self.path.open("a") as stream:
                    stream.write(json.dumps(row)[:40])
                die()
            real(self, row)

        MetricsLog.append = append  # type: ignore[method-assign]

    return arm


LIVES: dict[str, list[Callable[[], None]]] = {
    "killed": [
        at_row(1, die),  # before anything is saved
        torn_row(3),  # in the middle of a row
        on_call(checkpoint, "write_tensors", 2),  # inside a save
        on_call(atomic, "_replace_folder", 1),  # before the checkpoint gets its name
        at_row(7, die),  # between two checkpoints
        at_row(10, die),  # at a stage's last step
        on_call(checkpoint.shutil, "rmtree", 1),  # while old checkpoints are removed
        on_call(session, "save_model", 1),  # between the last checkpoint and the export
        on_call(atomic, "_seal", 1),  # inside the export
    ],
    "asked to stop": [
        at_row(2, ask(signal.SIGTERM)),
        at_row(6, ask(signal.SIGINT)),
        on_call(checkpoint, "write_tensors", 1, impatient(signal.SIGTERM)),
    ],
}
"""How each life of a pretraining run ends; after the last it is left in peace."""

SFT_LIVES: dict[str, list[Callable[[], None]]] = {
    "sft killed": [
        at_row(1, die),
        torn_row(2),
        on_call(checkpoint, "write_tensors", 2),
        on_call(atomic, "_replace_folder", 1),
        at_row(8, die),
        at_row(13, die),  # at the last step
        on_call(checkpoint.shutil, "rmtree", 1),
        on_call(sft, "save_model", 1),
        on_call(atomic, "_seal", 1),
    ],
    "sft asked to stop": [
        at_row(2, ask(signal.SIGTERM)),
        at_row(5, ask(signal.SIGINT)),
        on_call(checkpoint, "write_tensors", 1, impatient(signal.SIGTERM)),
    ],
}
"""The same of SFT (row T6 of the reliability plan)."""


def soon(rng: random.Random) -> Callable[[], None]:
    """5 to 90 ms after this process has trained its first step, wherever it is then."""

    def arm() -> None:
        real, started = MetricsLog.append, False

        def append(self: MetricsLog, row: Any) -> None:
            nonlocal started
            if not started:
                started = True
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process between any two instructions
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.005, 0.09))
            real(self, row)

        MetricsLog.append = append  # type: ignore[method-assign]

    return arm


def random_death(rng: random.Random) -> Callable[[], None]:
    """Half of them at a random moment, half inside a save."""
    if rng.random() < 0.5:
        return soon(rng)
    owner, name = rng.choice(
        [
            (checkpoint, "write_tensors"),
            (atomic, "_seal"),
            (atomic, "_replace_folder"),
            (checkpoint.shutil, "rmtree"),
            (os, "fsync"),
        ]
    )
    return on_call(owner, name, rng.randint(1, 3))


def random_request(rng: random.Random) -> Callable[[], None]:
    """SIGTERM or SIGINT, 5 to 90 ms after this process has trained its first step, whatever it is doing then."""
    number = rng.choice([signal.SIGTERM, signal.SIGINT])

    def arm() -> None:
        real, started = MetricsLog.append, False

        def append(self: MetricsLog, row: Any) -> None:
            nonlocal started
            if not started:
                started = True
                signal.signal(signal.SIGALRM, lambda *_: ask(number)())
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.005, 0.09))
            real(self, row)

        MetricsLog.append = append  # type: ignore[method-assign]

    return arm


def child(recipe: RecipeBase, path: Path, arm: Callable[[], None] | None) -> int:
    """Run the recipe at `path` in a forked process; the exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            console.configure(quiet=True)
            if arm is not None:
                arm()
            execute(recipe, path)  # type: ignore[arg-type]
            # importing it costs every command seconds, and eager training has no use for it
            assert not {"torch._dynamo", "sympy", "torch.distributed.tensor"} & sys.modules.keys()
            code = 0
        except GlmctlError as error:
            (path / "error.txt").write_text(error.message)
            code = error.exit_code
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(path: Path, codes: list[int]) -> dict[str, Any]:
    """What a finished run left, without what may differ between two equal runs."""
    varying = ("seconds", "tokens_per_second", "mfu")
    rows = [{k: v for k, v in row.items() if k not in varying} for row in MetricsLog(path / "metrics.jsonl").rows()]
    status = json.loads((path / "status.json").read_text())
    newest = max((path / "checkpoints").iterdir())
    return {
        "codes": codes,
        "guard": json.loads((newest / "state.json").read_text())["state"]["stepper"],
        "rows": rows,
        "samples": (path / "samples.jsonl").read_text(),
        "model": [
            atomic.sha256_file(model)
            for model in sorted(path.glob("**/model.safetensors"))
            if "checkpoints" not in model.parts
        ],
        "state": status["state"],
        "summary": {k: v for k, v in status["summary"].items() if k not in varying},
        "left": sorted(p.name for p in path.rglob(".*") if p.name != ".lock"),
        "checkpoints": sorted(p.name for p in (path / "checkpoints").iterdir()),
    }


def set_up(root: Path) -> None:
    """`prepare` in a process of its own."""
    setup = os.fork()
    if setup == 0:
        prepare(root)
        os._exit(0)
    assert os.waitpid(setup, 0)[1] == 0


ENDS = {"kills": random_death, "signals": random_request}


def soak(root: Path, how: str, lives: int) -> None:
    """One run that ends `lives` times and one left in peace; a life ends within a dozen steps at the latest."""
    set_up(root)
    recipe = pretrain_recipe(root, more=96 * 12 * lives)
    straight = outcome(root / "straight", [child(recipe, root / "straight", None)])
    rng = random.Random(0)
    codes = [child(recipe, root / "ended", ENDS[how](rng)) for _ in range(lives)]
    codes.append(child(recipe, root / "ended", None))
    ended = outcome(root / "ended", codes)
    (root / "results.json").write_text(json.dumps({"straight": straight, "ended": ended}))


def main(root: Path) -> None:
    """Train straight, then through every chain of lives, and write what came out."""
    set_up(root)
    results: dict[str, Any] = {}
    for recipe, straight, chains in (
        (pretrain_recipe(root), "straight", LIVES),
        (sft_recipe(root), "straight sft", SFT_LIVES),
    ):
        results[straight] = outcome(root / straight, [child(recipe, root / straight, None)])
        for name, arms in chains.items():
            codes = [child(recipe, root / name, arm) for arm in [*arms, None]]
            results[name] = outcome(root / name, codes)
    # once more over a finished run: nothing is done
    path = root / "straight"
    before = (path / "metrics.jsonl").stat().st_mtime_ns
    code = child(pretrain_recipe(root), path, at_row(1, die))
    results["again"] = {"code": code, "touched": (path / "metrics.jsonl").stat().st_mtime_ns != before}
    # the newest checkpoint is damaged between two lives
    path = root / "damaged"
    codes = [child(pretrain_recipe(root), path, at_row(10, die))]
    file = path / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    codes.append(child(pretrain_recipe(root), path, None))
    results["damaged"] = outcome(path, codes)
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        soak(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]))
