"""Held-out accuracy before and after RL: several seeds, several variants of the recipe, with a plot.

    python benchmarks/rl_gain.py runs/demo/rl-reasoning --seeds 0 1 2
    python benchmarks/rl_gain.py laptop/rl-arithmetic laptop/rl-code laptop/rl-function-calling --plot gain.svg
    python benchmarks/rl_gain.py laptop/rl-code --whole
    python benchmarks/rl_gain.py laptop/rl-code --variant "token=" --variant "sequence=objective.aggregation=sequence"

A target is the run directory of an RL stage, or a pipeline's recipe, which is run first (what is finished is skipped).
The seed changes the order of prompts and every sample; with --whole it is that of every stage, so the start differs
too. A variant is a name and the overrides it stands for, so that one switch can be compared over equal seeds (an
ablation). A run that is there already is not done again. Prints a line a seed, the median of each target, and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from glmctl.recipe.load import load
from glmctl.recipe.schema import PipelineRecipe
from glmctl.run.charts import Series, line_chart
from glmctl.run.metrics import MetricsLog
from glmctl.run.picture import standalone

KEPT = ("heldout_start", "heldout_end", "heldout_gain_points", "well_formed")


class Variant(NamedTuple):
    """A name, and the overrides that it stands for."""

    name: str
    overrides: list[str]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`NAME=KEY=VALUE; KEY=VALUE ...`; no overrides for the recipe as it is."""
        name, _, words = text.partition("=")
        return cls(name, [word.strip() for word in words.split(";") if word.strip()])


def glmctl(*words: str) -> float:
    """Run the command; seconds it took. Its notices go to our stderr."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "glmctl", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def pipeline(name: str) -> PipelineRecipe:
    """The pipeline of this name."""
    found = load(name, expect="pipeline")
    assert isinstance(found, PipelineRecipe)
    return found


def rl_stage(name: str) -> str:
    """The first RL stage of a pipeline."""
    for stage in pipeline(name).stages:
        if load(stage.recipe, stage.set).type == "rl":
            return stage.name
    raise SystemExit(f"{name}: no RL stage in this pipeline")


def start_of(target: str, root: Path) -> Path:
    """The RL run that the others repeat: the target itself, or that of a pipeline, which is run if it is not there."""
    if (Path(target) / "recipe.yaml").is_file():
        return Path(target)
    run = root / target.replace("/", "-")
    glmctl("run", target, "--run", str(run))
    return run / rl_stage(target)


def whole_life(target: str, seed: int, root: Path) -> Path:
    """The RL run of a pipeline of which every stage has this seed."""
    run = root / f"{target.replace('/', '-')}-{seed}"
    glmctl("run", target, "--run", str(run), *(f"--set={one.name}.seed={seed}" for one in pipeline(target).stages))
    return run / rl_stage(target)


def repeat(start: Path, seed: int, root: Path, variant: Variant) -> Path:
    """The RL run `start` again with another seed and the variant's overrides, below `root`."""
    if seed == seed_of(start) and not variant.overrides:
        return start
    name = "-".join(word for word in (start.parent.name, start.name, variant.name, str(seed)) if word)
    root.mkdir(parents=True, exist_ok=True)
    recipe = root / f"{name}.yaml"
    recipe.write_text((start / "recipe.yaml").read_text())
    words = [f"--set={word}" for word in (f"seed={seed}", *variant.overrides)]
    glmctl("rl", str(recipe), "--run", str(root / name), *words)
    return root / name


def seed_of(run: Path) -> int:
    """The seed that a run was made with."""
    return int(yaml.safe_load((run / "recipe.yaml").read_text())["seed"])


def result(run: Path) -> dict[str, Any]:
    """A finished run's figures."""
    status = json.loads((run / "status.json").read_text())
    return {**{key: status["summary"][key] for key in KEPT}, "seconds": status["seconds"]}


def plot(runs: dict[str, list[Path]], path: Path) -> None:
    """Held-out accuracy over steps: a line for each seed, a colour for each target and variant."""
    lines = []
    for color, (name, own) in enumerate(runs.items()):
        for place, run in enumerate(own):
            points = [(r["step"], r["heldout"]) for r in MetricsLog(run / "metrics.jsonl").rows() if "heldout" in r]
            # the legend has a name once
            lines.append(Series("" if place else name.removeprefix("laptop/"), points, markers=True, color=color))
    picture = line_chart(
        lines, title="Held-out accuracy", y_label="greedy, share of 1", zero=True, width=900, height=360
    )
    path.write_text(standalone(picture), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", metavar="RUN|PIPELINE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/gain"), help="where the runs go")
    parser.add_argument("--whole", action="store_true", help="every stage of the pipeline with the seed")
    parser.add_argument("--variant", type=Variant.parse, action="append", metavar="NAME=KEY=VALUE; ...")
    parser.add_argument("--plot", type=Path, help="an SVG of held-out accuracy over steps")
    args = parser.parse_args()
    if args.whole and args.variant:
        parser.error("--variant compares runs from one start; --whole has several")
    runs: dict[str, list[Path]] = {}
    for target in args.targets:
        if args.whole:
            runs[target] = [whole_life(target, seed, args.root) for seed in args.seeds]
            continue
        start = start_of(target, args.root)
        for variant in args.variant or [Variant("", [])]:
            name = f"{target} {variant.name}".strip()
            runs[name] = [repeat(start, seed, args.root, variant) for seed in args.seeds]
    rows = []
    for name, own in runs.items():
        found = [{"target": name, "seed": seed, **result(run)} for seed, run in zip(args.seeds, own, strict=True)]
        for row in found:
            start_share, end, gain = (row[key] for key in KEPT[:3])
            print(f"{name}, seed {row['seed']}: {start_share:.3f} -> {end:.3f}, {gain:+.1f}, RL {row['seconds']:.0f} s")
        gains = [row["heldout_gain_points"] for row in found]
        print(f"{name}: median {statistics.median(gains):+.1f} points, from {min(gains):+.1f} to {max(gains):+.1f}")
        rows += found
    if args.plot is not None:
        plot(runs, args.plot)
        print(f"plot: {args.plot}")
    print(json.dumps({"cpus": os.cpu_count(), "whole": args.whole, "rows": rows}))


if __name__ == "__main__":
    main()
