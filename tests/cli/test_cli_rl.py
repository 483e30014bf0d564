"""`glmctl rl`: training is what it does unless a subcommand is named."""

from __future__ import annotations

import json

import pytest

from glmctl.cli import main


@pytest.mark.parametrize(
    "words", [["demo/rl-reasoning"], ["train", "demo/rl-reasoning"], ["--record", "demo/rl-reasoning"]]
)
def test_a_recipe_is_trained_without_a_subcommand(words: list[str], capsys) -> None:
    assert main(["rl", *words, "--dry-run", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["name"] == "demo-rl-reasoning"
    assert recipe["rollouts"]["record"] == ("--record" in words)


def test_modes_are_options(capsys) -> None:
    assert main(["rl", "demo/rl-reasoning", "--rollout-only", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["mode"] == "rollout_only"
    assert main(["rl", "demo/rl-reasoning", "--train-on", "runs/x", "--dry-run", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert (recipe["mode"], recipe["recorded"]) == ("train_only", "runs/x")
    assert main(["rl", "demo/rl-reasoning", "--unsafe-no-sandbox", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["sandbox"]["level"] == "unsafe-none"


def test_what_is_wrong_is_said_in_a_line(capsys) -> None:
    assert main(["rl", "demo/rl-reasonin"]) == 2
    assert "did you mean 'demo/rl-reasoning'?" in capsys.readouterr().err
    assert main(["rl", "demo/rl-reasoning", "--set", "rollouts.unfinishd=carry", "--dry-run"]) == 2
    assert "did you mean 'unfinished'?" in capsys.readouterr().err
    assert main(["rl", "demo/rl-reasoning", "--rollout-only", "--train-on", "runs/x", "--dry-run"]) == 2


def test_completion_offers_subcommands_and_recipes(cli) -> None:
    offered = cli(_GLMCTL_COMPLETE="complete_bash", COMP_WORDS="glmctl rl demo/rl", COMP_CWORD="2").stdout.split()
    assert offered == ["demo/rl-agent", "demo/rl-reasoning"]
    offered = cli(_GLMCTL_COMPLETE="complete_bash", COMP_WORDS="glmctl rl re", COMP_CWORD="2").stdout.split()
    assert offered == ["replay"]
