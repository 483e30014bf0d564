"""Training and generation on one GPU beside transformers' Glm4Moe, one after the other in one process, in two minutes.

    python benchmarks/gpu.py                      # a model of 0.7 B parameters, rows of 2,048 tokens
    python benchmarks/gpu.py --model tiny --seconds 60

A training step is forward, backward, clipping and fused AdamW on the same number of tokens, without an MTP layer
(transformers has none in training). Ours, and `hf autocast`, keep fp32 weights and multiply in bf16; `hf bf16` keeps
the weights, their gradients and AdamW's moments in bf16, which is faster, smaller and rounds away small updates.
`loop` computes experts one by one, which autocast reaches and the grouped product does not.
Tokens a second are medians over the steps; `share` is the model's arithmetic (6 x active matrix elements + causal
attention, per token) over the time and the fastest bf16 product of 8192^3 measured in the same run; `peak` is what
torch held at most; `first` the seconds of the first step, compilation included; `busy` the share of a step in which
the GPU computed (by torch's profiler). Generation is greedy in bf16 weights from prompts of 128 tokens, as a whole
request of many tokens less one of a single token. Prints tables and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from glmctl.data.batches import Batch
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.torch_runner import TorchRunner
from glmctl.kernels import registry
from glmctl.kernels.registry import compiled_small
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.training.ceiling import flops_per_token, matmul_ceiling
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper

MODELS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 32, "vocab_size": 4096,
    },
    "0.7b": {
        "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 256, "num_hidden_layers": 12,
        "n_routed_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "vocab_size": 32768,
    },
}  # fmt: skip
PEERS = [
    ("hf bf16", "grouped_mm", False, 12),
    ("hf autocast", "grouped_mm", False, 15),
    ("hf autocast loop", "eager", False, 15),
    ("hf bf16 compiled", "grouped_mm", True, 60),
]
"""transformers' variants: name, how experts are computed, torch.compile, seconds that must be left to begin"""
PROMPT = 128
WARM = 2

Step = Callable[[], object]
Generate = Callable[[list[list[int]], int], object]


class Clock:
    """What is left of the time that the whole may take."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    def allows(self, what: str, seconds: float) -> bool:
        left = self.end - time.perf_counter()
        if left < seconds:
            print(f"left out: {what} ({left:.0f} s left)", file=sys.stderr)
        return left >= seconds


def config_of(name: str, length: int) -> ModelConfig:
    return ModelConfig(
        **MODELS[name],  # type: ignore[arg-type]
        num_nextn_predict_layers=0,
        routed_scaling_factor=2.5,
        rope_theta=1e6,
        max_position_embeddings=length,
    )


def batch_of(config: ModelConfig, rows: int, length: int) -> Batch:
    """Whole rows without padding, every place a target but the last."""
    tokens = torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    zeros, places = torch.zeros_like(tokens), torch.arange(length).expand(rows, length)
    targets = torch.cat([tokens[:, 1:], torch.full((rows, 1), -100)], 1)
    return Batch(tokens, places, zeros, targets, zeros, torch.full_like(tokens, -100))


def our_step(model: GlmMoe, batch: Batch, *, compiled: bool, muon: bool = False) -> Step:
    spec = MuonSpec() if muon else AdamWSpec()
    stepper = Stepper(model, build_optimizer(model, spec), make_accelerator("bf16"), grad_clip=1.0)

    def step() -> object:
        with compiled_small(compiled, model.device):
            return stepper.lm_step([batch], lr=1e-5, bias_update_rate=1e-3)

    return step


def peer(config: ModelConfig, device: torch.device, dtype: torch.dtype, experts: str = "grouped_mm") -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    body = {**config.to_hf(), "use_cache": False, "pad_token_id": 0}
    hf = transformers.Glm4MoeConfig(**{k: v for k, v in body.items() if k not in ("architectures", "model_type")})
    with device:
        return transformers.Glm4MoeForCausalLM._from_config(
            hf, attn_implementation="sdpa", experts_implementation=experts, dtype=dtype
        )


def peer_step(model: Any, batch: Batch, device: torch.device, *, autocast: bool, compiled: bool) -> Step:
    tokens = batch.tokens_BT.to(device)
    model.train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def measured(step: Step, device: torch.device, tokens: int, per_token: float, ceiling: float, repeats: int) -> dict:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = seconds_of(step, device)
    for _ in range(WARM):
        step()
    times = [seconds_of(step, device) for _ in range(repeats)]
    middle = statistics.median(times)
    return {
        "tokens_per_s": round(tokens / middle),
        "spread": round((max(times) - min(times)) / middle, 3),
        "share": round(per_token * tokens / middle / ceiling, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None,
        "first_s": round(first, 2),
        "step_ms": round(1e3 * middle, 1),
    }


def profile(step: Step, device: torch.device) -> dict[str, Any]:
    """Where the GPU's time of a step goes, by kernel, and how many kernels there are."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CUDA, ProfilerActivity.CPU] if device.type == "cuda" else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds[:1]) as found:
        seconds = seconds_of(step, device)
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    return {
        "step_ms": round(1e3 * seconds, 1),
        "busy": round(total / 1e6 / seconds, 3),
        "kernels": sum(row.count for row in rows if row.self_device_time_total > 0),
        "by_kernel": [
            {"name": row.key[:110], "ms": round(row.self_device_time_total / 1e3, 2), "count": row.count}
            for row in rows[:14]
        ],
    }


