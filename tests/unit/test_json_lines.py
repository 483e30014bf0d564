"""JSON lines end at line feeds only: characters that Unicode calls line ends stand in JSON's strings as they are."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from glmctl.distill.agentic.tasks import read_tasks
from glmctl.errors import DataError
from glmctl.recipe.schema import CustomTask, ScienceTask
from glmctl.rl.tasks import generate

ENDS = {"U+0085": "\x85", "U+2028": "\u2028", "U+2029": "\u2029"}


def custom(path: Path, count: int) -> list[str]:
    return [one.prompt for one in generate(CustomTask(paths=[str(path)], verifier="a:b"), count, random.Random(0))]


def science(path: Path, count: int) -> list[str]:
    spec = ScienceTask(paths=[str(path)], filter="mixed")
    return [one.prompt.removesuffix("\n") for one in generate(spec, count, random.Random(0))]


def agentic(path: Path, count: int) -> list[str]:
    return [one.prompt for one in read_tasks([str(path)])]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("read", [custom, science, agentic])
def test_a_row_with_an_unusual_line_end_in_a_string_is_one_row(
    read: Callable[[Path, int], list[str]], end: str, tmp_path: Path
) -> None:
    """And the lines after it keep their numbers."""
    texts = [f"one{end}two", "three"]
    rows = [{"prompt": text, "question": text, "answer": "x"} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = read(path, 2)
    assert len(found) == 2
    assert all(any(text in one for one in found) for text in texts)
    with path.open("a", encoding="utf-8") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: "):
        read(path, 2)
