"""One episode as a state machine over tokens: what the model wrote goes in, the next prompt or the end comes out.

Token alignment (spec section 3.2): GLM has no end-of-turn token. A turn ends with the role token that opens the next
block, so after a tool call the model's own `<|observation|>` already is the header of the tool results, and the
continuation is the rest of that block and the assistant's generation prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glmctl.data.chat import ChatTemplate
from glmctl.errors import GlmctlError
from glmctl.rl.environment import Environment, InfrastructureFailure, Message, Problem, StopReason, Tool
from glmctl.rl.tasks import environment

OBSERVATION = "<|observation|>"
USER = "<|user|>"


@dataclass
class Trajectory:
    """One episode. `tokens`, `loss_mask` and `logprobs` have one entry a token (log-prob 0.0 where the mask is 0)."""

    problem_id: str
    task: str
    group: int
    """index of the prompt in the batch: the samples of one prompt share it"""
    sample: int
    enable_thinking: bool = True
    tokens: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1 on what the model generated, closing role token included"""
    logprobs: list[float] = field(default_factory=list)
    """nats, under the sampling temperature, before any truncation of the distribution"""
    versions: list[int] = field(default_factory=list)
    """weight version of each stretch of generated tokens: one a model turn, one more for each time it was carried"""
    born: int = 0
    """the step in which its first token was generated"""
    reward: float | None = None
    """None: infrastructure failure, to be masked"""
    stop_reason: StopReason = StopReason.INFRASTRUCTURE
    well_formed: bool = False
    """every model turn parsed under the template and closed by the right role token"""
    detail: str = ""
    """what was malformed, or what failed"""
    info: dict[str, Any] = field(default_factory=dict)
    """what the environment said of its last judgement, e.g. how many tests passed"""
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] | None = None

    @property
    def generated_tokens(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.loss_mask)

    @property
    def assistant_turns(self) -> list[Message]:
        """The model's own messages, those that parsed."""
        return [message for message in self.messages if message["role"] == "assistant"]

    def to_row(self) -> dict[str, Any]:
        """The trajectory as one JSON-able row."""
        return dict(vars(self))

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Trajectory:
        """The inverse of `to_row` after a trip through JSON."""
        return cls(**{**row, "stop_reason": StopReason(row["stop_reason"])})


