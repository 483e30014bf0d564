"""Who speaks: a model behind a server, one of ours, or a script. Messages and tools in, one assistant message out."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from glmctl.data.chat import ChatTemplate
from glmctl.distill.endpoint import RETRIES, TIMEOUT_SECONDS, incoming, outgoing
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.runners import device_for
from glmctl.errors import EnvironmentProblem
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
        model = load_model(folder, device=device_for(), dtype=torch.float32)
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
