"""Bad input: one line that says what, where and the nearest choice; the documented exit code; never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glmctl import cli as face
from glmctl.errors import DataError, DivergedError, EnvironmentProblem

ROOT = Path(__file__).parents[2]


def one_line(stderr: str) -> str:
    """The message; holds that stderr is one `error:` line, and one `hint:` line at most."""
    lines = stderr.splitlines()
    assert lines
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), stderr
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pretrian", "unknown command 'glmctl pretrian'; did you mean 'pretrain'?"),
        ("data prepar x", "unknown command 'glmctl data prepar'; did you mean 'prepare'?"),
        ("pretrain laptop/pretrian", "unknown recipe 'laptop/pretrian'; did you mean 'laptop/pretrain'?"),
        ("run dmo", "unknown recipe 'dmo'; did you mean 'demo'?"),
        ("pretrain nowhere.yaml", "nowhere.yaml: no such recipe file"),
        ("pretrain laptop --set schedule.peak_lrr=1", "--set schedule.peak_lrr: unknown key; did you mean 'peak_lr'?"),
        ("pretrain laptop --set seed=abc", "--set seed: expected an integer, got 'abc'"),
        ("pretrain laptop --set seed", "--set seed: expected key=value, as in --set seed=1"),
        ("sft laptop/pretrain", "laptop/pretrain: is a 'pretrain' recipe, not 'sft'"),
        ("pretrain laptop --proceses 2", "unknown option '--proceses'; did you mean '--processes'?"),
        ("pretrain laptop --processes 0", "invalid value for '--processes': must be greater than or equal to 1"),
        ("pretrain", "missing argument 'RECIPE'"),
        ("data", "missing command"),
        ("recipe schema stf", "unknown recipe type 'stf'; did you mean 'sft'?"),
        ("serve nowhere", "nowhere: no such model folder, run or recipe"),
        ("eval nowhere -t x", "nowhere: no such model folder, run or recipe"),
        ("eval .", "nothing to evaluate '.' on; name tasks with -t or problem files with --problems"),
        ("serve . --port 99999", "--port: must be less than or equal to 65535, got 99999"),
        ("convert . out --to onnx", "--to: unknown value 'onnx'; one of: hf, checkpoint, gguf, megatron"),
        ("sft demo/sft-agent", "demo-sft-agent: only a pipeline fills in data.0, model"),
        ("run demo --set pretrain.sed=1 --dry-run", "demo/pretrain: set sed: unknown key; did you mean 'seed'?"),
        ("generate nowhere --prompt x", "nowhere: no such model; give a model folder or a run directory"),
    ],
)
def test_usage_errors_are_one_line_with_the_nearest_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert face.main(words.split()) == 2
    said = capsys.readouterr()
    assert one_line(said.err) == expected
    assert said.out == ""
    assert list(tmp_path.iterdir()) == [], "a mistyped command leaves nothing behind"


def test_wrong_type_names_the_command_that_is_meant(cli) -> None:
    done = cli("sft", "smoke/problems-math")
    assert done.stderr.splitlines()[1] == "hint: run it with `glmctl data problems smoke/problems-math`"


def test_recipe_file_errors_name_file_and_line(cli, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# mine\nextends: laptop/pretrain\nschedule:\n  peak_lrr: 1e-3\n")
    done = cli("pretrain", "mine.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr) == "mine.yaml:4: schedule.peak_lrr: unknown key; did you mean 'peak_lr'?"
    (tmp_path / "torn.yaml").write_text("type: sft\nname: [a\n")
    done = cli("sft", "torn.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr).startswith("torn.yaml:3: not valid YAML: ")


def test_check_reports_every_faulty_file(cli, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: laptop/pretrain\nsed: 1\n")
    (tmp_path / "b.yaml").write_text("extends: laptop/pretrain\nseed: x\n")
    done = cli("recipe", "check", "a.yaml", "demo", "b.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: a.yaml:2: sed: unknown key; did you mean 'seed'?",
        "error: b.yaml:2: seed: expected an integer, got 'x'",
    ]


def test_json_gives_the_error_as_one_object_too(cli) -> None:
    for words in (["--json", "pretrain", "laptp"], ["pretrain", "laptp", "--json"]):
        done = cli(*words)
        body = json.loads(done.stdout)
        assert done.returncode == 2
        assert body["error"]["kind"] == "recipe"
        assert body["error"]["exit_code"] == 2
        assert "did you mean 'laptop/" in body["error"]["message"]
        assert done.stderr.startswith("error: ")


def test_debug_shows_the_traceback_and_only_debug(cli) -> None:
    for done in (cli("pretrain", "laptp", "--debug"), cli("pretrain", "laptp", GLMCTL_DEBUG="1")):
        assert done.returncode == 2
        assert "Traceback" in done.stderr
    assert "Traceback" not in cli("pretrain", "laptp", GLMCTL_DEBUG="0").stderr


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (DataError("x.bin: torn", hint="make it again"), 3, "error: x.bin: torn\nhint: make it again\n"),
        (EnvironmentProblem("port 80: taken"), 4, "error: port 80: taken\n"),
        (DivergedError("loss is\nnot finite"), 5, "error: loss is not finite\n"),
        (OSError(28, "No space left on device", "runs/x"), 4, "error: runs/x: No space left on device\n"),
        (MemoryError(), 4, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (
            ZeroDivisionError("a bug"),
            1,
            "error: internal error: ZeroDivisionError: a bug (run with --debug for the traceback)\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_kind_of_failure_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, line: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("glmctl.commands._stage.run_stage", fail)
    monkeypatch.delenv("GLMCTL_DEBUG", raising=False)
    assert face.main(["sft", "anything"]) == code
    assert capsys.readouterr().err == line


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "glmctl", "recipe", "list"],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_an_environment_problem(flags: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "glmctl", "recipe", "list", *flags],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            check=False,
        )
    assert done.returncode == 4
    assert done.stderr == "error: No space left on device\n"


def test_the_checkouts_doors_never_shadow_packages() -> None:
    """`python -m glmctl` from the checkout, without PYTHONSAFEPATH: `kernels` must not be the door of that name."""
    program = "import runpy, sys; sys.argv = ['glmctl', '--version']; "
    program += "sys.path.insert(0, ''); "
    program += 'exec(\'try:\\n runpy.run_module("glmctl", run_name="__main__")\\nexcept SystemExit: pass\'); '
    program += "import importlib.util as u; found = u.find_spec('kernels'); "
    program += f"assert found is None or {str(ROOT)!r} not in str(found.origin), found"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
