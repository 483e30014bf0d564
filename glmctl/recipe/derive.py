"""What a recipe implies, by arithmetic alone: parameters, steps, memory. No torch, so `--dry-run` is instant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmctl.model.config import ModelConfig
from glmctl.model.cost import vectors
from glmctl.recipe.schema import (
    BatchRamp,
    DistillRecipe,
    EvalRecipe,
    LogitDistillRecipe,
    MuonSpec,
    OnPolicyDistillRecipe,
    Optimizer,
    PipelineRecipe,
    PretrainRecipe,
    ProblemsRecipe,
    RecipeBase,
    RewardRecipe,
    RlRecipe,
    ServeRecipe,
    SftRecipe,
)

BYTES = 4
"""weights, gradients and optimizer states are kept in float32; `precision: bf16` is autocast over them"""


def derived(recipe: RecipeBase) -> dict[str, Any]:
    """Every value that follows from `recipe`, by name; JSON-able. Empty for a recipe that implies nothing."""
    if isinstance(recipe, PretrainRecipe):
        return _pretrain(recipe)
    if isinstance(recipe, SftRecipe | DistillRecipe | LogitDistillRecipe):
        tokens = recipe.steps * recipe.batch_tokens
        model = recipe.model if isinstance(recipe, SftRecipe) else recipe.student
        rows = max(1, recipe.batch_tokens // recipe.sequence_length)
        warmup = round(recipe.schedule.warmup_fraction * recipe.steps)
        body: dict[str, Any] = {"steps": recipe.steps, "tokens": tokens, "sequences_per_step": rows}
        if isinstance(recipe, DistillRecipe):
            body["teacher_samples"] = {t.name: t.prompts * t.samples_per_prompt for t in recipe.teachers}
        return {**body, "warmup_steps": warmup, **_folder_model(model, recipe.optimizer)}
    if isinstance(recipe, OnPolicyDistillRecipe):
        per_step = recipe.prompts_per_step * recipe.samples_per_prompt
        body = {"steps": recipe.steps, "samples_per_step": per_step, "samples": recipe.steps * per_step}
        return {**body, **_folder_model(recipe.student, recipe.optimizer)}
    if isinstance(recipe, RewardRecipe):
        body = {"steps": recipe.steps, "pairs": recipe.steps * recipe.pairs_per_step}
        return {**body, **_folder_model(recipe.model, recipe.optimizer)}
    if isinstance(recipe, RlRecipe):
        per_step = recipe.prompts_per_step * recipe.group_size
        body = {"steps": recipe.steps, "rollouts_per_step": per_step, "rollouts": recipe.steps * per_step}
        return {**body, **_folder_model(recipe.model, recipe.optimizer)}
    if isinstance(recipe, ServeRecipe):
        return _folder_model(recipe.model, None)
    if isinstance(recipe, ProblemsRecipe):
        return {"problems": recipe.train + recipe.heldout, "demonstrations": recipe.cold_start}
    if isinstance(recipe, EvalRecipe):
        return {"evaluations": len(recipe.models) * (len(recipe.tasks) + len(recipe.problems))}
    if isinstance(recipe, PipelineRecipe):
        return {"stages": len(recipe.stages)}
    return {}


def _pretrain(recipe: PretrainRecipe) -> dict[str, Any]:
    steps = stage_steps(recipe)
    batch = recipe.batch
    return {
        **parameters(recipe.model),
        "tokens": recipe.total_tokens,
        "steps": sum(steps),
        "stages": {
            stage.name: {
                "tokens": stage.tokens,
                "steps": count,
                "sequence_length": stage.sequence_length,
                "sequences_per_step": max(1, batch.tokens // stage.sequence_length),
                "rope_theta": theta,
            }
            for stage, count, theta in zip(recipe.stages, steps, rope_thetas(recipe), strict=True)
        },
        "batch_tokens": {
            "start": batch.start_tokens or batch.tokens,
            "end": batch.tokens,
            "ramp_tokens": batch.ramp_tokens,
        },
        "warmup_tokens": round(recipe.schedule.warmup_fraction * recipe.total_tokens),
        "parameter_groups": parameter_groups(recipe.model, recipe.optimizer),
        **memory(recipe.model, recipe.optimizer),
    }


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameter counts. `parameters_named` is the released models' way of counting (spec section 1.1): with MTP,
    without the embedding and output matrices; `parameters_active` is the part of it one token passes, without MTP."""
    counts = config.parameter_counts()
    return {
        "parameters": counts.total,
        "parameters_named": counts.main + counts.mtp,
        "parameters_mtp": counts.mtp,
        "parameters_vocabulary": counts.vocabulary,
        "parameters_active": counts.active,
    }


