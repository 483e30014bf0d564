"""Which implementation of an operation runs, chosen by device and dtype.

Every operation lives in its own file, which registers a `reference` (plain torch, the definition) and any
faster variants. `op(name, device, dtype)` returns the last registered variant that suits; tests hold all
variants of an operation to its reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

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


_variants: dict[str, list[Variant]] = {}
_forced: dict[str, str] = {}
_chosen: dict[tuple[str, str, torch.dtype], Implementation] = {}


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
        found = _chosen[key] = suitable[-1].function
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


def _import(op_name: str) -> None:
    if op_name not in _variants:
        importlib.import_module(f"glmctl.kernels.{op_name}")
