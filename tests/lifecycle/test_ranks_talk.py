"""Several processes talk like one: notices once, one object under --json, and every error seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from glmctl import cli, console
from glmctl.parallel import launch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, training_harness: ModuleType) -> Path:
    """The harness's data, and its recipe with one stage of four steps."""
    folder = tmp_path_factory.mktemp("talk")
    training_harness.prepare(folder)
    recipe = training_harness.pretrain_recipe(folder).model_dump(mode="json")
    recipe["stages"] = [{**recipe["stages"][0], "tokens": 9600, "export": False}]
    # more tokens than there are, which is said; fewer steps than would take long
    recipe |= {"batch": {"tokens": 2400}, "sample_prompts": []}
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def two(root: Path, run: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "glmctl", "pretrain", str(root / "pretrain.yaml"), "--run", str(root / run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--processes", "2", "--json", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=280,
    )


@pytest.mark.multiprocess
def test_a_notice_comes_once_and_the_result_is_one_object(root: Path) -> None:
    done = two(root, "good")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["summary"]["steps"] == 4
    lines = done.stderr.splitlines()
    assert sum("epochs of its data" in line for line in lines) == 1
    assert sum(": 4/4 steps" in line for line in lines) == 1


@pytest.mark.multiprocess
def test_an_error_of_all_ranks_is_one_object_and_each_says_who_it_is(root: Path) -> None:
    done = two(root, "lost", "--set", "stages.0.data=nowhere", "--set", "verify_data=false")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"]
    assert "nowhere" in error["message"]
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # the second may be ended before it comes to speak
    assert said
    assert {line.removeprefix("error: ").removeprefix("rank 1: ") for line in said} == {error["message"]}


@pytest.mark.multiprocess
def test_what_ranks_end_in_together_is_said_once(root: Path) -> None:
    words = ("--set", "schedule.peak_lr=1e30", "--set", "schedule.final_lr=1e29", "--set", "grad_clip=1e30")
    done = two(root, "diverged", "--set", "batch.tokens=240", *words)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["kind"], error["exit_code"]) == (5, "diverged", 5)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [f"error: {error['message']}"]


# ----------------------------------------------------------------------------- one process, as a rank


@pytest.fixture
def as_rank_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")


def test_a_rank_but_the_first_keeps_to_its_errors(as_rank_one: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "laptp", "--json"]) == 2
    console.note("a note")
    console.warn("a warning")
    with console.progress("x", 2) as bar:
        bar.advance(2)
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("error: rank 1: ")


def launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], errors: list[dict[str, Any]]) -> Any:
    """What the launcher of `errors`' ranks says and returns."""

    def launch_(processes: int, argv: object) -> tuple[int, str]:
        for number, body in enumerate(errors):
            console.configure(json=True, rank=number)
            assert not body or launch.tell(**body)
        console.configure(json=True)
        return 1, "rank 1 ended with exit code 1; the other ranks were stopped"

    monkeypatch.setattr(launch, "_launch", launch_)
    monkeypatch.setenv(launch.RANK_ERRORS, "taken back when the test ends")
    code = launch.relaunch(2, [])
    said = capsys.readouterr()
    return code, json.loads(said.out)["error"], said.err


def test_the_launcher_makes_the_object_of_the_first_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = {"kind": "data", "message": "x.bin: torn", "hint": "make it again", "exit_code": 3}
    late = {"kind": "internal", "message": "connection closed by peer", "hint": None, "exit_code": 1}
    assert launched(monkeypatch, capsys, [torn, late]) == (3, torn, "")
    assert launched(monkeypatch, capsys, [{}, torn]) == (3, torn, ""), "rank 0 had nothing to say"
    stopped = {"kind": "interrupted", "message": "saved after step 3", "hint": "again", "exit_code": 143}
    assert launched(monkeypatch, capsys, [stopped, stopped]) == (
        143,
        stopped,
        "error: saved after step 3\nhint: again\n",
    )
    code, error, said = launched(monkeypatch, capsys, [])
    assert (code, error["kind"], error["exit_code"]) == (1, "internal", 1)
    assert said == "warning: rank 1 ended with exit code 1; the other ranks were stopped\n"
