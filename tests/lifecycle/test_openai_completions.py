"""Plain completions, scores of prompts, and models, through the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from glmctl.data.tokenizer import Tokenizer


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": "def add(", "max_tokens": 8, "temperature": 0, **fields}
    )


# ------------------------------------------------------------------ plain completions and models


def test_completion(random_client: openai.OpenAI) -> None:
    answer = complete(random_client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.usage.completion_tokens <= 8


def test_completion_of_token_ids(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    assert (
        complete(random_client, prompt=tiny_tokenizer.encode("def add(")).choices[0].text
        == complete(random_client).choices[0].text
    )


def test_completion_echo(random_client: openai.OpenAI) -> None:
    assert complete(random_client, echo=True).choices[0].text == "def add(" + complete(random_client).choices[0].text


def test_completion_echo_of_nothing_more(random_client: openai.OpenAI) -> None:
    answer = complete(random_client, echo=True, max_tokens=0)
    assert answer.choices[0].text == "def add("
    assert answer.usage.completion_tokens == 0


def test_completion_scores_its_prompt(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    """What lm-eval's local-completions reads: prompt and one more token, the first without a score."""
    prompt = tiny_tokenizer.encode("def add(a, b)")
    logprobs = (
        complete(random_client, prompt=[prompt], echo=True, max_tokens=1, logprobs=1, temperature=0).choices[0].logprobs
    )
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(prompt) + 1
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    assert logprobs.text_offset[-1] == len("def add(a, b)")


def test_completion_scores_agree_with_generation(random_client: openai.OpenAI, tiny_tokenizer: Tokenizer) -> None:
    """A token scored as part of a prompt has the log-probability that it had when it was generated."""
    prompt = tiny_tokenizer.encode("def add(")
    made = complete(random_client, prompt=prompt, max_tokens=1, logprobs=1).choices[0].logprobs
    (token,) = [index for index in range(512) if tiny_tokenizer.decode([index]) == made.tokens[0]][:1]
    scored = complete(random_client, prompt=[*prompt, token], echo=True, max_tokens=0, logprobs=1).choices[0].logprobs
    assert scored.token_logprobs[-1] == pytest.approx(made.token_logprobs[0], abs=1e-4)


def test_completion_logprobs(random_client: openai.OpenAI) -> None:
    logprobs = complete(random_client, logprobs=3).choices[0].logprobs
    for token, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == pytest.approx(value, abs=1e-5)


def test_completion_stream(random_client: openai.OpenAI) -> None:
    pieces = [choice.text for chunk in complete(random_client, stream=True) for choice in chunk.choices]
    assert "".join(pieces) == complete(random_client).choices[0].text


def test_completion_batch(random_client: openai.OpenAI) -> None:
    answer = complete(random_client, prompt=["a", "b"], n=2, max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_models(random_client: openai.OpenAI) -> None:
    assert [model.id for model in random_client.models.list()] == ["tiny"]
    assert random_client.models.retrieve("tiny").object == "model"
