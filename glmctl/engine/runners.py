"""Which runner an engine uses: by name, or the fastest that this machine and model allow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch

from glmctl.engine.cache import PagedCache
from glmctl.engine.native import NativeRunner
from glmctl.engine.native_weights import WeightFormat
from glmctl.engine.runner import Runner
from glmctl.engine.torch_runner import TorchRunner
from glmctl.errors import GlmctlError, unknown
from glmctl.kernels.cpu.library import compiled
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.use import RunnerName

MakeRunner = Callable[[GlmMoe, PagedCache], Runner]

_FORMATS: dict[str, WeightFormat] = {
    "native": "stored", "native-bf16": "bf16", "native-int8": "int8", "native-fp8": "fp8",
}  # fmt: skip


def runner_named(name: RunnerName) -> MakeRunner:
    """What makes the runner of this name for a model and its cache. RecipeError for an unknown name.

    `auto` is the native one for an fp32 model of GLM's architecture on the CPU and torch's for everything else (MLA and
    MFA among it); where the native one cannot be compiled it says so, once, and takes torch's. A `native` one that is
    asked for by name and cannot be had is an EnvironmentProblem; for a model that it cannot compute, a GlmctlError.
    """
    if name not in get_args(RunnerName):
        raise unknown("runner", name, get_args(RunnerName))
    if name == "auto":
        return automatic
    if name == "torch":
        return TorchRunner
    return partial(_native, name)


def device_for(name: RunnerName = "auto") -> torch.device:
    """Where a model should be for a runner of this name: a GPU where there is one, unless it computes on the CPU."""
    return torch.device("cuda" if name in ("auto", "torch") and torch.cuda.is_available() else "cpu")


def automatic(model: GlmMoe, cache: PagedCache) -> Runner:
    """See `runner_named`."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or _foreign(model.config) or compiled() is None:
        return TorchRunner(model, cache)
    return NativeRunner(model, cache)


def _native(name: RunnerName, model: GlmMoe, cache: PagedCache) -> Runner:
    if model.device.type != "cpu":
        raise GlmctlError(f"runner: '{name}' computes on the CPU; the model is on {model.device}")
    if foreign := _foreign(model.config):
        raise GlmctlError(f"runner: '{name}' computes GLM's architecture; this model has {foreign}")
    if cache.keys[0].dtype != torch.float32:
        raise GlmctlError(f"runner: '{name}' keeps keys and values in fp32; load the model with dtype float32")
    return NativeRunner(model, cache, weights=_FORMATS[name])


def _foreign(config: ModelConfig) -> str | None:
    """What the compiled step does not know of the family's other architectures, if the model has any of it."""
    if config.attention != "gqa":
        return f"attention '{config.attention}'"
    if config.scoring_func != "sigmoid":
        return f"a {config.scoring_func} router"
    if config.rope_scaling is not None:
        return "RoPE scaling"
    return "dense layers at the end" if config.last_k_dense_replace else None
