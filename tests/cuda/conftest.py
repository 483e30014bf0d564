"""What the CUDA tests share: the device, batches, two trainings side by side, and a file for what is only observed.

`GLMCTL_CUDA_TESTS_ON=cpu` runs them on a CPU, which tries the tests and not the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.data.batches import IGNORE, Batch
from glmctl.model.config import ModelConfig

SECONDS = 150 if os.environ.get("GLMCTL_CUDA_TESTS_ON", "cuda") == "cuda" else 600
"""that a command may take"""
ON = os.environ.get("GLMCTL_CUDA_TESTS_ON", "cuda")


@pytest.fixture(autouse=True, scope="session")
def _needs_a_device() -> None:
    """Of the whole session, so that it comes before the runs that modules make."""
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(ON)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Widths that CUDA's bf16 kernels take (multiples of 8), and still no two alike."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=160,
        moe_intermediate_size=48,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=1024,
    )


def _packed(seed: int, rows: int = 4, length: int = 96, vocabulary: int = 512) -> Batch:
    """Rows of documents of many lengths, with padding at the end of some; half of the tokens follow from the last."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (rows, length), generator=generator)
    # something to be learnt: every second token is the one before it plus one
    tokens[:, 1::2] = (tokens[:, ::2] + 1) % vocabulary
    documents, positions = torch.full((rows, length), -1), torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        at = number = 0
        end = length - 7 * (row % 2)
        while at < end:
            size = min(int(torch.randint(1, 40, (), generator=generator)), end - at)
            documents[row, at : at + size] = number
            positions[row, at : at + size] = torch.arange(size)
            at, number = at + size, number + 1

    def ahead(by: int, missing: int) -> torch.Tensor:
        moved = torch.full_like(tokens, missing)
        same = (documents[:, by:] == documents[:, :-by]) & (documents[:, :-by] >= 0)
        moved[:, :-by] = torch.where(same, tokens[:, by:], missing)
        return moved

    return Batch(tokens, positions, documents, ahead(1, IGNORE), ahead(1, 0), ahead(2, IGNORE))


@pytest.fixture(scope="session")
def packed() -> Callable[..., Batch]:
    """`packed(seed, rows, length)`: a batch of packed documents."""
    return _packed


@pytest.fixture
def observe(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Write down what was seen and is not asserted, for a person: a line in $GLMCTL_OBSERVED, and on stdout."""

    def write(**seen: Any) -> None:
        line = json.dumps({"test": request.node.name, **seen})
        print(line)
        if path := os.environ.get("GLMCTL_OBSERVED"):
            with open(path, "a") as stream:
                stream.write(line + "\n")

    return write


def _environment(**changes: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "GLMCTL_CUDA"))}
    return {**clean, "PYTHONSAFEPATH": "1", "NO_COLOR": "1", **changes}


class Command:
    """`glmctl` as a person runs it: in a process of its own that finds the device by itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *words: str, launcher: tuple[str, ...] = (), **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*(launcher or (sys.executable, "-m")), "glmctl", *words],
            cwd=self.folder,
            env=_environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, launcher: tuple[str, ...] = (), **changes: str) -> str:
        """What it printed; it must end with 0."""
        began = time.perf_counter()
        process = self.start(*words, launcher=launcher, **changes)
        try:
            said, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{' '.join(words)}: over {SECONDS} s\n{process.communicate()[0][-4000:]}") from None
        assert process.returncode == 0, f"{' '.join(words)}: {process.returncode}\n{said[-4000:]}"
        print(f"{' '.join(words)}: {time.perf_counter() - began:.1f} s")
        return said


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """One folder for a module's runs."""
    return Command(tmp_path_factory.mktemp("runs"))


def _rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run's metrics.jsonl."""
    return _rows
