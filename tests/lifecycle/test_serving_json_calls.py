"""A model whose template writes tool calls as JSON: from SFT through its folder to the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from glmctl.commands._stage import execute
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import styled
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ServeRecipe, SftRecipe
from glmctl.serving.run import load_service
from glmctl.serving.server import Server
from glmctl.training import session

ASKED: Any = [{"role": "user", "content": "Stock of 3 bolts?"}]
NOTHINK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
PROPERTIES = {"item": {"type": "string"}, "count": {"enum": [1, 2, 3]}, "near": {"$ref": "#/$defs/place"}}
STOCK: Any = {
    "type": "function",
    "function": {
        "name": "get_stock",
        "parameters": {
            "type": "object",
            "properties": PROPERTIES,
            "required": ["item", "count", "near"],
            "$defs": {"place": {"enum": ["shop", "</tool_call>"]}},
        },
    },
}
BARE: Any = {"type": "function", "function": {"name": "stop"}}
GIVEN = {"item": 'a "3" bolt\n</tool_call>', "count": 3, "near": "shop"}
CALLING = {
    "role": "assistant",
    "reasoning_content": 'I could write <tool_call>{"name": "stop", "arguments": {}}</tool_call>',
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_stock", "arguments": GIVEN}}],
}
RESULT = {"role": "tool", "content": "12"}
ANSWER = {"role": "assistant", "reasoning_content": "12 found", "content": "There are 12."}


def served(folder: Path, *, draft: int = 0) -> Iterator[openai.OpenAI]:
    recipe = ServeRecipe(name="s", model=str(folder), served_name="tiny", max_slots=4, speculative=draft)
    server = Server(load_service(recipe), "127.0.0.1", 0, drain_seconds=0)
    server.start()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            yield client
    finally:
        server.stop()


def ask(client: openai.OpenAI, messages: Any = ASKED, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0, **fields})


def joined(chunks: Any) -> tuple[str, str, list[list[str]], str | None]:
    """Reasoning, content, [name, arguments] of each call, and the finish reason of a stream."""
    reasoning, content, finish = "", "", None
    calls: list[list[str]] = []
    for chunk in chunks:
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                if part.function.name:
                    assert part.index == len(calls)
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments or ""
    return reasoning, content, calls, finish


# ------------------------------------------------------------------ under a grammar


@pytest.fixture(scope="module")
def random_json(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> Iterator[openai.OpenAI]:
    folder: Path = tmp_path_factory.mktemp("json")
    save_model(GlmMoe(tiny_config.model_copy(update={"max_position_embeddings": 2048}), seed=0), folder)
    tiny_tokenizer.save(folder, styled("json"))
    yield from served(folder, draft=1)


@pytest.fixture
def closing(tiny_tokenizer: Tokenizer) -> dict[str, int]:
    """A bias to the quote, so that a random model's strings end."""
    return {str(token): 20 for token in tiny_tokenizer.encode_plain('"')}


FORCED: Any = {"tool_choice": "required", "max_tokens": 300, "extra_body": NOTHINK, "parallel_tool_calls": False}


@pytest.mark.parametrize("temperature", [0, 2])
def test_a_required_call_follows_its_schema(
    random_json: openai.OpenAI, closing: dict[str, int], temperature: float
) -> None:
    fields = {**FORCED, "tools": [STOCK], "temperature": temperature, "seed": 5, "logit_bias": closing}
    choice = ask(random_json, **fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    given = json.loads(call.function.arguments)
    assert call.function.name == "get_stock"
    assert given.keys() == PROPERTIES.keys()
    assert given["count"] in (1, 2, 3)
    assert given["near"] in ("shop", "</tool_call>")
    streamed = joined(ask(random_json, **fields, stream=True))
    assert streamed == ("", "", [["get_stock", call.function.arguments]], "tool_calls")


def test_a_named_tool_is_the_one_that_is_called(random_json: openai.OpenAI, closing: dict[str, int]) -> None:
    named = {"type": "function", "function": {"name": "get_stock"}}
    fields = {**FORCED, "tool_choice": named, "tools": [BARE, STOCK], "logit_bias": closing}
    (call,) = ask(random_json, **fields).choices[0].message.tool_calls
    assert call.function.name == "get_stock"


# ------------------------------------------------------------------ of its own accord


@pytest.fixture(scope="module")
def taught(
    tmp_path_factory: pytest.TempPathFactory, learnt_tokenizer: Tokenizer, tiny_config: ModelConfig
) -> Iterator[openai.OpenAI]:
    """The client of a model that `sft` with `tool_style.calls: json` has taught one conversation by heart."""
    root: Path = tmp_path_factory.mktemp("taught")
    shape = {"vocab_size": learnt_tokenizer.vocab_size, "max_position_embeddings": 1024}
    save_model(GlmMoe(tiny_config.model_copy(update=shape), seed=0), root / "base")
    learnt_tokenizer.save(root / "base")
    row = {"messages": [*ASKED, CALLING, RESULT, ANSWER], "tools": [STOCK]}
    (root / "talk.jsonl").write_text(json.dumps(row) + "\n")
    recipe = SftRecipe.model_validate(
        {
            "name": "json",
            "model": str(root / "base"),
            "data": [str(root / "talk.jsonl")],
            "tool_style": {"calls": "json"},
            "steps": 120,
            "batch_tokens": 1024,
            "sequence_length": 1024,
            "optimizer": {"type": "adamw"},
            "schedule": {"peak_lr": 0.008, "final_lr": 0.001, "warmup_fraction": 0.05},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SAMPLE_TOKENS", 2)
        assert execute(recipe, root / "run")["loss_last"] < 0.05
    yield from served(root / "run")


@pytest.mark.slow
def test_what_sft_taught_as_json_comes_back_as_calls(taught: openai.OpenAI) -> None:
    """Through its exported folder: whole and streamed, with a call quoted in the reasoning and tags in an argument."""
    choice = ask(taught, tools=[STOCK]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == CALLING["reasoning_content"]
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_stock", GIVEN)
    streamed = joined(ask(taught, tools=[STOCK], stream=True))
    assert streamed == (CALLING["reasoning_content"], "", [["get_stock", call.function.arguments]], "tool_calls")
    sent_back = {**CALLING, "tool_calls": [call.model_dump()]}
    after = ask(taught, [*ASKED, sent_back, {**RESULT, "tool_call_id": call.id}], tools=[STOCK]).choices[0]
    assert (after.finish_reason, after.message.content) == ("stop", "There are 12.")
