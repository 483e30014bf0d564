"""`glmctl plan`'s memory beside what processes really take: short training runs, 1, 2 and 4 processes.

    python -m benchmarks.plan --folder /tmp/plan-benchmark

For every case a run of the real command is started, and the high-water mark of each process's resident memory is read
from /proc until it ends. What interpreter and libraries take is measured by the same command on a model of nearly
nothing and passed to the plan as `runtime` (recomputation imports torch.utils.checkpoint, so it has its own); the error
of what remains for the plan to predict is shown too. With --returning, glibc is told to give freed blocks back
(MALLOC_MMAP_THRESHOLD_), which shows what the tensors alone take: by default it keeps blocks below 32 MB, and where
small and large ones alternate, much of what it keeps is holes. Prints a table and, with --json, one object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from glmctl.data.shards import ShardWriter
from glmctl.data.tokenizer import Tokenizer
from glmctl.recipe.load import load
from glmctl.run.plan.memory import Moment
from glmctl.run.plan.training import plan_process

GLM: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
}
NOTHING: dict[str, Any] = {
    **GLM,
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 1,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}
BARE = {"attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 1.0}
MLA = {
    **BARE,
    "attention": "mla",
    "num_key_value_heads": 6,
    "head_dim": 48,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
MFA = {**BARE, "attention": "mfa", "num_key_value_heads": 1, "q_lora_rank": 96, "scoring_func": "softmax"}
VOCABULARY = {"vocab_size": 65536, "hidden_size": 256}
DEEP = {"num_hidden_layers": 24, "hidden_size": 64, "n_routed_experts": 8, "moe_intermediate_size": 64}
EXPERTS = {"n_routed_experts": 128, "num_hidden_layers": 7, "hidden_size": 256, "moe_intermediate_size": 128}
FEW = {"batch.tokens": 512}

CASES: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    # name, processes, changes of the model, changes of the recipe
    ("activations", 1, {}, {}),
    ("recomputed", 1, {}, {"recompute": True}),
    ("micro-batches", 1, {}, {"batch.micro_tokens": 2048}),
    ("no mtp, long rows", 1, {"num_nextn_predict_layers": 0}, {"stages.0.sequence_length": 2048}),
    ("deep", 1, DEEP, {}),
    ("experts, muon", 1, EXPERTS, FEW),
    ("experts, adamw", 1, EXPERTS, {**FEW, "optimizer.type": "adamw"}),
    ("experts, saving each step", 1, EXPERTS, {**FEW, "optimizer.type": "adamw", "checkpoint.every_steps": 1}),
    ("vocabulary", 1, VOCABULARY, FEW),
    ("mla", 1, MLA, {"batch.tokens": 4096}),
    ("mfa", 1, MFA, {}),
    ("activations", 2, {}, {"batch.tokens": 16384}),
    ("experts, adamw", 2, EXPERTS, {"batch.tokens": 1024, "optimizer.type": "adamw"}),
    ("vocabulary", 2, VOCABULARY, {"batch.tokens": 1024}),
    ("activations", 4, {}, {"batch.tokens": 16384}),
    ("experts, adamw", 4, EXPERTS, {"batch.tokens": 2048, "optimizer.type": "adamw"}),
]
STEPS = 2


def prepare(root: Path) -> None:
    """A tokenizer and shards of random tokens."""
    root.mkdir(parents=True)
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n", "Compute 34+57. It is 91."] * 4, vocab_size=512)
    (root / "tokenizer").mkdir()
    tokenizer.save(root / "tokenizer")
    rng = np.random.default_rng(random.Random(0).randrange(1 << 30))
    for split, documents in (("train", 60), ("validation", 4)):
        with ShardWriter(
            root / "data" / split,
            vocab_size=tokenizer.vocab_size,
            tokenizer_hash=tokenizer.hash,
            end_of_document=tokenizer.pad_id,
            shard_tokens=1 << 20,
        ) as writer:
            for _ in range(documents):
                writer.add([*rng.integers(0, 200, 4000).tolist(), tokenizer.pad_id])


def recipe_file(root: Path, model: dict[str, Any], changes: dict[str, Any]) -> tuple[Path, list[str]]:
    """A pretraining recipe of a few steps, and the overrides that make the case of it."""
    tokens = int(changes.get("batch.tokens", 8192))
    body = {
        "type": "pretrain",
        "name": "case",
        "model": model,
        "tokenizer": str(root / "tokenizer"),
        "stages": [{"name": "a", "data": str(root / "data"), "tokens": STEPS * tokens, "sequence_length": 512}],
        "batch": {"tokens": tokens},
        "validation": {"every_steps": 100, "tokens": 2048},
        "checkpoint": {"every_steps": 100},
    }
    path = root / "case.yaml"
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return path, [f"{key}={value}" for key, value in changes.items()]


def measure(root: Path, recipe: Path, overrides: list[str], processes: int, returning: bool) -> int:
    """Bytes that the largest process of a run had resident at its highest."""
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = ["pretrain", str(recipe), "--run", str(run), "--quiet"]
    words += [word for one in overrides for word in ("--set", one)]
    words += ["--processes", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if returning:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    child = subprocess.Popen([sys.executable, "-m", "glmctl", *words], env=environment, stdout=subprocess.DEVNULL)
    highest: dict[int, int] = {}
    while child.poll() is None:
        for pid in [child.pid] if processes == 1 else ranks(child.pid):
            highest[pid] = max(highest.get(pid, 0), high_water(pid))
        time.sleep(0.05)
    if child.returncode:
        raise SystemExit(f"glmctl {' '.join(words)}: exit code {child.returncode}")
    return max(highest.values())


def ranks(parent: int) -> list[int]:
    """Training processes below the launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _parent(entry) == parent and b"LOCAL_RANK=" in _read(entry / "environ"):
            found.append(int(entry.name))
    return found


