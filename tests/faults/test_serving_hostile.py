"""Hostile requests: whatever arrives, the answer is a 4xx in OpenAI's shape that names the field, and never a 5xx."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.body import MAX_BODY_BYTES, MAX_DEPTH
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

CANARY = "canary-7f3a9c"
KEY = "key-canary-51d2"


@pytest.fixture(scope="module")
def server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    engine = Engine(
        GlmMoe(tiny_config, seed=0),
        max_slots=2,
        max_length=128,
        token_bytes=lambda token: tiny_tokenizer.decode_bytes([token]),
    )
    service = Service("tiny", tiny_tokenizer, ChatTemplate(tiny_tokenizer), EngineWorker(engine, 4), strict=True)
    server = Server(service, "127.0.0.1", 0, key=KEY)
    server.start()
    yield server
    server.stop()


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, {"Authorization": f"Bearer {KEY}", **headers})
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    return response.status, json.loads(raw) if raw else None


def chat(**fields: Any) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2, **fields}
    return json.dumps(body).encode()


def raw_chat(fragment: str) -> bytes:
    """A valid request with one raw JSON member more."""
    return (
        '{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}], ' + fragment + "}"
    ).encode()


def raw_content(content: str) -> bytes:
    return ('{"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": ' + content + "}]}").encode()


MESSAGE = {"role": "user", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}


def named(tool: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool}}


# (name, body, the field that the error names, or None where the body as a whole is wrong)
CORPUS: list[tuple[str, bytes, str | None]] = [
    ("empty", b"", None),
    ("not json", b"hello", None),
    ("truncated", b'{"model": "tiny", "messages": [', None),
    ("trailing", b"{} {}", None),
    ("array", b"[]", None),
    ("null", b"null", None),
    ("string", b'"x"', None),
    ("number", b"17", None),
    ("byte order mark", b"\xef\xbb\xbf{}", None),
    ("utf-16", '{"a": 1}'.encode("utf-16"), None),
    ("bad utf-8", b'{"model": "\xff\xfe"}', None),
    ("overlong utf-8", b'{"model": "\xc0\xaf"}', None),
    ("nul byte", b'{"model": "a\x00b"}', None),
    ("control character", b'{"model": "a\x01b"}', None),
    ("single quotes", b"{'model': 'tiny'}", None),
    ("comment", b'{"model": "tiny" /* x */}', None),
    ("trailing comma", b'{"model": "tiny",}', None),
    ("deep arrays", raw_chat('"logit_bias": ' + "[" * 100_000 + "]" * 100_000), None),
    ("deep objects", raw_chat('"logit_bias": ' + '{"a":' * 5000 + "1" + "}" * 5000), None),
    ("too deep", raw_chat('"tools": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH), None),
    ("duplicate key", raw_chat('"max_tokens": 3'), "max_tokens"),
    ("nested duplicate", raw_content('"x", "role": "user"'), "role"),
    ("NaN", raw_chat('"temperature": NaN'), None),
    ("Infinity", raw_chat('"temperature": Infinity'), None),
    ("-Infinity", raw_chat('"top_p": -Infinity'), None),
    ("1e999", raw_chat('"temperature": 1e999'), None),
    ("5000 digits", raw_chat('"seed": ' + "9" * 5000), None),
    ("10^500", raw_chat('"n": 1' + "0" * 500), None),
    ("high surrogate", raw_content('"\\ud800"'), "messages[0].content"),
    ("low surrogate", raw_content('"a\\udc00b"'), "messages[0].content"),
    ("swapped pair", raw_content('"\\udc00\\ud800"'), "messages[0].content"),
    ("surrogate in key", raw_chat('"logit_bias": {"\\ud800": 1}'), "logit_bias"),
    ("surrogate in model", b'{"model": "\\ud800", "messages": []}', "model"),
    ("nothing", b"{}", "model"),
    ("no messages", b'{"model": "tiny"}', "messages"),
    ("no model", json.dumps({"messages": [MESSAGE]}).encode(), "model"),
    ("no message", chat(messages=[]), "messages"),
    ("messages of wrong type", chat(messages="hi"), "messages"),
    ("message of wrong type", chat(messages=["hi"]), "messages[0]"),
    ("unknown role", chat(messages=[{"role": "root", "content": "x"}]), "messages[0]"),
    ("no role", chat(messages=[{"content": "x"}]), "messages[0]"),
    ("null content", chat(messages=[{"role": "user", "content": None}]), "messages[0].content"),
    ("number content", chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    ("image", chat(messages=[{"role": "user", "content": [IMAGE]}]), "messages[0].content"),
    ("file url", chat(messages=[{"role": "user", "content": [{"type": "file"}]}]), "messages[0].content"),
    ("part of wrong type", chat(messages=[{"role": "user", "content": [7]}]), "messages[0].content"),
    ("part without text", chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content"),
    ("unknown key", chat(tempreature=1), "tempreature"),
    ("unknown key in message", chat(messages=[{**MESSAGE, "file": "/etc/passwd"}]), "messages[0].file"),
    ("too many messages", chat(messages=[MESSAGE] * 2049), "messages"),
    ("max_tokens 0", chat(max_tokens=0), "max_tokens"),
    ("max_tokens -1", chat(max_tokens=-1), "max_tokens"),
    ("max_tokens 2^31", chat(max_tokens=2**31), "max_tokens"),
    ("max_tokens float", chat(max_tokens=2.5), "max_tokens"),
    ("max_tokens text", chat(max_tokens="2"), "max_tokens"),
    ("max_tokens true", chat(max_tokens=True), "max_tokens"),
    ("max_tokens beyond context", chat(max_tokens=128), "max_tokens"),
    ("n 0", chat(n=0), "n"),
    ("n 9", chat(n=9), "n"),
    ("n 10^9", chat(n=10**9), "n"),
    ("temperature -0.1", chat(temperature=-0.1), "temperature"),
    ("temperature 2.01", chat(temperature=2.01), "temperature"),
    ("temperature list", chat(temperature=[1]), "temperature"),
    ("top_p 0", chat(top_p=0), "top_p"),
    ("top_p 1.01", chat(top_p=1.01), "top_p"),
    ("top_k -2", chat(top_k=-2), "top_k"),
    ("top_k 10^9", chat(top_k=10**9), "top_k"),
    ("min_p 1", chat(min_p=1), "min_p"),
    ("seed 2^64", chat(seed=2**64), "seed"),
    ("17 stops", chat(stop=["a"] * 17), "stop"),
    ("empty stop", chat(stop=[""]), "stop[0]"),
    ("long stop", chat(stop="a" * 257), "stop[0]"),
    ("stop of wrong type", chat(stop=7), "stop"),
    ("top_logprobs 21", chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    ("top_logprobs alone", chat(top_logprobs=2), "top_logprobs"),
    ("penalty 2.1", chat(presence_penalty=2.1), "presence_penalty"),
    ("repetition penalty 0", chat(repetition_penalty=0), "repetition_penalty"),
    ("logit bias 101", chat(logit_bias={"5": 101}), "logit_bias.5"),
    ("logit bias of a word", chat(logit_bias={"five": 1}), "logit_bias"),
    ("logit bias of no token", chat(logit_bias={"99999": 1}), "logit_bias"),
    ("1025 logit biases", chat(logit_bias={str(index): 1 for index in range(1025)}), "logit_bias"),
    ("stop token of no token", chat(stop_token_ids=[99999]), "stop_token_ids"),
    ("min_tokens over max_tokens", chat(min_tokens=3), "min_tokens"),
    ("user of wrong type", chat(user=5), "user"),
    ("audio", chat(audio={"voice": "x", "format": "wav"}), "audio"),
    ("modalities", chat(modalities=["text", "audio"]), "modalities"),
    ("functions", chat(functions=[{"name": "f"}]), "functions"),
    ("web search", chat(web_search_options={}), "web_search_options"),
    ("verbosity", chat(verbosity="high"), "verbosity"),
    ("guided json", chat(guided_json={}), "guided_json"),
    ("format of no kind", chat(response_format={"type": "xml"}), "response_format.type"),
    ("format without schema", chat(response_format={"type": "json_schema"}), "response_format"),
    ("schema without format", chat(response_format={"type": "text", "json_schema": {"name": "x"}}), "response_format"),
    ("forced tool without tools", chat(tool_choice="required"), "tool_choice"),
    ("forced tool that is not there", chat(tools=[TOOL], tool_choice=named("g")), "tool_choice"),
    ("tools of one name", chat(tools=[TOOL, TOOL]), "tools"),
    ("custom tool", chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type"),
    ("129 tools", chat(tools=[TOOL] * 129), "tools"),
    ("tool without name", chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name"),
    ("tool name", chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    ("template kwargs", chat(chat_template_kwargs={"cache": "x"}), "chat_template_kwargs.cache"),
    (
        "arguments not json",
        chat(
            messages=[
                {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]}
            ]
        ),
        "messages[0].tool_calls[0].function.arguments",
    ),
    (
        "arguments not an object",
        chat(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]),
        "messages[0].tool_calls[0].function.arguments",
    ),
    ("stream options alone", chat(stream_options={"include_usage": True}), "stream_options"),
    ("prompt beyond context", chat(messages=[{"role": "user", "content": "a1" * 200}]), "messages"),
    ("prompt beyond all bounds", chat(messages=[{"role": "user", "content": "x" * 1_000_000}]), "messages"),
]


@pytest.mark.parametrize(("body", "param"), [pytest.param(b, p, id=name) for name, b, p in CORPUS])
def test_bad_bodies_are_refused_by_name(server: Server, body: bytes, param: str | None) -> None:
    status, answer = post(server, "/v1/chat/completions", body)
    assert status == 400
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] == param
    if param:
        assert param.split(".")[-1].split("[")[0] in answer["error"]["message"]
    assert CANARY not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt[0]"),
        ("/v1/completions", {"prompt": [2**40]}, "prompt[0]"),
        ("/v1/completions", {"prompt": [512]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], "a"]}, "prompt[1]"),
        ("/v1/completions", {"prompt": ["a"] * 17}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 128}, "prompt"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/messages", {"model": "tiny", "messages": [MESSAGE]}, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "best_of": 10**9}, "best_of"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [MESSAGE]}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
def test_bad_fields_of_the_other_routes(server: Server, path: str, body: dict[str, Any], param: str | None) -> None:
    if path == "/v1/completions":
        body = {"model": "tiny", "max_tokens": 2, **body}
    status, answer = post(server, path, json.dumps(body).encode())
    assert status == 400
    if path.startswith("/v1/messages"):
        assert answer["type"] == "error"
        assert (param or "") in answer["error"]["message"]
        return
    assert answer["error"]["param"] == param


NUMBERS = ("max_tokens", "max_completion_tokens", "n", "top_logprobs", "min_tokens", "top_k", "seed", "temperature")
NUMBERS += ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
VALUES = ("-1", "0", "1e999", "NaN", "-Infinity", "2147483648", "1" + "0" * 500, '"1"', "[]", "{}", "true", "-0.0")
VALUES += ("1e-320", "99999999999999999999", '"\\ud800"', "[[[[]]]]", "0.1")
BODIES = [raw_chat(f'"{name}": {value}').replace(b'"max_tokens": 2, ', b"") for name in NUMBERS for value in VALUES]
FIELDS = ("messages", "tools", "tool_choice", "response_format", "stop", "logit_bias", "stream_options", "model")
FIELDS += ("chat_template_kwargs", "thinking", "structured_outputs", "stop_token_ids", "metadata")
ODD = (b"null", b"7", b'"\\u0000"', b"[]", b"{}", b"[null]", b'{"type": []}', b'[{"role": "user"}]', b'{"": ""}')


def test_no_body_is_a_server_error(server: Server) -> None:
    bodies = [*BODIES]
    for name in FIELDS:
        for value in ODD:
            fields = {"model": b'"tiny"', "messages": b'[{"role": "user", "content": "x"}]', "max_tokens": b"1"}
            fields[name] = value
            bodies.append(b"{" + b", ".join(b'"%s": %s' % (key.encode(), raw) for key, raw in fields.items()) + b"}")
    assert len(bodies) >= 300
    statuses: Counter[int] = Counter()
    for body in bodies:
        status, answer = post(server, "/v1/chat/completions", body)
        statuses[status] += 1
        assert status == 200 or answer["error"].keys() == {"message", "type", "param", "code"}, body
    assert set(statuses) <= {200, 400, 404}, statuses


def test_nothing_that_a_request_names_is_fetched(server: Server) -> None:
    """Not a picture, not a file, not a schema elsewhere: a listener on this machine hears nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for scheme in ("http", "https", "file", "ftp", "gopher"):
            url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/x"
            part = {"type": "image_url", "image_url": {"url": url}}
            assert post(server, "/v1/chat/completions", chat(messages=[{"role": "user", "content": [part]}]))[0] == 400
            schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}
            assert post(server, "/v1/chat/completions", chat(response_format=schema))[0] == 400
            tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": url}}}
            post(server, "/v1/chat/completions", chat(tools=[tool], tool_choice="required"))
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_misspelt_field_gets_its_nearest_name(server: Server) -> None:
    _, answer = post(server, "/v1/chat/completions", chat(tempreature=1))
    assert "temperature" in answer["error"]["message"]


