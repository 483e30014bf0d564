"""The C++ decoding step, compiled with the system's compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
from functools import lru_cache
from pathlib import Path

from glmctl import console
from glmctl.errors import EnvironmentProblem
from glmctl.kernels.native_build import NativeLibrary, base_flags

STEP = NativeLibrary("step", "the native decoder", Path(__file__).parent, "step.cpp")
COMPILERS = ("g++", "clang++", "c++")

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_SIGNATURES = {
    "glm_lanes": ([], _I),
    "glm_create": ([_P, _P, _I], _P),
    "glm_destroy": ([_P], None),
    "glm_set": ([_P, _I, _I, _P, _P, _I, _I, _I], None),
    "glm_step": ([_P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _P, _P, _I, _P, _P, _P, _P], _I),
    "glm_draw": ([_L, _L, _P, _L, _P, _P, _P, _P, _P, _P, _P, _I], None),
    "glm_all_finite": ([_P, _L], _I),
    "glm_pack": ([_P, _I, _L, _I, _I, _P, _P, _I], None),
    "glm_pack_fp8": ([_P, _I, _L, _I, _L, _L, _L, _P, _P, _P, _I], None),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled step. EnvironmentProblem when there is no compiler, it fails, or the cache cannot be written."""
    opened = STEP.open(find_compiler(), flags())
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, result
    return opened


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | None:
    """The library, or None, said once, where it cannot be had: the caller then computes with torch."""
    try:
        return library()
    except EnvironmentProblem as problem:
        hint = f" ({problem.hint})" if problem.hint else ""
        console.warn(f"{problem}{hint}; generating with torch, several times slower than native code")
        return None


def find_compiler() -> str:
    """Path of the C++ compiler: $CXX when set, else the first of g++, clang++ and c++ on PATH."""
    chosen = os.environ.get("CXX", "").strip()
    for name in (chosen,) if chosen else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise EnvironmentProblem(
        f"CXX={chosen}: no such compiler" if chosen else f"no C++ compiler ({', '.join(COMPILERS)}) on PATH",
        hint="install g++ or clang++, or set CXX",
    )


def flags() -> list[str]:
    """Of the compiler: the step brings its own threads."""
    return [*base_flags(), "-pthread"]
