"""`glmctl plan`: a recipe on N devices of a kind, as one JSON-able object. No torch is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glmctl.errors import RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.cost import forward_flops, kv_bytes_per_token
from glmctl.recipe.comparison import find_config
from glmctl.recipe.derive import parameters
from glmctl.recipe.schema import RecipeBase, ServeRecipe
from glmctl.run.plan import serving
from glmctl.run.plan.devices import DeviceKind, split
from glmctl.run.plan.layouts import Option, Terms, options, other_memory, smallest
from glmctl.run.plan.memory import Moment, peak
from glmctl.run.plan.step_time import trained_flops
from glmctl.run.plan.training import Job, Stage, job, process_moments

SHOWN = 8
"""layouts of a stage that are listed unless all are asked for"""

RUNTIME = {"cpu": 310e6}
"""bytes that a process has before its first tensor: interpreter, torch, accelerate; measured by benchmarks/plan.py"""
RUNTIME_ELSEWHERE = 2e9
"""driver's context, communication library, allocator's slack; an assumption for accelerators"""

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0625}
"""of a weight, by format; int8 has a scale for each 64 columns"""


def plan(
    recipe: RecipeBase,
    devices: int,
    device: DeviceKind,
    *,
    model: str | None = None,
    runtime: float | None = None,
    efficiency: float = 0.5,
    headroom: float = 0.05,
    price: float | None = None,
    every: bool = False,
    weights: str | None = None,
    context: int | None = None,
) -> dict[str, Any]:
    """Everything about `recipe` on `devices` devices.

    model: a preset or folder in place of the recipe's own. runtime: bytes a device has lost before the first tensor.
    efficiency: share of the peak FLOP/s that matrix products reach. headroom: share of memory to leave free. price: of
    a device-hour. every: list all layouts that fit. weights, context: of serving.
    """
    if runtime is None:
        runtime = RUNTIME.get(device.name, RUNTIME_ELSEWHERE)
    share = split(device, devices)
    terms = Terms(share, devices, runtime, efficiency, headroom)
    head = {"recipe": recipe.name, "type": getattr(recipe, "type", ""), "devices": devices, "kind": device.name}
    assumed = {"efficiency": efficiency, "headroom": headroom, "runtime_bytes": runtime}
    body = {**head, "device": _figures(share), "assumptions": assumed}
    if isinstance(recipe, ServeRecipe):
        return {**body, **_serve(recipe, terms, model, weights, context)}
    return {**body, **_train(job(recipe, model), terms, price, every)}


def _figures(device: DeviceKind) -> dict[str, float]:
    names = ("memory", "bf16_flops", "fp32_flops", "bandwidth", "link", "network", "per_node")
    return {name: getattr(device, name) for name in names}


# ------------------------------------------------------------------ training


def _train(work: Job, terms: Terms, price: float | None, every: bool) -> dict[str, Any]:
    stages = [_stage(work, stage, terms, every) for stage in work.stages]
    body: dict[str, Any] = {"model": _model(work.config), "precision": work.precision, "stages": stages}
    body["this_version"] = _this_version(work, terms)
    if all(stage["fits"] for stage in stages):
        days = sum(stage["layouts"][0]["days"] for stage in stages)
        body |= {"days": days, "device_hours": days * 24 * terms.devices}
        if price is not None:
            body["price"] = body["device_hours"] * price
    return body


def _model(config: ModelConfig) -> dict[str, Any]:
    return {**parameters(config), "attention": config.attention}


def _stage(work: Job, stage: Stage, terms: Terms, every: bool) -> dict[str, Any]:
    found = options(work, stage, terms)
    body = {
        "name": stage.name,
        "tokens": stage.tokens,
        "steps": stage.steps,
        "sequence_length": stage.length,
        "batch_tokens": stage.batch_tokens,
        "fits": bool(found),
    }
    if not found:
        least = smallest(work, stage, terms)
        if least is None:
            return {**body, "layouts": [], "least": None, "missing_bytes": None}
        short = least.memory.total - terms.room
        return {**body, "layouts": [], "least": _option(least, stage, terms), "missing_bytes": short}
    return {**body, "layouts": [_option(one, stage, terms) for one in (found if every else _few(found))]}


def _few(found: list[Option]) -> list[Option]:
    """The fastest ones, each layout once, and the one that this version runs."""
    best: dict[tuple[int, ...], Option] = {}
    for option in found:
        best.setdefault(tuple(option.layout), option)
    shown = list(best.values())[:SHOWN]
    own = [option for option in best.values() if option.layout.runs_here and option not in shown]
    return shown + own


def _option(option: Option, stage: Stage, terms: Terms) -> dict[str, Any]:
    seconds = option.stage_seconds(stage)
    either = {option.recompute: option.memory, not option.recompute: other_memory(option, terms)}
    memory = {"kept": either[False], "recomputed": either[True]}
    plain = trained_flops(replace(option.work, recompute=False))
    peak_flops = terms.devices * terms.device.flops(option.work.precision)
    return {
        "layout": option.layout._asdict(),
        "runs_here": option.layout.runs_here,
        "micro_batch_sequences": option.work.rows,
        "micro_batches": option.work.micro_batches,
        "recompute": option.recompute,
        "memory": {name: {**moment.parts, "total": moment.total} for name, moment in memory.items()},
        "fullest": option.memory.name,
        "step_seconds": option.time.total,
        "seconds": option.time.seconds,
        "sent_bytes": option.time.sent,
        "flops_per_token": plain,
        "mfu": plain * stage.batch_tokens / option.time.total / peak_flops,
        "tokens_per_second": stage.batch_tokens / option.time.total,
        "days": seconds / 86400,
        "device_hours": seconds / 3600 * terms.devices,
    }


def _this_version(work: Job, terms: Terms) -> dict[str, Any]:
    """What one process takes when `--processes N` trains the recipe today: data parallel, nothing divided."""
    saving = work.checkpoint_steps < work.steps
    moments = process_moments(work, terms.devices, runtime=terms.runtime, saving=saving, device=terms.device.name)
    most: Moment = peak(moments)
    return {
        "fits": most.total <= terms.device.memory,
        "memory": {**most.parts, "total": most.total},
        "fullest": most.name,
        "micro_tokens": work.micro_tokens,
        "recompute": work.recompute,
    }


# ------------------------------------------------------------------ serving


def _serve(
    recipe: ServeRecipe, terms: Terms, model: str | None, weights: str | None, context: int | None
) -> dict[str, Any]:
    if model is None and "${" in recipe.model:
        raise RecipeError(f"{recipe.name}: its model is an earlier stage's", hint="--model NAME plans for that one")
    config = find_config(model or recipe.model)
    kind = weights or {"native-bf16": "bf16", "native-int8": "int8"}.get(recipe.runner)
    kind = kind or ("fp32" if terms.device.name == "cpu" else "bf16")
    length = min(context or recipe.max_length or config.max_position_embeddings, config.max_position_embeddings)
    mtp = recipe.speculative > 0 and config.num_nextn_predict_layers > 0
    kv = 4.0 if terms.device.name == "cpu" else 2.0
    room = terms.room - terms.runtime
    found = [
        serving.describe(
            serving.Serving(
                config, terms.device, terms.devices, arrangement, length, BYTES[kind], kv, mtp, terms.efficiency
            ),
            room,
            recipe.max_slots,
        )
        for arrangement in serving.arrangements(config, terms.devices)
    ]
    return {
        "model": _model(config),
        "weights": kind,
        "context": length,
        "kv_bytes_per_token": kv_bytes_per_token(config, kv, mtp=mtp),
        "flops_per_token_decode": forward_flops(config, length, absorbed=True).total,
        "arrangements": found,
    }
