"""Every stage through the real command on CUDA: the whole smoke pipeline, and the variants that it leaves out."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# one worker makes the pipeline's run, and tests all of it
pytestmark = [pytest.mark.cuda, pytest.mark.xdist_group("stages")]

ON = os.environ.get("GLMCTL_CUDA_TESTS_ON", "cuda")


@pytest.fixture(scope="module")
def life(command: Any) -> Path:
    """`glmctl run smoke`: tokenizer, data, pretrain, sft, rl, distill, eval, convert, serve."""
    command("run", "smoke", "--run", str(command.folder / "smoke"))
    return command.folder / "smoke"


def test_the_whole_smoke_pipeline(life: Path, metrics: Callable[[Path], list[dict[str, Any]]]) -> None:
    for stage in ("pretrain", "sft", "rl", "distill", "eval", "convert", "serve"):
        state = json.loads((life / stage / "status.json").read_text())
        assert state["state"] == "finished", (stage, state)
    rows = metrics(life / "sft")
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    # the engine that rolls out and the trainer agree, or RL would be off-policy without knowing
    assert all(row["logprob_gap"] < 1e-4 for row in metrics(life / "rl") if "logprob_gap" in row)


def test_evaluation_was_on_the_device(life: Path) -> None:
    found = [path for path in (life / "eval").rglob("results.json") if '"device"' in path.read_text()]
    assert found
    assert all(f'"device": "{ON}' in path.read_text() for path in found)


def test_generate(life: Path, command: Any) -> None:
    said = command("--json", "generate", str(life / "sft"), "--prompt", "Compute 3+4.", "--max-tokens", "40")
    assert json.loads(said[said.index("{") :])["tokens"] > 0


def test_a_server_answers_until_it_is_stopped(life: Path, command: Any) -> None:
    process = command.start("serve", str(life / "sft"), "--set", "port=0")
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if "serving" in line and "http" in line:
            address = line.split(" on ")[1].split()[0]
            break
    try:
        assert address, "the server did not come up"
        body = {"model": "sft", "messages": [{"role": "user", "content": "Compute 3+4."}], "max_tokens": 24}
        for temperature in (0.0, 0.8):
            data = json.dumps({**body, "temperature": temperature}).encode()
            request = urllib.request.Request(f"{address}/chat/completions", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
        if ON == "cuda":
            assert on_the_gpu(process.pid), "the server holds no memory of the GPU"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def on_the_gpu(process: int) -> bool:
    """Whether it has the device's files open: `nvidia-smi` shows no processes inside a virtual machine."""
    links = Path(f"/proc/{process}/fd").iterdir()
    return any("nvidia" in os.readlink(link) for link in links)


VARIANTS = {
    "sft in bf16 with LoRA": ["sft", "smoke/sft", "precision=bf16", "lora={rank: 4}", "model={life}/pretrain"],
    "rl with FP8 rollouts and drafts": [
        "rl", "smoke/rl", "rollouts.precision=fp8-block", "rollouts.speculative=1", "objective.kl_weight=0.01",
        "model={life}/sft", "heldout=[{life}/math/export/heldout.jsonl]",
    ],
}  # fmt: skip
INPUTS = {
    "sft": ["data=[{life}/math/export/cold_start.jsonl]"],
    "rl": ["problems=[{life}/math/export/train.jsonl]"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name: str, life: Path, command: Any) -> None:
    stage, recipe, *changes = VARIANTS[name]
    settings = [word.replace("{life}", str(life)) for word in (*changes, *INPUTS[stage])]
    target = command.folder / name.replace(" ", "-")
    started = time.time()
    command(stage, recipe, *(part for one in settings for part in ("--set", one)), "--run", str(target))
    assert (target / "export" / "config.json").stat().st_mtime > started - 5


def test_an_fp8_folder_is_generated_from(life: Path, command: Any) -> None:
    target = command.folder / "fp8"
    command("convert", str(life / "sft"), str(target), "--dtype", "fp8-block", "--run", str(command.folder / "fp8-run"))
    said = command("--json", "generate", str(target), "--prompt", "Compute 3+4.", "--max-tokens", "16")
    assert json.loads(said[said.index("{") :])["tokens"] > 0
