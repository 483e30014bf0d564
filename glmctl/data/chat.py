"""Messages to text and to token ids with a loss mask, by the rules of GLM-4.5's chat template (spec section 3.2).

There is no end-of-turn token: a turn ends where the next role token starts. So the token that closes an assistant
turn, `<|user|>` (done) or `<|observation|>` (waiting for tools), is the model's own and is trained on.

Nothing inside a message can open or close a turn: special strings in contents, tool descriptions, arguments and
results are encoded as plain text. The one exception is `/nothink` in a user turn, which is a switch by design.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from glmctl.data.json_calls import JsonCallParser
from glmctl.data.messages import Message, settled
from glmctl.data.parsing import Parsed, StreamParser
from glmctl.data.sandbox import MARK_END, MARK_START, compile_template
from glmctl.data.template_source import exported_template, training_template, without_marks
from glmctl.data.template_worker import ForeignTemplate
from glmctl.data.tokenizer import NOTHINK, OBSERVATION, USER, Tokenizer
from glmctl.data.tool_styles import Calls, styled, styles
from glmctl.errors import DataError

LossOn = Literal["last_message", "last_turn", "all_turns"]


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether it is one that the model should learn to write."""

    tokens: list[int]
    loss_mask: list[int]
    """1 where the token is the model's own (its closing role token included), else 0; same length as `tokens`"""


def closes(message: Message) -> str:
    """The role token that ends this assistant turn: `<|observation|>` if it calls tools, else `<|user|>`."""
    return OBSERVATION if message.get("tool_calls") else USER


