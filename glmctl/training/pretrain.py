"""Pretraining and mid-training: stages of data under one schedule (GLM-4.5 report section 2; spec section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from glmctl import console
from glmctl.data.batches import Batch, PretrainBatches, TokenSource
from glmctl.data.packing import stage_seed
from glmctl.data.prepare import unigram_entropy
from glmctl.data.shards import INDEX, TokenShards
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import RecipeError
from glmctl.kernels.registry import compiled_small
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator, share, sum_over_ranks, wait_for_all
from glmctl.recipe.schema import PretrainRecipe
from glmctl.run.directory import Run, resolve_tokenizer
from glmctl.training.balance import max_vio
from glmctl.training.ceiling import flops_per_token, matmul_ceiling
from glmctl.training.loss import main_loss
from glmctl.training.plan import PlannedStep, plan_steps
from glmctl.training.session import Clock, Session, peak_memory, rate

VALIDATION_MICRO_TOKENS = 8192
"""tokens in one validation forward when the recipe sets no micro_tokens"""


def run(recipe: PretrainRecipe, run: Run) -> dict[str, Any]:
    """Train `recipe.model` from scratch through all stages and export it; resumes where an earlier process ended.

    Summary: `validation_loss` (nats per token, main head, of the final model) and `unigram_entropy` (nats) on the
    *first* stage's validation text, their difference, the final loss on every stage's text, and the last step's
    `mtp_loss` and `max_vio`.

    Raises:
        RecipeError, DataError: the recipe does not fit the tokenizer or the data.
        DivergedError: three steps in a row were not finite.
        Interrupted: a signal came; the state is saved.
    """
    accelerator = make_accelerator(recipe.precision, recipe.trackers, run.path)
    # the stages of a pipeline share a process, and only this one asked for it
    with compiled_small(recipe.compile, accelerator.device):
        return _train(recipe, run, accelerator)


def _train(recipe: PretrainRecipe, run: Run, accelerator: Accelerator) -> dict[str, Any]:
    tokenizer_folder = resolve_tokenizer(recipe.tokenizer)
    tokenizer = Tokenizer.load(tokenizer_folder)
    stages = open_stages(recipe, tokenizer)
    model = GlmMoe(model_config(recipe.model, tokenizer), device=accelerator.device, seed=recipe.seed)
    session = Session(
        model,
        run,
        accelerator,
        optimizer=recipe.optimizer,
        grad_clip=recipe.grad_clip,
        policy=recipe.checkpoint,
        trackers=recipe.trackers,
        spike_factor=recipe.spike_factor,
    )
    model.recompute = recipe.recompute
    plan = plan_steps(recipe)
    prompts = [(text, tokenizer.encode_plain(text)) for text in recipe.sample_prompts]

    ceiling = _ceiling(recipe, accelerator)
    done = session.resume()
    if done == 0:
        _say_epochs(recipe, stages)
        if recipe.verify_data and run.writer:
            verify_data(recipe)
        wait_for_all(accelerator)
        model.set_rope_theta(stages[0].rope_theta)
        session.sample(0, prompts, tokenizer, stage="start")
    with session.stopping() as stop, console.progress(recipe.name, len(plan), start=done) as progress:
        for step in plan[done:]:
            stage = stages[step.stage]
            model.set_rope_theta(stage.rope_theta)
            session.stepper.guard.enter(step.stage)
            clock = Clock()
            batches, idle = stage.micro_batches(step, accelerator, recipe.batch.micro_tokens)
            metrics = session.stepper.lm_step(
                batches,
                lr=step.lr,
                mtp_weight=step.mtp_weight,
                sequence_loss_weight=recipe.balance.sequence_loss_weight,
                bias_update_rate=step.bias_update_rate,
                center=recipe.balance.center,
                z_weight=recipe.z_weight,
                idle=idle,
                source=stage.source(step),
            )
            batch_tokens = step.sequences * stage.sequence_length
            row: dict[str, Any] = {
                "tokens": step.tokens,
                "stage": stage.name,
                "lr": step.lr,
                "batch_tokens": batch_tokens,
            }
            row |= {"filled_tokens": metrics.tokens, **clock.read(metrics.tokens)}
            row["mfu"] = row["tokens_per_second"] * stage.flops_per_token(model.config, step) / ceiling
            if step.ends_stage or step.number % recipe.validation.every_steps == 0:
                row["validation_loss"] = stage.validation_loss(model, accelerator, recipe.batch.micro_tokens)
                row |= stage.domain_losses(model, accelerator, recipe.batch.micro_tokens)
            session.log(step.number, len(plan), metrics, row)
            if step.ends_stage:
                stage.batches.forget()
                session.sample(step.number, prompts, tokenizer, stage=stage.name)
                if stage.export:
                    session.publish(tokenizer_folder, run.path / "stages" / stage.name)
            session.end_step(step.number, len(plan), stop)
            shown: dict[str, Any] = {key: row[key] for key in ("tokens_per_second", "mfu")}
            shown |= {"max_vio": max_vio(metrics.counts_LE), "memory": peak_memory(accelerator.device)}
            progress.advance(loss=metrics.loss, **shown)

    model.set_rope_theta(stages[-1].rope_theta)
    summary = _summary(recipe, run, session, stages)
    session.export(tokenizer_folder)
    return summary


@dataclass(frozen=True)
class StageData:
    """A stage's training rows, its fixed validation rows, and what holds while it lasts."""

    name: str
    sequence_length: int
    rope_theta: float
    export: bool
    batches: PretrainBatches
    validation: Batch
    domains: dict[str, Batch]
    """fixed validation rows of each domain, where there are several"""
    entropy: float
    """unigram entropy of the validation text under its own distribution, nats per token"""

    def micro_batches(
        self, step: PlannedStep, accelerator: Accelerator, micro_tokens: int | None
    ) -> tuple[list[Batch], bool]:
        """This rank's rows of the step, and whether it has none of its own (then the rows are a stand-in).

        One forward has at most `micro_tokens` tokens, but at least one row.
        """
        start, stop = share(step.sequences, accelerator)
        idle = start == stop
        batch = self.batches.batch(step.first_sequence + start * (not idle), max(1, stop - start))
        return batch.split(self._micro_rows(micro_tokens, len(batch))), idle

    def source(self, step: PlannedStep) -> dict[str, Any]:
        """Where the rows of a step lie: enough to take them out of the data again."""
        rows = {"first_sequence": step.first_sequence, "sequences": step.sequences}
        return {"step": step.number, "stage": self.name, **rows}

    def flops_per_token(self, config: ModelConfig, step: PlannedStep) -> float:
        """Arithmetic of one token of the step; see `ceiling`."""
        mtp = config.num_nextn_predict_layers > 0 and step.mtp_weight > 0
        return flops_per_token(config, self.sequence_length, mtp=mtp)

    def validation_loss(self, model: GlmMoe, accelerator: Accelerator, micro_tokens: int | None) -> float:
        """Mean of -log p(next token) in nats over the fixed validation rows, main head only."""
        return self._mean_loss(self.validation, model, accelerator, micro_tokens)

    def domain_losses(self, model: GlmMoe, accelerator: Accelerator, micro_tokens: int | None) -> dict[str, float]:
        """The same on each domain's text, as `validation_loss_DOMAIN`."""
        return {
            f"validation_loss_{name}": self._mean_loss(rows, model, accelerator, micro_tokens)
            for name, rows in self.domains.items()
        }

    def _mean_loss(self, rows: Batch, model: GlmMoe, accelerator: Accelerator, micro_tokens: int | None) -> float:
        start, stop = share(len(rows), accelerator)
        sums = torch.zeros(2, dtype=torch.float64)
        with accelerator.autocast():
            for part in rows.rows(start, stop).split(self._micro_rows(micro_tokens, 0)):
                sums += torch.tensor(main_loss(model, part.to(accelerator.device)), dtype=torch.float64)
        loss, count = sum_over_ranks(sums, accelerator).tolist()
        return float(loss / count)

    def _micro_rows(self, micro_tokens: int | None, whole: int) -> int:
        if micro_tokens is None:
            return whole or max(1, VALIDATION_MICRO_TOKENS // self.sequence_length)
        return max(1, micro_tokens // self.sequence_length)


def open_stages(recipe: PretrainRecipe, tokenizer: Tokenizer) -> list[StageData]:
    """The data of every stage, opened and checked against tokenizer and model before any step is taken."""
    tokenizer.require_fits(recipe.model.vocab_size, where=f"{recipe.name}: model")
    stages = []
    theta = recipe.model.rope_theta
    for index, stage in enumerate(recipe.stages):
        if stage.sequence_length > recipe.model.max_position_embeddings:
            raise RecipeError(
                f"{recipe.name}: stages.{index}.sequence_length {stage.sequence_length} exceeds "
                f"model.max_position_embeddings {recipe.model.max_position_embeddings}"
            )
        theta = theta if stage.rope_theta is None else stage.rope_theta
        train, validation = open_splits(Path(stage.data))
        for shards in (train, validation):
            shards.require_tokenizer(tokenizer.hash)
        seed = stage_seed(recipe.seed, index)
        batches = PretrainBatches(train, stage.sequence_length, stage.packing, seed=seed)
        stages.append(
            StageData(
                name=stage.name,
                sequence_length=stage.sequence_length,
                rope_theta=theta,
                export=stage.export,
                batches=batches,
                validation=_validation_rows(validation, stage.sequence_length, recipe.validation.tokens),
                domains=_domain_rows(validation, stage.sequence_length, recipe.validation.tokens),
                entropy=_entropy(validation),
            )
        )
    return stages


def open_splits(path: Path) -> tuple[TokenShards, TokenShards]:
    """Train and validation shards of a data run, of its export, or of its export's `train` folder."""
    base = path.parent if (path / INDEX).is_file() else path
    train = TokenShards.open(path, "train")
    return train, TokenShards.open(base, "validation")


def verify_data(recipe: PretrainRecipe) -> None:
    """Compare the shards of all stages with their manifests, each once. DataError names the file that differs."""
    splits = [split for stage in recipe.stages for split in open_splits(Path(stage.data))]
    for shards in {shards.folder.resolve(): shards for shards in splits}.values():
        shards.verify()


def _say_epochs(recipe: PretrainRecipe, stages: list[StageData]) -> None:
    """A stage that is longer than its data reads it again: said, since nothing else would show it."""
    for spec, stage in zip(recipe.stages, stages, strict=True):
        # how many rows best_fit makes of them is known when it has
        epochs = spec.tokens / stage.batches.total_tokens
        if epochs > 1:
            console.note(f"stage {stage.name}: {spec.tokens:,} tokens are about {epochs:.1f} epochs of its data")


def model_config(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The recipe's model with the tokenizer's padding and end-of-turn ids where it names none."""
    changes: dict[str, Any] = {}
    if config.pad_token_id is None:
        changes["pad_token_id"] = tokenizer.pad_id
    if not config.eos_token_id:
        changes["eos_token_id"] = tuple(tokenizer.eos_ids)
    return config.model_copy(update=changes)


def _domain_rows(shards: TokenShards, length: int, tokens: int) -> dict[str, Batch]:
    """Each domain's share of about `tokens`; nothing where there is but one domain."""
    if len(shards.domains) < 2:
        return {}
    streams = {name: shards.of_domain(name) for name in shards.domains}
    found = {name: stream for name, stream in streams.items() if stream.total_tokens}
    return {name: _validation_rows(stream, length, tokens // len(found)) for name, stream in found.items()}


def _validation_rows(shards: TokenSource, length: int, tokens: int) -> Batch:
    """The first rows of a fixed order, no row twice."""
    batches = PretrainBatches(shards, length, "concat", seed=0)
    return batches.batch(0, min(max(1, tokens // length), batches.sequences_per_epoch))


def _ceiling(recipe: PretrainRecipe, accelerator: Accelerator) -> float:
    """FLOP/s of matrix products on all ranks' devices together, in the precision that the products of a step have."""
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return matmul_ceiling(accelerator.device, dtype) * int(accelerator.num_processes)


def _entropy(shards: TokenShards) -> float:
    counts = np.zeros(shards.vocab_size, np.int64)
    for start in range(0, shards.total_tokens, 1 << 22):
        part = shards.tokens(start, min(1 << 22, shards.total_tokens - start))
        counts += np.bincount(part, minlength=shards.vocab_size)
    return unigram_entropy(counts)


def _summary(recipe: PretrainRecipe, run: Run, session: Session, stages: list[StageData]) -> dict[str, Any]:
    rows = run.metrics.rows()
    losses = [stage.validation_loss(session.model, session.accelerator, recipe.batch.micro_tokens) for stage in stages]
    last = rows[-1] if rows else {}
    summary: dict[str, Any] = {
        "validation_loss": losses[0],
        "unigram_entropy": stages[0].entropy,
        "validation_loss_below_unigram": stages[0].entropy - losses[0],
        "tokens": recipe.total_tokens,
        "steps": len(rows),
        "tokens_per_second": rate(rows, sum(int(row["filled_tokens"]) for row in rows)),
        "mtp_loss": last.get("mtp_loss", 0.0),
        "max_vio": last.get("max_vio", 0.0),
        "skipped_steps": session.stepper.guard.skipped,
    }
    if any(row["filled_tokens"] < row["batch_tokens"] for row in rows):
        # `stages.N.tokens` counts places in rows: what best-fit packing leaves empty is not text
        summary["padding"] = 1 - sum(row["filled_tokens"] for row in rows) / sum(row["batch_tokens"] for row in rows)
    for stage, loss in zip(stages, losses, strict=True):
        summary[f"validation_loss_{stage.name}"] = loss
        summary[f"unigram_entropy_{stage.name}"] = stage.entropy
    return summary
