"""Supervised fine-tuning on packed, masked conversations; the same machinery trains the distilled student.

The router biases are frozen and there is no balance loss here (spec section 2: their rates are 0 after pretraining).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from glmctl import console
from glmctl.data.batches import SftBatches
from glmctl.data.chat import ChatTemplate, Encoded, LossOn
from glmctl.data.conversations import Conversation, read_conversations
from glmctl.data.tool_styles import styled
from glmctl.errors import DataError, RecipeError
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator, share
from glmctl.recipe.lora import LoraSpec
from glmctl.recipe.schema import AdamWSpec, CheckpointPolicy, MuonSpec, Schedule, SftRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.training.lora import add_lora, merge_adapters, save_adapter
from glmctl.training.schedule import lr_at
from glmctl.training.session import Clock, Session, rate

SAMPLED_CONVERSATIONS = 2


class FinetuneSettings(Protocol):
    """What `finetune` needs of a recipe (SftRecipe and DistillRecipe have it)."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def micro_tokens(self) -> int | None: ...
    @property
    def sequence_length(self) -> int: ...
    @property
    def optimizer(self) -> MuonSpec | AdamWSpec: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def mtp_weight(self) -> float: ...
    @property
    def grad_clip(self) -> float: ...
    @property
    def precision(self) -> Literal["fp32", "bf16"]: ...
    @property
    def checkpoint(self) -> CheckpointPolicy: ...
    @property
    def trackers(self) -> list[str]: ...


def run(recipe: SftRecipe, run: Run) -> dict[str, Any]:
    """Fine-tune `recipe.model` on the conversations of `recipe.data` and export it. Summary: see `finetune`."""
    folder = resolve_model(recipe.model)
    model = load_model(folder, dtype=torch.float32)
    conversations = read_conversations(recipe.data, bad_rows=recipe.bad_rows)
    template = ChatTemplate.load(folder)
    if recipe.tool_style is not None:
        source = styled(recipe.tool_style.calls, recipe.tool_style.declaration)
        template = ChatTemplate(template.tokenizer, source)
    return finetune(model, conversations, template, recipe, run, folder, loss_on=recipe.loss_on, lora=recipe.lora)


