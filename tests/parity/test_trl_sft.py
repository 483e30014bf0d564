"""Twenty steps of our SFT beside TRL's SFTTrainer: one checkpoint, one set of conversations, one optimizer's settings.

TRL trains transformers' Glm4MoeForCausalLM on padded rows under its own GLM template; our driver trains our network on
packed rows under ours. Every step of both sees all conversations, so the order in which they come does not matter.
"""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.data.batches import SftBatches
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import SftRecipe
from glmctl.run.directory import Run
from glmctl.run.metrics import MetricsLog
from glmctl.training import session
from glmctl.training.sft import encode, finetune

STEPS, LENGTH, LR = 20, 256, 2e-3
# the bar; both sum in fp32, in another order
TOLERANCE = 1e-4


def conversations() -> list[Conversation]:
    """Ragged: sums with reasoning of one to a dozen steps, one in three through a tool."""
    rng = random.Random(0)
    talks = []
    for at in range(12):
        a, b, steps = rng.randint(1, 99), rng.randint(1, 99), 1 + at % 12
        messages: list[dict[str, Any]] = [{"role": "user", "content": f"Compute {a}+{b}."}]
        if at % 3 == 0:
            call = {"function": {"name": "add", "arguments": {"a": a, "b": b}}}
            messages.append(
                {"role": "assistant", "content": "", "reasoning_content": "use the tool", "tool_calls": [call]}
            )
            messages.append({"role": "tool", "content": str(a + b)})
        why = " ".join([f"{a}+{b}={a + b}."] * steps)
        messages.append({"role": "assistant", "reasoning_content": why, "content": str(a + b)})
        talks.append(Conversation(messages))
    return talks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    place: Path = tmp_path_factory.mktemp("sft") / "model"
    save_model(GlmMoe(tiny_config, seed=0), place)
    tiny_tokenizer.save(place)
    return place


def ours(folder: Path, path: Path) -> list[float]:
    """Losses of our driver, packed."""
    template = ChatTemplate.load(folder)
    encoded = encode(conversations(), template, "last_turn")
    rows = SftBatches(encoded, LENGTH, pad_id=template.tokenizer.pad_id).rows_per_epoch
    assert rows < len(encoded), "something is packed"
    assert max(len(one.tokens) for one in encoded) <= LENGTH, "nothing is left out or cut"
    recipe = SftRecipe.model_validate(
        {
            "name": "ours",
            "model": str(folder),
            "data": ["-"],
            "steps": STEPS,
            "batch_tokens": rows * LENGTH,
            "sequence_length": LENGTH,
            "optimizer": {"type": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
            "schedule": {"peak_lr": LR, "final_lr": LR, "warmup_fraction": 0.0},
            "mtp_weight": 0.0,
            "grad_clip": 1.0,
        }
    )
    with Run.open(recipe, path) as run:
        finetune(load_model(folder, dtype=torch.float32), conversations(), template, recipe, run, folder)
    return [row["loss"] for row in MetricsLog(path / "metrics.jsonl").rows()]


def theirs(folder: Path, path: Path) -> list[float]:
    """Losses of TRL's trainer, padded."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        resources.files("trl").joinpath("chat_templates", "glm4moe_training.jinja").read_text(encoding="utf-8")
    )
    found: list[float] = []

    class Recording(SFTTrainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **settings: Any) -> torch.Tensor:
            loss = super().training_step(*args, **settings)
            found.append(float(loss))
            return loss

    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": one.messages} for one in conversations()]),
        args=SFTConfig(
            output_dir=str(path),
            max_steps=STEPS,
            per_device_train_batch_size=len(conversations()),
            max_length=LENGTH,
            packing=False,
            assistant_only_loss=True,
            optim="adamw_torch",
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.1,
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
    return found


@pytest.mark.slow
def test_twenty_steps_have_trls_losses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 2)
    mine, other = ours(folder, tmp_path / "ours"), theirs(folder, tmp_path / "theirs")
    assert len(mine) == len(other) == STEPS
    assert mine[-1] < 0.7 * mine[0], "something is learnt"
    for step, (one, two) in enumerate(zip(mine, other, strict=True), start=1):
        assert one == pytest.approx(two, abs=TOLERANCE), f"step {step}"
