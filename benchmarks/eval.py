"""Evaluation beside lm-eval's own `hf` model: the same scores on the same checkpoint and tasks, and the time of both.

    python benchmarks/eval.py                                    # a random model of the `tiny` preset
    python benchmarks/eval.py --model runs/demo/distill --limit 50 --rounds 3

Both models are loaded once, in one process, fp32, with the same number of threads; then every task is evaluated by one
and by the other, in turns. `hf` gets the batch size that is the fastest for it among `--hf-batch-sizes`, tried on
each task in a round that is not counted. The time is that of lm-eval's whole evaluation of the task: prompts, model,
scoring. `table` says whether the two tables that lm-eval prints are the same text, to the last digit (a perplexity
above 100 to five: more would be beyond fp32); `answers` counts the requests whose answer is the same (texts equal;
log-likelihoods within 1e-3 nats and equally greedy).
Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table

from glmctl.data.chat import ChatTemplate
from glmctl.data.sources import documents
from glmctl.data.tokenizer import Tokenizer
from glmctl.evaluation.harness import Settings, run_tasks
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.tasks import TaskInputs
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import BundledText, Needle, Sampling
from glmctl.run.directory import resolve_model

TASKS = (
    *("glmctl_cloze", "glmctl_perplexity", "glmctl_perplexity_zh", "glmctl_needle"),
    *("glmctl_arithmetic", "glmctl_tool_use", "glmctl_instructions", "glmctl_think", "glmctl_nothink"),
)
HEAD = (
    "| task | same table | same answers | glmctl, s | hf, s (batch) | ratio (range) | CPU ratio |\n"
    "|---|---|---|---|---|---|---|"
)
CLOSE = 1e-3
"""nats: sums over tens of tokens of fp32 logits that two implementations round differently"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run directory or model folder; default: a random model of the tiny preset")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--hf-batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = resolve_model(args.model) if args.model else checkpoint(Path(temporary))
        ours = GlmctlLM(folder)
        theirs = {
            size: HFLM(str(folder), device="cpu", dtype=torch.float32, batch_size=size) for size in args.hf_batch_sizes
        }
        context = ours.model.config.max_position_embeddings
        inputs = TaskInputs(
            ChatTemplate.load(folder),
            Sampling(temperature=0.0, max_tokens=args.max_tokens),
            needle=Needle(samples=1),
            context=context,
        )
        print(HEAD)
        rows = []
        for task in args.tasks:
            rows.append(compare(task, ours, theirs, inputs, args.limit, args.rounds))
            print(line(rows[-1]), flush=True)
        parameters = sum(parameter.numel() for parameter in ours.model.parameters())
    whole = sum(row["hf_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
    print(f"| all, sum of medians | | | | | {whole:.1f} | |")
    machine = {"machine": platform.processor() or platform.machine(), "threads": args.threads}
    print(json.dumps({"parameters": parameters, "context": context, **machine, **vars(args), "rows": rows}))


def compare(
    task: str, ours: GlmctlLM, theirs: dict[int, HFLM], inputs: TaskInputs, limit: int, rounds: int
) -> dict[str, Any]:
    """Both models on one task, in turns; seconds and processor seconds of each, medians over the rounds."""
    mine: list[Timed] = []
    other: list[Timed] = []
    # not counted: warms both up, and finds the batch size
    Timed(ours, task, inputs, limit)
    tried = {size: Timed(lm, task, inputs, limit).wall for size, lm in theirs.items()}
    best = min(tried, key=lambda size: tried[size])
    for _ in range(rounds):
        mine.append(Timed(ours, task, inputs, limit))
        other.append(Timed(theirs[best], task, inputs, limit))
        print(f"{task}: {mine[-1].wall:.2f} s against {other[-1].wall:.2f} s", file=sys.stderr)
    same, of = agreement(mine[0].results["samples"][task], other[0].results["samples"][task])
    ratios = [b.wall / a.wall for a, b in zip(mine, other, strict=True)]
    return {
        "task": task,
        "table": printed(mine[0].results, task) == printed(other[0].results, task),
        "same": same,
        "answers": of,
        "seconds": statistics.median(one.wall for one in mine),
        "hf_seconds": statistics.median(one.wall for one in other),
        "hf_batch_size": best,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "cpu_ratio": statistics.median(b.cpu / a.cpu for a, b in zip(mine, other, strict=True)),
        "figures": figures(mine[0].results["results"][task]),
        "hf_figures": figures(other[0].results["results"][task]),
    }


class Timed:
    """One evaluation: lm-eval's results, seconds by the clock and of processor time."""

    def __init__(self, lm: LM, task: str, inputs: TaskInputs, limit: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.results = run_tasks(lm, [task], inputs, Settings(limit=limit, bootstrap_iters=100_000))
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


def printed(results: dict[str, Any], task: str) -> str:
    """lm-eval's table, without the digits of a large perplexity that fp32 does not have."""
    entry = dict(results["results"][task])
    key = "byte_perplexity,none"
    if entry.get(key, 0.0) > 100:
        entry[key] = float(f"{entry[key]:.5g}")
    return str(make_table({**results, "results": {task: entry}}))


def agreement(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[int, int]:
    """(answers that are the same, answers)."""
    pairs = [
        (a, b)
        for one, two in zip(mine, other, strict=True)
        for left, right in zip(one["resps"], two["resps"], strict=True)
        for a, b in zip(left, right, strict=True)
    ]
    return sum(alike(a, b) for a, b in pairs), len(pairs)


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, str):
        return bool(a == b)
    if isinstance(a, float):
        return abs(a - b) < CLOSE
    return abs(a[0] - b[0]) < CLOSE and a[1] == b[1]


def figures(entry: dict[str, Any]) -> dict[str, float]:
    return {key.partition(",")[0]: value for key, value in entry.items() if isinstance(value, float)}


def checkpoint(home: Path) -> Path:
    """A random model with a tokenizer of the bundled text, as a Hugging Face folder."""
    texts = [one.text for one in documents([BundledText(domain="text", text="jargon-file", max_bytes=500_000)], seed=0)]
    tokenizer = Tokenizer.train(texts, vocab_size=4096, digits=1)
    update = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_ids, "max_position_embeddings": 2048}
    # large enough that greedy choices are clear: with small weights all logits are nearly equal
    config = ModelConfig(**{**PRESETS["tiny"], "rope_theta": 1e6, "initializer_range": 0.1, **update})
    tokenizer.save(home / "tokenizer")
    save_model(GlmMoe(config, seed=0), home / "model", tokenizer_folder=home / "tokenizer")
    return home / "model"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['task']} | {'yes' if row['table'] else 'NO'} | {row['same']}/{row['answers']} "
        f"| {row['seconds']:.2f} | {row['hf_seconds']:.2f} ({row['hf_batch_size']}) "
        f"| {row['ratio']:.1f} ({row['ratio_low']:.1f} .. {row['ratio_high']:.1f}) | {row['cpu_ratio']:.1f} |"
    )


if __name__ == "__main__":
    main()
