"""lm-eval's spelling of options, read as lm-eval reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lm_eval.utils import simple_parse_args_string

from glmctl.commands import _eval_words as read
from glmctl.errors import GlmctlError


@pytest.mark.parametrize(
    "text", ["temperature=0.8,top_p=0.95,do_sample=True", "max_gen_toks=32,do_sample=false", "a=b"]
)
def test_keywords_are_those_of_lm_eval(text: str) -> None:
    assert read.keywords("--gen_kwargs", text) == simple_parse_args_string(text)


def test_lists_and_quotes_hold_commas() -> None:
    found = read.keywords("--gen_kwargs", 'until=["a,b", "c"],max_gen_toks=3')
    assert found == {"until": ["a,b", "c"], "max_gen_toks": 3}
    assert read.keywords("--gen_kwargs", '{"until": ["x"]}') == {"until": ["x"]}
    assert read.keywords("--gen_kwargs", None) is None


def test_seeds_batch_sizes_limits_and_names() -> None:
    assert read.seeds("7") == {"seed": ("--seed", 7), "fewshot_seed": ("--seed", 7)}
    assert read.seeds("0,1234,5,6") == {"seed": ("--seed", 5), "fewshot_seed": ("--seed", 6)}
    assert (read.batch_size("8"), read.batch_size("auto:4"), read.batch_size(None)) == (8, None, None)
    assert (read.whole(10.0), read.whole(0.25), read.whole(None)) == (10, 0.25, None)
    assert isinstance(read.whole(10.0), int)
    assert read.names(["a,b", "c"]) == ["a", "b", "c"]
    assert read.names(None) is None
    assert read.pretrained("pretrained=runs/x") == "runs/x"
    assert read.pairs("--problems", ["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}


def test_several_samples_are_drawn_at_the_temperature_of_the_report() -> None:
    assert read.sampling(None, 8) == ["sampling.temperature=0.6"]
    assert read.sampling(1.0, 8) == ["sampling.temperature=1.0"]
    assert read.sampling(None, None) == read.sampling(None, 1) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read.seeds("1,2,3,4"), "always 0,1234"),
        (lambda: read.seeds("x"), "expected one number"),
        (lambda: read.batch_size("0"), "at least 1"),
        (lambda: read.pretrained("model=x"), "expected pretrained=DIR"),
        (lambda: read.keywords("--gen_kwargs", "temperature"), "expected KEY=VALUE"),
        (lambda: read.json_object("--metadata", "[1]"), "expected a JSON object"),
        (lambda: read.json_object("--metadata", "{"), "not JSON"),
        (lambda: read.pairs("--problems", ["x"]), "expected NAME=FILE"),
    ],
)
def test_what_cannot_be_read_names_its_option(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(GlmctlError, match=message):
        call()
