"""Packed SFT on ragged conversations beside TRL's SFTTrainer: useful tokens a second at equal loss, in one run.

    python benchmarks/sft.py                      # nano, 32 conversations a step, 6 steps, ours - TRL - ours
    python benchmarks/sft.py --preset tiny --steps 4 --json FILE

Both train the same weights on the same conversations with fused AdamW, fp32, no checkpointing of activations, and
every step of both sees all conversations, so their losses must agree step by step; the largest difference is printed.
TRL pads each batch to its longest row (its packing needs an attention implementation that a CPU does not have). Useful
tokens are those of the conversations, padding not counted; a figure is the median over the steps but the first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glmctl.data.batches import SftBatches
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import AdamWSpec
from glmctl.training.optim import build_optimizer
from glmctl.training.sft import encode
from glmctl.training.step import Stepper

LENGTH, LR = 1024, 1e-3
WORDS = "the of and to in is it that was for on are as with his they at be this from".split()  # noqa: SIM905


class Result(NamedTuple):
    """One trainer's steps."""

    losses: list[float]
    seconds: list[float]


def conversations(count: int) -> list[Conversation]:
    """Ragged as chats are: log-normal lengths, a few near the row's end, most a third of it."""
    rng = random.Random(0)
    talks = []
    for _ in range(count):
        words = int(min(400, max(8, rng.lognormvariate(4.8, 0.8))))
        said = " ".join(rng.choice(WORDS) for _ in range(words))
        thought = " ".join(rng.choice(WORDS) for _ in range(words // 4))
        answer = {"role": "assistant", "content": said, "reasoning_content": thought}
        talks.append(Conversation([{"role": "user", "content": " ".join(rng.choices(WORDS, k=12))}, answer]))
    return talks


def prepare(folder: Path, preset: str, talks: list[Conversation]) -> None:
    """A model folder with a tokenizer of the conversations' own words."""
    texts = [str(message["content"]) for talk in talks for message in talk.messages]
    tokenizer = Tokenizer.train(texts, vocab_size=400)
    body = {**PRESETS[preset], "num_nextn_predict_layers": 0, "rope_theta": 1e6}
    save_model(GlmMoe(ModelConfig(**body), seed=0), folder)
    tokenizer.save(folder)


def ours(folder: Path, talks: list[Conversation], steps: int) -> Result:
    """Packed rows through the shared step."""
    template = ChatTemplate.load(folder)
    batches = SftBatches(encode(talks, template, "last_turn"), LENGTH, pad_id=template.tokenizer.pad_id)
    assert not batches.dropped
    model = load_model(folder, dtype=torch.float32)
    optimizer = build_optimizer(model, AdamWSpec(weight_decay=0.0, betas=(0.9, 0.95)))
    stepper = Stepper(model, optimizer, make_accelerator(), grad_clip=1.0)
    result = Result([], [])
    for step in range(steps):
        began = time.perf_counter()
        batch = batches.batch(step, batches.rows_per_epoch)
        result.losses.append(stepper.lm_step([batch], lr=LR).loss)
        result.seconds.append(time.perf_counter() - began)
    return result


def theirs(folder: Path, talks: list[Conversation], steps: int, place: Path) -> Result:
    """Padded rows through TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        resources.files("trl").joinpath("chat_templates", "glm4moe_training.jinja").read_text(encoding="utf-8")
    )
    result = Result([], [])

    class Recording(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **settings: Any) -> torch.Tensor:
            loss = super().training_step(*args, **settings)
            result.losses.append(float(loss))
            return loss

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = 0.0

        def on_step_begin(self, *args: Any, **settings: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **settings: Any) -> None:
            result.seconds.append(time.perf_counter() - self.began)

    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": talk.messages} for talk in talks]),
        callbacks=[Clock()],
        args=SFTConfig(
            output_dir=str(place),
            max_steps=steps,
            per_device_train_batch_size=len(talks),
            max_length=LENGTH,
            packing=False,
            assistant_only_loss=True,
            optim="adamw_torch_fused",
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_epsilon=1e-8,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return result


def main() -> None:
    """Measure in turn and print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", choices=sorted(PRESETS))
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    talks = conversations(options.conversations)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        prepare(folder, options.preset, talks)
        template = ChatTemplate.load(folder)
        lengths = [len(one.tokens) for one in encode(talks, template, "last_turn")]
        assert max(lengths) <= LENGTH, "TRL would cut what we leave out"
        first = ours(folder, talks, options.steps)
        other = theirs(folder, talks, options.steps, Path(temporary) / "trl")
        again = ours(folder, talks, options.steps)
    difference = max(abs(a - b) for a, b in zip(first.losses, other.losses, strict=True))
    rates = {
        name: sum(lengths) / statistics.median(found.seconds[1:])
        for name, found in (("glmctl", first), ("glmctl again", again), ("TRL SFTTrainer, padded", other))
    }
    mean = statistics.mean(lengths)
    print(f"{options.preset}: {len(talks)} conversations of {min(lengths)} to {max(lengths)} tokens, mean {mean:.0f}")
    print(f"threads {torch.get_num_threads()}, losses differ by at most {difference:.1e} over {options.steps} steps\n")
    for name, rate in rates.items():
        print(f"{name:26}{rate:10,.0f} useful tokens/s")
    ratio = (rates["glmctl"] + rates["glmctl again"]) / 2 / rates["TRL SFTTrainer, padded"]
    print(f"{'ratio':26}{ratio:10.2f}")
    body = {"preset": options.preset, "tokens": sum(lengths), "rates": rates, "ratio": ratio, "difference": difference}
    print(json.dumps(body))
    if options.json:
        options.json.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
