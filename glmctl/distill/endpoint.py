"""Episodes through an OpenAI-compatible server: messages go out and come back, the environment is ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glmctl.data.chat import ChatTemplate
from glmctl.data.reasoning import split_reasoning
from glmctl.errors import DataError, EnvironmentProblem, GlmctlError
from glmctl.recipe.schema import Sampling
from glmctl.rl.environment import Environment, InfrastructureFailure, Message, Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks import environment

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

RETRIES = 4
"""of one request, with the client's exponential wait: a server that restarts within half a minute is not noticed"""
TIMEOUT_SECONDS = 1800.0
"""a long chain of thought takes its time"""
STRAY = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>", "<tool_response>")
"""tags that a server's parsers leave in the content only when the model lost the format"""


class Endpoint:
    """One model of one server. Thread-safe: an episode keeps everything in its trajectory."""

    def __init__(self, url: str, model: str, key: str | None, template: ChatTemplate, max_turns: int) -> None:
        from openai import OpenAI

        self.template = template
        self._client = OpenAI(base_url=url, api_key=key or "none", max_retries=RETRIES, timeout=TIMEOUT_SECONDS)
        self._url = url
        self._model = model
        self._max_turns = max_turns

    def episode(self, problem: Problem, trajectory: Trajectory, sampling: Sampling, seed: int) -> int:
        """Play `problem` to its end into `trajectory`; returns the prompt tokens that the server counted.

        What the model wrote gets the tokens of `template`, and log-prob 0.0: a server's are of another tokenizer.
        EnvironmentProblem when the server does not answer or refuses the key or the model. A single request that it
        refuses (too long, say) and an environment that fails end this episode as infrastructure.
        """
        read = 0
        try:
            world = environment(problem)
            trajectory.messages, trajectory.tools = world.reset()
            while trajectory.stop_reason is StopReason.INFRASTRUCTURE:
                turn = len(trajectory.versions)
                reply = self._ask(trajectory, sampling, derive_seed(seed, problem.id, trajectory.sample, turn))
                trajectory.versions.append(0)
                read += reply.usage.prompt_tokens if reply.usage else 0
                self._take(reply, world, trajectory)
        except GlmctlError:
            raise
        except Exception as error:  # noqa: BLE001 - an environment may raise anything; it is not the model's fault
            trajectory.detail = f"{type(error).__name__}: {error}"
        self._tokenize(trajectory)
        return read

    def _ask(self, trajectory: Trajectory, sampling: Sampling, seed: int) -> ChatCompletion:
        import openai

        extra: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": trajectory.enable_thinking}}
        # names that are not OpenAI's are sent only when they say something
        extra |= {name: value for name in ("top_k", "min_p") if (value := getattr(sampling, name))}
        try:
            return self._client.chat.completions.create(
                model=self._model,
                messages=outgoing(trajectory.messages),  # type: ignore[arg-type]
                tools=trajectory.tools or openai.omit,  # type: ignore[arg-type]
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=seed,
                extra_body=extra,
            )
        except openai.BadRequestError as error:
            raise InfrastructureFailure(f"{self._url} refuses the request: {error}") from error
        except openai.OpenAIError as error:
            raise EnvironmentProblem(
                f"{self._url}: '{self._model}' does not answer: {error}", hint="the same command continues"
            ) from error

    def _take(self, reply: ChatCompletion, world: Environment, trajectory: Trajectory) -> None:
        """Act on one reply: the trajectory goes on with an observation, or has ended."""
        choice = reply.choices[0]
        message, broken = incoming(choice.message)
        trajectory.messages.append(message)
        if choice.finish_reason == "length":
            return _end(trajectory, 0.0, StopReason.TRUNCATED, "the turn used up its tokens")
        if broken:
            return _end(trajectory, 0.0, StopReason.MALFORMED, broken)
        transition = world.step(message)
        trajectory.well_formed = True
        if transition.done:
            assert transition.reward is not None
            assert transition.stop is not None
            return _end(trajectory, transition.reward, transition.stop, str(transition.info.get("problem", "")))
        trajectory.messages += transition.messages
        if len(trajectory.versions) == self._max_turns:
            return _end(trajectory, 0.0, StopReason.TURNS_EXHAUSTED, "")
        trajectory.well_formed = False

    def _tokenize(self, trajectory: Trajectory) -> None:
        try:
            made = self.template.encode_training(
                trajectory.messages, trajectory.tools, enable_thinking=trajectory.enable_thinking
            )
        except DataError as error:
            # nothing to learn (no reply came), or reasoning where none was asked for
            trajectory.detail = trajectory.detail or error.message
            trajectory.well_formed = False
            return
        trajectory.tokens, trajectory.loss_mask = made.tokens, made.loss_mask
        trajectory.logprobs = [0.0] * len(made.tokens)


def _end(trajectory: Trajectory, reward: float, stop: StopReason, detail: str) -> None:
    trajectory.reward, trajectory.stop_reason, trajectory.detail = reward, stop, detail


def outgoing(messages: Sequence[Message]) -> list[Message]:
    """As OpenAI's API takes them: arguments as JSON text, each tool result joined to its call by an id."""
    sent: list[Message] = []
    waiting: list[str] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            sent.append({**message, "tool_call_id": waiting.pop(0)})
        elif message.get("tool_calls"):
            waiting = [f"call_{at}_{number}" for number in range(len(message["tool_calls"]))]
            calls = [
                {"id": name, "type": "function", "function": _as_text(call["function"])}
                for name, call in zip(waiting, message["tool_calls"], strict=True)
            ]
            sent.append({**message, "tool_calls": calls})
        else:
            sent.append(message)
    return sent


def _as_text(function: Message) -> Message:
    return {"name": function["name"], "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def incoming(reply: Any) -> tuple[Message, str]:
    """The reply as one of our messages, and what is broken about it ("" when nothing is)."""
    message, broken = _incoming(reply)
    try:
        json.dumps(message, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # a character cut in half: no file and no tokenizer takes it
        return {"role": "assistant", "content": ""}, "half a character (a lone surrogate)"
    return message, broken


def _incoming(reply: Any) -> tuple[Message, str]:
    reasoning, content = split_reasoning(reply)
    message: Message = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    calls = []
    for call in reply.tool_calls or []:
        name, text = call.function.name, call.function.arguments or "{}"
        try:
            arguments = json.loads(text)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            # kept as it came, for whoever looks at the rejected sample
            message["content"] = f"{content}\n<tool_call>{name}\n{text}</tool_call>"
            return message, f"the arguments of {name} are no JSON object"
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    if calls:
        message["tool_calls"] = calls
    stray = next((tag for tag in STRAY if tag in content), None)
    if stray is not None:
        return message, f"{stray} inside the content"
    if not content and not calls:
        return message, "an empty answer"
    return message, ""
