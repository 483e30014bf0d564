"""Which implementation of an operation runs, chosen by device and dtype.

Every operation lives in its own file, which registers a `reference` (plain torch, the definition) and any
faster variants. `op(name, device, dtype)` returns the last registered variant that suits; tests hold all
variants of an operation to its reference. Inside `compiled_small(True, ...)` the operations that only read, compute and
write are their definitions as `torch.compile` makes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch

from glmctl.errors import EnvironmentProblem

Implementation = Callable[..., Any]
F = TypeVar("F", bound=Implementation)


@dataclass(frozen=True)
class Variant:
    """One implementation; empty `devices` or `dtypes` mean any."""

    name: str
    function: Implementation
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]

    def suits(self, device: str, dtype: torch.dtype) -> bool:
        """Whether it is meant for tensors of this device type and dtype."""
        return (not self.devices or device in self.devices) and (not self.dtypes or dtype in self.dtypes)


SMALL = ("rms_norm", "rope", "norm_rope", "swiglu")
"""operations bound by memory, in which a compiler has several passes to make one of"""

RECOMPILE_LIMIT = 64
"""forms of one operation (grad or not, ranks, widths) that are compiled before torch falls back to the plain one"""

_variants: dict[str, list[Variant]] = {}
_forced: dict[str, str] = {}
_chosen: dict[tuple[str, str, torch.dtype], Implementation] = {}
_compiling = False


def variant(
    op_name: str, name: str, *, devices: tuple[str, ...] = (), dtypes: tuple[torch.dtype, ...] = ()
) -> Callable[[F], F]:
    """Register the decorated function as variant `name` of operation `op_name`."""

    def register(function: F) -> F:
        _variants.setdefault(op_name, []).append(Variant(name, function, frozenset(devices), frozenset(dtypes)))
        _chosen.clear()
        return function

    return register


def variants(op_name: str) -> dict[str, Implementation]:
    """All implementations of an operation by name, `reference` first."""
    _import(op_name)
    return {v.name: v.function for v in _variants[op_name]}


def op(op_name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Implementation:
    """The implementation of `op_name` for tensors of this device type ("cpu", "cuda", "meta") and dtype."""
    key = (op_name, device, dtype)
    found = _chosen.get(key)
    if found is None:
        _import(op_name)
        forced = _forced.get(op_name)
        suitable = [v for v in _variants[op_name] if (v.name == forced if forced else v.suits(device, dtype))]
        assert suitable, f"no variant of {op_name} for {device} {dtype}"
        function = suitable[-1].function
        if _compiling and op_name in SMALL and not forced:
            function = _compiled(op_name)
        found = _chosen[key] = function
    return found


@contextmanager
def forced(op_name: str, name: str) -> Iterator[None]:
    """Use variant `name` of `op_name` inside the block, whatever the tensors (tests and benchmarks)."""
    assert name in variants(op_name), f"{op_name} has no variant {name}"
    before = _forced.get(op_name)
    _forced[op_name] = name
    _chosen.clear()
    try:
        yield
    finally:
        if before is None:
            del _forced[op_name]
        else:
            _forced[op_name] = before
        _chosen.clear()


@contextmanager
def compiled_small(wanted: bool, device: torch.device) -> Iterator[None]:
    """`SMALL` as torch.compile's kernels inside the block, in the whole process; as before afterwards, however it ends.

    EnvironmentProblem when nothing can be compiled for `device` here (no C++ compiler, no Triton).
    """
    global _compiling
    before = _compiling
    _chosen.clear()
    _compiling = wanted
    try:
        if wanted:
            _try_compiler(device)
        yield
    finally:
        _compiling = before
        _chosen.clear()


def compiling_small() -> bool:
    """Whether `compiled_small(True, ...)` holds now."""
    return _compiling


def _try_compiler(device: torch.device) -> None:
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    try:
        # a first one, so that a missing compiler is found before the run begins
        op("swiglu", device.type)(*torch.ones(2, 8, device=device))
    except Exception as problem:
        what = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise EnvironmentProblem(
            f"compile: torch.compile cannot make kernels for {device.type} here: {what}", hint="set compile: false"
        ) from problem


@lru_cache
def _compiled(op_name: str) -> Implementation:
    """The definition as torch.compile makes it; each new form costs seconds at its first call."""
    # dynamic from the first: with a graph of one shape beside a general one, a recomputed layer may get the other one,
    # which keeps other tensors than the backward expects
    compiled: Implementation = torch.compile(_variants[op_name][0].function, fullgraph=True, dynamic=True)
    return compiled


def _import(op_name: str) -> None:
    if op_name not in _variants:
        importlib.import_module(f"glmctl.kernels.{op_name}")
