"""Decoding, prefill and time to first token of this engine, transformers and llama.cpp, side by side in one run.

    python benchmarks/serving.py --size small --rounds 3 --json serving.json

One random checkpoint and the same prompts for all; whoever is measured runs alone, one after the other, again in each
round (A B C A B C); the table has medians and (spread: highest less lowest, in percent of the median), and ratios as
medians over the rounds. Decoding is timed as a whole request of many tokens less one of a single token, so the prompt
does not count. A sample during which other processes took more than 6 % of a core is taken again, `--tries` times at
most, and the least disturbed one counts. The ceiling is what reading the active weights once a step allows at the
memory bandwidth measured in the same run. Where a machine is never quiet, `--processor-time --threads 1` counts the
seconds that the process computed, which time-sharing does not change (a shared memory bus still does).

Needs transformers for its column, and xllamacpp and gguf for llama.cpp's; what is missing is left out and said.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast, get_args

import torch

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.runners import runner_named
from glmctl.kernels.cpu.library import find_compiler
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.use import RunnerName

SIZES = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 4,
        "n_routed_experts": 16, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 8192,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_hidden_layers": 8,
        "n_routed_experts": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 16384,
    },
    "serve": {
        "hidden_size": 768, "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 12,
        "n_routed_experts": 64, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": 32768,
    },
}  # fmt: skip
"""the models of shared/design/performance.md, without an MTP layer"""

HF_EXPERTS = {"hf": "grouped_mm", "hf-eager": "eager"}
"""how transformers computes experts: its default, and the loop"""
THEIRS = ("transformers grouped_mm", "transformers eager")
RATIOS = {
    "fp32 / transformers": ("glmctl native", THEIRS),
    "fp32 / llama.cpp F32": ("glmctl native", ("llama.cpp float32",)),
    "int8 / llama.cpp Q8_0": ("glmctl native-int8", ("llama.cpp q8_0",)),
    "fp32 / best of all fp32": (
        "glmctl native",
        ("transformers grouped_mm", "transformers eager", "llama.cpp float32"),
    ),
}
"""name -> ours, and the peers of which each round's best counts"""
QUIET = 0.06
"""cores that others may take during a sample that counts"""
STREAMS = (1, 8, 32)
DECODE_PROMPT, PREFILL_PROMPT = 32, 512
Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Prompts]
"""(prompts, tokens to generate for each) -> the tokens; greedy, no early end"""

READER = """
#include <thread>
#include <vector>
extern "C" double read_all(const float* p, long count, int threads) {
  std::vector<double> sums(threads * 8);
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; t++)
    workers.emplace_back([=, &sums] {
      float lane[64] = {};
      long end = count * (t + 1) / threads;
      for (long i = count * t / threads; i + 64 <= end; i += 64)
        for (int j = 0; j < 64; j++) lane[j] += p[i + j];
      for (float x : lane) sums[t * 8] += x;
    });
  for (auto& worker : workers) worker.join();
  return sums[0];
}
"""


@dataclass
class Figures:
    """Samples of one engine, a value a round."""

    decode: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in STREAMS})
    """tokens/s of all streams together"""
    prefill: list[float] = field(default_factory=list)
    """prompt tokens/s, one prompt"""
    first_token: list[float] = field(default_factory=list)
    """seconds from request to first token of that prompt"""
    others: list[float] = field(default_factory=list)
    """cores that other processes kept busy during a sample that counted"""
    tries: int = 1
    clock: Callable[[], float] = time.perf_counter


def ours(model: GlmMoe, runner: RunnerName) -> Generate:
    engine = Engine(model, max_slots=max(STREAMS), max_length=PREFILL_PROMPT + 64, runner=runner_named(runner))
    count = iter(range(1 << 30))

    def generate(prompts: Prompts, new: int) -> Prompts:
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        made = engine.generate([Request(str(next(count)), prompt, params) for prompt in prompts])
        return [completion.tokens for completion in made]

    return generate


@lru_cache(maxsize=1)
def hugging_face_model(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hugging_face(folder: Path, experts: str) -> Generate:
    model = hugging_face_model(folder)

    def generate(prompts: Prompts, new: int) -> Prompts:
        model.set_experts_implementation(experts)
        tokens = torch.tensor(prompts)
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return made[:, tokens.shape[1] :].tolist()

    return generate


def llama_cpp(gguf: Path, threads: int) -> Generate:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel = max(STREAMS)
    params.n_ctx = max(STREAMS) * (PREFILL_PROMPT + 64)
    params.n_batch = params.n_ubatch = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.warmup = True
    params.verbosity = -1
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(max(STREAMS))

    def one(prompt: list[int], new: int) -> list[int]:
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
                "return_tokens": True, "n_predict": new}  # fmt: skip
        answer = server.handle_completions(body)
        if "choices" not in answer or answer["usage"]["completion_tokens"] != new:
            raise RuntimeError(f"llama.cpp answered {str(answer)[:300]}")
        return list(answer.get("tokens") or answer["choices"][0].get("tokens") or [])

    return lambda prompts, new: list(pool.map(one, prompts, [new] * len(prompts)))


