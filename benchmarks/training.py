"""Training speed beside transformers' Glm4Moe, in turn (A B A B) in one process on the same tokens.

    python benchmarks/training.py                      # both reference models, every variant
    python benchmarks/training.py --model tiny --variants glmctl hf-grouped --repeats 3

A step is forward, backward, clipping and fused AdamW, fp32, no MTP layer (transformers has none in training), weights
of the same shapes. Tokens per second are medians over the repeats; `ceiling` is the fastest fp32 matrix product
(1024^3) measured in the same run and `share` is the model's arithmetic (6 x active matrix elements + causal attention,
no recomputation, per token) over the time and the ceiling. `first` is the seconds of the first step, compilation
included. Peak memory is of a process of its own. `times_hf_default_cpu` compares processor time, for busy machines.
`glmctl-inductor` is a recipe with `compile: true`. The Muon line is ours with Muon in AdamW's place at 16,384 tokens.
Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glmctl.data.batches import pad_batch
from glmctl.kernels.fused.library import in_torch, library
from glmctl.kernels.registry import compiled_small
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.ceiling import flops_per_token, matmul_ceiling
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper

SHAPES = {"tiny": (8, 512), "small": (4, 1024)}
"""rows and tokens a row"""
VARIANTS = ["glmctl", "glmctl-torch", "glmctl-inductor", "hf-loop", "hf-grouped", "hf-compiled"]
MUON_TOKENS = 16_384

Step = Callable[[], float]


def config_of(name: str) -> ModelConfig:
    return ModelConfig(**{**PRESETS[name], "num_nextn_predict_layers": 0, "rope_theta": 1e6})


def our_step(
    name: str, *, plain: bool = False, inductor: bool = False, muon: bool = False, rows: int | None = None
) -> Step:
    config = config_of(name)
    count, length = SHAPES[name]
    tokens = torch.randint(3, config.vocab_size, (rows or count, length), generator=torch.Generator().manual_seed(0))
    batch = pad_batch([(row, [1] * length) for row in tokens.tolist()], pad_id=0)
    model = GlmMoe(config, seed=0)
    spec = MuonSpec() if muon else AdamWSpec()
    stepper = Stepper(model, build_optimizer(model, spec), make_accelerator(), grad_clip=1.0)
    micro = batch.split(count)

    def step() -> float:
        with compiled_small(inductor, model.device), in_torch() if plain else nullcontext():
            return stepper.lm_step(micro, lr=1e-4).loss

    return step


def peer_step(name: str, experts: str, *, compiled: bool) -> Step:
    import transformers

    transformers.logging.set_verbosity_error()
    config = config_of(name)
    rows, length = SHAPES[name]
    ids = torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    body = {**config.to_hf(), "use_cache": False, "pad_token_id": 0}
    hf = transformers.Glm4MoeConfig(**{k: v for k, v in body.items() if k not in ("architectures", "model_type")})
    model = transformers.Glm4MoeForCausalLM._from_config(
        hf, attn_implementation="sdpa", experts_implementation=experts
    ).float()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if compiled else model

    def step() -> float:
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def make(name: str, variant: str) -> Step:
    if variant.startswith("glmctl"):
        return our_step(name, plain=variant == "glmctl-torch", inductor=variant == "glmctl-inductor")
    return peer_step(name, "eager" if variant == "hf-loop" else "grouped_mm", compiled=variant == "hf-compiled")


class Cost(NamedTuple):
    """Seconds of one step: by the clock, and of processor time, which other work on the machine disturbs less."""

    wall: float
    cpu: float


def timed(step: Step) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def peak_mebibytes(name: str, variant: str) -> int:
    """Peak resident memory of a fresh process that makes three steps."""
    command = [sys.executable, __file__, "--model", name, "--memory-of", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(name: str, variants: list[str], repeats: int, *, memory: bool) -> dict[str, Any]:
    steps: dict[str, Step] = {}
    found: dict[str, dict[str, Any]] = {}
    for variant in variants:
        step = make(name, variant)
        found[variant] = {"first_s": round(timed(step).wall, 2)}
        step()
        steps[variant] = step
    costs: dict[str, list[Cost]] = {variant: [] for variant in variants}
    for _ in range(repeats):
        for variant, step in steps.items():
            costs[variant].append(timed(step))
    ceiling = matmul_ceiling()
    rows, length = SHAPES[name]
    per_token = flops_per_token(config_of(name), length, mtp=False)
    for variant, own in costs.items():
        times = [cost.wall for cost in own]
        median = statistics.median(times)
        found[variant] |= {
            "tokens_per_s": round(rows * length / median),
            "spread": round((max(times) - min(times)) / median, 3),
            "share_of_ceiling": round(per_token * rows * length / median / ceiling, 3),
        }
        if "hf-grouped" in costs:
            pairs = list(zip(costs["hf-grouped"], own, strict=True))
            found[variant]["times_hf_default"] = round(statistics.median(a.wall / b.wall for a, b in pairs), 3)
            found[variant]["times_hf_default_cpu"] = round(statistics.median(a.cpu / b.cpu for a, b in pairs), 3)
        if memory:
            found[variant]["peak_mib"] = peak_mebibytes(name, variant)
    return {"ceiling_gflops": round(ceiling / 1e9, 1), "mflop_per_token": round(per_token / 1e6, 2), "variants": found}


def muon(name: str, repeats: int) -> dict[str, Any]:
    """What a Muon step costs, and its share of a whole step of 16,384 tokens."""
    rows = MUON_TOKENS // SHAPES[name][1]
    with_muon, with_adam = (our_step(name, muon=m, rows=rows) for m in (True, False))
    pairs = [(timed(with_muon), timed(with_adam)) for _ in range(repeats + 1)][1:]
    a, b = (statistics.median(cost.cpu for cost in column) for column in zip(*pairs, strict=True))
    return {"step_cpu_s": round(a, 3), "step_with_adamw_cpu_s": round(b, 3), "muon_share": round((a - b) / a, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted(SHAPES), default=["tiny", "small"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, help="rows a step, instead of the reference 8 (tiny) and 4 (small)")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-muon", action="store_true")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows is not None:
        SHAPES.update({name: (given.rows, length) for name, (_, length) in SHAPES.items()})
    if given.memory_of:
        step = make(given.model[0], given.memory_of)
        for _ in range(3):
            step()
        # not getrusage: its maximum is inherited from the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024)
        return
    report: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "compiled_kernels": library() is not None,
        "models": {},
    }
    for name in given.model:
        body = measure(name, given.variants, given.repeats, memory=not given.no_memory)
        if not given.no_muon:
            body["muon"] = muon(name, max(1, given.repeats // 2))
        report["models"][name] = body
        gc.collect()
        print(f"{name}: ceiling {body['ceiling_gflops']} GFLOP/s, {body['mflop_per_token']} MFLOP a token")
        for variant, row in body["variants"].items():
            print(f"  {variant:<14}" + "  ".join(f"{key} {value}" for key, value in row.items()))
        if "muon" in body:
            print(f"  muon: {body['muon']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
