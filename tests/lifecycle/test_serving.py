"""A served model through the official client: a tiny GLM that has learnt a few conversations by heart, so that
reasoning, answers and tool calls really come from the model, the template and the parser together."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.model.network import GlmMoe
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_stock",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["item", "count"],
            },
        },
    }
]
SUM = "What is 2+3?"
STOCK = "Stock of 3 bolts?"
CALL = {"name": "get_stock", "arguments": {"item": "bolt", "count": 3}}


def service_of(model: GlmMoe, learnt_tokenizer: Tokenizer, *, slots: int = 4, queue: int = 16) -> Service:
    engine = Engine(
        model, max_slots=slots, speculative=1, token_bytes=lambda token: learnt_tokenizer.decode_bytes([token])
    )
    return Service("tiny", learnt_tokenizer, ChatTemplate(learnt_tokenizer), EngineWorker(engine, queue))


@pytest.fixture(scope="module")
def server(learnt: GlmMoe, learnt_tokenizer: Tokenizer) -> Iterator[Server]:
    server = Server(service_of(learnt, learnt_tokenizer), "127.0.0.1", 0)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask(client: openai.OpenAI, prompt: str = SUM, **more: Any) -> Any:
    more.setdefault("temperature", 0)
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": prompt}], **more)


def joined(chunks: Any) -> dict[str, Any]:
    """A streamed answer put together again."""
    out: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "finish": None, "usage": None, "roles": []}
    for chunk in chunks:
        out["usage"] = chunk.usage or out["usage"]
        for choice in chunk.choices:
            delta = choice.delta
            out["roles"] += [delta.role] if delta.role else []
            out["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            out["content"] += delta.content or ""
            for call in delta.tool_calls or ():
                if call.id is not None:
                    assert call.index == len(out["calls"]), "id and name come first, once"
                    assert call.function.arguments == ""
                    out["calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
                out["calls"][call.index]["arguments"] += call.function.arguments
            assert out["finish"] is None or not choice.finish_reason
            out["finish"] = choice.finish_reason or out["finish"]
    return out


# ------------------------------------------------------------------ chat


def test_reasoning_and_content_are_apart(client: openai.OpenAI) -> None:
    response = ask(client)
    choice = response.choices[0]
    assert (response.object, response.model, choice.index) == ("chat.completion", "tiny", 0)
    assert choice.message.role == "assistant"
    assert choice.message.content == "It is 5."
    assert choice.message.reasoning_content == choice.message.reasoning == "2+3=5"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None


def test_usage_counts_prompt_and_answer(client: openai.OpenAI, learnt_tokenizer: Tokenizer) -> None:
    usage = ask(client).usage
    template = ChatTemplate(learnt_tokenizer)
    assert usage.prompt_tokens == len(template.encode_prompt([{"role": "user", "content": SUM}]))
    made = len(learnt_tokenizer.encode("\n<think>2+3=5</think>\nIt is 5.<|user|>"))
    assert usage.completion_tokens == made
    assert usage.total_tokens == usage.prompt_tokens + made


@pytest.mark.parametrize(
    "extra",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking": {"type": "disabled"}},
    ],
    ids=["template-kwargs", "z.ai"],
)
def test_nothink_answers_without_reasoning(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    message = ask(client, extra_body=extra).choices[0].message
    assert message.content == "Five."
    assert message.reasoning_content is None


def test_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    out = joined(ask(client, stream=True))
    assert (out["reasoning"], out["content"], out["finish"]) == ("2+3=5", "It is 5.", "stop")
    assert out["roles"] == ["assistant"]
    assert out["usage"] is None


def test_stream_ends_with_usage_when_asked(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask(client).usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_raw_stream_is_server_sent_events_ending_in_done(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    body = {"model": "tiny", "messages": [{"role": "user", "content": SUM}], "stream": True, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.read().decode().split("\n\n")
    connection.close()
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    first, *_, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def test_openai_stream_helper_understands_the_chunks(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": STOCK}]
    with client.chat.completions.stream(model="tiny", messages=messages, tools=TOOLS, temperature=0) as events:  # type: ignore[arg-type]
        final = events.get_final_completion()
    call = final.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert final.choices[0].message.reasoning_content == "look it up"


def test_tool_call(client: openai.OpenAI) -> None:
    choice = ask(client, STOCK, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.reasoning_content == "look it up"
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call-")
    assert call.function.name == "get_stock"
    assert isinstance(call.function.arguments, str)
    assert json.loads(call.function.arguments) == CALL["arguments"]


def test_streamed_tool_call(client: openai.OpenAI) -> None:
    out = joined(ask(client, STOCK, tools=TOOLS, stream=True))
    assert out["finish"] == "tool_calls"
    (call,) = out["calls"]
    assert call["name"] == "get_stock"
    assert json.loads(call["arguments"]) == CALL["arguments"]


def test_tool_loop_goes_on_after_the_result(client: openai.OpenAI) -> None:
    """The client's own message object, sent back as it came, renders as it was generated."""
    first = ask(client, STOCK, tools=TOOLS).choices[0].message
    messages: list[Any] = [
        {"role": "user", "content": STOCK},
        first.model_dump(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "12"},
    ]
    second = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, temperature=0)  # type: ignore[arg-type]
    assert second.choices[0].message.content == "There are 12."
    assert second.choices[0].message.reasoning_content == "12 found"


