"""Experts behind a server: the same answers as from our own engine, and what servers do wrong has a name."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill import endpoint
from glmctl.distill.experts import EndpointPlayer, EnginePlayer, open_expert
from glmctl.distill.filters import Judge, filter_samples
from glmctl.distill.sample import SampleJournal, collect
from glmctl.engine.engine import Engine
from glmctl.errors import EnvironmentProblem
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import Expert, Sampling
from glmctl.rl.environment import Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import rollout_engine
from glmctl.rl.tasks import demonstrate, tool_use
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

SHOP = {"seed": 5, "max_value": 9, "kind": "stock", "item": "1", "shop": "2", "day": "3"}
PROBLEMS = [
    Problem("sum", "arithmetic", "Compute 3+4.", 7),
    Problem("wrong", "arithmetic", "Compute 5+1.", 8),
    Problem("stock", "tool_use", "Stock?", 0, SHOP),
]
RUNNING = SimpleNamespace(raised=None)


@pytest.fixture(scope="module")
def problems(monkeypatch_module) -> list[Problem]:
    """With a single, short tool: a tiny model is to learn the conversations by heart."""
    parameters = {"type": "object", "properties": {k: {"type": "string"} for k in ("item", "shop", "day")}}
    tool = {"type": "function", "function": {"name": "stock", "parameters": parameters}}
    monkeypatch_module.setattr(tool_use, "TOOLS", [tool])
    answer = int(tool_use.Shop(5, 9).stock("1", "2", "3"))
    return [*PROBLEMS[:2], Problem("stock", "tool_use", "Stock?", answer, SHOP)]


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def template(problems) -> ChatTemplate:
    plain = ChatTemplate(Tokenizer.train([], vocab_size=292))
    texts = [plain.render(talk.messages, talk.tools) for talk in map(demonstrate, problems)]
    return ChatTemplate(Tokenizer.train(texts * 2, vocab_size=560, digits=1))


@pytest.fixture(scope="module")
def learnt(problems, template: ChatTemplate) -> GlmMoe:
    """A tiny model that knows the three demonstrations by heart."""
    batches = []
    for problem in problems:
        talk = demonstrate(problem)
        made = template.encode_training(talk.messages, talk.tools)
        tokens, mask = torch.tensor([made.tokens]), torch.tensor([made.loss_mask])
        batches.append((tokens, torch.where(mask.bool(), tokens, -100)[0, 1:]))
    config = ModelConfig(
        vocab_size=template.tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    model = GlmMoe(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(200):
        optimizer.zero_grad()
        losses = [torch.nn.functional.cross_entropy(model.logits(model(t))[0, :-1], y) for t, y in batches]
        if max(losses).item() < 0.02:
            return model
        sum(losses).backward()
        optimizer.step()
    raise AssertionError("the tiny model did not learn three conversations")


def ask(player: Any, problems: list[Problem], path: Path, samples: int = 2, **sampling: Any) -> list[Any]:
    settings = Sampling.model_validate({"temperature": 0.3, "max_tokens": 60} | sampling)
    return collect(
        SampleJournal(path),
        lambda: player,
        problems,
        label="ask",
        samples=samples,
        sampling=settings,
        seed=3,
        stop=RUNNING,  # type: ignore[arg-type]
    )


def test_a_served_expert_gives_the_samples_of_our_engine(tmp_path, problems, template, learnt) -> None:
    """Messages, tokens, rewards and ends of every sample, tool loop included; one problem has no right answer."""
    here = ask(EnginePlayer(rollout_engine(learnt, 512), template, 4), problems, tmp_path / "here.jsonl")
    engine = Engine(learnt, max_slots=4, token_bytes=lambda token: template.tokenizer.decode_bytes([token]))
    server = Server(
        Service("tiny", template.tokenizer, template, EngineWorker(engine, 16)), "127.0.0.1", 0, drain_seconds=0
    )
    server.start()
    try:
        away = endpoint.Endpoint(f"{server.url}/v1", "tiny", None, template, 4)
        there = ask(EndpointPlayer(away, 3), problems, tmp_path / "there.jsonl")
    finally:
        server.stop()
    fields = ("problem_id", "group", "sample", "tokens", "loss_mask", "reward", "stop_reason", "well_formed", "tools")
    for one, other in zip(here, there, strict=True):
        assert {name: getattr(one, name) for name in fields} == {name: getattr(other, name) for name in fields}
        assert template.encode_training(one.messages, one.tools) == template.encode_training(
            other.messages, other.tools
        )
    assert [one.reward for one in there] == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    journal = SampleJournal(tmp_path / "there.jsonl")
    assert journal.cost.tokens == sum(one.generated_tokens for one in there)
    # the prompt of the second turn is read again
    assert journal.cost.prompt_tokens > SampleJournal(tmp_path / "here.jsonl").cost.prompt_tokens > 0


# ----------------------------------------------------------------------------- a server that misbehaves


class FakeServer(ThreadingHTTPServer):
    """Answers what `reply(number, body)` says, (status, message or error); keeps every request."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, dict[str, Any]]]) -> None:
        self.reply, self.asked, self.keys, self.lock = reply, [], set(), threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(body)
            server.keys.add(self.headers["Authorization"])
        status, said = server.reply(number, body)
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def completion(content: str | None, *, finish: str = "stop", **message: Any) -> tuple[int, dict[str, Any]]:
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": content, **message},
    }
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    return 200, {**head, "choices": [choice], "usage": usage}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def fake(monkeypatch) -> Iterator[Callable[..., FakeServer]]:
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    servers: list[FakeServer] = []

    def start(reply: Callable[[int, dict[str, Any]], tuple[int, dict[str, Any]]]) -> FakeServer:
        servers.append(FakeServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def player_of(server: FakeServer, template: ChatTemplate, key: str | None = None) -> EndpointPlayer:
    return EndpointPlayer(endpoint.Endpoint(server.url, "m", key, template, 2), 2)


@pytest.mark.parametrize(
    ("problem", "said", "stop", "refused"),
    [
        (0, completion("7", reasoning_content="3+4=7"), StopReason.ANSWERED, None),
        (0, completion("<think>3+4=7</think>7"), StopReason.ANSWERED, None),
        (0, completion("8", reasoning_content="a guess at it"), StopReason.ANSWERED, "wrong_answer"),
        (0, completion("7"), StopReason.ANSWERED, "malformed_reasoning"),
        (0, completion("7</think>", reasoning_content="3+4"), StopReason.MALFORMED, "malformed_reasoning"),
        (0, completion("", reasoning_content="3+4=7, so"), StopReason.MALFORMED, "malformed_reasoning"),
        (0, completion("", reasoning_content="3+4=", finish="length"), StopReason.TRUNCATED, "truncated"),
        (0, (400, {"error": {"message": "too long"}}), StopReason.INFRASTRUCTURE, "not_judged"),
        (
            2,
            completion(None, reasoning_content="look it up", tool_calls=[call("stock", '{"item": "1"')]),
            StopReason.MALFORMED,
            "tool_protocol",
        ),
        (
            2,
            completion(None, reasoning_content="look it up", tool_calls=[call("rob", "{}")]),
            StopReason.MALFORMED,
            "tool_protocol",
        ),
        (
            2,
            completion(
                None,
                reasoning_content="look it up",
                tool_calls=[call("stock", '{"item": "1", "shop": "2", "day": "3"}')],
            ),
            StopReason.TURNS_EXHAUSTED,
            "terminal_state",
        ),
    ],
)
def test_every_end_of_a_served_sample_has_its_filter(fake, template, problems, problem, said, stop, refused) -> None:
    server = fake(lambda number, body: said)
    one = problems[problem]
    trajectory = Trajectory(one.id, one.task, 0, 0)
    player_of(server, template)._endpoint.episode(one, trajectory, Sampling(), 0)
    assert trajectory.stop_reason is stop
    _, rejections = filter_samples([trajectory], Judge(template, min_tokens=1))
    assert rejections.counts == ({} if refused is None else {refused: 1})


def test_what_a_server_is_sent(fake, template, problems, tmp_path, monkeypatch) -> None:
    """OpenAI's shape: arguments as text, results joined to calls, our switches beside; the key from its variable."""
    arguments = {"item": "1", "shop": "2", "day": "3"}
    replies = [
        completion(None, reasoning_content="look it up", tool_calls=[call("stock", json.dumps(arguments))]),
        completion(str(problems[2].answer), reasoning_content="there it is"),
    ]
    server = fake(lambda number, body: replies[number])
    monkeypatch.setenv("THE_KEY", "secret")
    template.tokenizer.save(tmp_path / "student")
    expert = Expert(name="e", model="m", url=server.url, api_key_env="THE_KEY", concurrency=1)
    player = open_expert(expert, tmp_path / "student", device=torch.device("cpu"), episode_tokens=512, max_turns=4)
    [found] = ask(player, problems[2:], tmp_path / "s.jsonl", samples=1, top_k=5)
    assert found.reward == 1.0
    assert server.keys == {"Bearer secret"}
    first, second = server.asked
    assert first["tools"] == found.tools
    assert first["top_k"] == 5
    assert "min_p" not in first
    assert first["chat_template_kwargs"] == {"enable_thinking": True}
    assert first["seed"] != second["seed"]
    _, assistant, result = second["messages"]
    assert json.loads(assistant["tool_calls"][0]["function"]["arguments"]) == arguments
    assert result["tool_call_id"] == assistant["tool_calls"][0]["id"]


def test_a_server_that_goes_away_costs_nothing_that_was_finished(fake, template, tmp_path) -> None:
    pool = [Problem(f"p{i}", "arithmetic", f"Compute {i}+1.", i + 1) for i in range(8)]
    gone = {"after": 5}

    def reply(number: int, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if number >= gone["after"]:
            return 503, {"error": {"message": "down"}}
        return completion("1", reasoning_content="because it is")

    server = fake(reply)
    with pytest.raises(EnvironmentProblem, match="'m' does not answer") as failure:
        ask(player_of(server, template), pool, tmp_path / "s.jsonl", samples=1)
    assert failure.value.exit_code == 4
    answered = [body["messages"][0]["content"] for body in server.asked[:5]]
    gone["after"] = 1000
    server.asked.clear()
    found = ask(player_of(server, template), pool, tmp_path / "s.jsonl", samples=1)
    assert len(found) == 8
    again = [body["messages"][0]["content"] for body in server.asked]
    assert sorted([*answered, *again]) == sorted(problem.prompt for problem in pool)


def test_a_wrong_key_is_the_environments_problem_at_once(fake, template, tmp_path) -> None:
    server = fake(lambda number, body: (401, {"error": {"message": "no"}}))
    with pytest.raises(EnvironmentProblem, match="does not answer"):
        ask(player_of(server, template), PROBLEMS[:1], tmp_path / "s.jsonl", samples=40)
    assert len(server.asked) <= 2
