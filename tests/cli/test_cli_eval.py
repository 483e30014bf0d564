"""`glmctl eval` as it is typed: what it lists, the recipe it makes, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmctl import cli as face
from glmctl.errors import EnvironmentProblem
from glmctl.evaluation.catalog import OWN_GROUPS, OWN_TASKS
from glmctl.evaluation.suites import SUITES, missing


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert face.main(["--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_list_names_tasks_groups_and_what_the_report_s_benchmarks_need(capsys: pytest.CaptureFixture[str]) -> None:
    body = said(capsys, "eval", "--list")
    assert {row["task"] for row in body["tasks"]} == set(OWN_TASKS)
    assert set(body["groups"]) == set(OWN_GROUPS)
    assert {row["suite"] for row in body["suites"]} == set(SUITES)
    assert all(row["needs"] for row in body["suites"])
    agentic = {row["name"]: row["glm_4_5"] for row in body["suites"] if row["suite"] == "glm45_agentic"}
    assert agentic["TAU-bench Retail"] == "79.7"


def test_options_are_those_of_lm_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model_args", f"pretrained={tmp_path}", "-t", "gsm8k,mmlu", "-f", "5", "-L", "0.5", "-b", "8"]
    words += ["--gen_kwargs", "temperature=0.5,do_sample=True", "--seed", "0,1234,7,9", "--apply-chat-template"]
    words += ["--system_instruction", "Be brief.", "--metadata", '{"a": 1}', "--no-fewshot_as_multiturn", "-s"]
    recipe = said(capsys, "eval", *words, "--dry-run")["recipe"]
    wanted = {
        "models": {tmp_path.name: str(tmp_path)},
        "tasks": ["gsm8k", "mmlu"],
        "num_fewshot": 5,
        "limit": 0.5,
        "max_slots": 8,
        "gen_kwargs": {"temperature": 0.5, "do_sample": True},
        "seed": 7,
        "fewshot_seed": 9,
        "apply_chat_template": True,
        "fewshot_as_multiturn": False,
        "system_instruction": "Be brief.",
        "metadata": {"a": 1},
    }
    assert {key: recipe[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--judge http://x", "a judgement needs --compare A B, --judge URL and --judge_model NAME"),
        ("--compare nowhere nowhere", "nowhere: no such folder"),
        (". -t glmctl_cloze --samples 2 --temperature 0", "would be the same answer again"),
        (". -t glmctl_cloze -L 2.5", "limit is a number of questions, or a share below 1"),
        (". -t glmctl_cloze --set needle.statement=x", "needle.statement has no {key}"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert face.main(["eval", *words.split()]) == 2
    assert expected in capsys.readouterr().err.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_suite_that_nothing_here_runs_says_what_it_needs() -> None:
    with pytest.raises(
        EnvironmentProblem, match="glm45_coding: lm-eval runs none of it; SWE-bench Verified: containers"
    ):
        missing(["glm45_coding"])
    assert any(line.startswith("SciCode: ") for line in missing(["glmctl_cloze", "glm45_reasoning"]))
    assert missing(["glmctl_cloze"]) == []


@pytest.mark.slow
def test_the_suites_tasks_are_lm_eval_s() -> None:
    """Every name is in its registry."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for part in (part for parts in SUITES.values() for part in parts if part.task is not None):
        assert part.task in manager.all_tasks, part.name
