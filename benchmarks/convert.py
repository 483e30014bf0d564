"""Conversion of a checkpoint that does not fit comfortably: peak memory, and speed beside a plain copy of the disk.

    python -m benchmarks.convert --gigabytes 20 --folder /tmp/convert-benchmark

A synthetic GLM-4.5-shaped folder (bf16, 5 GB shards, at least 5.8 GB) is written, copied with `cp` and a flush (the
yardstick), then converted by the real command in a process of its own, folder -> checkpoint -> folder. Pages of the
source are dropped from the cache before each measurement. Prints JSON; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from glmctl.convert.stored import Stored
from glmctl.convert.write import Folder, write_safetensors
from glmctl.model.config import ModelConfig
from glmctl.model.folder import plan_shards, write_config, write_index
from glmctl.model.weights import entries


def config_of(gigabytes: float) -> ModelConfig:
    """GLM-4.5-Air's widths with as many experts and layers as fit; the embedding at its real size."""
    fields = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 8,
    }
    layers = 2
    while True:
        config = ModelConfig.model_validate({**fields, "num_hidden_layers": layers})
        if 2 * config.parameter_counts().total > gigabytes * 1e9:
            return config
        layers += 1


def make(folder: Path, gigabytes: float) -> int:
    """Write the synthetic folder; returns its bytes."""
    config = config_of(gigabytes)
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tensor(name: str, shape: tuple[int, ...]) -> Stored:
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16

        def read(start: int, stop: int) -> torch.Tensor:
            n = (stop - start) * shape[-1]
            return noise[: n % len(noise) or len(noise)].repeat(-(-n // len(noise)))[:n].view(-1, shape[-1]).to(dtype)

        return Stored(shape, dtype, read)

    folder.mkdir(parents=True)
    listed = {e.disk: tensor(e.disk, e.shape) for e in entries(config) if not e.copy}
    sizes = {name: one.nbytes for name, one in listed.items()}
    shards = plan_shards(sizes, 5e9)
    target = Folder(folder)
    for name, names in shards.items():
        write_safetensors(target, name, {n: listed[n] for n in names})
    target.check()
    write_config(config, folder, torch.bfloat16)
    write_index(folder, shards, sizes)
    return sum(sizes.values())


def forget(folder: Path) -> None:
    """Drop the cached pages of a folder's files, so that they are read from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copied(source: Path, target: Path) -> float:
    """Seconds that `cp` takes until the disk has the copy, which is removed again."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def converted(source: Path, target: Path, to: str, run: Path) -> tuple[float, int]:
    """Seconds that the command takes until the disk has its result, and its peak resident memory in bytes."""
    forget(source)
    start = time.perf_counter()
    words = ["convert", str(source), str(target), "--to", to, "--run", str(run)]
    process = subprocess.Popen([sys.executable, "-m", "glmctl", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"glmctl {' '.join(words)}: exit code {process.returncode}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, required=True, help="made, and removed at the end")
    given = parser.parse_args()
    root: Path = given.folder
    root.mkdir(parents=True)
    try:
        size = make(root / "model", given.gigabytes)
        before = copied(root / "model", root / "copy")
        there = converted(root / "model", root / "checkpoint", "checkpoint", root / "run-there")
        after = copied(root / "model", root / "copy")
        shutil.rmtree(root / "model")
        back = converted(root / "checkpoint", root / "back", "hf", root / "run-back")
    finally:
        shutil.rmtree(root)
    copy = (before + after) / 2
    body: dict[str, object] = {"machine": platform.platform(), "cores": os.cpu_count(), "bytes": size}
    body["copy_MB_per_s"] = [round(size / seconds / 1e6) for seconds in (before, after)]
    for name, (seconds, peak) in (("folder_to_checkpoint", there), ("checkpoint_to_folder", back)):
        body[name] = {
            "seconds": round(seconds, 1),
            "MB_per_s": round(size / seconds / 1e6),
            "of_copy_speed": round(copy / seconds, 3),
            "peak_MB": round(peak / 1e6),
        }
    print(json.dumps(body, indent=2))


if __name__ == "__main__":
    main()
