"""The stage `serve`: it asks its own server, generates what the engine generates, and ends as its signals say."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmctl import console
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ServeRecipe, ToolUseTask
from glmctl.rl.tasks import tool_use
from glmctl.run.directory import Run
from glmctl.serving import run as serve_stage

SUM = "What is 2+3?"


@pytest.fixture
def folder(learnt: GlmMoe, learnt_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    learnt_tokenizer.save(tmp_path / "model")
    save_model(learnt, tmp_path / "model")
    return tmp_path / "model"


def test_stage_asks_its_own_server_and_reports(folder: Path, tmp_path: Path) -> None:
    console.configure(quiet=True)
    problem = tool_use.generate(ToolUseTask(), 1, random.Random(0))[0]
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem.to_row()) + "\n")
    recipe = ServeRecipe(
        name="serve", model=str(folder), port=0, ask=[SUM], ask_problems=[str(tmp_path / "problems.jsonl")]
    )
    with Run.open(recipe, tmp_path / "run") as run:
        summary = serve_stage.run(recipe, run)
        assert summary["reply"] == "It is 5."
        assert summary["reasoning"] == "2+3=5"
        assert summary["reply_nothink"] == "Five."
        assert summary["model"] == "model"
        assert 0 <= summary["mtp_acceptance"] <= 1
        rows = [json.loads(line) for line in run.samples.read_text().splitlines()]
        assert [(row["streamed"], row["thinking"]) for row in rows] == [(True, True), (False, False), (True, True)]
        assert rows[2]["prompt"] == problem.prompt
        assert summary["questions"] == 3
    json.dumps(summary)


_SERVE = """
import sys
from glmctl.errors import GlmctlError
from glmctl.recipe.schema import ServeRecipe, ToolUseTask
from glmctl.rl.tasks import tool_use
from glmctl.run.directory import Run
from glmctl.serving.run import run
recipe = ServeRecipe(name="serve", model=sys.argv[1], port=0)
with Run.open(recipe, __import__("pathlib").Path(sys.argv[2])) as opened:
    try:
        run(recipe, opened)
    except GlmctlError as error:
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_streams_finish_and_then_ends(folder: Path, tmp_path: Path, number: int, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(folder), str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while "http://" not in line:
            assert line, "the server ended before it listened"
            line = process.stderr.readline()
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = {"model": "model", "prompt": "xyz", "max_tokens": 200, "stream": True, "temperature": 2, "seed": 1}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        start = response.readline()
        process.send_signal(number)
        rest = response.read()
        assert start.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        connection.close()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_chat_on_the_terminal_thinks_answers_and_stops_thinking(folder: Path, tmp_path: Path) -> None:
    """The real command, with a conversation on its standard input."""
    said = subprocess.run(
        [sys.executable, "-m", "glmctl", "chat", str(folder), "--temperature", "0"],
        input=f"{SUM}\n/clear\n{SUM} /nothink\n/wat\n/quit\n",
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert "(thinking) 2+3=5\nIt is 5.\n" in said.stdout
    assert "Five.\n" in said.stdout.split("It is 5.\n")[1]
    assert "unknown command /wat" in said.stdout
    assert "Traceback" not in said.stderr
