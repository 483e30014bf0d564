"""One life of a pretraining of one or several ranks. Not a test.

    [torchrun --nproc-per-node N] one_life.py ROOT RUN STEP

Rank 0 is asked to stop in STEP (0: the run goes on to its end) and has a slow disk then. `{rank}` in RUN is the rank.
Every rank writes ROOT/life-STEP-rankN.json: the exit code, the message, and digests of all weights, biases and
optimizer states as they were loaded and as they were left.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import poisoned_rank
import training_harness as harness

from glmctl import console
from glmctl.commands._stage import execute
from glmctl.errors import GlmctlError
from glmctl.training.session import Session


def main(root: Path, run: str, stop: int) -> int:
    console.configure(quiet=True)
    rank = int(os.environ.get("RANK", "0"))
    found: dict[str, Any] = {"code": 0, "message": ""}
    sessions: list[Session] = []
    resume = Session.resume

    def resumed(self: Session) -> int:
        found["done"] = resume(self)
        found["loaded"] = poisoned_rank.digest(self.stepper)
        sessions.append(self)
        return int(found["done"])

    Session.resume = resumed  # type: ignore[method-assign]
    if stop and rank == 0:
        harness.at_row(stop, harness.ask(signal.SIGTERM))()
        harness.slow_write(1)()
    try:
        execute(harness.pretrain_recipe(root), root / run.format(rank=rank))
    except GlmctlError as error:
        found |= {"code": error.exit_code, "message": error.message}
    if sessions:
        found["left"] = poisoned_rank.digest(sessions[0].stepper)
    (root / f"life-{stop}-rank{rank}.json").write_text(json.dumps(found))
    return int(found["code"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
