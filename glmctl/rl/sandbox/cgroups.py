"""One control group a run: memory and processes bounded for the whole box, and a sure way to empty it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from glmctl.rl.environment import InfrastructureFailure

_ROOT = Path("/sys/fs/cgroup")
EMPTY_SECONDS = 5.0
"""how long killed processes may take to disappear; 50 ms were seen after a fork bomb"""


def parents() -> dict[str, Path]:
    """Where this process may make groups, by controller ("memory", "pids"); empty when it may not.

    Version 1 has a tree for each controller; in version 2 both are the same folder.
    """
    found: dict[str, Path] = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            folder = _ROOT / path.lstrip("/")
            enabled = folder / "cgroup.subtree_control"
            names = enabled.read_text(encoding="ascii").split() if enabled.is_file() else []
            found |= {name: folder for name in ("memory", "pids") if name in names}
        for name in {"memory", "pids"} & set(controllers.split(",")):
            found[name] = _ROOT / controllers / path.lstrip("/")
    usable = {name: folder for name, folder in found.items() if os.access(folder, os.W_OK)}
    return usable if usable.keys() == {"memory", "pids"} else {}


@contextlib.contextmanager
def group(name: str, memory_bytes: int, processes: int) -> Iterator[list[Path]]:
    """Folders of a fresh group for one run, removed (with every process in it) afterwards."""
    limits = {
        "memory": {"memory.limit_in_bytes": memory_bytes, "memory.max": memory_bytes, "memory.swap.max": 0},
        "pids": {"pids.max": processes},
    }
    folders: list[Path] = []
    try:
        for controller, parent in parents().items():
            folder = parent / name
            if folder not in folders:
                folder.mkdir()
                folders.append(folder)
            for file, value in limits[controller].items():
                if (folder / file).is_file():
                    (folder / file).write_text(str(value), encoding="ascii")
        yield folders
    finally:
        for folder in folders:
            remove(folder)


def remove(folder: Path) -> None:
    """Kill what is in the group, wait until it is gone (a kill is not a barrier), and remove the folder."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while True:
        for pid in (folder / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise InfrastructureFailure(f"{folder}: {error.strerror}") from error
        time.sleep(0.002)
