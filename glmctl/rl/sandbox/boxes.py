"""The levels of isolation, what each needs, and running one command in one.

A  a virtual machine or gVisor elsewhere, behind HTTP (`remote`)       hostile code
B  bubblewrap + seccomp + own uid + control group + rlimits            the default
C  Landlock + seccomp + own uid + rlimits                              code of a model that you train yourself
none  rlimits only, chosen by name                                     never by default

B and C share the host's kernel: a kernel bug is an escape. A level is never exchanged for a lower one.
"""

from __future__ import annotations

import base64
import ctypes
import functools
import importlib.resources
import itertools
import json
import os
import platform
import select
import selectors
import shutil
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmctl.errors import EnvironmentProblem
from glmctl.recipe.schema import SandboxLevel, SandboxSpec
from glmctl.rl.environment import InfrastructureFailure
from glmctl.rl.sandbox import cgroups, seccomp

INTERPRETER = "/usr/bin/python3"
"""what a candidate runs on: readable by every uid, which one in a home folder is not"""
OUTPUT_BYTES = 1 << 20
FIRST_UID = 61184
"""a block of uids that Debian and systemd leave alone; each run of this process takes the next, so that
RLIMIT_NPROC, which counts a user's processes on the whole machine, counts this run's"""
UIDS = 256
EMPTY_SECONDS = 2.0
"""how long killed processes may hold their outputs; up to 60 ms were seen"""
LANDLOCK_ABI = 3
"""the first that also refuses truncation"""

_COUNTER = itertools.count()


@dataclass(frozen=True)
class Finished:
    """How a run in a box ended."""

    output: bytes
    """what it wrote to stdout, at most 1 MiB"""
    errors: bytes
    """what it wrote to stderr, at most 1 MiB"""
    exit_code: int | None
    """None: it was stopped for running too long or writing too much"""
    seconds: float


@functools.cache
def missing(level: SandboxLevel) -> tuple[str, ...]:
    """What this machine lacks for `level`, each with how to get it; empty when the level is offered."""
    lacks: list[str] = []
    if not Path(INTERPRETER).exists():
        lacks.append(f"{INTERPRETER} (apt install python3)")
    if level in ("B", "C") and platform.machine() != seccomp.ARCHITECTURE:
        lacks.append(f"an {seccomp.ARCHITECTURE} processor: the seccomp filter is written for it")
    if level == "B":
        if bubblewrap() is None:
            lacks.append("bubblewrap (apt install bubblewrap)")
        elif not lacks and (problem := _bubblewrap_problem()):
            lacks.append(f"user namespaces for bubblewrap: {problem}")
    if level == "C" and landlock_abi() < LANDLOCK_ABI:
        lacks.append(f"Landlock ABI {LANDLOCK_ABI} (Linux 6.2 or newer, with landlock among its security modules)")
    return tuple(lacks)


def bubblewrap() -> str | None:
    """The bwrap executable: GLMCTL_BWRAP, else the one on PATH."""
    return os.environ.get("GLMCTL_BWRAP") or shutil.which("bwrap")


def landlock_abi() -> int:
    """The kernel's Landlock version, 0 without."""
    return max(0, int(ctypes.CDLL(None).syscall(444, None, 0, 1)))


def _bubblewrap_problem() -> str | None:
    try:
        done = run([INTERPRETER, "-I", "-S", "-c", "print('ok')"], b"", SandboxSpec(level="B"))
    except InfrastructureFailure as error:
        return str(error)
    return None if done.output == b"ok\n" else done.errors.decode(errors="replace").strip() or "it does not start"


def require(spec: SandboxSpec) -> None:
    """Raise EnvironmentProblem when the machine does not offer the level that was asked for: never a lower one."""
    if spec.level == "http":
        return
    if lacks := missing(spec.level):
        offered = [level for level in ("B", "C") if not missing(level)]
        other = f"--set sandbox.level={offered[0]} is offered here; " if offered else ""
        raise EnvironmentProblem(
            f"sandbox level {spec.level} is not offered by this machine: it lacks {'; '.join(lacks)}",
            hint=f"{other}`glmctl doctor` shows every level; --unsafe-no-sandbox runs code unprotected",
        )


