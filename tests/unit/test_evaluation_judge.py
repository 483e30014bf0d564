"""A judge behind HTTP: both orders are asked, only what survives the swap counts, and an interruption costs nothing."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glmctl import console
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.evaluation.judge import Judge, verdict
from glmctl.evaluation.pairwise import Judged, judge_folders, summarize
from glmctl.evaluation.statistics import wilson

Rule = Callable[[str, str], str]
"""(answer A, answer B) -> the judge's reply"""


class FakeJudge:
    """An OpenAI-compatible endpoint that judges by a rule and counts what it was asked."""

    def __init__(self) -> None:
        self.rule: Rule = lambda a, b: "Verdict: tie"
        self.asked: list[dict[str, Any]] = []
        self.dies_after: int | None = None
        self.counting = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.counting:
                    owner.asked.append(body)
                    place = len(owner.asked)
                if owner.dies_after is not None and place > owner.dies_after:
                    self.send_error(400, "gone")
                    return
                text = body["messages"][1]["content"]
                answers = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_[AB]>", text, re.DOTALL)
                message = {"role": "assistant", "content": owner.rule(*answers)}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                data = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def fake() -> Iterator[FakeJudge]:
    console.configure(quiet=True)
    one = FakeJudge()
    thread = threading.Thread(target=one.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


def folder(path: Path, answers: list[str], task: str = "glmctl_chat") -> Path:
    path.mkdir(parents=True)
    rows = [{"doc": {"question": f"Q{n}"}, "resps": [[answer]]} for n, answer in enumerate(answers)]
    (path / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def longer(a: str, b: str) -> str:
    return "Verdict: tie" if len(a) == len(b) else f"The longer one.\nVerdict: {'A' if len(a) > len(b) else 'B'}"


def test_wins_ties_and_losses_are_the_second_model_s(fake: FakeJudge, tmp_path: Path) -> None:
    fake.rule = longer
    first = folder(tmp_path / "first", ["aa", "aa", "aa", "aaaa"])
    second = folder(tmp_path / "second", ["aaa", "aaa", "aa", "a"])
    found = judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")["glmctl_chat"]
    assert (found.wins, found.ties, found.losses, found.swayed) == (2, 1, 1, 0.0)
    assert found.net == pytest.approx(0.25)
    assert found.net_interval[0] < found.net < found.net_interval[1]
    assert found.win_interval == wilson(2, 4)
    back = judge_folders(second, first, Judge(fake.url, "m"), tmp_path / "back")["glmctl_chat"]
    assert (back.wins, back.losses) == (found.losses, found.wins)
    rows = [json.loads(line) for line in (tmp_path / "out" / "judgements_glmctl_chat.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows] == [1, 1, 0, -1]
    sent = [body["messages"] for body in fake.asked]
    assert all(prompt in sent for row in rows for prompt in row["prompts"]), "what was asked is kept word for word"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["judge"]["model"] == "m"


def test_a_judge_that_goes_by_the_order_decides_nothing(fake: FakeJudge, tmp_path: Path) -> None:
    fake.rule = lambda a, b: "Verdict: A"
    first, second = (folder(tmp_path / name, ["x", "y", "z"]) for name in ("one", "two"))
    found = judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")["glmctl_chat"]
    assert (found.wins, found.ties, found.losses) == (0, 3, 0)
    assert (found.swayed, found.p_value) == (1.0, 1.0)


def test_reasoning_is_not_shown_to_the_judge(fake: FakeJudge, tmp_path: Path) -> None:
    first = folder(tmp_path / "one", ["\n<think>secret</think>\nanswer"])
    second = folder(tmp_path / "two", ["plain"])
    judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")
    shown = fake.asked[0]["messages"][1]["content"]
    assert "answer" in shown
    assert "secret" not in shown


def test_what_was_judged_before_an_interruption_is_not_asked_again(fake: FakeJudge, tmp_path: Path) -> None:
    fake.rule, fake.dies_after = longer, 3
    first = folder(tmp_path / "one", ["a", "bb", "ccc", "dddd"])
    second = folder(tmp_path / "two", ["aaa", "bbb", "cc", "ddd"])
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")
    kept = len((tmp_path / "out" / "responses.jsonl").read_text().splitlines())
    assert kept == 3, "what was answered before the judge died, however the answers and the failure crossed"
    fake.dies_after, before = None, len(fake.asked)
    found = judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")["glmctl_chat"]
    assert len(fake.asked) - before == 8 - kept
    assert (found.wins, found.losses) == (2, 2)
    judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")
    assert len(fake.asked) - before == 8 - kept


def test_a_judge_without_verdicts_is_refused(fake: FakeJudge, tmp_path: Path) -> None:
    fake.rule = lambda a, b: "Both are nice."
    first, second = (folder(tmp_path / name, ["x"]) for name in ("one", "two"))
    with pytest.raises(DataError, match="1 of 1 judgements give no verdict"):
        judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")


def test_a_tenth_of_unreadable_replies_is_left_out_and_counted() -> None:
    clear = [Judged(str(n), "", "", ("", ""), (1, 1)) for n in range(9)]
    found = summarize([*clear, Judged("x", "", "", ("", ""), (None, 1))])
    assert (found.documents, found.wins, found.unreadable) == (9, 9, 1)
    assert found.p_value == pytest.approx(2 / 2**9)


@pytest.mark.parametrize(
    ("outcomes", "outcome"), [((1, 1), 1), ((-1, -1), -1), ((1, -1), 0), ((1, 0), 0), ((0, 0), 0), ((None, 1), None)]
)
def test_only_what_both_orders_say_counts(outcomes: tuple[int | None, int | None], outcome: int | None) -> None:
    assert Judged("q", "a", "b", ("", ""), outcomes).outcome == outcome


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("... Verdict: A", "A"),
        ("**Verdict:** b", "B"),
        ("I thought 'Verdict: A' first.\nVerdict: tie", "tie"),
        ("Verdict: Apples are better", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_verdict_of_a_reply_counts(reply: str, expected: str | None) -> None:
    assert verdict(reply) == expected


def test_tasks_and_questions_must_be_in_both(fake: FakeJudge, tmp_path: Path) -> None:
    first, second = folder(tmp_path / "one", ["x"]), folder(tmp_path / "two", ["x", "y"])
    with pytest.raises(DataError, match="other questions of 'glmctl_chat'"):
        judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out")
    with pytest.raises(RecipeError, match="did you mean 'glmctl_chat'"):
        judge_folders(first, second, Judge(fake.url, "m"), tmp_path / "out", ["glmctl_chats"])
    assert fake.asked == []


@pytest.mark.parametrize(
    ("count", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)]
)
def test_wilson_intervals(count: int, of: int, low: float, high: float) -> None:
    """Textbook values, to four places."""
    assert wilson(count, of) == pytest.approx((low, high), abs=5e-5)