def engines(folder: Path, wanted: list[str], threads: int) -> Iterator[tuple[str, Generate]]:
    """Those that can be had, by name; what cannot is said."""
    model = load_model(folder).requires_grad_(False)
    for name in wanted:
        if name in get_args(RunnerName):
            yield f"glmctl {name}", ours(model, cast(RunnerName, name))
        elif name in HF_EXPERTS:
            if importlib.util.find_spec("transformers") is None:
                print(f"left out: {name} (transformers is not installed)", file=sys.stderr)
                continue
            yield f"transformers {HF_EXPERTS[name]}", hugging_face(folder, HF_EXPERTS[name])
        else:
            missing = [package for package in ("xllamacpp", "gguf") if importlib.util.find_spec(package) is None]
            if missing:
                print(f"left out: {name} ({', '.join(missing)} not installed)", file=sys.stderr)
                continue
            dtype = {"llama-f32": "float32", "llama-q8": "q8_0"}[name]
            yield f"llama.cpp {dtype}", llama_cpp(to_gguf(folder, dtype), threads)


def to_gguf(folder: Path, dtype: str) -> Path:
    """The checkpoint as a GGUF file, by `glmctl convert`."""
    target = folder.parent / f"{folder.name}-{dtype}"
    if not target.exists():
        command = [sys.executable, "-m", "glmctl", "--quiet", "convert", str(folder), str(target), "--to", "gguf"]
        subprocess.run([*command, "--dtype", dtype, "--run", str(target) + "-run"], check=True)
    return next(target.glob("*.gguf"))


def busy() -> tuple[float, float]:
    """Core-seconds used on the machine so far, and by this process with its children."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = os.times()
    total = (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")
    return total, own.user + own.system + own.children_user + own.children_system


def timed(call: Callable[[], Any], figures: Figures) -> float:
    """Seconds of a call, the least disturbed of some tries."""
    samples: list[tuple[float, float]] = []
    while len(samples) < figures.tries and (not samples or min(samples)[0] > QUIET):
        before = busy()
        start, began = figures.clock(), time.perf_counter()
        call()
        seconds, passed = figures.clock() - start, time.perf_counter() - began
        after = busy()
        samples.append((max(0.0, after[0] - before[0] - (after[1] - before[1])) / passed, seconds))
    figures.others.append(min(samples)[0])
    return min(samples)[1]


def measure(generate: Generate, figures: Figures, vocab: int, seed: int, new: dict[int, int]) -> None:
    """One round of one engine. Prompts are fresh in each call, so that no cache can answer."""
    rng = random.Random(seed)

    def prompts(count: int, length: int) -> Prompts:
        return [[rng.randrange(100, vocab) for _ in range(length)] for _ in range(count)]

    seconds = timed(lambda: generate(prompts(1, PREFILL_PROMPT), 1), figures)
    figures.first_token.append(seconds)
    figures.prefill.append(PREFILL_PROMPT / seconds)
    for streams in STREAMS:
        one = timed(lambda: generate(prompts(streams, DECODE_PROMPT), 1), figures)  # noqa: B023
        many = timed(lambda: generate(prompts(streams, DECODE_PROMPT), 1 + new[streams]), figures)  # noqa: B023
        figures.decode[streams].append(streams * new[streams] / max(many - one, 1e-9))


def bandwidth(threads: int, clock: Callable[[], float], megabytes: int = 512) -> float:
    """Bytes/s that `threads` threads read from memory: the best of five passes over a large buffer."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "reader.cpp", Path(folder) / "reader.so"
        source.write_text(READER)
        flags = ["-O3", "-march=native", "-ffast-math", "-pthread", "-shared", "-fPIC", "-std=c++17"]
        subprocess.run([find_compiler(), *flags, str(source), "-o", str(target)], check=True)
        reader = ctypes.CDLL(str(target)).read_all
    reader.argtypes, reader.restype = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int], ctypes.c_double
    buffer = torch.ones(megabytes << 18)
    best = float("inf")
    for _ in range(5):
        start = clock()
        reader(buffer.data_ptr(), buffer.numel(), threads)
        best = min(best, clock() - start)
    return buffer.nbytes / best


def bytes_per_step(c: ModelConfig, streams: int, bytes_a_weight: float) -> float:
    """Weights that one step reads: each expert counts as often as some token of `streams` is expected to choose it."""
    counts = c.parameter_counts()
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    fixed = counts.active - c.num_moe_layers * c.num_experts_per_tok * expert + c.vocab_size * c.hidden_size
    distinct = c.n_routed_experts * (1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** streams)
    return (fixed + c.num_moe_layers * distinct * expert) * bytes_a_weight


