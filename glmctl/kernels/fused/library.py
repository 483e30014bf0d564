"""Training's passes between matrix products in C++, compiled with the system's g++.

g++ and not another compiler: its OpenMP runtime is the one torch brings, so both share one pool of threads. Without
it the same passes run in torch, slower and equal up to rounding; `GLMCTL_KERNELS=torch` chooses that by name.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from glmctl import console
from glmctl.errors import EnvironmentProblem
from glmctl.kernels.native_build import NativeLibrary, base_flags

FUSED = NativeLibrary("fused", "training's kernels", Path(__file__).parent, "fused.cpp")

_P, _N, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "glm_rms_norm": [_N, _N, _P, _P, _F, _P, _P, _I],
    "glm_rms_norm_back": [_N, _N, _P, _P, _P, _P, _P, _P, _P, _I],
    "glm_norm_rope": [_N, _N, _N, _N, _P, _P, _F, _P, _P, _P, _P, _I],
    "glm_norm_rope_back": [_N, _N, _N, _N, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I],
    "glm_swiglu": [_N, _N, _P, _N, _P, _N, _P, _P, _I],
    "glm_swiglu_back": [_N, _N, _P, _P, _N, _P, _N, _P, _P, _N, _P, _N, _P, _P, _I],
    "glm_softmax_loss": [_N, _N, _N, _P, _P, _F, _P, _I, _I],
    "glm_gather_sum": [_N, _N, _N, _P, _P, _P, _I],
    "glm_attention": [_N, _P, _P, _N, _N, _N, _F, _P, _P, _P, _P, _P, _I],
    "glm_attention_back": [_N, _P, _P, _N, _N, _N, _F, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I],
}

_disabled = False


def compiled(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library when it may work on all of `tensors` (fp32 on the CPU), else None: the caller then uses torch."""
    if _disabled or any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    return library()


@contextmanager
def in_torch() -> Iterator[None]:
    """Inside, every pass runs in torch (tests and benchmarks)."""
    global _disabled
    before, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = before


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled passes; None, said once, when they were not wanted or cannot be made here."""
    choice = os.environ.get("GLMCTL_KERNELS", "")
    if choice == "torch":
        return None
    compiler = shutil.which("g++")
    if compiler is None:
        console.note("no g++ on PATH: training's small operations run in torch, which is slower")
        return None
    try:
        opened = FUSED.open(compiler, [*base_flags(), "-fopenmp"])
    except EnvironmentProblem as problem:
        console.warn(f"training's C++ kernels cannot be used, torch is slower: {problem}")
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, None
    return opened


def call(name: str, *arguments: int | float | Tensor | None) -> None:
    """Run one of the library's functions on torch's number of threads; a tensor is passed as its address.

    The caller has seen to shapes and contiguity: nothing is checked here.
    """
    opened = library()
    assert opened is not None, "call only after compiled()"
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    getattr(opened, name)(*plain, torch.get_num_threads())


def strip() -> int:
    """Head widths that the compiled attention takes are multiples of this."""
    opened = library()
    assert opened is not None
    return int(opened.glm_strip())
