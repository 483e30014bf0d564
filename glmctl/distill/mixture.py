"""The hybrid model's training data: verified answers with their reasoning, and some without any (`/nothink`)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

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


def epochs(tokens: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, float]:
    """How often each part is shown so that its trained tokens have its share; the scarcest need is shown once.

    `tokens` are the trained tokens of one showing. Without `shares` every part is shown once.
    """
    if not shares:
        return dict.fromkeys(tokens, 1.0)
    needed = {name: shares[name] / count for name, count in tokens.items()}
    return {name: value / min(needed.values()) for name, value in needed.items()}


def repeat(rows: Sequence[Conversation], times: float, seed: int) -> list[Conversation]:
    """Each row `floor(times)` times, and as many once more, drawn by `seed`, as the rest of `times` asks for."""
    whole = math.floor(times)
    more = set(random.Random(seed).sample(range(len(rows)), round((times - whole) * len(rows))))
    return [row for index, row in enumerate(rows) for _ in range(whole + (index in more))]


def _without_reasoning(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}
