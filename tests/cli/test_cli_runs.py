"""A command from recipe to result: what it prints, what it leaves behind, how it goes on, and how it fails."""

from __future__ import annotations

import importlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from glmctl import cli as face
from glmctl.commands import _stage as stage
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, Interrupted
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.load import CLASSES
from glmctl.recipe.names import COMMANDS

PROBLEMS = [
    "data",
    "problems",
    "smoke/problems-math",
    "--set",
    "train=8",
    "--set",
    "heldout=4",
    "--set",
    "cold_start=2",
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GLMCTL_RUNS", "GLMCTL_DEBUG", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Run a command line; give exit code, stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = face.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def model_folder(tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    folder, words = tmp_path / "model", tmp_path / "words"
    tiny_tokenizer.save(words)
    config = tiny_config.model_copy(update={"eos_token_id": tuple(tiny_tokenizer.eos_ids)})
    folder.mkdir()
    save_model(GlmMoe(config, seed=0), folder, tokenizer_folder=words)
    assert ChatTemplate.load(folder)
    return folder


def status(path: str | Path) -> dict[str, Any]:
    return json.loads((Path(path) / "status.json").read_text())


def test_every_recipe_type_has_a_driver_and_a_command() -> None:
    assert set(stage.DRIVERS) == set(CLASSES) - {"pipeline", "study"}
    assert set(COMMANDS) == set(CLASSES)
    for kind, target in stage.DRIVERS.items():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), kind


def test_a_stage_runs_once_and_says_so(say) -> None:
    code, out, err = say(*PROBLEMS)
    assert code == 0, err
    assert "smoke-problems-math" in out
    assert "next: glmctl sft" in err
    assert status("runs/smoke-problems-math")["state"] == "finished"
    assert len(Path("runs/smoke-problems-math/export/train.jsonl").read_text().splitlines()) == 8
    before = Path("runs/smoke-problems-math/status.json").read_bytes()
    code, again, err = say(*PROBLEMS)
    assert (code, again) == (0, out)
    assert "finished already; --fresh runs it again" in err
    assert Path("runs/smoke-problems-math/status.json").read_bytes() == before


def test_another_recipe_does_not_overwrite_a_run(say) -> None:
    assert say(*PROBLEMS)[0] == 0
    code, out, err = say(*PROBLEMS, "--set", "train=9")
    assert (code, out) == (2, "")
    assert "train: 8 -> 9" in err.splitlines()[0]
    assert "--fresh" in err.splitlines()[1]
    assert say(*PROBLEMS, "--set", "train=9", "--fresh")[0] == 0
    assert Path("runs/smoke-problems-math.old-1/recipe.yaml").is_file()