def test_tool_choice_none_hides_the_tools(client: openai.OpenAI) -> None:
    with_choice = ask(client, STOCK, tools=TOOLS, tool_choice="none").usage.prompt_tokens
    assert with_choice == ask(client, STOCK).usage.prompt_tokens


def test_content_parts_of_text_are_one_text(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+3?"}]
    response = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": parts}],
        temperature=0,  # type: ignore[list-item]
    )
    assert response.choices[0].message.content == "It is 5."


def test_developer_messages_are_system_messages(client: openai.OpenAI) -> None:
    counts = [
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": role, "content": "be brief"}, {"role": "user", "content": SUM}],  # type: ignore[misc]
            max_tokens=1,
        ).usage.prompt_tokens
        for role in ("system", "developer")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_token_limit_ends_with_length(client: openai.OpenAI, field: str) -> None:
    response = ask(client, **{field: 4})
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens_is_cut_off(client: openai.OpenAI, stream: bool) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    response = ask(client, stop=["t is 5"], stream=stream, extra_body=extra)
    if stream:
        out = joined(response)
        assert (out["content"], out["finish"]) == ("I", "stop")
    else:
        assert response.choices[0].message.content == "I"
        assert response.choices[0].finish_reason == "stop"


def test_logprobs_follow_the_tokens(client: openai.OpenAI) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    entries = ask(client, logprobs=True, top_logprobs=3, extra_body=extra).choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode().strip() == "Five."
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)
        assert entry.logprob <= 0
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=3, stream=True, extra_body=extra)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_n_choices_are_numbered_and_differ(client: openai.OpenAI) -> None:
    response = ask(client, "abc", n=4, temperature=2.0, max_tokens=12, seed=5)
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    texts = {(choice.message.content, choice.message.reasoning_content) for choice in response.choices}
    assert len(texts) > 1
    assert response.usage.completion_tokens <= 48


def test_a_seed_repeats_and_no_seed_does_not(client: openai.OpenAI) -> None:
    def text(**more: Any) -> str:
        return (
            client.completions.create(model="tiny", prompt="xyz", max_tokens=24, temperature=2.0, **more)
            .choices[0]
            .text
        )

    assert text(seed=3) == text(seed=3)
    assert text(seed=3) != text(seed=4)
    assert text() != text()


def test_answers_do_not_depend_on_other_requests(client: openai.OpenAI) -> None:
    alone = ask(client, "abc", temperature=1.5, max_tokens=20, seed=11).choices[0].message
    streams = [ask(client, f"other {i}", temperature=1.5, max_tokens=60, stream=True) for i in range(3)]
    beside = ask(client, "abc", temperature=1.5, max_tokens=20, seed=11).choices[0].message
    for stream in streams:
        stream.close()
    assert alone == beside


# ------------------------------------------------------------------ other routes


def test_completion_of_text_and_of_its_tokens_agree(client: openai.OpenAI, learnt_tokenizer: Tokenizer) -> None:
    text = "def add(a"
    a = client.completions.create(model="tiny", prompt=text, max_tokens=8, temperature=0)
    b = client.completions.create(model="tiny", prompt=learnt_tokenizer.encode(text), max_tokens=8, temperature=0)
    assert a.object == "text_completion"
    assert a.choices[0].text == b.choices[0].text
    assert a.usage == b.usage


def test_completion_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="def add(a", max_tokens=8, temperature=0).choices[0]
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="def add(a",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.text
    assert chunks[-2].choices[0].finish_reason == whole.finish_reason
    assert chunks[-1].usage is not None


def test_completion_of_several_prompts_numbers_the_choices(client: openai.OpenAI) -> None:
    response = client.completions.create(model="tiny", prompt=["abc", "def add"], n=2, max_tokens=3, temperature=0)
    assert [choice.index for choice in response.choices] == [0, 1, 2, 3]
    assert response.choices[0].text == response.choices[1].text


