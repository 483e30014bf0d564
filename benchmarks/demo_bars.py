"""Hold a finished `glmctl run demo` against the bars it promises; prints a table, exits 1 when one is missed.

python benchmarks/demo_bars.py runs/demo
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from pathlib import Path
from typing import Any

# (what, stage, summary key, comparison, bar)
BARS = [
    ("validation loss under unigram entropy, nats/token", "pretrain", "validation_loss_below_unigram", ">=", 1.0),
    ("well-formed answers after SFT, reasoning", "rl-reasoning", "well_formed_start", ">=", 0.95),
    ("well-formed answers after SFT, agent", "rl-agent", "well_formed_start", ">=", 0.95),
    ("held-out arithmetic gained by RL, points", "rl-reasoning", "heldout_gain_points", ">=", 15.0),
    ("hybrid / reasoning expert", "distill", "reasoning_ratio", ">=", 0.9),
    ("hybrid / agent expert", "distill", "agent_ratio", ">=", 0.9),
    ("/nothink answers without reasoning", "distill", "direct_obeyed", ">=", 0.95),
    ("thinking answers with reasoning", "distill", "thinking_obeyed", ">=", 0.95),
    ("MTP drafts accepted, hybrid", "eval", "hybrid/mtp_acceptance", ">", 0.4),
    ("MTP output identical to plain decoding, hybrid", "eval", "hybrid/mtp_identical", "==", True),
]
COMPARE = {">=": operator.ge, ">": operator.gt, "==": operator.eq}


def summary_of(stage: Path) -> dict[str, Any]:
    """The summary of a finished stage."""
    status = json.loads((stage / "status.json").read_text(encoding="utf-8"))
    if status["state"] != "finished":
        raise SystemExit(f"{stage}: {status['state']}, not finished")
    summary: dict[str, Any] = status["summary"]
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    run = parser.parse_args().run
    missed = 0
    for what, stage, key, sign, bar in BARS:
        value = summary_of(run / stage)[key]
        met = COMPARE[sign](value, bar)
        missed += not met
        shown = value if isinstance(value, bool) else f"{value:.3f}"
        print(f"{'met ' if met else 'MISSED'}  {what:<52} {shown:>8}  {sign} {bar}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
