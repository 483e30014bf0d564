"""Agentic data in its four steps: real tools of every kind, a server that dies, tasks, users and judges of a model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glmctl.commands._stage import execute
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import read_conversations
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill.agentic import actors
from glmctl.distill.agentic.mcp_tools import McpToolbox
from glmctl.distill.agentic.openapi import OpenApiToolbox
from glmctl.distill.agentic.toolbox import ToolboxDied, tool_name
from glmctl.distill.agentic.worlds import Workbench
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.recipe.agentic import AgenticRecipe, McpTools, OpenApiTools
from glmctl.recipe.schema import ProblemsRecipe, ToolUseTask
from glmctl.run.metrics import MetricsLog

EXAMPLES = Path(__file__).parents[2] / "examples"
SERVER = [sys.executable, str(EXAMPLES / "mcp_server.py")]
LIBRARY = {"type": "mcp", "command": SERVER}
SHAPES = {"type": "python", "module": str(EXAMPLES / "shapes.py")}
TASKS = [str(EXAMPLES / "library_tasks.jsonl")]


def recipe(**changes: Any) -> AgenticRecipe:
    return AgenticRecipe.model_validate({"name": "agentic", "tools": [LIBRARY], "tasks": TASKS, **changes})


class Replies(ThreadingHTTPServer):
    """An OpenAI-compatible server that answers what `reply(body)` says: a message, its text, or an error's status.

    A message may bring the `finish_reason` that goes beside it.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Any]) -> None:
        self.reply, self.asked = reply, []
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def actor(self) -> dict[str, Any]:
        return {"type": "endpoint", "url": f"http://127.0.0.1:{self.server_port}/v1", "model": "m"}


