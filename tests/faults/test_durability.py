"""Full and failing disks at every system call of a save, and the order in which a save reaches the disk (T2, T10)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("syscall_faults.py")
EVERY = int(os.environ.get("GLMCTL_SOAK_FAULTS_EVERY", "5"))
"""1 in `make soak`: every fault point there is"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (Debian's package strace)")
    root = tmp_path_factory.mktemp("faults")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(PROGRAM), str(root), str(EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def test_a_failing_system_call_costs_the_new_checkpoint_at_most(results: dict[str, Any]) -> None:
    """Row T2: the one before is valid, the error names the place (exit 4), and nothing half-written is left."""
    trials = results["trials"]
    assert sum(results["counts"].values()) >= 40, "fewer fault points than the plan wants"
    assert {one["call"] for one in trials} >= {"openat", "write", "fsync"}
    for one in trials:
        where = (one["call"], one["number"], one["message"])
        published = "step-00000015" in one["left"]
        if one["call"] == "mkdir" and one["code"] == 0:
            continue  # the folder is there already, which is all that was asked
        assert one["code"] == 4, where
        assert one["error"] in one["message"], where
        assert f"{one['call']}-{one['number']}" in one["message"], where
        assert one["loaded"] == (15 if published else 10), where
        assert not [name for name in one["left"] if name.startswith(".")], where
        if one["call"] in ("write", "fsync", "rename") and not published:
            assert re.search(r"\d+ bytes needed", one["message"]), where


def test_files_reach_the_disk_before_their_names_and_names_before_anything_goes_on(results: dict[str, Any]) -> None:
    """Row T10: fsync of every file, then rename, then fsync of the folder, always. A kill cannot show this."""
    renames = 0
    dirty: set[str] = set()
    awaited: str | None = None
    for line in results["strace"]:
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None or " = -1" in line:
            continue
        name = call[1]
        if name == "write":
            dirty.add(path_of(line))
        elif name in ("fsync", "fdatasync"):
            dirty.discard(path_of(line))
            if path_of(line) == awaited:
                awaited = None
        elif name.startswith("rename"):
            source, target = re.findall(r'"([^"]*)"', line)[:2]
            if ".aside-" in target:
                continue  # the old one steps aside; its files are on the disk since long
            assert awaited is None, f"{awaited} was not flushed before {line}"
            late = [path for path in dirty if path == source or path.startswith(f"{source}/")]
            assert not late, f"{late} not flushed before {line}"
            awaited, renames = str(Path(target).parent), renames + 1
        elif name in ("unlinkat", "rmdir"):
            assert awaited is None, f"{line} before {awaited} was flushed"
    assert awaited is None
    assert renames == 3


def path_of(line: str) -> str:
    """The path that `strace -y` shows for the call's descriptor."""
    found = re.search(r"\(\d+<([^>]*)>", line)
    return found[1] if found is not None else ""