def train(config: ModelConfig, rows: int, length: int, device: torch.device, repeats: int, clock: Clock) -> dict:
    batch = batch_of(config, rows, length)
    ceiling = matmul_ceiling(device, torch.bfloat16)
    per_token = flops_per_token(config, length, mtp=False)
    result: dict[str, Any] = {"ceiling_tflops": round(ceiling / 1e12, 1), "variants": {}}

    def take(name: str, step: Step) -> None:
        result["variants"][name] = measured(step, device, rows * length, per_token, ceiling, repeats)
        print(f"  {name:<18}" + "  ".join(f"{k} {v}" for k, v in result["variants"][name].items()), flush=True)

    print(f"training, {rows} x {length} tokens a step; ceiling {result['ceiling_tflops']} TFLOP/s in bf16")
    model = GlmMoe(config, device=device, seed=0)
    step: Step | None = our_step(model, batch, compiled=False)
    assert step is not None
    take("glmctl", step)
    result["profile"] = profile(step, device)
    if clock.allows("glmctl compiled", 45):
        step = our_step(model, batch, compiled=True)
        take("glmctl compiled", step)
        result["profile_compiled"] = profile(step, device)
    if clock.allows("glmctl muon", 20):
        step = None
        take("glmctl muon", our_step(model, batch, compiled=False, muon=True))
    del model, step
    for name, experts, compiled, seconds in PEERS:
        autocast = "autocast" in name
        if clock.allows(name, seconds):
            theirs = peer(config, device, torch.float32 if autocast else torch.bfloat16, experts)
            try:
                take(name, peer_step(theirs, batch, device, autocast=autocast, compiled=compiled))
            except (torch.OutOfMemoryError, RuntimeError) as problem:
                result["variants"][name] = {"failed": str(problem).splitlines()[0]}
                print(f"  {name}: {result['variants'][name]}")
            del theirs
    return result


