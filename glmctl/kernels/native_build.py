"""Compiles a folder of C++ into a shared library at first use, keeps it in the user's cache, and opens it.

The cached file is named after everything its code depends on: sources, compiler, flags, processor. Processes that
build at once wait for one of them; the file appears whole or not at all, and one that is damaged is built again.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from glmctl import console
from glmctl.errors import EnvironmentProblem

COMPILE_SECONDS = 300
"""a compiler that takes longer is stuck: a fast core needs five"""


def cache_folder() -> Path:
    """Where compiled code is kept: $GLMCTL_CACHE, else glmctl's folder in the user's cache."""
    own = os.environ.get("GLMCTL_CACHE")
    if own:
        return Path(own) / "native"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "glmctl" / "native"


def base_flags() -> list[str]:
    """For this processor. No fast-math: the order of every sum is part of what the tests hold."""
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    return ["-std=c++17", "-O3", tune, "-shared", "-fPIC"]


@dataclass(frozen=True)
class NativeLibrary:
    """One shared library to be: `main` in `folder`, which includes what else it needs from there.

    `name` begins the cached file's name; `what` says in messages what is being compiled.
    """

    name: str
    what: str
    folder: Path
    main: str

    def open(self, compiler: str, flags: list[str]) -> ctypes.CDLL:
        """The library, compiled when the cache does not hold it.

        EnvironmentProblem when the compiler fails, its output cannot be opened, or the cache cannot be written.
        """
        target = cache_folder() / f"{self.name}-{self.key(compiler, flags)}.so"
        if not target.exists():
            self._build_once(compiler, flags, target)
        try:
            return ctypes.CDLL(str(target))
        except OSError:
            # a file that another machine's crash or a full disk left unreadable is built anew, once
            target.unlink(missing_ok=True)
            self._build_once(compiler, flags, target)
            return self._opened(target)

    def key(self, compiler: str, flags: list[str]) -> str:
        """Hash of sources, compiler version, flags and the processor's abilities."""
        digest = hashlib.sha256()
        for source in sorted([*self.folder.glob("*.cpp"), *self.folder.glob("*.h")]):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        digest.update("\0".join([_run([compiler, "--version"]), *flags, _processor()]).encode())
        return digest.hexdigest()[:24]

    def _build_once(self, compiler: str, flags: list[str], target: Path) -> None:
        try:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(target.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not target.exists():
                    self._build(compiler, flags, target)
        except OSError as error:
            raise EnvironmentProblem(
                f"{target.parent}: {error.strerror or error}", hint="set GLMCTL_CACHE to a folder that can be written"
            ) from error

    def _build(self, compiler: str, flags: list[str], target: Path) -> None:
        console.note(f"compiling {self.what} with {Path(compiler).name} (once; kept in {target.parent})")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
            made = Path(folder) / target.name
            _run([compiler, *flags, str(self.folder / self.main), "-o", str(made)])
            self._opened(made)
            os.replace(made, target)

    def _opened(self, path: Path) -> ctypes.CDLL:
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            raise EnvironmentProblem(f"{self.what}, compiled, cannot be opened: {error}") from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(told)])


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
