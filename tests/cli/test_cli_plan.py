"""`glmctl plan`: every shipped training recipe, as text and JSON, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
DOCS = Path(__file__).parents[2] / "docs" / "plan.md"


def test_the_full_model_as_the_docs_show_it(cli: Cli) -> None:
    """Arithmetic alone, so it is the same everywhere."""
    words = ("plan", "glm-4.5/pretrain", "--devices", "2048", "--kind", "h100")
    shown = cli(*words)
    assert shown.returncode == 0, shown.stderr
    assert f"$ glmctl {' '.join(words)}\n{shown.stdout}" in DOCS.read_text(encoding="utf-8")
    body = json.loads(cli(*words, "--json", "--price", "2").stdout)
    assert body["price"] == 2 * body["device_hours"]
    assert [stage["fits"] for stage in body["stages"]] == [True] * 5
    first = body["stages"][0]["layouts"][0]
    assert first["memory"]["recomputed"]["total"] < first["memory"]["kept"]["total"]
    assert not body["this_version"]["fits"]


def test_serving(cli: Cli) -> None:
    shown = cli("plan", "smoke/serve", "--model", "glm-4.5", "--devices", "8", "--kind", "h200", "--weights", "fp8")
    assert shown.returncode == 0, shown.stderr
    for part in ("381 kB of keys and values a token", "tensor: weights 44.6 GB", "data-expert", "tokens/s"):
        assert part in shown.stdout


def test_this_machine_with_given_speed(cli: Cli) -> None:
    """Nothing is measured when everything is given, so the plan is the same everywhere."""
    words = ("--kind", "cpu", "--devices", "2", "--memory", "8", "--tflops", "0.2", "--bandwidth", "40", "--json")
    body = json.loads(cli("plan", "laptop/pretrain", *words).stdout)
    assert body["device"]["memory"] == 4e9
    assert [option["layout"]["data"] for option in body["stages"][0]["layouts"]] == [2]
    assert body["this_version"]["fits"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("glm-4.5/pretrain", "--kind", "h1000"), "did you mean 'h100'"),
        (("demo/math",), "has no plan"),
        (("smoke/sft",), "earlier stage's"),
        (("smoke/serve", "--model", "glm-4.5", "--weights", "fp9"), "did you mean 'fp8'"),
        (("glm-4.5/pretrain", "--devices", "0"), "0 given"),
    ],
)
def test_errors_are_one_line(cli: Cli, words: tuple[str, ...], message: str) -> None:
    failed = cli("plan", *words)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
