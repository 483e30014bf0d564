"""Compiles the C++ step with the system compiler at first use, keeps it in the user's cache, and opens it.

The cached file is named after everything its code depends on: sources, compiler, flags, processor. Processes that
build at once wait for one of them; the file appears whole or not at all.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from glmctl import console
from glmctl.errors import EnvironmentProblem

SOURCE = Path(__file__).parent
MAIN = "step.cpp"
COMPILERS = ("g++", "clang++", "c++")
COMPILE_SECONDS = 300
"""a compiler that takes longer is stuck: a fast core needs five"""

_P, _I = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "glm_lanes": ([], _I),
    "glm_create": ([_P, _P, _I], _P),
    "glm_destroy": ([_P], None),
    "glm_set": ([_P, _I, _I, _P, _P, _I, _I, _I], None),
    "glm_step": ([_P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _P, _P, _I, _P, _P, _P, _P], _I),
    "glm_pack": ([_P, _I, ctypes.c_long, _I, _I, _P, _P, _I], None),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled step. EnvironmentProblem when there is no compiler, it fails, or the cache cannot be written."""
    compiler = find_compiler()
    target = cache_folder() / f"step-{_key(compiler)}.so"
    if not target.exists():
        _build_once(compiler, target)
    try:
        opened = ctypes.CDLL(str(target))
    except OSError:
        # a file that another machine's crash or a full disk left unreadable is built anew, once
        target.unlink(missing_ok=True)
        _build_once(compiler, target)
        opened = _open(target)
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = arguments, result
    return opened


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


def cache_folder() -> Path:
    """Where compiled code is kept: $GLMCTL_CACHE, else glmctl's folder in the user's cache."""
    own = os.environ.get("GLMCTL_CACHE")
    if own:
        return Path(own) / "native"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "glmctl" / "native"


def flags() -> list[str]:
    """Of the compiler. No fast-math: the order of every sum is part of what the tests hold."""
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    return ["-std=c++17", "-O3", tune, "-pthread", "-shared", "-fPIC"]


def _sources() -> list[Path]:
    return sorted([*SOURCE.glob("*.cpp"), *SOURCE.glob("*.h")])


def _key(compiler: str) -> str:
    """Hash of sources, compiler version, flags and the processor's abilities."""
    digest = hashlib.sha256()
    for source in _sources():
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    version = _run([compiler, "--version"])
    digest.update("\0".join([version, *flags(), _processor()]).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(told)])


def _build_once(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _build(compiler, target)
    except OSError as error:
        raise EnvironmentProblem(
            f"{target.parent}: {error.strerror or error}", hint="set GLMCTL_CACHE to a folder that can be written"
        ) from error


def _build(compiler: str, target: Path) -> None:
    console.note(f"compiling the native decoder with {Path(compiler).name} (once; kept in {target.parent})")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        _run([compiler, *flags(), str(SOURCE / MAIN), "-o", str(made)])
        _open(made)
        os.replace(made, target)


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentProblem(f"the compiled decoder cannot be opened: {error}") from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(f"{command[0]} did not finish in {COMPILE_SECONDS} s") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise EnvironmentProblem(f"{command[0]} failed with code {done.returncode}: {first}")
    return done.stdout
