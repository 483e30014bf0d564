"""A step of GRPO beside TRL's GRPOTrainer: same model, prompts, group size and lengths, step by step in turn.

    python benchmarks/rl.py                                    # tiny model, 2 prompts x 8 samples, 128 new tokens
    python benchmarks/rl.py --preset nano --prompts 8 --steps 6

Both begin with one model folder (preset without MTP layer), fp32, AdamW at 1e-5, no KL, token mean, temperature 1;
every sample has exactly --tokens new tokens, rewards are the same function of them. TRL generates with transformers
(`use_cpu`, no gradient checkpointing, no vLLM: it needs a GPU), we with the engine's native runner. After each step of
TRL one of ours is taken in the same process, so both see the same machine. Medians without the first step. The split:
`generate`, `reward` (TRL: everything between generation and update: rewards, advantages, padding) and `update`.
Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import AdamWSpec, GrpoSpec, Sampling
from glmctl.rl.environment import Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.learn import update, weigh
from glmctl.rl.pack import pack
from glmctl.rl.rollout import play, rollout_engine
from glmctl.rl.tasks import environment
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper

LR = 1e-5
PARTS = ("generate", "reward", "update")


def reward(tokens: list[int]) -> float:
    """The share of even token ids: anything that differs between samples."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def prepare(folder: Path, preset: str) -> None:
    """A model of random weights with a tokenizer of its vocabulary, as a folder."""
    config = ModelConfig.model_validate({**PRESETS[preset], "num_nextn_predict_layers": 0})
    sources = [
        path.read_text(encoding="utf-8", errors="ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))
    ]
    Tokenizer.train(sources, vocab_size=config.vocab_size).save(folder)
    save_model(GlmMoe(config, seed=0), folder)


def problems_of(count: int) -> list[Problem]:
    """`count` prompts of one length."""
    texts = [f"Compute {10 + i % 90}+{10 + 7 * i % 90} and explain each step in words." for i in range(count)]
    return [Problem(f"p{i}", "arithmetic", text, 0) for i, text in enumerate(texts)]


class Ours:
    """Our trainer's step."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.model = load_model(folder)
        self.template = ChatTemplate.load(folder)
        # nothing ends a sample but its length
        self.template.tokenizer.eos_ids = ()
        self.stepper = Stepper(
            self.model, build_optimizer(self.model, AdamWSpec(weight_decay=0.0)), make_accelerator(), grad_clip=1.0
        )
        self.engine = rollout_engine(self.model, 1024)
        self.args, self.done = args, 0

    def step(self, problems: list[Problem]) -> dict[str, float]:
        """Rollouts, advantages and one update; seconds of each part."""
        args, spec = self.args, GrpoSpec()
        samples = [
            (problem, Trajectory(problem.id, problem.task, group, sample))
            for group, problem in enumerate(problems)
            for sample in range(args.group_size)
        ]
        began = time.perf_counter()
        sampling = Sampling(max_tokens=args.tokens)
        play(self.engine, self.template, samples, sampling=sampling, seed=self.done, max_turns=1)
        generated = time.perf_counter()
        trajectories = [one for _, one in samples]
        for one in trajectories:
            made = [token for token, mask in zip(one.tokens, one.loss_mask, strict=True) if mask]
            assert len(made) == args.tokens
            one.reward, one.stop_reason = reward(made), StopReason.ANSWERED
        size = args.group_size
        groups = [trajectories[at : at + size] for at in range(0, len(trajectories), size)]
        batches = pack(weigh(groups, spec, max_tokens=args.tokens), None)
        judged = time.perf_counter()
        update(self.model, self.stepper, batches, spec, lr=LR, temperature=1.0, mtp_weight=0.0)
        self.done += 1
        self.engine.load_weights(self.done)
        ended = time.perf_counter()
        return {"generate": generated - began, "reward": judged - generated, "update": ended - judged}


def run_trl(
    folder: Path, args: argparse.Namespace, prompts: list[str], after: Callable[[], None]
) -> list[dict[str, float]]:
    """Seconds of the parts of each of TRL's steps; `after` is called after each."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    transformers.logging.set_verbosity_error()
    model = transformers.Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    batch = args.prompts * args.group_size
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=batch,
        num_generations=args.group_size,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        max_steps=args.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="bnpo",
        temperature=1.0,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    seconds: dict[str, list[float]] = {"generate": [], "scored": [], "step": []}

    class Clock(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds["step"].append(time.perf_counter() - self.began)
            after()

    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
        callbacks=[Clock()],
    )
    for name, key in (("_generate", "generate"), ("_generate_and_score_completions", "scored")):
        setattr(trainer, name, timed(getattr(trainer, name), seconds[key]))
    trainer.train()
    return [
        {"generate": generate, "reward": scored - generate, "update": step - scored}
        for generate, scored, step in zip(seconds["generate"], seconds["scored"], seconds["step"], strict=True)
    ]


def timed(call: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    """`call`, its seconds noted."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        into.append(time.perf_counter() - began)
        return result

    return wrapped


def summary(steps: list[dict[str, float]], samples: int, tokens: int) -> dict[str, float]:
    """Medians over all steps but the first."""
    later = steps[1:]
    parts = {part: statistics.median(one[part] for one in later) for part in PARTS}
    totals = [sum(one.values()) for one in later]
    step = statistics.median(totals)
    return {
        **parts,
        "step": step,
        "spread": (max(totals) - min(totals)) / step,
        "samples_per_second": samples / step,
        "tokens_generated_per_second": samples * tokens / parts["generate"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["nano", "tiny", "small"])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each sample")
    parser.add_argument("--steps", type=int, default=6, help="the first is not counted")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, args.preset)
        ours, problems = Ours(folder, args), problems_of(args.prompts * args.steps)
        prompts = [
            ours.template.tokenizer.decode(ours.template.encode_prompt(*environment(p).reset())) for p in problems
        ]
        mine: list[dict[str, float]] = []

        def after() -> None:
            at = len(mine) * args.prompts
            mine.append(ours.step(problems[at : at + args.prompts]))

        theirs = run_trl(folder, args, prompts, after)
    samples = args.prompts * args.group_size
    found = {"glmctl": summary(mine, samples, args.tokens), "trl": summary(theirs, samples, args.tokens)}
    print(f"{'':8}" + "".join(f"{name:>12}" for name in (*PARTS, "step", "samples/s", "tokens/s")))
    for name, one in found.items():
        figures = [*(f"{one[part]:.2f} s" for part in (*PARTS, "step")), f"{one['samples_per_second']:.1f}"]
        print(f"{name:8}" + "".join(f"{x:>12}" for x in (*figures, f"{one['tokens_generated_per_second']:.0f}")))
    ratio = found["trl"]["step"] / found["glmctl"]["step"]
    print(f"samples/s: {ratio:.2f} times TRL's")
    conditions = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], **vars(args)}
    print(json.dumps({"ratio": ratio, "conditions": conditions, **found}))


if __name__ == "__main__":
    main()