def experts_alone(config: ModelConfig, tokens: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of forward and backward of one layer's routed experts: what we choose on this device, our loop over
    experts, and torch's grouped products used plainly."""
    E, D, width, k = (
        config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, device=device, generator=generator) / shape[-1] ** 0.5
        return made.bfloat16().requires_grad_()

    x, up, down, weight = draw(tokens, D), draw(E, 2 * width, D), draw(E, D, width), draw(tokens, k)
    index = torch.rand(tokens, E, device=device, generator=generator).topk(k).indices

    def grouped(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, up: Any, down: Any) -> torch.Tensor:
        flat = index.flatten()
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=E).cumsum(0).int()
        product = F.grouped_mm
        gate, wide = product(x[order // k], up.mT, offs=ends).chunk(2, -1)
        hidden = F.silu(gate) * wide * weight.flatten()[order, None]
        out = product(hidden, down.mT, offs=ends)
        return torch.zeros_like(x).index_add(0, order // k, out)

    found = {}
    candidates = {
        "ours": registry.op("experts", device.type, torch.bfloat16),
        "loop": registry.variants("experts")["sorted"],
        "plain": grouped,
    }
    for name, function in candidates.items():

        def once(function: Callable[..., torch.Tensor] = function) -> None:
            made = function(x, index, weight, up, down)
            made.backward(made.detach())

        def forward(function: Callable[..., torch.Tensor] = function) -> None:
            with torch.no_grad():
                function(x, index, weight, up, down)

        for kind, call in (("forward_backward_ms", once), ("forward_ms", forward)):
            try:
                call()
                times = [seconds_of(call, device) for _ in range(7)]
                found[f"{name}_{kind}"] = round(1e3 * statistics.median(times), 3)
            except RuntimeError as problem:
                print(f"  experts, {name}: {str(problem).splitlines()[0]}", file=sys.stderr)
    return found


def ours_generates(model: GlmMoe, *, graphs: bool) -> Generate:
    engine = Engine(
        model,
        max_slots=max(STREAMS),
        max_length=PROMPT + 128,
        prefill_tokens=16384,
        runner=partial(TorchRunner, graphs=graphs),
    )
    count = iter(range(1 << 30))

    def generate(prompts: list[list[int]], new: int) -> object:
        params = SamplingParams(max_tokens=new, temperature=0.0)
        return engine.generate([Request(str(next(count)), prompt, params) for prompt in prompts])

    return generate


def theirs_generates(model: Any, device: torch.device) -> Generate:
    model.eval()

    def generate(prompts: list[list[int]], new: int) -> object:
        tokens = torch.tensor(prompts, device=device)
        return model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            use_cache=True, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    return generate


STREAMS = (1, 32, 128)


def generation(config: ModelConfig, device: torch.device, new: int, clock: Clock) -> dict[str, Any]:
    def engines() -> Iterator[tuple[str, Generate]]:
        for dtype in (torch.bfloat16, torch.float32):
            model = GlmMoe(config, device=device, seed=0).requires_grad_(False).to(dtype)
            for graphs in (True, False):
                yield f"glmctl {str(dtype)[6:]} {'graphs' if graphs else 'plain'}", ours_generates(model, graphs=graphs)
        yield "hf bfloat16", theirs_generates(peer(config, device, torch.bfloat16), device)

    drawn = torch.Generator().manual_seed(0)

    def prompts(streams: int) -> list[list[int]]:
        found: list[list[int]] = torch.randint(3, config.vocab_size, (streams, PROMPT), generator=drawn).tolist()
        return found

    def figures(generate: Generate, streams: int) -> dict[str, float]:
        # enough for a graph to be recorded
        generate(prompts(streams), 8)
        one = min(seconds_of(lambda: generate(prompts(streams), 1), device) for _ in range(2))
        many = seconds_of(lambda: generate(prompts(streams), 1 + new), device)
        return {
            "decode_tokens_per_s": round(streams * new / max(many - one, 1e-9), 1),
            "prefill_tokens_per_s": round(streams * PROMPT / one),
            "step_ms": round(1e3 * (many - one) / new, 2),
        }

    found: dict[str, Any] = {}
    print(f"generation, prompts of {PROMPT}, {new} new tokens each; tokens/s of decoding and of prefill")
    for name, generate in engines():
        found[name] = {}
        for streams in STREAMS:
            if clock.allows(f"{name} x{streams}", 12):
                row = found[name][streams] = figures(generate, streams)
                print(f"  {name:<23} x{streams:<4}" + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="0.7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each prompt")
    parser.add_argument("--seconds", type=float, default=140, help="what would begin too late is left out and said")
    parser.add_argument("--only", choices=["training", "experts", "generation"], nargs="+")
    given = parser.parse_args()
    device, clock = torch.device(given.device), Clock(given.seconds)
    config = config_of(given.model, max(given.length, PROMPT + 128))
    counts = config.parameter_counts()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        f"{name}, torch {torch.__version__}: {counts.total / 1e6:.0f} M parameters, {counts.active / 1e6:.0f} M active"
    )
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "model": given.model,
        "parameters": [counts.total, counts.active],
    }
    wanted = given.only or ["training", "experts", "generation"]
    if "experts" in wanted:
        report["experts"] = {n: experts_alone(config, n, device) for n in (given.rows * given.length, 128, 1)}
        for tokens, row in report["experts"].items():
            print(f"  experts of one layer, {tokens} tokens: " + "  ".join(f"{k} {v}" for k, v in row.items()))
    if "training" in wanted:
        # generation must still have its time
        mine = Clock(given.seconds - (45 if "generation" in wanted else 0))
        report["training"] = train(config, given.rows, given.length, device, given.repeats, mine)
        for key in ("profile", "profile_compiled"):
            found = report["training"].get(key)
            if found:
                print(f"  {key}: {found['step_ms']} ms, busy {found['busy']}, {found['kernels']} kernels")
                for row in found["by_kernel"]:
                    print(f"    {row['ms']:9.2f} ms  x{row['count']:<5} {row['name']}")
    if "generation" in wanted:
        report["generation"] = generation(config, device, given.new, clock)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
