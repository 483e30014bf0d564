"""`glmctl eval` killed by the system in the middle of its work: the same command goes on, and nothing shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe

TASKS = "glmctl_cloze,glmctl_arithmetic"


def command(folder: Path, run: Path, cache: Path) -> list[str]:
    words = [sys.executable, "-m", "glmctl", "--quiet", "eval", str(folder), "-t", TASKS, "-L", "20"]
    settings = ["--set", "sampling.max_tokens=120", "--set", "batch_tokens=60", "--set", "max_slots=2"]
    return [*words, *settings, "--temperature", "1", "-o", str(run), "--use_cache", str(cache)]


def answers(cache: Path) -> list[Any]:
    files = list(cache.glob("*.jsonl")) if cache.is_dir() else []
    return [json.loads(line) for file in files for line in file.read_bytes().split(b"\n")[:-1]]


def outcome(run: Path) -> tuple[Any, dict[str, bytes]]:
    (export,) = (path for path in (run / "export").iterdir() if path.is_dir())
    samples = {path.name: path.read_bytes() for path in export.glob("samples_*")}
    return json.loads((export / "results.json").read_text())["results"], samples


@pytest.mark.slow
def test_a_killed_evaluation_ends_as_if_it_had_not_been(
    tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "model"
    tiny_tokenizer.save(tmp_path / "tokenizer")
    save_model(GlmMoe(tiny_config, seed=1), folder, tokenizer_folder=tmp_path / "tokenizer")
    subprocess.run(command(folder, tmp_path / "straight", tmp_path / "a"), check=True, capture_output=True)

    killed = subprocess.Popen(command(folder, tmp_path / "killed", tmp_path / "b"), stderr=subprocess.DEVNULL)
    whole = len(answers(tmp_path / "a"))
    # not a wait for time to pass: the process is killed when a share of its answers is on disk
    while len(answers(tmp_path / "b")) < whole // 3 and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it was still at work"
    before = len(answers(tmp_path / "b"))
    assert whole // 3 <= before < whole

    subprocess.run(command(folder, tmp_path / "killed", tmp_path / "b"), check=True, capture_output=True)
    keys = [key for key, _ in answers(tmp_path / "b")]
    assert len(keys) == len(set(keys)) == whole, "nothing was asked twice"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "straight")
