"""The hybrid model's training data: verified answers with their reasoning, and some without any (`/nothink`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from glmctl.data.conversations import Conversation
from glmctl.rl.environment import Message
from glmctl.rl.episode import Trajectory
from glmctl.rl.seeds import derive_seed


def thinking(sample: Trajectory) -> Conversation:
    """The trajectory as a conversation, reasoning kept."""
    return Conversation(sample.messages, sample.tools, enable_thinking=True)


def direct(sample: Trajectory) -> Conversation:
    """The same verified answer (and tool calls) without reasoning, for a prompt that carries `/nothink`."""
    messages = [_without_reasoning(message) for message in sample.messages]
    return Conversation(messages, sample.tools, enable_thinking=False)


def mix(samples: Sequence[Trajectory], direct_fraction: float, seed: int) -> list[Conversation]:
    """`direct_fraction` of the samples (rounded) as direct conversations, the others thinking, in the given order."""
    rng = random.Random(derive_seed(seed, "direct"))
    chosen = set(rng.sample(range(len(samples)), round(direct_fraction * len(samples))))
    return [direct(one) if index in chosen else thinking(one) for index, one in enumerate(samples)]


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
