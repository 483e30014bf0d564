"""The real command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("pretrain", "laptop", "--dry-run")` in an empty working directory, with stdout and stderr captured."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("GLMCTL_", "_GLMCTL"))}
        settings = {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "glmctl", *words],
            cwd=tmp_path,
            env={**clean, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return run
