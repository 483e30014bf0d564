"""Laws of synthetic reasoning: only what a page marks is mined, only traces that end in its answer are kept."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glmctl.data import reasoning
from glmctl.data.conversations import read_conversations
from glmctl.errors import DataError, EnvironmentProblem
from glmctl.recipe.data import ReasoningRecipe

PAGE = """An essay that asks: why? And answers nothing.

Question 1: A train goes 120 km in 2 hours.
How fast is it?
Answer: 60 km/h

Q: What is the capital of France?
A: Paris.

Q: Tell me about everything.
A: That would be a very long story which nobody could ever check against a reply of any kind.

问：3加4等于几？
答：7
"""


def test_marked_pairs_with_answers_that_can_be_checked_are_mined() -> None:
    found = [(pair.question, pair.answer) for pair in reasoning.mine(PAGE, "p")]
    assert found == [
        ("A train goes 120 km in 2 hours.\nHow fast is it?", "60 km/h"),
        ("What is the capital of France?", "Paris."),
        ("3加4等于几？", "7"),
    ]


def test_an_unanswered_question_does_not_take_the_next_pair_with_it() -> None:
    text = "Q: one?\n\nQ: two?\nA: 2\n\nQ: three?\n\nQ: four?\n\nQ: five?\nA: 5\n"
    assert [(pair.question, pair.answer) for pair in reasoning.mine(text, "p")] == [("two?", "2"), ("five?", "5")]
    assert not list(reasoning.mine("Q: one?\n\nQ:\nA: 2\n", "p"))


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("120 / 2 = 60, so the answer is 60 km/h.", "60 km/h", True),
        (r"Thus \boxed{60}", "60 km/h", True),
        (r"First \boxed{50}, no: \boxed{60}", "60", True),
        ("The answer is 61 km/h.", "60 km/h", False),
        ("1,200", "1200", True),
        ("x = 3/4", "0.75", True),
        ("Paris", "Paris.", True),
        ("It is in France.\nAnswer: paris", "Paris.", True),
        ("Not Paris", "Paris.", False),
        ("", "Paris.", False),
        ("60 or 61", "60", False),
        # the number of another thing
        ("The answer is Airbus 747.", "Boeing 747", False),
        ("747 passengers", "Boeing 747", False),
        ("The answer is 5 miles.", "5 km", False),
        ("5 %", "5 €", False),
        ("5 A", "5 V", False),
        # the same thing in a sentence, or its number alone
        ("It is a Boeing 747.", "Boeing 747", True),
        ("The answer is 747.", "Boeing 747", True),
        ("The train goes **60 km/h**.", "60 km/h", True),
        (r"The answer is $60\text{ km/h}$.", "60 km/h", True),
        ("The answer is 60 km/h.", "60", True),
        ("It isn't a Boeing 747.", "Boeing 747", False),
        ("It goes faster than 60 km/h.", "60 km/h", False),
    ],
)
def test_a_reply_is_right_when_it_settles_on_the_answer(reply: str, answer: str, right: bool) -> None:
    assert reasoning.agrees(reply, answer) is right


def test_reasoning_is_taken_from_either_place() -> None:
    message = SimpleNamespace(content="60", reasoning_content="120/2")
    assert reasoning.split_reasoning(message) == ("120/2", "60")
    inline = SimpleNamespace(content="<think>\n120/2\n</think>\n60")
    assert reasoning.split_reasoning(inline) == ("120/2", "60")
    assert reasoning.split_reasoning(SimpleNamespace(content="60")) == ("", "60")


class Teacher(BaseHTTPRequestHandler):
    """Four replies: right with reasoning, wrong, right without reasoning, right with other reasoning."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = "7" if "3加4" in body["messages"][0]["content"] else "60"
        replies: list[dict[str, Any]] = [
            {"content": right, "reasoning_content": "first"},
            {"content": "59", "reasoning_content": "wrong"},
            {"content": right},
            {"content": f"<think>second</think>{right}"},
        ]
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", **replies[i]}}
            for i in range(body["n"])
        ]
        data = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: object) -> None:
        pass


def recipe(home: Path, base: str, **fields: Any) -> ReasoningRecipe:
    (home / "page.txt").write_text(PAGE.replace("Q: What is the capital of France?\nA: Paris.\n", ""))
    body = {
        "name": "r",
        "sources": [{"type": "text", "domain": "web", "paths": [str(home / "page.txt")]}],
        "teacher": {"base_url": base, "model": "m"},
    }
    return ReasoningRecipe.model_validate({**body, **fields})


def test_only_verified_traces_are_kept(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/v1"
    run: Any = SimpleNamespace(export=tmp_path / "export")
    try:
        counts = reasoning.run(recipe(tmp_path, base, keep_per_question=2), run)
        assert counts == {"questions": 2, "traces": 8, "wrong": 2, "without_reasoning": 2, "kept": 4, "bad_rows": 0}
        talks = read_conversations([tmp_path / "export/conversations.jsonl"])
        assert [talk.messages[1]["reasoning_content"] for talk in talks] == ["first", "second"] * 2
        assert [talk.messages[1]["content"] for talk in talks] == ["60", "60", "7", "7"]
        wrong = recipe(tmp_path, base)
        (tmp_path / "page.txt").write_text("Q: One?\nA: 1\n")
        with pytest.raises(DataError, match="none of 4 traces"):
            reasoning.run(wrong, run)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        reasoning.run(recipe(tmp_path, base), run)
