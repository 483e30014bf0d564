"""Kills a pipeline with SIGKILL once in the middle of every stage, runs it on, and compares with an undisturbed run.

    python benchmarks/kill_demo.py runs/demo --recipe demo

`runs/demo` is the finished, undisturbed run. The killed one is made beside it as `<name>-killed`. Compared: every row
of every training stage's metrics but the clock's fields, and every exported file, byte for byte but for the clock's
fields and the run folder's own name.
Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

CLOCK = re.compile(r"date|(\w+_)?time|mfu|tokens_per_second|(\w+_)?seconds(_\w+)?|total_evaluation_time_seconds")
"""names of what a row or a result says about time; no two runs agree on it"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    args = parser.parse_args()
    killed = args.undisturbed.with_name(args.undisturbed.name + "-killed")
    stages = [path.parent.name for path in args.undisturbed.glob("*/status.json")]
    usual = {name: json.loads((args.undisturbed / name / "status.json").read_text())["seconds"] for name in stages}
    rng = random.Random(args.seed)
    pending = {name: usual[name] * rng.uniform(0.2, 0.8) for name in stages}
    while pending:
        stage = _run_until_kill(args.recipe, killed, pending)
        if stage is None:
            break
        print(f"killed {stage} after {pending.pop(stage):.1f} s of its usual {usual[stage]:.1f} s", flush=True)
    for missed in pending:
        print(f"{missed}: over before it could be killed")
    subprocess.run(_command(args.recipe, killed), check=True, stdout=subprocess.DEVNULL)
    differences = [line for name in sorted(stages) for line in _differences(args.undisturbed / name, killed / name)]
    print("\n".join(differences) or "every metric and every exported file is identical to the undisturbed run's")
    return 1 if differences else 0


def _command(recipe: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "glmctl", "run", recipe, "--run", str(folder), "--quiet"]


def _run_until_kill(recipe: str, folder: Path, pending: dict[str, float]) -> str | None:
    """Start the pipeline and kill it when a pending stage has run for its time; None when it ended first."""
    process = subprocess.Popen(_command(recipe, folder), start_new_session=True, stdout=subprocess.DEVNULL)
    since: dict[str, float] = {}
    while process.poll() is None:
        for name, after in pending.items():
            if _state(folder / name) != "running":
                continue
            if time.monotonic() - since.setdefault(name, time.monotonic()) >= after:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return name
        time.sleep(0.01)
    if process.returncode != 0:
        raise SystemExit(f"the pipeline ended with code {process.returncode}")
    return None


def _state(folder: Path) -> str:
    try:
        return str(json.loads((folder / "status.json").read_text()).get("state", ""))
    except FileNotFoundError:
        return ""


def _differences(left: Path, right: Path) -> list[str]:
    lines = []
    if (left / "metrics.jsonl").exists():
        rows = [_rows(folder / "metrics.jsonl") for folder in (left, right)]
        if rows[0] != rows[1]:
            at = next((i for i, pair in enumerate(zip(*rows, strict=False)) if pair[0] != pair[1]), min(map(len, rows)))
            lines.append(f"{left.name}: metrics differ from row {at + 1} (of {len(rows[0])} and {len(rows[1])})")
    files = [_hashes(folder / "export") for folder in (left, right)]
    lines += [
        f"{left.name}: export/{name} differs"
        for name in sorted(files[0].keys() | files[1].keys())
        if files[0].get(name) != files[1].get(name)
    ]
    return lines


def _rows(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if not CLOCK.fullmatch(key)} for row in rows]


def _hashes(folder: Path) -> dict[str, str]:
    """Of every file below an export; a manifest's hashes follow from the other files."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest() for path in paths}


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".json":
        return data
    run = next(parent for parent in path.parents if parent.name == "export").parent.parent
    named = data.replace(str(run).encode(), b"RUN")
    # lm-eval's own name for a model is its path with the separators replaced
    found = json.loads(named.replace(str(run).replace(os.sep, "__").encode(), b"RUN"))
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if not CLOCK.fullmatch(key)}
    return json.dumps(found).encode()


if __name__ == "__main__":
    sys.exit(main())
