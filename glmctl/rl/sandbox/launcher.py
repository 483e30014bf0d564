"""Gives up every privilege, in order, and becomes the candidate. Run as a script by a fresh interpreter.

usage: launcher.py PLAN    PLAN is JSON: see `boxes.Plan`

A script of its own and not a `preexec_fn`: forking a process full of threads to run Python in the child deadlocks.
Imports nothing of glmctl, and everything it needs before it lets go of the right to read it.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import struct
import sys
from typing import Any

_SET_NO_NEW_PRIVS, _SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 0b1101
"""LANDLOCK_ACCESS_FS_EXECUTE | READ_FILE | READ_DIR"""
_READ_WRITE_FILE = 0b110


def main() -> None:
    plan = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    for group in plan["cgroups"]:
        with open(os.path.join(group, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))
    for name, value in plan["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    if os.getuid() == 0 or os.geteuid() == 0:
        sys.exit("launcher: refusing to run a candidate as uid 0")
    _check(libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if plan["landlock"] is not None:
        _landlock(libc, plan["landlock"])
    argv = list(plan["argv"])
    program = base64.b64decode(plan["seccomp"])
    if plan["seccomp_by_bwrap"]:
        argv[argv.index("SECCOMP_FD")] = str(_readable(program))
    elif program:
        _seccomp(libc, program)
    os.execv(argv[0], argv)


def _landlock(libc: Any, plan: dict[str, Any]) -> None:
    """Reading below `read`, reading and writing the files of `write`; no other file, no TCP, no outside processes."""
    abi = plan["abi"]
    files = (1 << (16 if abi >= 5 else 15)) - 1
    attributes = struct.pack("<QQQ", files, 0b11 if abi >= 4 else 0, 0b11 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes[:size], size, 0)
    _check(ruleset, "landlock")
    for paths, rights in ((plan["read"], _READ), (plan["write"], _READ_WRITE_FILE)):
        for path in paths:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", rights, handle), 0), f"landlock {path}")
            os.close(handle)
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)


def _seccomp(libc: Any, program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _check(libc.prctl(_SET_SECCOMP, _SECCOMP_FILTER, header, 0, 0), "seccomp")


def _readable(program: bytes) -> int:
    """A descriptor that bwrap can read the filter from."""
    reader, writer = os.pipe()
    os.write(writer, program)
    os.close(writer)
    os.set_inheritable(reader, True)
    return reader


def _check(result: int, what: str) -> None:
    if result < 0:
        sys.exit(f"launcher: {what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # setrlimit raises ValueError above a hard limit
        sys.exit(f"launcher: {error}")