class Episode:
    """Drives one environment from generated tokens. `trajectory` grows as it goes and is complete once `done`."""

    def __init__(self, template: ChatTemplate, problem: Problem, trajectory: Trajectory, max_turns: int) -> None:
        assert max_turns > 0
        self.trajectory = trajectory
        self.done = False
        self._template = template
        self._problem = problem
        self._turns_left = max_turns
        self._turn_start = 0
        self._environment: Environment | None = None
        self.judging_seconds = 0.0
        """spent in the environment: rewards and tools"""

    def start(self, prompts: dict[str, list[int]]) -> None:
        """Reset the environment and encode the opening prompt; `prompts` remembers it for the problem's other samples.

        An environment that fails here ends the episode as infrastructure.
        """
        trajectory = self.trajectory
        try:
            self._environment = environment(self._problem)
            trajectory.messages, trajectory.tools = self._environment.reset()
        except GlmctlError:
            raise
        except Exception as error:  # noqa: BLE001 - see _act
            return self._fail(error)
        if self._problem.id not in prompts:
            prompts[self._problem.id] = self._template.encode_prompt(
                trajectory.messages, trajectory.tools, enable_thinking=trajectory.enable_thinking
            )
        self._append(prompts[self._problem.id])

    def resume(self) -> None:
        """Bring a fresh environment to where a carried trajectory stopped, by its messages again.

        Environments are deterministic, so the observations are those that stand in its tokens. One that fails now, or
        ends earlier, ends the episode as infrastructure.
        """
        trajectory = self.trajectory
        # the turn that was cut short, or is about to begin, starts behind the last token that is not the model's
        self._turn_start = len(trajectory.tokens) - _trailing(trajectory.loss_mask)
        self._turns_left -= len(trajectory.assistant_turns)
        try:
            self._environment = environment(self._problem)
            self._environment.reset()
            for message in trajectory.assistant_turns:
                if self._environment.step(message).done:
                    raise InfrastructureFailure("the environment ended where it had gone on before")
        except GlmctlError:
            raise
        except Exception as error:  # noqa: BLE001 - see _act
            self._fail(error)

    @property
    def turn_tokens(self) -> int:
        """Tokens that the present turn has."""
        return len(self.trajectory.tokens) - self._turn_start

    def suspend(self, version: int) -> None:
        """The rollout is stopped here; what the turn has was made by weights `version`."""
        if self.turn_tokens and not self.done:
            self.trajectory.versions.append(version)

    def push(self, token: int, logprob: float) -> None:
        """One more token of the model's turn, with its log-prob under the sampling temperature."""
        self.trajectory.tokens.append(token)
        self.trajectory.loss_mask.append(1)
        self.trajectory.logprobs.append(logprob)

    def truncate(self) -> None:
        """The context has no room for another turn."""
        self._end(0.0, StopReason.TRUNCATED, "the context is full")

    def finish_turn(self, finish_reason: str, version: int) -> None:
        """The model's turn is over ("stop" | "length" | "aborted"): parse it, act on it, and append what follows."""
        self.trajectory.versions.append(version)
        self._turns_left -= 1
        if finish_reason == "aborted":
            return self._fail(InfrastructureFailure("the engine gave the request up"))
        if finish_reason == "length":
            return self._end(0.0, StopReason.TRUNCATED, "the turn used up its tokens")
        message, problem = self._read_turn()
        if problem:
            return self._end(0.0, StopReason.MALFORMED, problem)
        self.trajectory.messages.append(message)
        self._act(message)

    def _act(self, message: Message) -> None:
        assert self._environment is not None
        began = time.perf_counter()
        try:
            transition = self._environment.step(message)
        except GlmctlError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an environment raises is its failure, not the model's:
            # recorded, counted, masked, and the run stops when a fifth of a batch ends so
            return self._fail(error)
        finally:
            self.judging_seconds += time.perf_counter() - began
        if transition.done:
            assert transition.reward is not None
            assert transition.stop is not None
            self.trajectory.well_formed = True
            self.trajectory.info = {key: value for key, value in transition.info.items() if key != "problem"}
            return self._end(transition.reward, transition.stop, str(transition.info.get("problem", "")))
        self.trajectory.messages += transition.messages
        if self._turns_left == 0:
            self.trajectory.well_formed = True
            return self._end(0.0, StopReason.TURNS_EXHAUSTED, "")
        reply = self._template.encode_reply(transition.messages, enable_thinking=self.trajectory.enable_thinking)
        # the model's closing role token already is the header of the reply
        assert reply[0] == self.trajectory.tokens[-1]
        self._append(reply[1:])

    def _read_turn(self) -> tuple[Message, str]:
        """The generated turn as a message, and what is wrong with it ("" when well-formed)."""
        trajectory, tokenizer = self.trajectory, self._template.tokenizer
        *written, closer = trajectory.tokens[self._turn_start :]
        parsed = self._template.parse(tokenizer.decode(written), trajectory.tools, thinking=trajectory.enable_thinking)
        if parsed.problem is not None:
            return {}, parsed.problem
        observation = tokenizer.id(OBSERVATION)
        # a model that came with another chat format has an end token of its own beside ours
        ends = {observation} if parsed.tool_calls else {*tokenizer.eos_ids} - {observation}
        if closer not in ends:
            wanted = OBSERVATION if parsed.tool_calls else USER
            return {}, f"closed by {tokenizer.decode([closer])!r} instead of {wanted}"
        return parsed.message(), ""

    def _append(self, tokens: Sequence[int]) -> None:
        """Tokens that the model did not write; its next turn starts behind them."""
        self.trajectory.tokens += tokens
        self.trajectory.loss_mask += [0] * len(tokens)
        self.trajectory.logprobs += [0.0] * len(tokens)
        self._turn_start = len(self.trajectory.tokens)

    def _end(self, reward: float, stop: StopReason, detail: str) -> None:
        self.done = True
        self.trajectory.reward, self.trajectory.stop_reason, self.trajectory.detail = reward, stop, detail

    def _fail(self, error: Exception) -> None:
        self.done = True
        self.trajectory.reward, self.trajectory.stop_reason = None, StopReason.INFRASTRUCTURE
        self.trajectory.detail = f"{type(error).__name__}: {error}"


def _trailing(mask: Sequence[int]) -> int:
    """How many ones `mask` ends with."""
    return next((count for count, made in enumerate(reversed(mask)) if not made), len(mask))
