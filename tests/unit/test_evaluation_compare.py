"""Laws: documents are paired by what was asked; folders that cannot be compared are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmctl.errors import DataError, RecipeError
from glmctl.evaluation.compare import compare


def write(folder: Path, task: str, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def episode(prompt: str, reward: float | None) -> dict[str, object]:
    return {"prompt": prompt, "reward": reward, "reply": ""}


def test_documents_are_paired_by_prompt_whatever_their_order(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "sums", [episode("x", 1.0), episode("y", 0.0)])
    two = write(tmp_path / "b", "sums", [episode("y", 0.0), episode("x", 1.0)])
    result = compare(one, two)["sums"]
    assert (result.wins, result.ties, result.losses) == (0, 2, 0)


def test_samples_of_one_problem_are_averaged_and_failed_ones_left_out(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "sums", [episode("x", 1.0), episode("x", 0.0), episode("x", None)])
    two = write(tmp_path / "b", "sums", [episode("x", 1.0)])
    result = compare(one, two)["sums"]
    assert (result.first, result.second, result.documents) == (0.5, 1.0, 1)


def test_an_lm_eval_task_counts_by_its_main_metric(tmp_path: Path) -> None:
    row = {"doc_hash": "d", "metrics": ["acc_norm", "acc"], "acc": 1.0, "acc_norm": 0.0}
    one = write(tmp_path / "a", "cloze", [row])
    two = write(tmp_path / "b", "cloze", [{**row, "acc": 0.0}])
    assert compare(one, two)["cloze"].difference == -1.0


def test_other_documents_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "sums", [episode("x", 1.0)])
    two = write(tmp_path / "b", "sums", [episode("z", 1.0)])
    with pytest.raises(DataError, match="2 documents of 'sums'"):
        compare(one, two)


def test_no_common_task_is_refused_naming_both(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "sums", [episode("x", 1.0)])
    two = write(tmp_path / "b", "tools", [episode("x", 1.0)])
    with pytest.raises(RecipeError, match="sums against tools"):
        compare(one, two)


def test_a_run_folder_is_told_which_models_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "export" / "base", "sums", [episode("x", 1.0)])
    with pytest.raises(RecipeError) as caught:
        compare(tmp_path / "export", tmp_path / "export")
    assert "base" in (caught.value.hint or "")


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "sums", [episode("x", 1.0)])
    (one / "samples_sums.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=r"samples_sums.jsonl:1"):
        compare(one, one)