def high_water(pid: int) -> int:
    """VmHWM: not ru_maxrss, which a process inherits from whoever started it."""
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _parent(entry: Path) -> int:
    text = _read(entry / "stat")
    return int(text.rpartition(b")")[2].split()[1]) if text else 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def compared(name: str, processes: int, planned: Moment, seen: int) -> dict[str, Any]:
    """One row of the table, said at once."""
    runtime = planned.parts["runtime"]
    row: dict[str, Any] = {"case": name, "processes": processes, "runtime_MB": round(runtime / 1e6)}
    row |= {"planned_MB": round(planned.total / 1e6), "measured_MB": round(seen / 1e6), "at": planned.name}
    row |= {"error": round(planned.total / seen - 1, 3)}
    row["error_beyond_runtime"] = round((planned.total - runtime) / (seen - runtime) - 1, 3)
    print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 1")
    parser.add_argument("--returning", action="store_true", help="freed blocks go back to the system at once")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    root: Path = given.folder
    rows: list[dict[str, Any]] = []
    runtimes: dict[tuple[int, bool], float] = {}
    try:
        prepare(root)
        for number, (name, processes, model, changes) in enumerate(CASES, start=1):
            if given.only and number not in given.only:
                continue
            key = (processes, "recompute" in changes)
            if key not in runtimes:
                path, overrides = recipe_file(root, NOTHING, {"recompute": True} if key[1] else {})
                nothing = plan_process(load(str(path), overrides), processes, runtime=0.0)
                runtimes[key] = measure(root, path, overrides, processes, given.returning) - nothing.total
            path, overrides = recipe_file(root, {**GLM, **model}, changes)
            planned = plan_process(load(str(path), overrides), processes, runtime=runtimes[key])
            rows.append(compared(name, processes, planned, measure(root, path, overrides, processes, given.returning)))
    finally:
        shutil.rmtree(root)
    if given.json:
        print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "cases": rows}, indent=2))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
