"""The clients people have, LiteLLM, LangChain and lm-eval's chat model: they read what the official one reads."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from glmctl.serving.server import Server

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
litellm = pytest.importorskip("litellm")
langchain = pytest.importorskip("langchain_openai")

pytestmark = pytest.mark.slow  # their imports take longer than the tests

QUESTIONS = ["Stock of 3 bolts?", "add 1 and 2", "34+57"]
NOTHINK: Any = {"chat_template_kwargs": {"enable_thinking": False}}
PARAMETERS: Any = {
    "type": "object",
    "properties": {"name": {"enum": ["bolt", "nut"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "get_stock", "description": "", "parameters": PARAMETERS}}


def official(client: openai.OpenAI, question: str, tokens: int = 12) -> str:
    """What the official client gets, greedy and without reasoning."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        extra_body=NOTHINK,
    )
    return answer.choices[0].message.content or ""


def lite(server: Server, question: str = QUESTIONS[0], **more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model": "openai/tiny",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": NOTHINK,
        "num_retries": 0,
    }
    return fields | more


def test_litellm_whole_and_streamed(random_server: Server, random_client: openai.OpenAI) -> None:
    for question in QUESTIONS:
        expected = official(random_client, question)
        whole = litellm.completion(**lite(random_server, question))
        assert whole.choices[0].message.content == expected
        assert whole.usage.completion_tokens <= 12
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        pieces = list(litellm.completion(**lite(random_server, question, stream=True)))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_litellm_tool_call(random_server: Server) -> None:
    fields = lite(random_server, tools=[TOOL], tool_choice="required", max_tokens=120)
    (call, *_) = litellm.completion(**fields).choices[0].message.tool_calls
    assert call.function.name == "get_stock"
    assert json.loads(call.function.arguments).keys() == {"name", "count"}


def test_litellm_error_and_concurrency(random_server: Server, random_client: openai.OpenAI) -> None:
    with pytest.raises(litellm.BadRequestError, match="max_tokens"):
        litellm.completion(**lite(random_server, max_tokens=0))

    async def all_at_once() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**lite(random_server, q)) for q in QUESTIONS))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(all_at_once()) == [official(random_client, question) for question in QUESTIONS]


def chat(server: Server, **more: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0, "extra_body": NOTHINK, "max_retries": 0, **more}
    return langchain.ChatOpenAI(model="tiny", base_url=f"{server.url}/v1", api_key="none", **fields)


def test_langchain_whole_streamed_and_in_batches(random_server: Server, random_client: openai.OpenAI) -> None:
    expected = [official(random_client, question) for question in QUESTIONS]
    model = chat(random_server, stream_usage=True)
    assert [answer.content for answer in model.batch(QUESTIONS)] == expected
    pieces = list(model.stream(QUESTIONS[0]))
    assert "".join(piece.content for piece in pieces) == expected[0]
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert used[-1]["total_tokens"] == model.invoke(QUESTIONS[0]).usage_metadata["total_tokens"]


def test_langchain_tools_and_their_results(random_server: Server) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chat(random_server, max_tokens=120)
    asked = HumanMessage(QUESTIONS[0])
    answer = model.bind_tools([TOOL], tool_choice="required").invoke([asked])
    assert {call["name"] for call in answer.tool_calls} == {"get_stock"}
    assert answer.tool_calls[0]["args"].keys() == {"name", "count"}
    results = [ToolMessage("7", tool_call_id=call["id"]) for call in answer.tool_calls]
    after = chat(random_server).bind_tools([TOOL], tool_choice="none").invoke([asked, answer, *results])
    assert after.content
    assert not after.tool_calls


def test_langchain_structured_output(random_server: Server) -> None:
    class Part(pydantic.BaseModel):
        name: str = pydantic.Field(pattern="^(bolt|nut)$")
        wanted: bool

    part = chat(random_server, max_tokens=200).with_structured_output(Part, method="json_schema").invoke("which?")
    assert isinstance(part, Part)


def test_lm_eval_reads_what_the_official_client_reads(
    random_server: Server, random_client: openai.OpenAI, tmp_path: Path
) -> None:
    """Its task's answers are the official client's: it must score exactly 1."""
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask

    rows = [{"question": q, "answer": official(random_client, q, 8)} for q in QUESTIONS]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ConfigurableTask(
        config={
            "task": "same_text",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["<|user|>"], "max_gen_toks": 8, **NOTHINK},
            "metric_list": [{"metric": "exact_match"}],
        }
    )
    found = simple_evaluate(
        model="local-chat-completions",
        model_args={"base_url": f"{random_server.url}/v1/chat/completions", "model": "tiny", "num_concurrent": 2},
        tasks=[task],
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert found is not None
    assert found["results"]["same_text"]["exact_match,none"] == 1.0