BROKEN = {
    "answer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    "error": b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    "status": b"what?\r\n\r\n",
    "silence": b"",
}
"""what a server may say before its connection is gone"""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(body)
        said = server.reply(body)
        if isinstance(said, int):
            self.answer(said, {})
            return
        message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
        choice = {"index": 0, "finish_reason": message.pop("finish_reason", "stop"), "message": message}
        self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def do_GET(self) -> None:
        """A small REST service for the OpenAPI tools."""
        path, _, query = self.path.partition("?")
        if path == "/items/none":
            self.answer(404, {"detail": "no such item"})
        elif path.startswith("/items/broken"):
            self.wfile.write(BROKEN[path.removeprefix("/items/broken-")])
        else:
            said = {"query": query, "trace": self.headers["X-Trace"], "key": self.headers["Authorization"]}
            self.answer(200, {"item": path.rsplit("/", 1)[-1], **said})

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Replies]]:
    monkeypatch.setattr(actors, "RETRIES", 0)
    servers: list[Replies] = []

    def start(reply: Callable[[dict[str, Any]], Any]) -> Replies:
        servers.append(Replies(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# ----------------------------------------------------------------------------- step 1: tools


def test_tools_of_functions_and_of_a_real_mcp_server_are_called_in_trajectories(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    """The scripted teacher: three tasks are completed, one is not, and only the three are kept."""
    summary = execute(recipe(tools=[LIBRARY, SHAPES]), tmp_path / "run")
    assert (summary["tasks"], summary["kept"], summary["tools"]) == (4, 3, 5)
    assert summary["rejected"] == {"judge 1": 1}
    rejected = json.loads((tmp_path / "run/export/rejections.json").read_text())
    assert rejected["judge 1"]["example"]["why"] == "lend was never called"
    talks = read_conversations([tmp_path / "run/export/conversations.jsonl"])
    template = ChatTemplate(tiny_tokenizer)
    for talk in talks:
        assert {tool_name(tool) for tool in talk.tools or []} == {"find_book", "lend", "give_back", "area", "convert"}
        results = [message["content"] for message in talk.messages if message["role"] == "tool"]
        assert json.loads(results[0]).keys() == {"mark", "copies"}
        assert any(template.encode_examples(talk.messages, talk.tools, loss_on="all_turns"))
    assert [message["role"] for message in talks[-1].messages].count("user") == 2
    assert "is back from Ben" in talks[-1].messages[-1]["content"]


def test_declarations_come_from_signatures(tmp_path: Path) -> None:
    from glmctl.distill.agentic.toolbox import PythonToolbox
    from glmctl.recipe.agentic import PythonTools

    box = PythonToolbox(PythonTools(module=str(EXAMPLES / "shapes.py")))
    assert box.tools[1]["function"] == {
        "name": "convert",
        "description": "Convert a length in metres.",
        "parameters": {
            "type": "object",
            "properties": {"value": {"type": "number"}, "unit": {"enum": ["cm", "inch"], "default": "inch"}},
            "required": ["value"],
        },
    }
    assert box.call("area", {"shape": "square", "size": 3}) == "9"
    assert box.call("area", {"shape": "square", "size": "x"}).startswith("error: TypeError")
    with pytest.raises(RecipeError, match="did you mean 'convert'"):
        PythonToolbox(PythonTools(module=str(EXAMPLES / "shapes.py"), functions=["convrt"]))


DOCUMENT = {
    "openapi": "3.1.0",
    "paths": {
        "/items/{id}": {
            "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}],
            "get": {
                "operationId": "get_item",
                "summary": "One item",
                "parameters": [
                    {"$ref": "#/components/parameters/Size"},
                    {"name": "X-Trace", "in": "header", "schema": {"type": "string"}},
                ],
            },
        },
        "/items": {
            "post": {
                "operationId": "add_item",
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Item"}}}},
            }
        },
    },
    "components": {
        "parameters": {"Size": {"name": "size", "in": "query", "schema": {"type": "integer"}}},
        "schemas": {
            "Item": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "in": {"$ref": "#/components/schemas/Item"}},
                "required": ["name"],
            }
        },
    },
}


def test_operations_of_an_openapi_document_are_declared_and_called(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBRARY_KEY", "k")
    path = tmp_path / "api.json"
    path.write_text(json.dumps(DOCUMENT))
    server = serve(lambda body: "made")
    url = f"http://127.0.0.1:{server.server_port}"
    box = OpenApiToolbox(OpenApiTools(path=str(path), base_url=url, api_key_env="LIBRARY_KEY"))
    first, second = (tool["function"] for tool in box.tools)
    assert first["parameters"]["required"] == ["id"]
    assert first["parameters"]["properties"].keys() == {"id", "size", "X-Trace"}
    assert second["parameters"]["properties"]["name"] == {"type": "string"}
    said = json.loads(box.call("get_item", {"id": "a/b", "size": 3, "X-Trace": "t"}))
    assert said == {"item": "a%2Fb", "query": "size=3", "trace": "t", "key": "Bearer k"}
    assert box.call("get_item", {"id": "none"}).startswith("error: HTTP 404")
    box.call("add_item", {"name": "n"})
    assert server.asked == [{"name": "n"}]
    with pytest.raises(RecipeError, match="did you mean 'get_item'"):
        OpenApiToolbox(OpenApiTools(path=str(path), base_url="http://x", operations=["getitem"]))
    path.write_text("swagger: '2.0'")
    with pytest.raises(DataError, match="not an OpenAPI 3 document"):
        OpenApiToolbox(OpenApiTools(path=str(path)))


@pytest.mark.parametrize(
    ("operation", "arguments", "why"),
    [
        ("get_item", {"id": "a", "X-Trace": "a\nb"}, "Invalid header value"),
        ("get_item", {"id": "a", "X-Trace": "\N{SNOWMAN}"}, "'latin-1' codec can't encode"),
        ("get_item", {"id": "\ud800"}, "surrogates not allowed"),
        ("get_item", {"id": "a", "size": "\ud800"}, "surrogates not allowed"),
        ("a_gap", {}, "URL can't contain control characters"),
    ],
)
def test_what_no_request_can_hold_is_an_error_that_the_model_reads(
    operation: str, arguments: dict[str, Any], why: str, serve: Any, tmp_path: Path
) -> None:
    """Such a value, and then the same connection answers a good one: nobody died."""
    paths = {**DOCUMENT["paths"], "/a gap": {"get": {"operationId": "a_gap"}}}
    path = tmp_path / "api.json"
    path.write_text(json.dumps({**DOCUMENT, "paths": paths}))
    url = f"http://127.0.0.1:{serve(lambda body: 'made').server_port}"
    box = OpenApiToolbox(OpenApiTools(path=str(path), base_url=url))
    said = box.call(operation, arguments)
    assert said.startswith("error: ")
    assert why in said
    assert json.loads(box.call("get_item", {"id": "a"}))["item"] == "a"


@pytest.mark.parametrize("how", BROKEN)
def test_an_answer_that_breaks_off_is_a_server_that_died(how: str, serve: Any, tmp_path: Path) -> None:
    path = tmp_path / "api.json"
    path.write_text(json.dumps(DOCUMENT))
    url = f"http://127.0.0.1:{serve(lambda body: 'made').server_port}"
    box = OpenApiToolbox(OpenApiTools(path=str(path), base_url=url))
    with pytest.raises(ToolboxDied, match="does not answer"):
        box.call("get_item", {"id": f"broken-{how}"})


def test_a_key_or_server_that_no_request_can_hold_is_said_before_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never as a tool's answer, where the model and then the data would hold the key."""
    path = tmp_path / "api.json"
    path.write_text(json.dumps(DOCUMENT))
    monkeypatch.setenv("LIBRARY_KEY", "secret\n")
    with pytest.raises(RecipeError, match="LIBRARY_KEY: ") as found:
        OpenApiToolbox(OpenApiTools(path=str(path), base_url="http://x", api_key_env="LIBRARY_KEY"))
    assert "secret" not in str(found.value)
    with pytest.raises(RecipeError, match="'http://x:port' is no address of a server"):
        OpenApiToolbox(OpenApiTools(path=str(path), base_url="http://x:port"))


@pytest.mark.slow
def test_an_mcp_server_over_http_offers_and_runs_the_same_tools() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    over_stdio = McpToolbox(McpTools(command=SERVER))
    process = subprocess.Popen([*SERVER, "--http", str(port)], stderr=subprocess.DEVNULL)
    try:
        over_http = None
        while over_http is None:
            assert process.poll() is None, "the server runs"
            try:
                over_http = McpToolbox(McpTools(url=f"http://127.0.0.1:{port}/mcp"))
            except EnvironmentProblem:
                continue  # not listening yet
        assert over_http.tools == over_stdio.tools
        asked = ("find_book", {"title": "Emma"})
        assert over_http.call(*asked) == over_stdio.call(*asked)
        over_http.call("lend", {"mark": "A1", "reader": "x"})
        assert over_http.call("lend", {"mark": "A1", "reader": "y"}).startswith("error: ")
        process.kill()
        process.wait()
        with pytest.raises(ToolboxDied):
            over_http.call(*asked)
        over_http.close()
    finally:
        process.kill()
        process.wait()
        over_stdio.close()


@pytest.mark.slow
def test_a_fresh_server_has_no_traces_of_the_last_trajectory() -> None:
    bench = Workbench([McpTools(command=SERVER, fresh=True)], None)
    lends = {"tool_calls": [{"function": {"name": "lend", "arguments": {"mark": "A1", "reader": "x"}}}]}
    try:
        bench.begin()
        assert bench.act(lends)[0]["content"].startswith("until day")
        assert bench.act(lends)[0]["content"].startswith("error"), "it remembers"
        bench.begin()
        assert bench.act(lends)[0]["content"].startswith("until day")
    finally:
        bench.close()


# ----------------------------------------------------------------------------- a server that dies


@pytest.mark.slow
def test_a_server_that_dies_is_started_again_and_its_task_played_from_the_beginning(tmp_path: Path) -> None:
    """It dies at its third call: in the middle of `lend-and-return`, again and again until the restarts are used up."""
    dying = {"type": "mcp", "command": [*SERVER, "--die-after", "3"], "restarts": 2}
    summary = execute(recipe(tools=[dying], tasks=_some(tmp_path, "find", "lend", "find2")), tmp_path / "run")
    # 1 call, then 2, then the fourth kills it; the third task is played on a new server
    assert summary["kept"] == 3
    rows = MetricsLog(tmp_path / "run/trajectories.jsonl").rows()
    assert [row["task"] for row in rows] == ["find", "lend", "find2"]
    whole = rows[-1]["messages"]
    assert [message["role"] for message in whole] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.slow
def test_a_server_that_stays_dead_stops_the_run_which_goes_on_later(tmp_path: Path) -> None:
    dying = {"type": "mcp", "command": [*SERVER, "--die-after", "2"], "restarts": 0}
    tasks = _some(tmp_path, "find", "lend")
    flag = tmp_path / "healed"
    # the server that a user repairs between two calls of the same command
    shell = f'[ -e {flag} ] && exec "$0" "$1" || exec "$0" "$@"'
    healed = {**dying, "command": ["sh", "-c", shell, *dying["command"]]}
    with pytest.raises(EnvironmentProblem, match="Connection closed"):
        execute(recipe(tools=[healed], tasks=tasks), tmp_path / "run")
    before = MetricsLog(tmp_path / "run/trajectories.jsonl").rows()
    assert [row["task"] for row in before] == ["find"]
    flag.touch()
    summary = execute(recipe(tools=[healed], tasks=tasks), tmp_path / "run")
    assert summary["kept"] == 2
    assert MetricsLog(tmp_path / "run/trajectories.jsonl").rows()[:1] == before, "nothing is played twice"


def _some(folder: Path, *names: str) -> list[str]:
    """A file of the example tasks by name; a digit behind a name makes another one of it."""
    known = {row["id"]: row for row in map(json.loads, Path(TASKS[0]).read_text().splitlines())}
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps({**known[name.rstrip("0123456789")], "id": name}) + "\n" for name in names))
    return [str(path)]