def run(argv: list[str], given: bytes, spec: SandboxSpec, greeting: bytes = b"") -> Finished:
    """Run `argv` in a box of `spec.level` with `given` on its stdin; back only when nothing of it is left.

    It is stopped after `spec.wall_seconds`, or when it has written more than 1 MiB. With a `greeting`, its stdin stays
    open until that has come as the first of its output, and InfrastructureFailure is raised when it has not come. A
    program that loads foreign code only after its stdin has ended is then told apart from a box that failed, whatever
    that code does: the greeting is out of its reach.
    """
    number = next(_COUNTER)
    name = f"glmctl-{os.getpid()}-{number}"
    privileged = os.geteuid() == 0
    memory = spec.memory_mb << 20
    bounded: AbstractContextManager[list[Path]] = nullcontext([])
    if spec.level in ("B", "C"):
        bounded = cgroups.group(name, memory, spec.processes)
    with bounded as folders:
        plan = {
            "cgroups": [str(folder) for folder in folders],
            "uid": FIRST_UID + (os.getpid() + number) % UIDS if privileged else None,
            "rlimits": _rlimits(spec, inside=spec.level == "B"),
            "argv": _boxed(argv) if spec.level == "B" else argv,
            "landlock": _landlock() if spec.level == "C" else None,
            "seccomp": _filter(spec.level),
            "seccomp_by_bwrap": spec.level == "B",
        }
        launcher = str(importlib.resources.files("glmctl.rl.sandbox").joinpath("launcher.py"))
        began = time.monotonic()
        process = subprocess.Popen(
            # this interpreter: it is the one that is surely there, and it is gone before the candidate begins
            [sys.executable, "-I", "-S", launcher, json.dumps(plan)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
        try:
            output, errors, whole = _talk(process, given, greeting, began + spec.wall_seconds)
        finally:
            _end(process, drain=not folders)
    if not output.startswith(greeting):
        ended = f"exit code {process.returncode}" if whole else f"not ready within {spec.wall_seconds:g} s"
        said = errors.decode(errors="replace").strip().splitlines() or [ended]
        raise InfrastructureFailure(f"the box failed before the candidate's code was loaded: {said[-1]}")
    return Finished(output, errors, process.returncode if whole else None, time.monotonic() - began)


def limits_inside(spec: SandboxSpec) -> dict[str, int]:
    """The rlimits that the candidate's process sets on itself before the candidate's code is loaded.

    The number of processes belongs here: set before bubblewrap it would count, and stop, bubblewrap's own. Memory is
    limited for each process apart, so where no control group bounds them together there is but one. An executor
    elsewhere bounds them with a box of its own.
    """
    processes = spec.processes if spec.level == "http" or cgroups.parents() else 1
    return {"RLIMIT_NPROC": processes, "RLIMIT_AS": spec.memory_mb << 20, "RLIMIT_CORE": 0}


def _rlimits(spec: SandboxSpec, *, inside: bool) -> dict[str, int]:
    common = {
        "RLIMIT_CPU": max(1, int(spec.wall_seconds + 1)),
        "RLIMIT_FSIZE": 16 << 20,
        "RLIMIT_NOFILE": 128,
        "RLIMIT_CORE": 0,
    }
    return common if inside else {**common, "RLIMIT_AS": spec.memory_mb << 20}


def _filter(level: SandboxLevel) -> str:
    if level not in ("B", "C"):
        return ""
    return base64.b64encode(seccomp.build_filter(alone=level == "C")).decode()


def _landlock() -> dict[str, Any]:
    read = [path for path in ("/usr", "/lib", "/lib64", "/bin") if Path(path).exists()]
    return {"abi": landlock_abi(), "read": read, "write": ["/dev/null"]}


def _boxed(argv: list[str]) -> list[str]:
    """The command line of reliability.md section 3: own namespaces, a read-only /usr and small scratch file systems."""
    bwrap = bubblewrap()
    assert bwrap is not None, "`require` comes first"
    words = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    words += ["--clearenv", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path("/", name).is_symlink():
            words += ["--symlink", f"usr/{name}", f"/{name}"]
        elif Path("/", name).is_dir():
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    words += [
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--size",
        str(16 << 20),
        "--tmpfs",
        "/dev/shm",
        "--remount-ro",
        "/dev",
    ]
    words += ["--size", str(64 << 20), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]
    return [*words, "--seccomp", "SECCOMP_FD", "--", *argv]


def _talk(
    process: subprocess.Popen[bytes], given: bytes, greeting: bytes, deadline: float
) -> tuple[bytes, bytes, bool]:
    """Feed stdin, collect both outputs, up to the deadline and the cap; the flag says whether it ended by itself."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    collected: dict[int, bytearray] = {}
    with selectors.DefaultSelector() as ready:
        for stream in (process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
            collected[stream.fileno()] = bytearray()
            ready.register(stream, selectors.EVENT_READ)
        os.set_blocking(process.stdin.fileno(), False)
        if given:
            ready.register(process.stdin, selectors.EVENT_WRITE)
        whole = False
        while not whole:
            if not given and collected[process.stdout.fileno()].startswith(greeting):
                process.stdin.close()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for key, _ in ready.select(left):
                if key.fileobj is process.stdin:
                    given = _feed(process.stdin, given, ready)
                    continue
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    ready.unregister(key.fileobj)
                collected[key.fd] += chunk
            if max(map(len, collected.values())) > OUTPUT_BYTES:
                break
            # a candidate that closes its outputs and lives on is not done: the exit is
            readers = [key for key in ready.get_map().values() if key.fileobj is not process.stdin]
            if not readers:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    break
                whole = True
    output, errors = (bytes(collected[s.fileno()][:OUTPUT_BYTES]) for s in (process.stdout, process.stderr))
    return output, errors, whole


def _feed(stdin: Any, given: bytes, ready: selectors.BaseSelector) -> bytes:
    """Write what fits. A candidate that closed its stdin does not want the rest."""
    try:
        given = given[os.write(stdin.fileno(), given) :]
    except BrokenPipeError:
        given = b""
    if not given:
        ready.unregister(stdin)
    return given


def _end(process: subprocess.Popen[bytes], *, drain: bool) -> None:
    """Stop the whole session, if it is still there, and take the exit code.

    A kill is not a barrier. Emptying the control group is one; where there is none, `drain`: the box is empty when
    bubblewrap's child, the init of its namespace, is gone, which takes everybody in it along first, and nobody holds
    the outputs any more (a candidate may have closed them and live).
    """
    deadline = time.monotonic() + EMPTY_SECONDS if drain else 0.0
    if process.poll() is None:
        children = _children(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while any(map(_lives, children)) and time.monotonic() < deadline:
            time.sleep(0.001)
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        while (left := deadline - time.monotonic()) > 0:
            if select.select([stream], [], [], left)[0] and not os.read(stream.fileno(), 1 << 16):
                break
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None and not stream.closed:
            stream.close()


def _children(pid: int) -> list[int]:
    """Processes that `pid` has started and not waited for; none where the kernel does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie, which a namespace's init becomes when all others in it are gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