def parameter_groups(config: ModelConfig, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Who updates what: elements, weight decay and what is in each group. All groups share one learning rate."""
    total, decay = config.parameter_counts().total, optimizer.weight_decay
    small = sum(vectors(config))
    if not isinstance(optimizer, MuonSpec):
        return {
            "adamw": {"elements": total - small, "weight_decay": decay, "holds": "every matrix"},
            "adamw_vectors": {"elements": small, "weight_decay": 0.0, "holds": "biases, norms"},
        }
    rest = _adamw_elements(config, optimizer)
    head = "" if config.tie_word_embeddings or optimizer.head == "muon" else "output matrix, "
    matrices = "q, k, v, o, gate, up, down, each expert apart, routers, MTP's eh_proj"
    matrices += ", output matrix" if optimizer.head == "muon" and not config.tie_word_embeddings else ""
    return {
        "muon": {"elements": total - rest, "weight_decay": decay, "holds": matrices},
        "adamw": {"elements": rest, "weight_decay": decay, "holds": f"embedding, {head}biases, norms"},
    }


def memory(config: ModelConfig, optimizer: Any) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state, activations not counted, over all processes together.

    Muon keeps one momentum per matrix element; AdamW two moments per element.
    """
    counts = config.parameter_counts()
    weights = counts.total * BYTES
    if optimizer is None:
        return {"bytes_weights": weights}
    matrices = counts.total - _adamw_elements(config, optimizer) if isinstance(optimizer, MuonSpec) else 0
    state = (matrices + 2 * (counts.total - matrices)) * BYTES
    return {
        "bytes_weights": weights,
        "bytes_gradients": weights,
        "bytes_optimizer": state,
        "bytes_training": 2 * weights + state,
    }


def _adamw_elements(config: ModelConfig, spec: MuonSpec) -> int:
    """Elements that Muon leaves to AdamW: embedding, (by default) head, biases and norms."""
    vocabulary = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings or spec.head == "muon" else vocabulary
    return sum(vectors(config)) + vocabulary + head


def rope_thetas(recipe: PretrainRecipe) -> list[float]:
    """The RoPE base in force in each stage: its own, else that of the stage before, else the model's."""
    thetas, now = [], recipe.model.rope_theta
    for stage in recipe.stages:
        now = stage.rope_theta or now
        thetas.append(now)
    return thetas


def ramped_batch(tokens_seen: int, batch: BatchRamp) -> int:
    """Tokens of the step that begins after `tokens_seen` tokens: linear from start to end over the ramp (spec 2)."""
    start = batch.start_tokens or batch.tokens
    if tokens_seen >= batch.ramp_tokens:
        return batch.tokens
    return round(start + (batch.tokens - start) * tokens_seen / batch.ramp_tokens)


def stage_steps(recipe: PretrainRecipe) -> list[int]:
    """Optimizer steps of each stage. A step holds whole sequences, at least one."""
    counts, seen = [], 0
    for stage in recipe.stages:
        end, steps, length = seen + stage.tokens, 0, stage.sequence_length
        while seen < end:
            step = max(1, ramped_batch(seen, recipe.batch) // length) * length
            if seen >= recipe.batch.ramp_tokens:
                rest = -(-(end - seen) // step)
                steps, seen = steps + rest, end
            else:
                steps, seen = steps + 1, min(end, seen + step)
        counts.append(steps)
    return counts


def _folder_model(folder: str, optimizer: Any) -> dict[str, Any]:
    """Counts and bytes of a model that already lies on disk (a run or a model folder); nothing when it does not yet."""
    for path in (Path(folder) / "export" / "config.json", Path(folder) / "config.json"):
        if path.is_file():
            config = ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
            return {**parameters(config), **memory(config, optimizer)}
    return {}
