"""Help costs nothing: no torch, no command module for the list of commands; and it says everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from glmctl.cli import TABLE

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "accelerate", "lm_eval", "fastapi", "openai", "numpy")

PROBE = """
import contextlib, io, json, sys
from glmctl.cli import main
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = main(json.loads(line))
    print(json.dumps({"code": code, "text": text.getvalue(), "modules": sorted(sys.modules)}))
"""


def probe(*commands: list[str]) -> list[dict]:
    """Each command line in turn, in one process: exit code, output, and the modules that are loaded after it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input="\n".join(map(json.dumps, commands)),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help_of_everything_imports_nothing_heavy() -> None:
    commands = [
        [],
        *([name] for name in TABLE),
        *(["data", name] for name in ("prepare", "tokenizer", "problems")),
        *(["recipe", name] for name in ("list", "show", "check", "schema")),
    ]
    for words, seen in zip(commands, probe(*([*words, "--help"] for words in commands)), strict=True):
        assert seen["code"] == 0
        assert seen["text"].startswith(f"Usage: {' '.join(['glmctl', *words])}")
        loaded = [name for name in HEAVY if name in seen["modules"]]
        assert not loaded, f"{words} --help imported {loaded}"
        # pydantic alone would double the time
        assert "pydantic" not in seen["modules"], words
        if words:
            assert "--json" in seen["text"], words


def test_list_of_commands_imports_no_command() -> None:
    [seen] = probe(["--help"])
    assert not [name for name in seen["modules"] if name.startswith("glmctl.commands.")]
    for name in TABLE:
        assert f"\n  {name} " in seen["text"]


def test_each_command_in_the_table_has_its_module_and_no_other_exists() -> None:
    modules = {path.stem for path in (ROOT / "glmctl" / "commands").glob("*.py") if not path.stem.startswith("_")}
    assert modules == set(TABLE)


def test_dry_run_and_plan_of_the_largest_recipe_need_no_torch() -> None:
    for words in (["pretrain", "glm-4.5", "--dry-run"], ["plan", "glm-4.5/pretrain", "--devices", "512"]):
        [seen] = probe(words)
        assert seen["code"] == 0
        assert "torch" not in seen["modules"]
        assert "numpy" not in seen["modules"]


def test_help_without_arguments_and_short(cli) -> None:
    bare, short = cli(), cli("-h")
    assert bare.returncode == short.returncode == 0
    assert bare.stdout == short.stdout
    assert cli("sft", "-h").stdout.startswith("Usage: glmctl sft")


def test_version(cli) -> None:
    from glmctl import __version__

    assert cli("--version").stdout == f"glmctl {__version__}\n"
    assert json.loads(cli("--version", "--json").stdout) == {"version": __version__}


def test_completion_offers_commands_and_recipe_names(cli) -> None:
    commands = cli(_GLMCTL_COMPLETE="complete_bash", COMP_WORDS="glmctl pre", COMP_CWORD="1")
    assert commands.stdout.split() == ["pretrain"]
    recipes = cli(_GLMCTL_COMPLETE="complete_bash", COMP_WORDS="glmctl pretrain glm-4.5", COMP_CWORD="2")
    assert recipes.stdout.split() == ["glm-4.5-air/pretrain", "glm-4.5/data-general", "glm-4.5/pretrain"]
    assert "_GLMCTL_COMPLETE" in cli("--show-completion", SHELL="/bin/bash").stdout
