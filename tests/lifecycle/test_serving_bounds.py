"""Row S5 of the reliability plan: what is exactly at a limit is served, and one more is refused by name."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest

from glmctl.serving.guard import MAX_HEADER_BYTES
from glmctl.serving.server import Server

CONTEXT = 2048
MESSAGE = {"role": "user", "content": "x"}
NOTHINK = {"chat_template_kwargs": {"enable_thinking": False}}


def tool(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}"}}


def post(server: Server, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body), headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, json.loads(raw) if raw.startswith(b"{") else raw


@pytest.mark.parametrize(
    ("path", "name", "most", "more"),
    [
        ("/v1/chat/completions", "n", 8, 9),
        ("/v1/chat/completions", "top_logprobs", 20, 21),
        ("/v1/chat/completions", "stop", ["a" * 256] * 16, ["a"] * 17),
        ("/v1/chat/completions", "stop_token_ids", [1] * 16, [1] * 17),
        ("/v1/chat/completions", "temperature", 2, 2.01),
        ("/v1/chat/completions", "presence_penalty", -2, -2.01),
        ("/v1/chat/completions", "top_p", 1, 1.01),
        ("/v1/chat/completions", "seed", 2**64 - 1, 2**64),
        ("/v1/chat/completions", "logit_bias", {"5": -100}, {"5": -101}),
        ("/v1/completions", "logprobs", 20, 21),
        ("/v1/completions", "prompt", ["a"] * 16, ["a"] * 17),
        ("/tokenize", "messages", [MESSAGE] * 2048, [MESSAGE] * 2049),
        ("/tokenize", "tools", [tool(index) for index in range(128)], [tool(index) for index in range(129)]),
    ],
)
def test_the_limit_is_served_and_one_more_is_not(
    random_server: Server, path: str, name: str, most: Any, more: Any
) -> None:
    fixed: dict[str, Any] = {"model": "tiny", "messages": [MESSAGE], "logprobs": True, **NOTHINK}
    if path == "/v1/completions":
        fixed = {"model": "tiny", "prompt": "x"}
    if path != "/tokenize":
        fixed["max_tokens"] = 1
    assert post(random_server, path, {**fixed, name: most})[0] == 200
    status, answer = post(random_server, path, {**fixed, name: more})
    assert status == 400
    assert answer["error"]["param"].startswith(name)


def test_prompt_and_answer_fill_the_context_exactly(random_server: Server) -> None:
    body = {"model": "tiny", "prompt": [40] * (CONTEXT - 3), "ignore_eos": True}
    status, answer = post(random_server, "/v1/completions", {**body, "max_tokens": 3})
    assert (status, answer["usage"]["total_tokens"]) == (200, CONTEXT)
    status, answer = post(random_server, "/v1/completions", {**body, "max_tokens": 4})
    assert (status, answer["error"]["param"]) == (400, "max_tokens")
    status, answer = post(random_server, "/v1/completions", {**body, "prompt": [40] * CONTEXT})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


def test_headers_up_to_their_limit(random_server: Server) -> None:
    body = {"prompt": "x"}
    assert post(random_server, "/tokenize", body, X="a" * (MAX_HEADER_BYTES - 1024))[0] == 200
    assert post(random_server, "/tokenize", body, X="a" * MAX_HEADER_BYTES)[0] == 431