def test_completion_logprobs_align_with_the_text(client: openai.OpenAI) -> None:
    choice = client.completions.create(model="tiny", prompt="def add(a", max_tokens=6, temperature=0, logprobs=2)
    logprobs = choice.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(value, abs=1e-5)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "glmctl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_engine_and_server_give_the_same_tokens(
    client: openai.OpenAI, learnt: GlmMoe, learnt_tokenizer: Tokenizer
) -> None:
    """Colocated and HTTP generation are one engine: same seed, same text."""
    prompt = learnt_tokenizer.encode("def add(")
    params = SamplingParams(max_tokens=20, temperature=1.3, seed=77, stop_token_ids=learnt_tokenizer.eos_ids)
    made = Engine(learnt, max_slots=1, max_length=64).generate([Request("x", prompt, params)])[0]
    tokens = made.tokens[:-1] if made.finish_reason == "stop" else made.tokens
    served = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=1.3, seed=77)
    assert served.choices[0].text == learnt_tokenizer.decode(tokens, skip_special=True)


def get(server: Server, path: str, method: str = "GET", body: Any = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_tokenize_and_detokenize_are_inverse(server: Server, learnt_tokenizer: Tokenizer) -> None:
    text = "add(34, 57) <|user|> ä"
    status, body = get(server, "/tokenize", "POST", {"prompt": text})
    assert status == 200
    assert json.loads(body) == {
        "tokens": learnt_tokenizer.encode(text),
        "count": len(learnt_tokenizer.encode(text)),
        "max_model_len": 512,
    }
    status, body = get(server, "/detokenize", "POST", {"tokens": learnt_tokenizer.encode(text)})
    assert (status, json.loads(body)) == (200, {"prompt": text})


def test_tokenize_of_messages_is_the_prompt(server: Server, learnt_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": SUM}]
    _, body = get(server, "/tokenize", "POST", {"messages": messages})
    assert json.loads(body)["tokens"] == ChatTemplate(learnt_tokenizer).encode_prompt(messages)


def test_health_ready_and_metrics(server: Server, client: openai.OpenAI) -> None:
    assert get(server, "/health")[0] == 200
    assert get(server, "/ready")[0] == 200
    ask(client)
    status, text = get(server, "/metrics")
    assert status == 200
    values = {
        line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line and not line.startswith("#")
    }
    assert values["glmctl_generated_tokens_total"] > 0
    assert values["glmctl_requests_running"] == values["glmctl_requests_queued"] == 0
    assert values["glmctl_drafts_total"] >= values["glmctl_drafts_accepted_total"]
    assert values['glmctl_http_responses_total{status="200"}'] > 0


# ------------------------------------------------------------------ errors as the client sees them


def test_errors_have_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert wrong_model.value.code == "model_not_found"
    assert wrong_model.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, max_tokens=512)
    assert long.value.code == "context_length_exceeded"
    assert long.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(client, temperature=2.1)
    assert hot.value.param == "temperature"
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]
    with pytest.raises(openai.BadRequestError, match="text") as picture:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": image}])  # type: ignore[list-item,misc]
    assert picture.value.param == "messages[0].content"


# ------------------------------------------------------------------ key, exposure, port


def test_with_a_key_every_route_needs_it(learnt: GlmMoe, learnt_tokenizer: Tokenizer) -> None:
    server = Server(service_of(learnt, learnt_tokenizer), "127.0.0.1", 0, key="s3cret")
    server.start()
    try:
        for path in ("/v1/models", "/health", "/ready", "/metrics", "/nowhere", "/v1/../health", "//health"):
            status, body = get(server, path)
            assert status == 401, path
            assert "s3cret" not in body
        assert get(server, "/v1/chat/completions", "POST", {})[0] == 401
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret", max_retries=0) as right:
            assert ask(right).choices[0].message.content == "It is 5."
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="s3cret2", max_retries=0) as wrong,
            pytest.raises(openai.AuthenticationError),
        ):
            ask(wrong)
    finally:
        server.stop()


def test_a_foreign_host_header_is_refused(server: Server) -> None:
    for host, expected in (("evil.example", 421), ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.putrequest("GET", "/health", skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        assert connection.getresponse().status == expected, host
        connection.close()


def test_a_reachable_host_needs_a_key(learnt: GlmMoe, learnt_tokenizer: Tokenizer) -> None:
    with pytest.raises(RecipeError, match="API key"):
        Server(service_of(learnt, learnt_tokenizer), "0.0.0.0", 0)


def test_a_taken_port_is_an_environment_problem(server: Server, learnt: GlmMoe, learnt_tokenizer: Tokenizer) -> None:
    with pytest.raises(EnvironmentProblem, match=str(server.port)) as error:
        Server(service_of(learnt, learnt_tokenizer), "127.0.0.1", server.port)
    assert error.value.exit_code == 4
