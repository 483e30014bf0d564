"""A full disk while data is prepared: an error with its number, never records that are silently not there."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmctl.data import encode, measure, spool, units
from glmctl.data.tokenizer import Tokenizer
from glmctl.recipe.schema import DataRecipe

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.fixture
def made(tmp_path: Path, tiny_tokenizer: Tokenizer) -> DataRecipe:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    rows = [{"text": f"Row {at} of a few that fit the buffer of a file."} for at in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "domain": "d", "paths": [str(tmp_path / "rows.jsonl")]}
    body = {"name": "d", "tokenizer": str(tmp_path / "tokenizer"), "sources": [source], "stages": [{"type": "minhash"}]}
    return DataRecipe.model_validate(body)


@pytest.mark.parametrize(
    "name",
    [
        *(f"scan/{name}" for name in (spool.DOCUMENTS, spool.TABLE)),
        *(f"measure/{name}-0.bin" for name in ("bands", "signatures")),
        *(f"encode/{name}-train.bin" for name in ("tokens", "lengths", "domains")),
        f"encode/{encode.PLACES}",
    ],
)
def test_a_full_disk_is_never_silent(made: DataRecipe, tmp_path: Path, name: str) -> None:
    (unit,) = units.plan(made.sources)
    gauge = measure.Gauge(0, made.stages[0])  # type: ignore[arg-type]  # one of its kinds
    passes: dict[str, Callable[[Path], Any]] = {
        "scan": lambda out: spool.scan(out, unit, made.sources[0], [], 0.0),
        "measure": lambda out: measure.measure(out, tmp_path / "scan", [gauge]),
        "encode": lambda out: encode.encode(out, tmp_path / "scan", np.ones(20), made.sources[0], made, made.tokenizer),
    }
    for kind, work in passes.items():
        (tmp_path / kind).mkdir()
        if name.startswith(f"{kind}/"):
            (tmp_path / name).symlink_to(FULL)
            with pytest.raises(OSError, match="No space left") as caught:
                work(tmp_path / kind)
            assert caught.value.errno == errno.ENOSPC  # which makes it exit code 4
            return
        work(tmp_path / kind)
