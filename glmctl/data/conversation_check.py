"""Conversations of any known format, checked row by row and written in the one form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data.conversations import Conversation, conversations
from glmctl.errors import DataError
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.recipe.schema import ConversationFiles


LISTED = 1000
"""most complaints that are listed one by one; all are counted"""


def check(sources: Sequence[ConversationFiles], to: Path | None = None) -> tuple[dict[str, int], list[str]]:
    """Counts of all rows, and `file:line: what is wrong` of the first `LISTED` that are no conversations.

    Those that are go to `to` as JSON lines. Counts: `rows`, `unusable`, `conversations`, `messages`, `turns`
    (messages of the assistant), `with_tools`, `with_reasoning`, `without_thinking` (conversations of each kind), and
    `characters` of all contents.
    """
    counts = dict.fromkeys(("rows", "unusable", "conversations", "messages", "turns"), 0)
    counts |= dict.fromkeys(("with_tools", "with_reasoning", "without_thinking", "characters"), 0)
    complaints: list[str] = []
    lines: list[str] = []
    for source in sources:
        for place, talk in conversations(source):
            counts["rows"] += 1
            if isinstance(talk, DataError):
                counts["unusable"] += 1
                complaints += [f"{place}: {talk.message}"] if len(complaints) < LISTED else []
                continue
            _count(talk, counts)
            if to is not None:
                lines.append(json.dumps(talk.row(), ensure_ascii=False) + "\n")
    if to is not None:
        atomic.write_text(to, "".join(lines))
    return counts, complaints


def _count(talk: Conversation, counts: dict[str, int]) -> None:
    counts["conversations"] += 1
    counts["messages"] += len(talk.messages)
    counts["turns"] += sum(message["role"] == "assistant" for message in talk.messages)
    counts["with_tools"] += any(message.get("tool_calls") for message in talk.messages)
    counts["with_reasoning"] += any(_reasons(message) for message in talk.messages)
    counts["without_thinking"] += not talk.enable_thinking
    counts["characters"] += sum(len(str(message.get("content") or "")) for message in talk.messages)


def _reasons(message: dict[str, Any]) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in str(message.get("content"))
