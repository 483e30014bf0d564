"""Held-out accuracy before and after RL for several seeds, from the SFT model of a finished demo.

    python benchmarks/rl_gain.py runs/demo --seeds 0 1 2

The seed changes the prompts' order and every sample; model and problems are the demo's. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--recipe", default="demo/rl-reasoning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        folder = args.run.parent / f"rl-gain-{seed}"
        command = [sys.executable, "-m", "glmctl", "rl", args.recipe, "--json", "--quiet", "--run", str(folder)]
        for key, value in {
            "seed": seed,
            "model": args.run / "sft-reasoning",
            "problems": f"[{args.run / 'math/export/train.jsonl'}]",
            "heldout": f"[{args.run / 'math/export/heldout.jsonl'}]",
        }.items():
            command += ["--set", f"{key}={value}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout)["summary"]
        rows.append({"seed": seed, **{k: result[k] for k in ("heldout_start", "heldout_end", "heldout_gain_points")}})
        print(
            "seed {seed}: {heldout_start:.3f} -> {heldout_end:.3f}  {heldout_gain_points:+.1f} points".format(
                **rows[-1]
            )
        )
    gains = [row["heldout_gain_points"] for row in rows]
    print(
        f"median gain {statistics.median(gains):+.1f} points over {len(gains)} seeds, "
        f"from {min(gains):+.1f} to {max(gains):+.1f}"
    )
    print(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()
