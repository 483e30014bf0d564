"""The law of every question to an endpoint: an answer that has come is never asked for again, whatever happens next."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glmctl.data import asked, prepare, reasoning
from glmctl.data.asked import Asked
from glmctl.data.conversations import read_conversations
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, EnvironmentProblem
from glmctl.recipe.data import DataRecipe, ReasoningRecipe

COUNT = 100


class Endpoint:
    """Answers `patience` requests, refuses the rest, and keeps what it answered."""

    def __init__(self) -> None:
        self.answered: list[str] = []
        self.patience = 10**6
        self.unreadable: set[str] = set()
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = json.dumps(body.get("input") or body["messages"], sort_keys=True)
                with lock:
                    refused = len(endpoint.answered) >= endpoint.patience
                    if not refused:
                        endpoint.answered.append(asked)
                answer = {"error": "no more"} if refused else endpoint.answer(body)
                data = json.dumps(answer).encode()
                # 400 is an error that the client does not try again
                self.send_response(400 if refused else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0}
        if "input" in body:
            rows = [[float(len(text)), float(number(text) or 0), 1.0] for text in body["input"]]
            data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
            return {"object": "list", "data": data, "model": "m", "usage": usage}
        found = number(body["messages"][0]["content"])
        content = "\ud83d" if str(found) in self.unreadable else str(found if body.get("n") else 5 * (found % 2))
        message = {"role": "assistant", "content": content, "reasoning_content": "so"}
        choices = [{"index": i, "finish_reason": "stop", "message": message} for i in range(body.get("n") or 1)]
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def number(text: str) -> int:
    return int(re.search(r"page (\d+)", text)[1])  # type: ignore[index]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def data(home: Path, tokenizer: Tokenizer, stage: dict[str, Any]) -> DataRecipe:
    tokenizer.save(home / "tokenizer")
    rows = [{"text": f"This is page {i}, which says what page {i} says."} for i in range(COUNT)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "domain": "web", "paths": [str(home / "rows.jsonl")]}
    body = {"name": "d", "tokenizer": str(home / "tokenizer"), "sources": [source], "stages": [stage]}
    return DataRecipe.model_validate({**body, "validation_fraction": 0.1})


def stages(base: str) -> dict[str, dict[str, Any]]:
    teacher = {"type": "endpoint", "base_url": base, "model": "m"}
    taught = {"type": "taught", "teacher": teacher, "sample": COUNT}
    embedding = {"type": "endpoint", "base_url": base, "model": "m"}
    return {
        "taught": {"type": "score", "name": "odd", "scorer": taught, "cuts": [0.5], "epochs": [1, 2]},
        "embedded": {"type": "semantic", "similarity": 1.0, "embedding": embedding},
    }


@pytest.mark.parametrize(("kind", "before"), [("taught", 30), ("embedded", 2)])
def test_a_preparation_asks_no_endpoint_twice(
    endpoint: Endpoint, tiny_tokenizer: Tokenizer, tmp_path: Path, kind: str, before: int
) -> None:
    made = data(tmp_path, tiny_tokenizer, stages(endpoint.base)[kind])
    for name in ("straight", "cut"):
        (tmp_path / name).mkdir()
    prepare.run(made, SimpleNamespace(export=tmp_path / "straight/export"))  # type: ignore[arg-type]
    wanted = sorted(endpoint.answered)
    assert len(wanted) == len(set(wanted)) > before
    endpoint.answered, endpoint.patience = [], before
    run: Any = SimpleNamespace(export=tmp_path / "cut/export")
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        prepare.run(made, run)
    (journal,) = (tmp_path / "cut/work").rglob("asked/*.jsonl" if kind == "embedded" else "*.asked.jsonl")
    assert len(journal.read_text().splitlines()) == before
    with journal.open("a") as stream:
        stream.write('{"request": "half of a li')
    endpoint.patience = 10**6
    prepare.run(made, run)
    assert sorted(endpoint.answered) == wanted
    assert not (tmp_path / "cut/work").exists()
    for file in ("train/tokens-00000.bin", prepare.DECISIONS):
        assert (tmp_path / "cut/export" / file).read_bytes() == (tmp_path / "straight/export" / file).read_bytes()


def reason(home: Path, base: str) -> ReasoningRecipe:
    rows: list[Any] = [{"text": f"Question: what number has page {i}?\nAnswer: {i}\n"} for i in range(1, COUNT + 1)]
    rows.insert(1, {"txt": "no such field"})
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "jsonl", "domain": "web", "paths": [str(home / "rows.jsonl")]}
    teacher = {"base_url": base, "model": "m"}
    return ReasoningRecipe.model_validate({"name": "r", "sources": [source], "teacher": teacher, "samples": 2})


def test_reasoning_goes_on_where_it_was_cut_and_says_its_bad_rows(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = reason(tmp_path, endpoint.base)
    run: Any = SimpleNamespace(export=tmp_path / "run/export")
    endpoint.patience = 40
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        reasoning.run(made, run)
    with (tmp_path / "run" / reasoning.ASKED).open("a") as stream:
        stream.write('{"request": "half of a li')
    endpoint.patience, endpoint.unreadable = 10**6, {"100"}
    counts = reasoning.run(made, run)
    assert len(endpoint.answered) == len(set(endpoint.answered)) == COUNT
    # half a character is no answer, and no reason to stop
    assert (counts["questions"], counts["traces"], counts["wrong"], counts["kept"]) == (COUNT, 2 * COUNT, 2, COUNT - 1)
    assert counts["bad_rows"] == 1
    report = json.loads((tmp_path / "run/export/report.json").read_text())
    assert report["bad_rows"]["places"] == {"no field 'text'": [f"{tmp_path / 'rows.jsonl'}:2"]}
    assert "1 rows left out" in capsys.readouterr().err
    assert len(read_conversations([tmp_path / "run/export/conversations.jsonl"])) == COUNT - 1
    assert not (tmp_path / "run" / reasoning.ASKED).exists()


def test_replies_that_are_all_wrong_are_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    made = reason(tmp_path, endpoint.base)
    run: Any = SimpleNamespace(export=tmp_path / "run/export")
    endpoint.unreadable = set(map(str, range(1, COUNT + 1)))
    with pytest.raises(DataError, match=r"none of 200 traces"):
        reasoning.run(made, run)
    endpoint.unreadable = set()
    assert reasoning.run(made, run)["kept"] == COUNT


def test_no_answer_is_asked_again_and_who_leaves_early_asks_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            gate.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(asked, "ThreadPoolExecutor", Pool)
    first = Asked(tmp_path / "a.jsonl")
    requests = [{"n": n} for n in range(200)]

    def call(request: Any) -> int | None:
        if request["n"] > 2:
            gate.wait()
        made.append(request["n"])
        return None if request["n"] == 1 else request["n"] * 10

    made: list[int] = []
    answers = first.answers(requests, call, "there")
    assert [next(answers) for _ in range(3)] == [0, None, 20]
    answers.close()
    assert len(made) < 20
    known = set(made) - {1}
    made = []
    again = Asked(tmp_path / "a.jsonl")
    assert list(again.answers(requests, call, "there")) == [None if n == 1 else n * 10 for n in range(200)]
    assert set(made) == set(range(200)) - known
