"""Row S10 of the reliability plan: an engine that dies or hangs in mid-stream. Its clients are told, `/ready` flips,
and the process ends with an exit code that a supervisor restarts on.

`GLMCTL_SOAK_DEATHS=20` is the full form.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe

pytestmark = pytest.mark.slow

DEATHS = int(os.environ.get("GLMCTL_SOAK_DEATHS", "1"))

# `glmctl serve`, but for an engine that meets its fate in its n-th step
_CHILD = """
import sys, threading
from pathlib import Path
from glmctl.engine.engine import Engine
from glmctl.errors import GlmctlError
from glmctl.recipe.schema import ServeRecipe
from glmctl.run.directory import Run
from glmctl.serving import run as stage

folder, run, fate, fatal = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

class Doomed(Engine):
    def step(self):
        events = super().step()
        if self.stats.steps >= fatal:
            if fate == "raise":
                raise RuntimeError("told to fail")
            threading.Event().wait()
        return events

stage.Engine = Doomed
# only a hang may end by the clock: a busy machine can make any other step long
patience = 1.0 if fate == "hang" else 600.0
recipe = ServeRecipe(name="serve", model=folder, port=0, stall_seconds=patience, speculative=0)
with Run.open(recipe, Path(run)) as opened:
    try:
        stage.run(recipe, opened)
    except GlmctlError as error:
        print(error.message, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer.save(folder)
    save_model(GlmMoe(tiny_config, seed=0), folder)
    return folder


@contextmanager
def doomed(folder: Path, run: Path, fate: str, step: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process, and the port that it serves on."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), str(run), fate, str(step)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "http://127.0.0.1:" in line:
                yield process, int(line.split("127.0.0.1:")[1].split("/")[0])
                break
        else:
            raise AssertionError("the server ended before it listened")
    finally:
        process.kill()
        process.wait()


def begin(port: int, *, stream: bool) -> http.client.HTTPConnection:
    """Ask for more tokens than the engine will live to give."""
    body = {"model": "any", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": stream, "seed": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/v1/models")
    body["model"] = json.loads(connection.getresponse().read())["data"][0]["id"]
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


@pytest.mark.parametrize("fate", ["raise", "hang"])
@pytest.mark.parametrize("seed", range(DEATHS))
def test_clients_are_told_and_the_process_fails(folder: Path, tmp_path: Path, fate: str, seed: int) -> None:
    step = random.Random(seed).randint(1, 200)
    with doomed(folder, tmp_path / "run", fate, step) as (process, port):
        streams = [begin(port, stream=True) for _ in range(3)]
        whole = begin(port, stream=False)
        answers = [stream.getresponse() for stream in streams]
        told = [answer.read().decode().strip().split("\n\n")[-1] for answer in answers]
        assert {json.loads(last.removeprefix("data: "))["error"]["code"] for last in told} == {"engine_unavailable"}
        assert whole.getresponse().status == 503
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 4
        assert ("stall_seconds" if fate == "hang" else "internal error") in errors
        # a failure is a bug, and its traceback is wanted; a hang has none
        assert ("told to fail" in errors) == (fate == "raise")


@pytest.mark.parametrize("seed", range(DEATHS))
def test_a_killed_process_never_looks_finished(folder: Path, tmp_path: Path, seed: int) -> None:
    with doomed(folder, tmp_path / "run", "raise", 10_000) as (process, port):
        stream = begin(port, stream=True).getresponse()
        for _ in range(random.Random(seed).randint(1, 60)):
            stream.readline()
        process.send_signal(signal.SIGKILL)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            stream.read()
        assert process.wait() == -signal.SIGKILL