def test_unknown_routes_and_methods(server: Server) -> None:
    status, answer = post(server, "/v1/embeddings", b"{}")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, answer = post(server, "/v1/models", b"{}")
    assert status == 405
    assert answer["error"]["message"]


def test_large_bodies_are_refused_with_and_without_a_declared_length(server: Server) -> None:
    status, answer = post(server, "/v1/chat/completions", b"x" * (MAX_BODY_BYTES + 1))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    pieces = (b"x" * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 1))
    try:
        connection.request("POST", "/v1/completions", pieces, {"Authorization": f"Bearer {KEY}"}, encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused and closed while the rest was still being sent
    connection.close()
    # at the limit the body is read: it is the JSON that is wrong
    assert post(server, "/v1/chat/completions", b" " * MAX_BODY_BYTES)[0] == 400


def exchange(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request)
        return connection.recv(65536)


AUTH = f"Authorization: Bearer {KEY}\r\n".encode()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        + AUTH
        + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        + AUTH
        + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + AUTH + b"Content-Length: -2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        + AUTH
        + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["both lengths", "two lengths", "negative length", "bad chunk", "no http", "tls", "huge header"],
)
def test_broken_http_is_a_400(server: Server, request_bytes: bytes) -> None:
    assert exchange(server, request_bytes).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Authorization: Bearer\r\n",
        "Authorization: Bearer  \r\n",
        f"Authorization: Basic {KEY}\r\n",
        f"Authorization: Bearer {KEY}x\r\n",
        f"Authorization: Bearer {KEY[:-1]}\r\n",
        f"Authorization: {KEY}\r\n",
        f"X-Api-Key: {KEY}x\r\n",
        f"X-Api-Key: {KEY}\r\nAuthorization: Bearer {KEY}\r\n",
        f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer x\r\n",
    ],
)
@pytest.mark.parametrize("target", ["/v1/models", "/health", "//v1/models", "/v1/%6dodels", "/v1/models?x=/health"])
def test_no_way_around_the_key(server: Server, target: str, header: str) -> None:
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode()
    assert exchange(server, request).startswith(b"HTTP/1.1 401")


def test_no_prompt_and_no_key_in_logs_and_metrics(
    server: Server, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for body in (chat(), chat(temperature=9), chat(stream=True)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {KEY}"})
        connection.getresponse().read()
        connection.close()
    post(server, "/v1/chat/completions", chat(), Authorization="Bearer wrong" + KEY)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    metrics = connection.getresponse().read().decode()
    connection.close()
    written = "".join(capfd.readouterr()) + caplog.text + metrics
    assert "glmctl_generated_tokens_total" in metrics
    assert CANARY not in written
    assert KEY not in written


def test_the_server_still_answers_after_all_that(server: Server) -> None:
    status, answer = post(server, "/v1/chat/completions", chat())
    assert status == 200
    assert answer["usage"]["completion_tokens"] <= 2