def cell(samples: list[float], digits: int = 0) -> str:
    middle = statistics.median(samples)
    spread = 100 * (max(samples) - min(samples)) / middle if middle else 0.0
    return f"{middle:.{digits}f} ({spread:.0f}%)"


def ratios(figures: dict[str, Figures]) -> dict[str, list[float]]:
    """Ours over the best peer of each round, its median; for each count of streams, then for prefill."""
    found = {}
    for name, (own, wanted) in RATIOS.items():
        peers = [figures[peer] for peer in wanted if peer in figures]
        if own in figures and peers:
            columns = [(figures[own].decode[n], [peer.decode[n] for peer in peers]) for n in STREAMS]
            columns.append((figures[own].prefill, [peer.prefill for peer in peers]))
            found[name] = [
                statistics.median(x / max(others) for x, *others in zip(mine, *theirs, strict=True))
                for mine, theirs in columns
            ]
    return found


def report(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{result['size']}: {result['parameters'] / 1e6:.0f} M parameters, {result['rounds']} rounds, "
        f"{machine['clock']}, {machine['cpu']}, {machine['threads']} threads, {result['bandwidth'] / 1e9:.1f} GB/s; "
        f"others kept {machine['others_median']:.2f} cores busy (median), {machine['others_highest']:.2f} at most",
        "",
        "| | " + " | ".join(f"decode x{n}, tok/s" for n in STREAMS) + " | prefill, tok/s | first token, ms |",
        "|-" * (len(STREAMS) + 3) + "|",
    ]
    for name, f in result["figures"].items():
        cells = [cell(f["decode"][n]) for n in STREAMS]
        cells += [cell(f["prefill"]), cell([1e3 * x for x in f["first_token"]])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, ratios in result["ratios"].items():
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |")
    for bits, ceiling in result["ceiling"].items():
        lines.append(f"| ceiling, {bits} | " + " | ".join(f"{ceiling[n]:.0f}" for n in STREAMS) + " | | |")
    return "\n".join(lines)


def checkpoint(size: str, folder: Path) -> Path:
    """A random model with a tokenizer, as a Hugging Face folder; made once."""
    target = folder / size
    if not (target / "config.json").exists():
        config = ModelConfig(
            **SIZES[size], num_nextn_predict_layers=0, rope_theta=1e6, max_position_embeddings=4096, eos_token_id=(0,)
        )  # type: ignore[arg-type]
        tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")] * 2, vocab_size=512)
        save_model(GlmMoe(config, seed=0), target)
        tokenizer.save(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--engines", nargs="+",
        default=["torch", "native", "native-int8", "native-fp8", "hf", "hf-eager", "llama-f32", "llama-q8"],
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="seconds of this process, not of the clock")
    parser.add_argument("--tries", type=int, default=3, help="samples of a figure while others disturb them")
    parser.add_argument("--tokens", type=int, default=48, help="generated by a single stream; more streams, fewer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keeps the checkpoint; default: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    new = {streams: max(8, args.tokens // (1 + streams // 8)) for streams in STREAMS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(args.size, args.folder or Path(temporary))
        config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
        candidates = dict(engines(folder, args.engines, args.threads))
        figures = {name: Figures(tries=args.tries, clock=clock) for name in candidates}
        with torch.inference_mode():
            for name, generate in candidates.items():
                print(f"warming up {name}", file=sys.stderr)
                measure(generate, Figures(), config.vocab_size, 0, dict.fromkeys(STREAMS, 2))
            read = [bandwidth(args.threads, clock)]
            for turn in range(args.rounds):
                for name, generate in candidates.items():
                    measure(generate, figures[name], config.vocab_size, 1 + turn, new)
                read.append(bandwidth(args.threads, clock))
    others = [x for f in figures.values() for x in f.others]
    width = {"fp32": 4.0, "int8": 1.0625}
    result = {
        "size": args.size,
        "rounds": args.rounds,
        "parameters": config.parameter_counts().total,
        "bandwidth": max(read),
        "machine": {
            "cpu": next((x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
                         if x.startswith("model name")), platform.machine()),
            "threads": args.threads,
            "clock": clock.__name__,
            "others_median": statistics.median(others),
            "others_highest": max(others),
            "time": time.strftime("%F %T"),
        },
        "figures": {name: {**asdict(f), "clock": f.clock.__name__} for name, f in figures.items()},
        "ratios": ratios(figures),
        "ceiling": {
            bits: {n: n * max(read) / bytes_per_step(config, n, each) for n in STREAMS} for bits, each in width.items()
        },
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print(report(result))


if __name__ == "__main__":
    main()