def finetune(
    model: GlmMoe,
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    settings: FinetuneSettings,
    run: Run,
    tokenizer_folder: Path,
    *,
    loss_on: LossOn = "last_turn",
    lora: LoraSpec | None = None,
) -> dict[str, Any]:
    """Train `model` (fp32) in place on `conversations` for `settings.steps` steps, resuming, and publish run.export.

    With `lora` only adapters are trained; the export is the merged model or the adapter, as it says.

    A step's loss is the mean over its trained tokens in nats. Summary: `loss` (mean over the last tenth of the
    steps), `loss_first`, `loss_last`, `mtp_loss`, `steps`, `conversations`, `examples` (more than conversations when
    all turns are learnt), `dropped` (examples longer than a row), `trained_tokens`, `tokens_per_second`.

    Raises:
        DataError: a conversation has nothing to learn, or none fits in a row; the conversation is named.
        RecipeError: the model's positions are fewer than a row's tokens.
    """
    if settings.sequence_length > model.config.max_position_embeddings:
        raise RecipeError(
            f"{settings.name}: sequence_length {settings.sequence_length} exceeds the model's "
            f"{model.config.max_position_embeddings} positions"
        )
    tokenizer = template.tokenizer
    tokenizer.require_fits(model.config.vocab_size, where=str(tokenizer_folder))
    encoded = encode(conversations, template, loss_on)
    batches = SftBatches(encoded, settings.sequence_length, settings.seed, pad_id=tokenizer.pad_id)
    accelerator = make_accelerator(settings.precision, settings.trackers, run.path)
    if lora is not None:
        add_lora(model, lora, settings.seed)
    session = Session(
        model.to(accelerator.device),
        run,
        accelerator,
        optimizer=settings.optimizer,
        grad_clip=settings.grad_clip,
        policy=settings.checkpoint,
        trackers=settings.trackers,
    )
    rows = max(accelerator.num_processes, settings.batch_tokens // settings.sequence_length)
    micro_rows = rows if settings.micro_tokens is None else max(1, settings.micro_tokens // settings.sequence_length)
    mine = share(rows, accelerator)
    prompts = _prompts(conversations[:SAMPLED_CONVERSATIONS], template)

    done = session.resume()
    if done == 0:
        session.sample(0, prompts, tokenizer, stage="start")
    with session.stopping() as stop, console.progress(settings.name, settings.steps, start=done) as progress:
        for step in range(done + 1, settings.steps + 1):
            clock = Clock()
            lr = lr_at(step / settings.steps, settings.schedule)
            batch = batches.batch(step - 1, rows).rows(*mine)
            metrics = session.stepper.lm_step(batch.split(micro_rows), lr=lr, mtp_weight=settings.mtp_weight)
            tokens = rows * settings.sequence_length
            row = {"lr": lr, "tokens": step * tokens, "filled_tokens": metrics.tokens, **clock.read(metrics.tokens)}
            session.log(step, settings.steps, metrics, row)
            if step == settings.steps:
                session.sample(step, prompts, tokenizer, stage="end")
            session.end_step(step, settings.steps, stop)
            progress.advance(loss=metrics.loss)
    session.export(tokenizer_folder, write=lambda folder: write_export(model, template, lora, folder, tokenizer_folder))
    counts = {"conversations": len(conversations), "examples": len(encoded), "dropped": batches.dropped}
    return {**_summary(run.metrics.rows()), **counts}


def write_export(model: GlmMoe, template: ChatTemplate, lora: LoraSpec | None, folder: Path, base: Path) -> None:
    """The model (adapters merged), or its adapter alone, with the tokenizer of `base` and the template trained on."""
    if lora is not None and lora.export == "adapter":
        save_adapter(model, lora, folder, base)
    else:
        if lora is not None:
            merge_adapters(model)
        save_model(model, folder, tokenizer_folder=base)
    path = folder / "chat_template.jinja"
    if not path.is_file() or path.read_text(encoding="utf-8") != template.source:
        atomic.write_text(path, template.source)


def encode(conversations: Sequence[Conversation], template: ChatTemplate, loss_on: LossOn) -> list[Encoded]:
    """Tokens and loss mask of every example that the conversations give (`ChatTemplate.encode_examples`), in order.

    DataError names the first conversation (1-based) with nothing to learn.
    """
    encoded: list[Encoded] = []
    for number, one in enumerate(conversations, start=1):
        try:
            made = template.encode_examples(
                one.messages, one.tools, enable_thinking=one.enable_thinking, loss_on=loss_on
            )
            # the first token is nobody's target
            if not all(any(example.loss_mask[1:]) for example in made):
                raise DataError("no token to learn")
        except DataError as error:
            message = f"conversation {number} of {len(conversations)}: {error.message}"
            raise DataError(message, hint=error.hint) from error
        encoded += made
    return encoded


def _prompts(conversations: Sequence[Conversation], template: ChatTemplate) -> list[tuple[str, list[int]]]:
    """For each conversation, its messages up to the assistant's first turn, as a prompt to sample from."""
    prompts = []
    for one in conversations:
        first = next(at for at, message in enumerate(one.messages) if message["role"] == "assistant")
        asked = one.messages[:first]
        tokens = template.encode_prompt(asked, one.tools, enable_thinking=one.enable_thinking)
        prompts.append((str(asked[-1].get("content", "")) if asked else "", tokens))
    return prompts


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    tail = losses[-max(1, len(rows) // 10) :]
    return {
        "loss": sum(tail) / max(1, len(tail)),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "mtp_loss": rows[-1]["mtp_loss"],
        "steps": len(rows),
        "trained_tokens": sum(int(row["targets"]) for row in rows),
        "tokens_per_second": rate(rows, sum(int(row["filled_tokens"]) for row in rows)),
    }