# ----------------------------------------------------------------------------- steps 2 to 4 with a model


def call(name: str, **arguments: Any) -> dict[str, Any]:
    made = {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"content": None, "reasoning_content": "look", "tool_calls": [made]}


def test_a_model_writes_tasks_plays_teacher_user_and_tools_and_judges(serve: Any, tmp_path: Path) -> None:
    """One server in five roles, told apart by what they are asked; one of two judges turns one task down."""
    declared = [{"name": "weather", "description": "Weather of a town", "parameters": {
        "type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}]  # fmt: skip
    (tmp_path / "tools.json").write_text(json.dumps(declared))

    def reply(body: dict[str, Any]) -> Any:
        messages, text = body["messages"], str(body["messages"][-1]["content"])
        if body.get("tools"):
            if messages[-1]["role"] == "tool":
                return {"content": f"It says: {text}", "reasoning_content": "read it"}
            return call("weather", town=text.split()[-1].strip("?"))
        if text.startswith("These functions"):
            towns = ("Oslo", "Rome") if "exactly one call" in text else ("Bonn",)
            return "Sure:\n" + json.dumps([{"prompt": f"Weather in {t}?", "goal": f"knows {t}"} for t in towns])
        if text.startswith("Play the server"):
            return "rain" if "Oslo" in text else "sun"
        if text.startswith("You play a person"):
            return "DONE" if "And tomorrow" in text or "Rome" in text else "And tomorrow in Oslo?"
        assert text.startswith("Judge whether")
        return "It was not asked about.\nno" if "Bonn" in text and "strict" in text else "All there.\nyes"

    server = serve(reply)
    actor = server.actor
    made = recipe(
        tools=[{"type": "simulated", "path": str(tmp_path / "tools.json")}],
        tasks=[],
        simulator=actor,
        synthesis={"writer": actor, "single_step": 2, "multi_step": 1, "per_request": 2},
        teacher=actor,
        user=actor,
        judges=[
            {"type": "rules"},
            {"type": "model", "judge": actor},
            {"type": "model", "judge": actor, "focus": "strict"},
        ],
        concurrency=2,
    )
    summary = execute(made, tmp_path / "run")
    assert (summary["tasks"], summary["kept"], summary["rejected"]) == (3, 2, {"judge 3": 1})
    oslo, rome = read_conversations([tmp_path / "run/export/conversations.jsonl"])
    assert [message["role"] for message in oslo.messages] == ["user", "assistant", "tool", "assistant"] * 2
    assert [message["role"] for message in rome.messages] == ["user", "assistant", "tool", "assistant"]
    assert oslo.messages[2]["content"] == "rain"
    assert oslo.messages[1]["reasoning_content"] == "look"


def _two_turns(folder: Path) -> list[str]:
    """Two tasks without a script."""
    path = folder / "two.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": f"Greet {name}"}) + "\n" for name in ("Ann", "Ben")))
    return [str(path)]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"content": "I would also", "finish_reason": "length"}, "the turn used up its tokens"),
        ("", "an empty answer"),
        (" \n", "an empty answer"),
    ],
    ids=["cut", "empty", "blank"],
)
def test_a_simulated_user_who_loses_the_format_ends_one_trajectory_only(
    said: Any, why: str, serve: Any, tmp_path: Path
) -> None:
    def reply(body: dict[str, Any]) -> Any:
        if not str(body["messages"][-1]["content"]).startswith("You play a person"):
            return "Hello!"
        return said if "Greet Ann" in body["messages"][-1]["content"] else "DONE"

    actor = serve(reply).actor
    summary = execute(
        recipe(tools=[SHAPES], tasks=_two_turns(tmp_path), teacher=actor, user=actor, enable_thinking=False),
        tmp_path / "run",
    )
    assert (summary["kept"], summary["rejected"]) == (1, {"broken off": 1})
    rejected = json.loads((tmp_path / "run/export/rejections.json").read_text())
    assert rejected["broken off"]["example"]["task"] == "Ann"
    assert rejected["broken off"]["example"]["why"] == f"the user simulator: {why}"


