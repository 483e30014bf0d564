"""Two hundred hostile patterns and schemas: each is refused by name or compiled, and the next client is not kept
waiting, neither by a compilation nor by the mask of a token."""

from __future__ import annotations

import http.client
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.grammar import GrammarConstraint
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker


@pytest.fixture(scope="module")
def server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    engine = Engine(
        GlmMoe(tiny_config, seed=0), max_slots=2, token_bytes=lambda token: tiny_tokenizer.decode_bytes([token])
    )
    service = Service("tiny", tiny_tokenizer, ChatTemplate(tiny_tokenizer), EngineWorker(engine, 4))
    server = Server(service, "127.0.0.1", 0, drain_seconds=0)
    server.start()
    yield server
    server.stop()


def nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


WRONG_PATTERNS = [
    *("(", ")", "[", "[a", "a{", "*", "+", "?", "(?", "(?P<", "(?P<n>a)(?P<n>b)", "\\", "[z-a]", "a{3,1}"),
    *("(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b", r"(a)\1", "(?>a)", "(?1)", "(?(1)a|b)", r"\p{Nope}", r"\u{110000}"),
    *("(?z)a", r"\c", r"\x{zz}", "(*FAIL)", "[]", "(?P<1>a)", "(?#"),
]
LARGE_PATTERNS = [
    nested("(", "a", "+)+", 30),
    nested("(", "a", "*)*b", 30),
    nested("(", "a", "{0,9})", 8),
    nested("(", "a", "{9})", 7),
    nested("(a|", "a", ")*", 25),
    "(a?){900}a{900}",
    "(.*a){40}",
    "(.*){100}x",
    "(a|aa|aaa)+" * 40,
    "(x+x+)+y",
    "[^a]*[^b]*[^c]*" * 60,
    "|".join("ab" * n for n in range(1, 80)),
    "(?i)" + "straße" * 300,
    ".{0,4000}",
    r"(\p{L}{1,50}){1,50}",
    r"[\x{0}-\x{10FFFF}]{500}",
    "a{99999999}",
    "a{1,99999999}",
    "a**",
    "(?R)",
    "[[:nope:]]",
    "a" * 8000,
    "\\" * 8191,
    "(a{0,50}){0,50}",
    "(a{0,200}b{0,200}){0,40}",
]
WRONG_VALUES: list[Any] = [
    None,
    7,
    -1,
    1.5,
    "x",
    "",
    [],
    [7],
    [None],
    {},
    {"a": 7},
    True,
    [[]],
    10**19,
    "(",
    [{"type": 9}],
]
KEYWORDS = ("type", "properties", "required", "items", "enum", "pattern", "minLength", "maxItems", "anyOf", "$ref")


def chain(length: int) -> dict[str, Any]:
    """Definitions that each hold two of the next: 2^length of them when written out."""
    definitions: dict[str, Any] = {
        f"d{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(length)
    }
    definitions[f"d{length}"] = {"type": "null"}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def deep(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


SCHEMAS: list[Any] = [
    *({keyword: value} for keyword, value in itertools.product(KEYWORDS, WRONG_VALUES)),
    chain(25),
    deep(18),
    {"$ref": "#"},
    {"$ref": "#/nowhere"},
    {"$ref": "http://127.0.0.1:9/schema"},
    {"$ref": "file:///etc/passwd"},
    {"allOf": [{"$ref": "#"}]},
    {"anyOf": [{"$ref": "#/anyOf/0"}]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"not": {}},
    {"type": "string", "minLength": 10**12},
    {"type": "string", "pattern": nested("(", "a", "+)+", 30)},
    {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "object", "minProperties": 10**6},
    {"type": "integer", "multipleOf": 1e-300},
    {"type": "number", "minimum": 1, "maximum": 0},
    {"enum": [str(index) for index in range(9000)]},
    {"type": "object", "properties": {f"p{index}": {"type": "integer"} for index in range(2000)}},
    {"type": "object", "patternProperties": {nested("(", "a", "+)+", 20): {}, "^a": {"type": "null"}}},
    {"oneOf": [{"type": "string", "pattern": f"^{index}.*"} for index in range(60)]},
    {"x-guidance": {"whitespace_pattern": nested("(", " ", "+)+", 30)}},
]


def post(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> tuple[int, Any]:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 3,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
        **fields,
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len(WRONG_PATTERNS) + len(LARGE_PATTERNS) + len(SCHEMAS) >= 200


@pytest.mark.parametrize("pattern", WRONG_PATTERNS)
def test_a_wrong_pattern_is_refused_by_name(server: Server, pattern: str) -> None:
    status, answer = post(server, structured_outputs={"regex": pattern})
    assert status == 400
    assert answer["error"]["param"] == "structured_outputs"
    assert answer["error"]["code"] == "invalid_schema"


@pytest.mark.parametrize("pattern", LARGE_PATTERNS, ids=range(len(LARGE_PATTERNS)))
def test_a_large_pattern_is_followed_or_refused(server: Server, pattern: str) -> None:
    status, answer = post(server, structured_outputs={"regex": pattern})
    assert status in (200, 400)
    assert status == 200 or answer["error"]["param"] == "structured_outputs"
    assert post(server)[0] == 200


def test_no_schema_is_a_server_error(server: Server) -> None:
    statuses: Counter[int] = Counter()
    for schema in SCHEMAS:
        wish = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, answer = post(server, response_format=wish)
        statuses[status] += 1
        assert status in (200, 400), schema
        if status == 400:
            assert answer["error"]["param"].startswith("response_format"), schema
    # neither everything nor nothing is refused
    assert min(statuses[200], statuses[400]) > 20, statuses
    assert post(server)[0] == 200


def test_no_tool_schema_is_a_server_error(server: Server) -> None:
    for schema in SCHEMAS[::3]:
        function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
        status, answer = post(server, tools=[{"type": "function", "function": function}], tool_choice="required")
        assert status in (200, 400), schema
        # the prompt shows the tool, and may become too long
        assert status == 200 or answer["error"]["param"].startswith(("tools", "messages")), schema
    assert post(server)[0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_that_left_its_grammar_is_an_error(
    server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came by then looks whole, and is not what was asked for."""
    monkeypatch.setattr(GrammarConstraint, "problem", "too many states")
    fields = {"structured_outputs": {"regex": "ab"}, **({"prompt": "x"} if path == "/v1/completions" else {})}
    status, answer = post(server, path, **fields)
    assert (status, answer["error"]["code"]) == (400, "grammar_too_complex")
    assert answer["error"]["param"] == "structured_outputs"


def test_compiled_grammars_are_forgotten_in_time(server: Server) -> None:
    grammars = server._service.grammars
    for number in range(100):
        assert post(server, structured_outputs={"regex": f"a{{{number + 1}}}b"}, max_tokens=1)[0] == 200
    assert len(grammars._compiler._compiled) <= 64
