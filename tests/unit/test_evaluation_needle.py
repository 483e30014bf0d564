"""The needle: haystacks of the length that was asked for, the needle at its depth, and what counts as found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import RecipeError
from glmctl.evaluation.documents import Row
from glmctl.evaluation.harness import run_tasks
from glmctl.evaluation.needle import cell_name, default_lengths, depths, documents, needle, worst_cell
from glmctl.evaluation.results import grid
from glmctl.evaluation.tasks import TaskInputs
from glmctl.recipe.schema import Needle, Sampling

LENGTHS = [256, 600]


def rows_of(spec: Needle, tokenizer: Tokenizer) -> list[Row]:
    return list(documents(spec, tokenizer, spec.lengths))


def test_a_haystack_fills_its_length_and_never_exceeds_it(tiny_tokenizer: Tokenizer) -> None:
    for spec in (Needle(lengths=LENGTHS, samples=2), Needle(lengths=LENGTHS, samples=2, needles=4, digits=3)):
        for row in rows_of(spec, tiny_tokenizer):
            tokens = len(tiny_tokenizer.encode(f"{row['context']} {row['answer']}"))
            assert 0.9 * row["length"] <= tokens <= row["length"]
            assert len(row["answer"]) == spec.digits


def test_the_needle_stands_at_its_depth_once_and_the_question_at_the_end(tiny_tokenizer: Tokenizer) -> None:
    for row in rows_of(Needle(lengths=[900], samples=2), tiny_tokenizer):
        *before, question = row["context"].split("\n")
        (at,) = [n for n, line in enumerate(before) if line == f"{question} {row['answer']}."]
        share = sum(map(len, before[:at])) / (sum(map(len, before)) - len(before[at]))
        assert share == pytest.approx(row["depth"] / 100, abs=0.08), "within a line of it"


def test_several_needles_differ_and_one_is_asked_for(tiny_tokenizer: Tokenizer) -> None:
    for row in rows_of(Needle(lengths=[600], samples=1, needles=4), tiny_tokenizer):
        hidden = [line for line in row["context"].split("\n") if " number is " in line]
        assert len({line.split(" number")[0] for line in hidden}) == 4


def test_a_limit_keeps_the_whole_grid_and_a_cell_does_not_depend_on_the_others(tiny_tokenizer: Tokenizer) -> None:
    few, many = (rows_of(Needle(lengths=LENGTHS, samples=n, depths=3), tiny_tokenizer) for n in (1, 2))
    assert many[:6] == few
    assert {(row["length"], row["depth"]) for row in few} == {(n, d) for n in LENGTHS for d in (0, 50, 100)}
    assert rows_of(Needle(lengths=LENGTHS[1:], samples=1, depths=3), tiny_tokenizer) == few[3:]


def test_scores_stand_for_each_length_and_depth_and_for_the_worst(tiny_tokenizer: Tokenizer) -> None:
    config = needle(Needle(lengths=LENGTHS, depths=3, samples=1), tiny_tokenizer, 600)
    score = config["process_results"]
    found = score({"length": 600, "depth": 50}, [(-0.1, True)])
    cell = ("found_600@50", 1.0)
    assert found == {
        "found": 1.0,
        "found_worst": cell,
        "found_600": 1.0,
        "found_600@50": 1.0,
        "longest": 1.0,
        "longest_worst": cell,
    }
    missed = score({"length": 256, "depth": 0}, [(-9.0, False)])
    assert missed == {"found": 0.0, "found_worst": ("found_256@0", 0.0), "found_256": 0.0, "found_256@0": 0.0}
    assert set(found) | set(missed) <= {one["metric"] for one in config["metric_list"]}
    assert worst_cell([cell, ("b", 1.0), ("b", 0.0), ("c", 1.0)]) == 0.5


class Reader(LM):  # type: ignore[misc]
    """A reader that sees the last so many characters, and finds there whatever stands there."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        answers = []
        for context, continuation in (request.args for request in requests):
            question = context.rsplit("\n", 1)[1]
            found = re.search(rf"{question}( \d+)\.", context[-self.window :])
            answers.append((-1.0, found is not None and found[1] == continuation))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def test_a_reader_finds_what_its_window_holds(tiny_tokenizer: Tokenizer) -> None:
    """Through lm-eval: everything with a long memory; with a short one the late needles of long contexts only."""
    spec = Needle(lengths=[256, 1200], depths=3, samples=2, needles=2)
    inputs = TaskInputs(ChatTemplate(tiny_tokenizer), Sampling(), needle=spec, context=1200)
    whole, short = (run_tasks(Reader(n), ["glmctl_needle"], inputs)["results"]["glmctl_needle"] for n in (10**6, 900))
    assert {key: value for key, value in whole.items() if key.endswith(",none") and value not in (1.0, "N/A")} == {}
    assert set(grid({key.removesuffix(",none"): value for key, value in whole.items()}).values()) == {1.0}
    found = {key.removesuffix(",none"): value for key, value in short.items()}
    assert (found["found_256"], found["found_1200@0"], found["found_1200@100"]) == (1.0, 0.0, 1.0)
    assert (found["longest_worst"], found["found_worst"]) == (0.0, 0.0)
    assert 0.0 < found["longest"] < found["found"] < 1.0


def test_depths_and_lengths_are_even(tiny_tokenizer: Tokenizer) -> None:
    assert depths(5) == [0, 25, 50, 75, 100]
    assert depths(2) == [0, 100]
    assert default_lengths(131072) == [16384, 32768, 65536, 131072]
    assert default_lengths(512) == [128, 256, 512]
    assert cell_name(512, 25) == "found_512@25"


def test_own_text_and_wording(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "Nothing but this one sentence here. " * 5}) + "\n")
    spec = Needle(
        lengths=[200],
        depths=2,
        samples=1,
        texts=[str(path)],
        statement="{key}: {value}.",
        question="\nRecall {key}:",
        between=" ",
        keys=["tea"],
    )
    for row in rows_of(spec, tiny_tokenizer):
        haystack, question = row["context"].split("\n")
        assert question == "Recall tea:"
        assert haystack.count(f"tea: {row['answer']}.") == 1
        assert "Nothing but this one sentence here." in row["context"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Needle(lengths=[1024]), "1024 tokens exceed the model's context of 600"),
        (Needle(lengths=[20]), "20 tokens are no haystack"),
        (Needle(texts=["nowhere.jsonl"], lengths=[256]), r"nowhere\.jsonl: no such file"),
    ],
)
def test_what_cannot_be_asked_is_said(spec: Needle, message: str, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match=message):
        needle(spec, tiny_tokenizer, 600)


def test_a_statement_without_the_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needle.statement has no \{value\}"):
        Needle(statement="The {key}.")
    with pytest.raises(ValueError, match="1 different words cannot name 2 needles"):
        Needle(keys=["a", "a"], needles=2)
