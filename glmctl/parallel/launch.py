"""The same command line again, in several processes: torchrun without its own command."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Sequence

from glmctl import console


def relaunch(processes: int, argv: Sequence[str]) -> int:
    """Run `glmctl <argv>` in `processes` local ranks and return the exit code of the command.

    When a rank fails the others are ended, and its exit code (the documented one) is returned; a signal to this
    process goes to the ranks, which save and end with 130 or 143.
    """
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
    )
    executable, *first = command()
    try:
        elastic_launch(config, executable)(*first, *argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        console.warn(f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped")
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


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