class ChatTemplate:
    """A chat template bound to a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, *, where: str = "chat template") -> None:
        """`source` is Jinja; None, or ours as exported (in any `tool_styles`), means ours.

        DataError if a foreign one does not compile.
        """
        self.tokenizer = tokenizer
        self._where = where
        self._foreign: ForeignTemplate | None = None
        self._ours = training_template()
        if source is None or source in (exported_template(), training_template()):
            self.source = exported_template()
        elif source in styles():
            self._ours = styled(*styles()[source])
            self.source = without_marks(self._ours)
        else:
            self.source = source
            self._foreign = ForeignTemplate(source, where)
        added = sorted(tokenizer.added_tokens, key=lambda token: (-len(token), token))
        self._added = added
        self._special = re.compile("|".join(map(re.escape, added)))
        self._special_in_user = re.compile("|".join(re.escape(token) for token in added if token != NOTHINK))

    @classmethod
    def load(cls, folder: Path | str) -> ChatTemplate:
        """Tokenizer and template of a model folder or run directory.

        A folder without a template gets ours: GLM-4.5's format is the one this toolkit trains.
        """
        folder = Path(folder)
        tokenizer = Tokenizer.load(folder)
        home = folder if (folder / "tokenizer.json").is_file() else folder / "export"
        path = home / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8") if path.is_file() else None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text") from error
        return cls(tokenizer, source, where=str(path))

    @functools.cached_property
    def calls(self) -> Calls:
        """How a tool call is written. A foreign template is asked to write one; one that cannot, or writes neither,
        counts as GLM-4.5's own."""
        if self._foreign is None:
            return styles()[self._ours][0]
        probe = {"name": "probe", "arguments": {"key": 1}}
        calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": probe}]}
        try:
            text = self.render([{"role": "user", "content": "?"}, calling])
        except DataError:
            return "tags"
        _, tag, call = text.rpartition("<tool_call>")
        return "json" if JsonCallParser(thinking=False).read(tag + call).tool_calls == [probe] else "tags"

    # ------------------------------------------------------------------ text

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        """The conversation as text, the same as transformers' `apply_chat_template` gives.

        DataError for an unknown role, a content part that is not text, or arguments that are not an object.
        """
        context = _context(settled(messages), tools, add_generation_prompt, enable_thinking)
        return self._run({**context, MARK_START: "", MARK_END: ""})

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] | None = None, *, thinking: bool = True) -> Parsed:
        """One assistant turn back from text, in the style in which this template writes calls; see `parsing.parse`."""
        return self.stream_parser(tools, thinking=thinking).read(text)

    def stream_parser(self, tools: Sequence[Mapping[str, Any]] | None = None, *, thinking: bool = True) -> StreamParser:
        """The same for a turn that arrives in pieces."""
        return (JsonCallParser if self.calls == "json" else StreamParser)(thinking, tools)

    # ------------------------------------------------------------------ tokens

    def encode_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = True,
    ) -> list[int]:
        """Token ids up to the point where the assistant starts to write."""
        return self._encode(messages, tools, True, enable_thinking)[0]

    def encode_reply(self, messages: Sequence[Message], *, enable_thinking: bool = True) -> list[int]:
        """Token ids of tool results or a user turn that follow an assistant turn, and the next generation prompt.

        The first id is the role token, which the assistant turn before it already ended in.
        """
        assert messages, "a reply has at least one message"
        assert all(message["role"] in ("tool", "user") for message in messages), "a reply is from the user or tools"
        alone = self.encode_prompt(messages, enable_thinking=enable_thinking)
        roles = (self.tokenizer.id(USER), self.tokenizer.id(OBSERVATION))
        return alone[next(at for at, token in enumerate(alone) if token in roles) :]

    def encode_whole(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = True,
    ) -> list[int]:
        """Token ids of a whole conversation; one that ends in an assistant turn has its closing role token too."""
        return self._closed(messages, self._encode(messages, tools, False, enable_thinking)[0])

    def encode_training(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = True,
        last_message: bool = False,
    ) -> Encoded:
        """Token ids and loss mask of a conversation whose last turn is to be learnt.

        The loss is on the assistant messages after the last user message (the whole tool loop; with `last_message`
        the last of them), but for those that carry `"weight": 0` (OpenAI's key); each with its closing role token,
        which is appended when the conversation ends in an assistant message. What inference gives the model is not
        learnt: the role token that opens a turn, and the empty think block of a `/nothink` turn.

        Up to each message that is learnt, the tokens are those of `encode_prompt`: a law of our template, and
        checked for a foreign one.

        DataError when there is nothing to learn, a learnt `/nothink` turn carries reasoning, or the template does
        not mark what the model writes, or writes it otherwise than for inference.
        """
        if self._foreign is not None and not self._foreign.marked:
            raise DataError(
                f"{self._where}: the template has no {{% generation %}} marks, which training needs",
                hint="remove the file to train with glmctl's own GLM-4.5 template",
            )
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        last_user = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=-1)
        current = [at for at in turns if at > last_user]
        if not current:
            raise DataError("the conversation has no assistant turn after its last user message")
        learnt = [at for at in (current[-1:] if last_message else current) if messages[at].get("weight", 1)]
        if not learnt:
            raise DataError("every assistant message to learn from has weight 0")
        whole = settled(messages, split_reasoning=True)
        if not enable_thinking and any(str(whole[at].get("reasoning_content") or "").strip() for at in learnt):
            raise DataError("enable_thinking is false, but an assistant turn to learn from has reasoning")

        tokens, spans = self._encode(whole, tools, False, enable_thinking)
        if len(spans) != len(turns):
            raise DataError(f"{self._where}: {len(spans)} generation marks for {len(turns)} assistant turns")
        tokens = self._closed(messages, tokens)
        mask, written = [0] * len(tokens), 0
        for at, (start, stop) in zip(turns, spans, strict=True):
            if at not in learnt:
                continue
            if self._foreign is not None:
                start = max(start, self._prompt_length(whole[:at], tools, enable_thinking, tokens))
            closed = stop < len(tokens) and tokens[stop] == self.tokenizer.id(closes(messages[at]))
            written += max(stop - start, 0)
            mask[start : stop + closed] = [1] * (stop + closed - start)
        if self._foreign is not None and not written:
            raise DataError(f"{self._where}: the {{% generation %}} marks hold nothing that the model writes")
        return Encoded(tokens, mask)

    def encode_examples(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = True,
        loss_on: LossOn = "last_turn",
    ) -> list[Encoded]:
        """What to train on so that the messages `loss_on` names are learnt exactly as inference would meet them.

        "last_message" and "last_turn" give one example (see `encode_training`). With "all_turns", each turn is
        learnt in the conversation up to its end, where its reasoning still stands: a later user message drops that
        from what the model sees, so a conversation with reasoning in earlier turns becomes several examples. Turns
        that read the same later (no reasoning) share one. DataError as for `encode_training`.
        """
        if loss_on != "all_turns":
            last = loss_on == "last_message"
            return [self.encode_training(messages, tools, enable_thinking=enable_thinking, last_message=last)]
        ends = _turn_ends(messages)
        if not ends:
            raise DataError("the conversation has no assistant message to learn from")
        examples: list[Encoded] = []
        for end in ends:
            example = self.encode_training(messages[:end], tools, enable_thinking=enable_thinking)
            before = examples[-1] if examples else Encoded([], [])
            if examples and example.tokens[: len(before.tokens)] == before.tokens:
                known = len(before.tokens)
                joined = [max(pair) for pair in zip(before.loss_mask, example.loss_mask[:known], strict=True)]
                examples[-1] = Encoded(example.tokens, joined + example.loss_mask[known:])
            else:
                examples.append(example)
        return examples

    # ------------------------------------------------------------------ inside

    def _closed(self, messages: Sequence[Message], tokens: list[int]) -> list[int]:
        """`tokens` with the role token that the last message, if it is the assistant's, ends in."""
        if messages and messages[-1]["role"] == "assistant":
            tokens.append(self.tokenizer.id(closes(messages[-1])))
        return tokens

    def _prompt_length(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        thinking: bool,
        tokens: list[int],
    ) -> int:
        """How many of `tokens` inference gives before the assistant writes. DataError when it gives others."""
        prompt = self._encode(messages, tools, True, thinking)[0]
        if tokens[: len(prompt)] != prompt:
            raise DataError(
                f"{self._where}: the template writes the conversation before messages[{len(messages)}] otherwise for "
                "training than for inference",
                hint="remove the file to train with glmctl's own GLM-4.5 template",
            )
        return len(prompt)

    def _encode(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, prompt: bool, thinking: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and of each generation mark the token range. Text is cut at special tokens and at marks only.

        A mark starts where inference starts to generate, so cutting there makes the training tokens continue the
        prompt's exactly.
        """
        try:
            whole = settled(messages, split_reasoning=True)
            names = self._stand_ins(whole, tools)
            start, end = names.pop(), names.pop()
            hide = dict(zip(self._added, names, strict=True))
            context = _context(self._hidden(whole, hide), _hide(tools, self._special, hide), prompt, thinking)
        except RecursionError as error:
            raise DataError("the conversation is nested too deeply") from error
        text = self._run({**context, MARK_START: start, MARK_END: end})

        shown = {stand_in: token for token, stand_in in hide.items()}
        stand_ins = re.compile("[" + "".join(names) + "]")
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for part in re.split(f"({start}|{end}|{self._special.pattern})", text):
            if part == start:
                begin = len(tokens)
            elif part == end:
                spans.append((begin, len(tokens)))
            elif part in hide:
                tokens.append(self.tokenizer.id(part))
            elif part:
                tokens += self.tokenizer.encode_plain(stand_ins.sub(lambda match: shown[match.group()], part))
        return tokens, spans

    def _stand_ins(self, messages: Any, tools: Any) -> list[str]:
        """Private-use characters that occur nowhere in the conversation: one an added token, and two marks."""
        used = set(json.dumps([messages, tools], ensure_ascii=False))
        need = len(self._added) + 2
        for base in range(0x100000, 0x10FFFE - need, need):
            block = [chr(base + offset) for offset in range(need)]
            if used.isdisjoint(block):
                return block
        raise DataError("the conversation uses every private-use character there is")

    def _hidden(self, messages: list[dict[str, Any]], hide: dict[str, str]) -> list[dict[str, Any]]:
        """The messages with every special string in their contents replaced by its stand-in."""
        return [
            {
                key: value
                if key == "role"
                else _hide(value, self._special_in_user if message["role"] == "user" else self._special, hide)
                for key, value in message.items()
            }
            for message in messages
        ]

    def _run(self, context: dict[str, Any]) -> str:
        if self._foreign is not None:
            return self._foreign.render(context)
        return _render_ours(context, self._where, self._ours)


@functools.cache
def _compiled(source: str) -> jinja2.Template:
    return compile_template(source)


def render_text(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, *, enable_thinking: bool = True
) -> str:
    """A whole conversation as text, by glmctl's own template; needs no tokenizer. DataError as for `render`."""
    context = _context(settled(messages), tools, False, enable_thinking)
    text = _render_ours({**context, MARK_START: "", MARK_END: ""}, "chat template", training_template())
    return text + (closes(messages[-1]) if messages and messages[-1]["role"] == "assistant" else "")


def _turn_ends(messages: Sequence[Message]) -> list[int]:
    """For every user message (and the beginning) that the assistant answers with something to learn: the place just
    behind its last answer before the next user message."""
    ends: list[int] = []
    end, learnt = 0, False
    for at, message in enumerate([*messages, {"role": "user"}]):
        if message["role"] == "user":
            ends += [end] if learnt else []
            learnt = False
        elif message["role"] == "assistant":
            end, learnt = at + 1, learnt or bool(message.get("weight", 1))
    return ends


def _render_ours(context: dict[str, Any], where: str, source: str) -> str:
    try:
        return _compiled(source).render(context)
    except (jinja2.TemplateError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from error


def _context(messages: list[dict[str, Any]], tools: Any, prompt: bool, thinking: bool) -> dict[str, Any]:
    return {
        "messages": messages,
        "tools": list(tools) if tools else None,
        "add_generation_prompt": prompt,
        "enable_thinking": thinking,
    }


def _hide(value: Any, special: re.Pattern[str], hide: dict[str, str]) -> Any:
    """`value` with special strings replaced in every string inside it, keys of objects too."""
    if isinstance(value, str):
        return special.sub(lambda match: hide[match.group()], value)
    if isinstance(value, Mapping):
        return {_hide(key, special, hide): _hide(item, special, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item, special, hide) for item in value]
    return value
