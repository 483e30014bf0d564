"""Compiles fused.cpp with the system's g++ at first use, keeps it in the user's cache, and opens it.

g++ and not another compiler: its OpenMP runtime is the one torch brings, so both share one pool of threads. The
cached file is named after everything its code depends on; it appears whole or not at all. Without a compiler the
same passes run in torch, slower and equal up to rounding; `GLMCTL_KERNELS=torch` chooses that by name.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from glmctl import console
from glmctl.kernels.cpu.library import cache_folder

SOURCE = Path(__file__).parent
COMPILE_SECONDS = 300
"""a compiler that takes longer is stuck: a fast core needs three"""

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
        target = cache_folder() / f"fused-{_key(compiler)}.so"
        if not target.exists():
            _build(compiler, target)
        opened = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        console.warn(f"training's C++ kernels cannot be used, torch is slower: {reason[0] if reason else error!r}")
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


def _flags() -> list[str]:
    """No fast-math: sums keep the order that the source gives them."""
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ["-std=c++17", "-O3", tune, "-fopenmp", "-shared", "-fPIC"]


def _key(compiler: str) -> str:
    """Hash of sources, compiler version, flags and the processor's abilities."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCE.glob("*.cpp"), *SOURCE.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    abilities = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    digest.update("\0".join([version, *_flags(), platform.machine(), *abilities]).encode())
    return digest.hexdigest()[:24]


def _build(compiler: str, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    console.note(f"compiling training's kernels (once; kept in {target.parent})")
    # processes that build at once each make their own and the last rename wins: all are the same
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        command = [compiler, *_flags(), str(SOURCE / "fused.cpp"), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
        os.replace(made, target)
