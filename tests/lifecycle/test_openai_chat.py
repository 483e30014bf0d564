"""What clients of OpenAI's chat API rely on, checked by the official client. Every test is one promise."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from glmctl.data.tokenizer import Tokenizer
from glmctl.serving.server import Server

MESSAGES: Any = [{"role": "user", "content": "Stock of 3 bolts?"}]
NOTHINK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
STOCK: Any = {"type": "function", "function": {"name": "get_stock"}}


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    fields = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": NOTHINK,
        **fields,
    }
    return client.chat.completions.create(**fields)


def say(client: openai.OpenAI, **fields: Any) -> str:
    return ask(client, **fields).choices[0].message.content or ""


# ------------------------------------------------------------------ the shape of an answer


def test_ids_differ_and_say_what_they_are(random_client: openai.OpenAI) -> None:
    first, second = ask(random_client, max_tokens=1), ask(random_client, max_tokens=1)
    assert first.id.startswith("chatcmpl-")
    assert first.id != second.id


def test_object_model_and_created(random_client: openai.OpenAI) -> None:
    answer = ask(random_client, max_tokens=1)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.created > 1_600_000_000


def test_fingerprint_names_the_weights(random_client: openai.OpenAI) -> None:
    assert ask(random_client, max_tokens=1).system_fingerprint == "glmctl-weights-0"


def test_message_has_a_role_and_no_refusal(random_client: openai.OpenAI) -> None:
    message = ask(random_client, max_tokens=1).choices[0].message
    assert (message.role, message.refusal, message.tool_calls) == ("assistant", None, None)


def test_usage_adds_up(random_client: openai.OpenAI) -> None:
    usage = ask(random_client, extra_body={**NOTHINK, "ignore_eos": True}).usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_usage_counts_reasoning(random_client: openai.OpenAI) -> None:
    usage = ask(random_client, extra_body={"ignore_eos": True}).usage
    assert usage.completion_tokens_details.reasoning_tokens == 12


def test_length_is_a_finish_reason(random_client: openai.OpenAI) -> None:
    assert ask(random_client, extra_body={**NOTHINK, "ignore_eos": True}).choices[0].finish_reason == "length"


def test_max_completion_tokens_is_max_tokens(random_client: openai.OpenAI) -> None:
    assert (
        ask(
            random_client, max_tokens=openai.omit, max_completion_tokens=3, extra_body={"ignore_eos": True}
        ).usage.completion_tokens
        == 3
    )


def test_raw_response_headers(random_client: openai.OpenAI) -> None:
    raw = random_client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, max_tokens=1)
    assert raw.headers["content-type"] == "application/json"
    assert raw.parse().choices


@pytest.mark.parametrize("eos", ["<|endoftext|>", "<|user|>", "<|observation|>"])
def test_each_end_token_stops_and_is_not_shown(
    random_client: openai.OpenAI, tiny_tokenizer: Tokenizer, eos: str
) -> None:
    answer = ask(random_client, logit_bias={str(tiny_tokenizer.id(eos)): 100})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 1


# ------------------------------------------------------------------ messages that are taken


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, *MESSAGES],
        [{"role": "developer", "content": "Be brief."}, *MESSAGES],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "x"}],
        [*MESSAGES, {"role": "assistant", "content": "12", "refusal": None}, {"role": "user", "content": "and nuts?"}],
        [
            *MESSAGES,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "12"},
        ],
    ],
    ids=["system", "developer", "parts", "turns", "tool result"],
)
def test_messages(random_client: openai.OpenAI, messages: Any) -> None:
    assert ask(random_client, messages=messages, max_tokens=2).usage.prompt_tokens > 5


def test_an_answer_can_be_sent_back_as_it_came(random_client: openai.OpenAI) -> None:
    message = ask(random_client, tools=[STOCK], tool_choice="required", max_tokens=120).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12"}
    assert (
        ask(random_client, messages=[*MESSAGES, message, result], tools=[STOCK], max_tokens=2).usage.prompt_tokens > 5
    )


# ------------------------------------------------------------------ sampling


def test_greedy_repeats(random_client: openai.OpenAI) -> None:
    assert say(random_client) == say(random_client)


def test_seed_repeats(random_client: openai.OpenAI) -> None:
    assert say(random_client, temperature=1.5, seed=5) == say(random_client, temperature=1.5, seed=5)


def test_seeds_differ(random_client: openai.OpenAI) -> None:
    assert say(random_client, temperature=1.5, seed=5) != say(random_client, temperature=1.5, seed=6)


def test_n_answers_are_numbered(random_client: openai.OpenAI) -> None:
    answer = ask(random_client, n=4, temperature=1.5, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_top_p_near_zero_is_greedy(random_client: openai.OpenAI) -> None:
    assert say(random_client, temperature=1.5, top_p=1e-6) == say(random_client)


def test_top_k_one_is_greedy(random_client: openai.OpenAI) -> None:
    assert say(random_client, temperature=1.5, extra_body={**NOTHINK, "top_k": 1}) == say(random_client)


def test_logit_bias_forces_a_token(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    token = tiny_tokenizer.encode_plain("x")[0]
    assert say(random_client, logit_bias={str(token): 100}, max_tokens=3) == "xxx"


def test_logit_bias_bans_a_token(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    first = ask(random_client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0].bytes
    bias = {str(index): -100 for index in range(512) if list(tiny_tokenizer.decode_bytes([index])) == first}
    assert (
        ask(random_client, max_tokens=1, logprobs=True, logit_bias=bias).choices[0].logprobs.content[0].bytes != first
    )


def test_frequency_penalty_ends_a_repetition(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(tiny_tokenizer.encode_plain("x")[0]): 8}
    assert say(random_client, logit_bias=bias, max_tokens=8) == "x" * 8
    assert say(random_client, logit_bias=bias, max_tokens=8, frequency_penalty=2) != "x" * 8


def test_min_tokens_holds_the_end_back(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(token): 20 for token in tiny_tokenizer.eos_ids}
    answer = ask(random_client, logit_bias=bias, extra_body={**NOTHINK, "min_tokens": 5})
    assert answer.usage.completion_tokens == 6


# ------------------------------------------------------------------ stop


def test_stop_string_ends_and_is_not_shown(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(tiny_tokenizer.encode_plain("x")[0]): 100}
    answer = ask(random_client, logit_bias=bias, stop="xxx")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 3


def test_stop_list(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    bias = {str(tiny_tokenizer.encode_plain("x")[0]): 100}
    assert ask(random_client, logit_bias=bias, stop=["never", "xx"]).usage.completion_tokens == 2


def test_a_stop_string_that_never_comes_loses_no_text(random_client: openai.OpenAI) -> None:
    assert say(random_client, stop=["\u2603\u2603"]) == say(random_client)


def test_stop_token_ids(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    token = tiny_tokenizer.encode_plain("x")[0]
    answer = ask(random_client, logit_bias={str(token): 100}, extra_body={**NOTHINK, "stop_token_ids": [token]})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)


# ------------------------------------------------------------------ log-probabilities


def test_logprobs_one_entry_a_token(random_client: openai.OpenAI) -> None:
    answer = ask(random_client, logprobs=True, extra_body={**NOTHINK, "ignore_eos": True})
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    assert all(entry.logprob <= 0 for entry in entries)
    assert b"".join(bytes(entry.bytes) for entry in entries)


def test_top_logprobs_are_sorted_and_start_with_the_greedy_token(random_client: openai.OpenAI) -> None:
    for entry in ask(random_client, logprobs=True, top_logprobs=4).choices[0].logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0], abs=1e-5)


def test_no_logprobs_unless_asked(random_client: openai.OpenAI) -> None:
    assert ask(random_client, max_tokens=1).choices[0].logprobs is None


def test_streamed_logprobs_are_the_whole_ones(random_client: openai.OpenAI) -> None:
    whole = ask(random_client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    parts = [
        entry
        for chunk in ask(random_client, logprobs=True, top_logprobs=2, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert [entry.token for entry in parts] == [entry.token for entry in whole]


# ------------------------------------------------------------------ streaming


def test_stream_joins_to_the_whole(random_client: openai.OpenAI) -> None:
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(random_client, stream=True)]
    assert "".join(pieces) == say(random_client)


def test_stream_starts_with_the_role_and_ends_with_a_reason(random_client: openai.OpenAI) -> None:
    chunks = list(ask(random_client, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) == {None}


def test_stream_chunks_share_one_id(random_client: openai.OpenAI) -> None:
    chunks = list(ask(random_client, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_stream_usage_comes_last_and_alone(random_client: openai.OpenAI) -> None:
    chunks = list(ask(random_client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_has_no_usage_unless_asked(random_client: openai.OpenAI) -> None:
    assert all(chunk.usage is None for chunk in ask(random_client, stream=True))


def test_stream_of_n_interleaves_choices(random_client: openai.OpenAI) -> None:
    texts = {0: "", 1: ""}
    for chunk in ask(random_client, n=2, seed=3, temperature=1.2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    whole = ask(random_client, n=2, seed=3, temperature=1.2)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_closing_a_stream_frees_its_place(random_client: openai.OpenAI, random_server: Server) -> None:
    stream = ask(random_client, stream=True, max_tokens=400, extra_body={**NOTHINK, "ignore_eos": True})
    next(stream)
    stream.close()
    # the next requests fill every place: they could not if the first still held one
    assert len(ask(random_client, n=8, max_tokens=2).choices) == 8


def test_async_client_and_cancelled_task(random_client: openai.OpenAI) -> None:
    async def scenario() -> str:
        async with openai.AsyncOpenAI(base_url=random_client.base_url, api_key="none", max_retries=0) as other:
            endless = {**NOTHINK, "ignore_eos": True}
            call = other.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=400, extra_body=endless)
            task = asyncio.create_task(call)
            await asyncio.sleep(0)
            task.cancel()
            answer = await other.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, extra_body=NOTHINK
            )
            return answer.choices[0].message.content or ""

    assert asyncio.run(scenario()) == say(random_client)


# ------------------------------------------------------------------ reasoning


def test_reasoning_and_content_are_apart(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    """With `</think>` made likely from the first token on, what follows is content."""
    bias = {str(tiny_tokenizer.id("</think>")): 100}
    answer = ask(random_client, extra_body={}, logit_bias=bias, max_tokens=1)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1


def test_thinking_streams_as_reasoning_content(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    begin = tiny_tokenizer.id("<think>")
    forced = {"structured_outputs": {"regex": "[ab]{3}"}}
    stream = ask(
        random_client, extra_body=forced, logit_bias={str(begin): 50}, frequency_penalty=2, max_tokens=8, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert not any(delta.content for delta in deltas[1:])


@pytest.mark.parametrize(
    "off", [NOTHINK, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}], ids=["kwargs", "z.ai", "effort"]
)
def test_each_spelling_turns_thinking_off(random_client: openai.OpenAI, off: Any) -> None:
    assert ask(random_client, extra_body=off).usage.completion_tokens_details.reasoning_tokens == 0


# ------------------------------------------------------------------ errors


def test_unknown_model_is_not_found(random_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        ask(random_client, model="huge")
    assert error.value.code == "model_not_found"


def test_bad_value_names_its_field(random_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(random_client, temperature=3)
    assert error.value.param == "temperature"
    assert error.value.type == "invalid_request_error"


def test_too_long_is_a_context_length_error(random_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(random_client, messages=[{"role": "user", "content": "a1 " * 2000}])
    assert error.value.code == "context_length_exceeded"


def test_images_are_refused(random_client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}
    with pytest.raises(openai.BadRequestError):
        ask(random_client, messages=[{"role": "user", "content": [image]}])


def test_what_cannot_be_honoured_is_refused_by_name(random_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(random_client, modalities=["text", "audio"])
    assert error.value.param == "modalities"


def test_what_changes_nothing_is_accepted(random_client: openai.OpenAI) -> None:
    inert: Any = {"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "modalities": ["text"]}
    inert |= {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium", "parallel_tool_calls": True}
    assert say(random_client, **inert) == say(random_client)


def test_foreign_fields_are_ignored(random_client: openai.OpenAI) -> None:
    assert say(random_client, extra_body={**NOTHINK, "mm_processor_kwargs": {}, "cache_salt": "x"}) == say(
        random_client
    )


def test_unknown_routes_are_not_found(random_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        random_client.embeddings.create(model="tiny", input="x")