def test_json_quiet_and_places(say, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = say("--json", "--quiet", *PROBLEMS, "--run", "elsewhere")
    assert (code, err) == (0, "")
    body = json.loads(out)
    assert (body["type"], body["run"]) == ("problems", "elsewhere")
    assert body["summary"]["train"] == 8
    assert Path("elsewhere/export").is_dir()
    monkeypatch.setenv("GLMCTL_RUNS", "other")
    assert say(*PROBLEMS, "-q")[2] == ""
    assert Path("other/smoke-problems-math").is_dir()
    assert not Path("runs").exists()


def test_dry_run_does_nothing_and_shows_everything(say) -> None:
    code, out, _ = say("pretrain", "glm-4.5", "--dry-run", "--set", "seed=7")
    assert code == 0
    assert "seed: 7" in out
    assert "355,233,991,936" in out
    assert "32,080,359,424" in out
    assert "23,100,000,000,000" in out
    assert "runs/glm-4.5-pretrain/export" in out
    code, out, _ = say("pretrain", "glm-4.5", "--dry-run", "--json")
    body = json.loads(out)
    assert body["derived"]["stages"]["long-agent"]["sequence_length"] == 131072
    assert body["recipe"]["optimizer"]["type"] == "muon"
    code, out, _ = say("run", "smoke", "--dry-run", "--set", "pretrain.seed=5", "--json")
    stages = json.loads(out)["stages"]
    assert stages["pretrain"]["recipe"]["seed"] == 5
    assert stages["sft"]["recipe"]["model"] == "runs/smoke/pretrain"
    assert stages["sft"]["recipe"]["seed"] == 0
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "code", "state"),
    [
        (Interrupted("saved at step 3", exit_code=143), 143, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (DataError("x.bin: torn"), 3, "failed"),
        (ZeroDivisionError("bug"), 1, "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_how_a_run_ended_is_recorded(say, monkeypatch, raised: BaseException, code: int, state: str) -> None:
    def fail(recipe: Any, run: Any) -> dict[str, Any]:
        raise raised

    monkeypatch.setattr(stage, "driver", lambda kind: fail)
    got, out, err = say(*PROBLEMS)
    assert (got, out) == (code, "")
    assert "Traceback" not in err
    assert status("runs/smoke-problems-math")["state"] == state
    # the lock is given back, and the same command takes the run up again
    monkeypatch.setattr(stage, "driver", lambda kind: lambda recipe, run: {"resumed": run.resumed})
    assert json.loads(say(*PROBLEMS, "--json")[1])["summary"] == {"resumed": True}


def test_a_stopped_server_is_not_done(say, monkeypatch, model_folder: Path) -> None:
    seen = []
    monkeypatch.setattr(stage, "driver", lambda kind: lambda recipe, run: seen.append(recipe.port) or {})
    assert say("serve", "model", "--port", "0")[0] == 0
    assert say("serve", "model", "--port", "0")[0] == 0
    assert seen == [0, 0]


def test_many_processes_start_the_same_command(say, monkeypatch) -> None:
    started = []
    monkeypatch.setattr("sys.argv", ["glmctl", "pretrain", "x.yaml", "--processes", "2", "--set", "seed=1"])
    monkeypatch.setattr("glmctl.parallel.launch.relaunch", lambda n, argv: started.append((n, argv)) or 5)
    Path("x.yaml").write_text("extends: laptop/pretrain")
    assert say("pretrain", "x.yaml", "--processes", "2", "--set", "seed=1")[0] == 5
    assert started == [(2, ["pretrain", "x.yaml", "--set", "seed=1"])]


def test_a_damaged_run_is_listed_as_such_and_hides_no_other(say) -> None:
    """And nothing is read that grows with the run: a bad row in the middle is for those who ask for the rows."""
    for name in ("sound", "torn-recipe", "empty-recipe", "torn-status", "torn-row", "bad-row"):
        assert say(*PROBLEMS, "--run", f"runs/{name}")[0] == 0
        Path(f"runs/{name}/metrics.jsonl").write_text('{"step": 1}\n' * 3 + '{"step": 4}\n{"step": 5, "lo')
    Path("runs/torn-recipe/recipe.yaml").write_text("type: [problems\nname: x")
    Path("runs/empty-recipe/recipe.yaml").write_text("")
    Path("runs/torn-status/status.json").write_text('{"state": "fini')
    Path("runs/torn-row/metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    Path("runs/bad-row/metrics.jsonl").write_text('{"st\n{"step": 4}\n')
    code, out, err = say("runs", "list", "--json")
    assert (code, err) == (0, "")
    runs = {Path(run["run"]).name: run for run in json.loads(out)["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {
        "sound": "finished",
        "bad-row": "finished",
        "torn-recipe": "damaged",
        "empty-recipe": "damaged",
        "torn-status": "damaged",
        "torn-row": "damaged",
    }
    assert (runs["sound"]["step"], runs["bad-row"]["step"]) == (4, 4)
    assert runs["sound"]["summary"]["train"] == 8
    for name, file in (("torn-recipe", "recipe.yaml"), ("torn-status", "status.json"), ("torn-row", "metrics.jsonl")):
        assert file in runs[name]["error"]
    code, out, _ = say("runs", "list")
    assert code == 0
    assert out.count("damaged") == 4
    code, out, err = say("runs", "show", "torn-recipe")
    assert (code, out) == (3, "")
    assert "recipe.yaml: not a recipe" in err


# ----------------------------------------------------------------------------- models


def test_generate_answers_on_stdout(say, model_folder: Path) -> None:
    code, out, err = say("generate", "model", "--prompt", "Compute 1+1.", "--max-tokens", "8", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert body["prompt_tokens"] > 5
    assert 1 <= body["tokens"] <= 8
    code, raw, _ = say("generate", "model", "--raw", "--prompt", "def ", "--max-tokens", "5", "--quiet")
    assert (code, raw) == (0, say("generate", "model", "--raw", "--prompt", "def ", "--max-tokens", "5")[1])
    sampled = ["generate", "model", "--raw", "-p", "def ", "--max-tokens", "12", "--temperature", "2"]
    one, two, other = (say(*sampled, "--seed", seed)[1] for seed in ("1", "1", "2"))
    assert one == two != other


def test_generate_refuses_what_cannot_be(say, model_folder: Path) -> None:
    assert "the prompt is empty" in say("generate", "model", "--prompt", "")[2]
    assert "takes neither" in say("generate", "model", "--prompt", "x", "--raw", "--nothink")[2]
    (model_folder / "model.safetensors").write_bytes(b"torn")
    code, out, err = say("generate", "model", "--prompt", "x")
    assert (code, out) == (3, "")
    assert "model.safetensors" in err
    assert err.count("\n") == 1


def test_convert_writes_the_folder_that_was_named(say, model_folder: Path) -> None:
    code, _, err = say("convert", "model", "copy", "--dtype", "bfloat16")
    assert code == 0, err
    config = json.loads(Path("copy/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert Path("copy/manifest.json").is_file()
    weights = Path("copy/model.safetensors").stat()
    assert stat.S_ISREG(weights.st_mode)
    assert 0 < weights.st_size < (model_folder / "model.safetensors").stat().st_size
    code, _, err = say("convert", "model", "copy")
    assert code == 2
    assert "copy: exists already" in err


def test_eval_lists_its_own_tasks(say) -> None:
    code, out, _ = say("eval", "--list", "--json")
    assert code == 0
    assert {"glmctl_cloze", "glmctl_arithmetic"} <= {task["task"] for task in json.loads(out)["tasks"]}


def test_eval_options_spell_as_lm_eval_and_fill_a_recipe(say, model_folder: Path) -> None:
    for names in (
        ["-t", "a,b", "-L", "5", "-f", "2"],
        ["--tasks", "a", "--tasks", "b", "--limit", "5", "--num-fewshot=2"],
    ):
        code, out, err = say("eval", "model", *names, "--output_path", "here", "--dry-run", "--json")
        assert code == 0, err
        body = json.loads(out)
        assert body["recipe"]["tasks"] == ["a", "b"]
        assert (body["recipe"]["limit"], body["recipe"]["num_fewshot"]) == (5, 2)
        assert body["recipe"]["models"] == {"model": "model"}
        assert body["derived"]["run"] == "here"
    recipe = json.loads(say("eval", "smoke", "-L", "3", "--nothink", "--dry-run", "--json")[1])["recipe"]
    assert (recipe["limit"], recipe["enable_thinking"]) == (3, False)


@pytest.mark.slow
def test_the_whole_life_and_then_nothing(cli, tmp_path: Path) -> None:
    done = cli("run", "smoke", "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert {stage["state"] for stage in first["stages"].values()} == {"finished"}
    assert first["stages"]["eval"]["summary"]["hybrid/mtp_identical"]
    again = cli("run", "smoke", "--json", "--quiet")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout) == first


def test_convert_verify_tells_same_from_other(say, model_folder: Path) -> None:
    assert say("convert", "model", "same")[0] == 0
    code, out, _ = say("--json", "convert", "verify", "model", "same")
    assert code == 0
    assert json.loads(out)["identical"] is True
    assert say("convert", "model", "half", "--dtype", "bfloat16")[0] == 0
    code, out, err = say("convert", "verify", "model", "half")
    assert code == 3
    assert "has dtype torch.bfloat16, expected torch.float32" in out
    assert "not the same model" in err
    code, _, err = say("convert", "verify", "model")
    assert code == 2
    assert "two models" in err