@pytest.mark.parametrize("concurrency", [1, 2])
def test_what_was_played_before_a_judge_went_away_is_judged_and_not_played_again(
    concurrency: int, serve: Any, tmp_path: Path
) -> None:
    played: list[str] = []
    away = True

    def reply(body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        if text.startswith("Judge whether"):
            return 503 if away else "Never greeted.\nno" if "Greet Ann" in text else "Greeted.\nyes"
        played.append(text)
        return f"Hello! ({len(played)})"

    actor = serve(reply).actor
    made = recipe(
        tools=[SHAPES],
        tasks=_two_turns(tmp_path),
        teacher=actor,
        judges=[{"type": "rules"}, {"type": "model", "judge": actor}],
        concurrency=concurrency,
    )
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        execute(made, tmp_path / "run")
    kept = MetricsLog(tmp_path / "run/trajectories.jsonl").rows()
    assert len(kept) == len(played) == concurrency
    away = False
    summary = execute(made, tmp_path / "run")
    assert sorted(played) == ["Greet Ann", "Greet Ben"], "each was played once"
    assert (summary["kept"], summary["rejected"]) == (1, {"judge 2": 1})
    assert MetricsLog(tmp_path / "run/trajectories.jsonl").rows()[:concurrency] == kept
    votes = {row["task"]: row["votes"] for row in MetricsLog(tmp_path / "run/votes.jsonl").rows()}
    assert votes == {"Ann": {"judge 1": "", "judge 2": "Never greeted.\nno"}, "Ben": {"judge 1": "", "judge 2": ""}}


def test_our_own_environments_give_tasks_scripts_and_verdicts(tmp_path: Path) -> None:
    problems = ProblemsRecipe(name="p", task=ToolUseTask(max_value=9), train=12, heldout=4, cold_start=0)
    execute(problems, tmp_path / "problems")
    source = {"type": "problems", "paths": [str(tmp_path / "problems/export/train.jsonl")], "count": 6}
    summary = execute(recipe(tools=[source], tasks=[]), tmp_path / "run")
    assert (summary["tasks"], summary["kept"], summary["rejected"]) == (6, 6, {})
    verdicts = {row["verdict"] for row in MetricsLog(tmp_path / "run/trajectories.jsonl").rows()}
    assert verdicts == {1.0}


# ----------------------------------------------------------------------------- what a user gets wrong


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tools": [{"type": "mcp", "command": ["false"]}]}, "the MCP server does not start"),
        ({"tools": [SHAPES, SHAPES]}, "two sources have a tool 'area'"),
        ({"tools": [SHAPES], "tasks": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, EnvironmentProblem, DataError), match=why):
        execute(recipe(**changes), tmp_path / "run")


def test_a_bad_task_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"prompt": "x", "script": [{"answer": "y"}]}\n{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"tasks\.jsonl:2: a task is an object with a 'prompt'"):
        execute(recipe(tools=[SHAPES], tasks=[str(path)]), tmp_path / "run")
