"""Who speaks: a model behind a server, one of ours, or a script. Messages and tools in, one assistant message out."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.distill.endpoint import RETRIES, TIMEOUT_SECONDS, incoming, outgoing
from glmctl.engine.request import Request, SamplingParams
from glmctl.errors import EnvironmentProblem, RecipeError
from glmctl.model.folder import load_model
from glmctl.recipe.agentic import EndpointActor, ModelActor
from glmctl.rl.environment import Message, Tool
from glmctl.rl.rollout import rollout_engine
from glmctl.run.directory import resolve_model

MODEL_EPISODE_TOKENS = 8192
"""longest conversation with a model of ours (and never more than its context)"""


class Malformed(Exception):
    """What an actor wrote is no message in the format: its trajectory is over."""


class Actor(Protocol):
    """Somebody who can be asked for the next assistant message. Safe to ask from several threads."""

    def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, thinking: bool, seed: int) -> Message:
        """The next message. Raises Malformed, or EnvironmentProblem when nobody answers."""
        ...


class EndpointSpeaker:
    """Any OpenAI-compatible server."""

    def __init__(self, spec: EndpointActor) -> None:
        from openai import OpenAI

        key = os.environ.get(spec.api_key_env) or "none"
        self._client = OpenAI(base_url=spec.url, api_key=key, max_retries=RETRIES, timeout=TIMEOUT_SECONDS)
        self._spec = spec

    def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, thinking: bool, seed: int) -> Message:
        """See `Actor`."""
        import openai

        try:
            answer = self._client.chat.completions.create(
                model=self._spec.model,
                messages=outgoing(messages),  # type: ignore[arg-type]
                tools=tools or openai.omit,  # type: ignore[arg-type]
                temperature=self._spec.temperature,
                max_tokens=self._spec.max_tokens,
                seed=seed,
                extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
            )
        except openai.BadRequestError as error:
            raise Malformed(f"the server refuses the request: {error}") from error
        except openai.OpenAIError as error:
            raise EnvironmentProblem(
                f"{self._spec.url}: '{self._spec.model}' does not answer: {error}", hint="the same command continues"
            ) from error
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            raise Malformed("the turn used up its tokens")
        message, broken = incoming(choice.message)
        if broken:
            raise Malformed(broken)
        return message


class ModelSpeaker:
    """A model of ours; one request at a time, for its engine belongs to one thread."""

    def __init__(self, spec: ModelActor) -> None:
        folder = resolve_model(spec.model)
        model = load_model(folder, dtype=torch.float32)
        self._engine = rollout_engine(model, MODEL_EPISODE_TOKENS)
        self._template = ChatTemplate.load(folder)
        self._spec = spec
        self._lock = threading.Lock()
        self._asked = 0

    def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, thinking: bool, seed: int) -> Message:
        """See `Actor`."""
        prompt = self._template.encode_prompt(messages, tools, enable_thinking=thinking)
        room = self._engine.max_length - len(prompt)
        if room <= 0:
            raise Malformed("the context is full")
        tokenizer = self._template.tokenizer
        params = SamplingParams(
            max_tokens=min(self._spec.max_tokens, room),
            temperature=self._spec.temperature,
            stop_token_ids=tuple(tokenizer.eos_ids),
            seed=seed,
        )
        with self._lock:
            self._asked += 1
            [done] = self._engine.generate([Request(str(self._asked), prompt, params)])
        if done.finish_reason == "length":
            raise Malformed("the turn used up its tokens")
        parsed = self._template.parse(tokenizer.decode(done.tokens[:-1]), tools, thinking=thinking)
        if parsed.problem is not None:
            raise Malformed(parsed.problem)
        return parsed.message()


def open_speaker(spec: EndpointActor | ModelActor) -> Actor:
    """The actor that a recipe names. RecipeError or DataError for a model that is not there."""
    return EndpointSpeaker(spec) if isinstance(spec, EndpointActor) else ModelSpeaker(spec)


class Script:
    """Follows one task's script: its calls one after another, then its answer.

    `{0}`, `{1}`, ... in an argument or answer are the results of the calls made so far, and `{0.key}` a member of a
    result that is a JSON object, so a script can use what only the tools know.
    """

    def __init__(self, turns: Sequence[dict[str, Any]], where: str) -> None:
        """`turns`: for every user message {calls: [{name, arguments}], answer, reasoning?}."""
        self._turns = turns
        self._where = where

    def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None, *, thinking: bool, seed: int) -> Message:
        """See `Actor`. RecipeError when the script has no turn for this user message."""
        from glmctl.distill.agentic.tasks import filled

        asked = sum(message["role"] == "user" for message in messages) - 1
        if asked >= len(self._turns):
            raise RecipeError(f"{self._where}: the script ends before user message {asked + 1}")
        turn = self._turns[asked]
        since = max(at for at, message in enumerate(messages) if message["role"] == "user")
        made = sum(message["role"] == "assistant" for message in messages[since:])
        results = [str(message["content"]) for message in messages if message["role"] == "tool"]
        calls = turn.get("calls") or []
        if made < len(calls):
            call = calls[made]
            arguments = filled(call["arguments"], results, self._where)
            said: Message = {"role": "assistant", "content": ""}
            said["tool_calls"] = [{"type": "function", "function": {"name": call["name"], "arguments": arguments}}]
            why = call.get("reasoning") or f"I need {call['name']}."
        else:
            said = {"role": "assistant", "content": filled(turn["answer"], results, self._where)}
            why = turn.get("reasoning") or "I have what was asked for."
        return {**said, "reasoning_content": filled(why, results, self._where)} if thinking else said
