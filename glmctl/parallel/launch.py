"""The same command line again, in several processes: torchrun without its own command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmctl import console

SAVE_SECONDS = 6 * 3600
"""how long ranks that were asked to stop may finish their step and write the checkpoint; a second signal ends them"""

RANK_ERRORS = "GLMCTL_RANK_ERRORS"
"""variable that names the folder in which the ranks leave their errors for `relaunch`, as RANK.json"""

TOGETHER = ("interrupted", "diverged")
"""kinds of error that all ranks end in together; they are said once"""


def relaunch(processes: int, argv: Sequence[str]) -> int:
    """Run `glmctl <argv>` in `processes` local ranks and return the exit code of the command.

    When a rank fails the others are ended, and its exit code (the documented one) is returned; a signal to this
    process goes to the ranks, which save and end with 130 or 143. With --json the first error of a rank becomes the
    one object on stdout.
    """
    with tempfile.TemporaryDirectory(prefix="glmctl-ranks-") as folder:
        os.environ[RANK_ERRORS] = folder
        code, ending = _launch(processes, argv)
        if code == 0:
            return 0
        told = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")]
    if not told:
        # ended from outside, or in a crash
        if ending:
            console.warn(ending)
        console.error_object("internal" if ending else "interrupted", ending or "interrupted", None, code)
        return code
    # the others may have failed since, for want of the one that had
    first: dict[str, Any] = min(told, key=lambda body: body.pop("time"))
    if first["kind"] in TOGETHER:
        console.error(**first)
    else:
        console.error_object(**first)
    return int(first["exit_code"])


def tell(kind: str, message: str, hint: str | None, exit_code: int) -> bool:
    """Leave the error that this process ends in to the `relaunch` that started it; False when there was none."""
    folder = os.environ.get(RANK_ERRORS)
    if folder is None:
        return False
    body = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code, "time": time.time_ns()}
    part = Path(folder, f".{console.rank()}")
    # without a place for it the launcher still sees the exit code
    with suppress(OSError):
        part.write_text(json.dumps(body), encoding="utf-8")
        # in one step: the launcher may end this process at any moment, because another one has failed
        part.rename(Path(folder, f"{console.rank()}.json"))
        return True
    return False


def _launch(processes: int, argv: Sequence[str]) -> tuple[int, str | None]:
    """The exit code, and which rank ended with it where it was not a signal to this process."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # each rank gets its share of the cores; torch would take all of them in every rank
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"glmctl-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        # torch's 30 seconds would kill rank 0 in the middle of a large checkpoint. A rank that failed is not waited for
        # this long: what is left of its job still gets 30
        shutdown_timeout=SAVE_SECONDS,
    )
    executable, *first = command()
    try:
        elastic_launch(config, executable)(*first, *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return code, f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped"
    except SignalException as error:
        return 128 + int(error.sigval), None
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, None
    return 0, None


def command() -> list[str]:
    """How to start glmctl in a new process: the installed script, else this interpreter with `-m glmctl`."""
    script = sys.argv[0]
    if os.path.basename(script) == "glmctl" and os.path.isfile(script):
        return [os.path.abspath(script)]
    found = shutil.which("glmctl", path=os.path.dirname(sys.executable))
    if found:
        return [found]
    # as this interpreter was started: with -P, the working directory stays off the ranks' path too
    return [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", "glmctl"]
