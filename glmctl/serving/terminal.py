"""`glmctl chat`: a conversation on the terminal with any OpenAI-compatible server, our own among them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from glmctl.errors import DataError, GlmctlError

HELP = """/nothink, /think   answer directly, or think first
/system TEXT       set the system message (empty removes it)
/tools FILE        offer the tools of a JSON file (OpenAI's `tools` list); no FILE: none
/clear             start anew
/save FILE         write the conversation as one line of JSON
/quit              leave (so does Ctrl-D)
A line that ends in \\ goes on in the next one; \"\"\" opens and closes a block of lines. Ctrl-C stops an answer."""

_DIM, _BOLD, _PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MAX_CALL_ROUNDS = 16


@dataclass
class Conversation:
    """What was said, and how the next answer is asked for."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = True

    def request(self) -> dict[str, Any]:
        """Arguments of the official client's `chat.completions.create`, without model and sampling."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        arguments: dict[str, Any] = {
            "messages": [*system, *self.messages],
            "extra_body": {"chat_template_kwargs": {"enable_thinking": self.thinking}},
        }
        return {**arguments, "tools": self.tools} if self.tools else arguments


class Terminal:
    """Reads lines, carries out commands, and prints answers as they are written."""

    def __init__(
        self,
        client: Any,
        model: str,
        sampling: dict[str, Any],
        *,
        read: Callable[[str], str],
        out: TextIO = sys.stdout,
        colour: bool = False,
    ) -> None:
        """client: openai.OpenAI. sampling: its arguments temperature, max_tokens ... read: a prompt to a line, EOFError
        at the end. colour: thinking dimmed by escape codes, else marked by words."""
        self._client = client
        self._model = model
        self._sampling = sampling
        self._read = read
        self._out = out
        self._colour = colour
        self.conversation = Conversation()

    def run(self) -> None:
        """Until the end of the input or /quit."""
        while (text := self._next_message()) is not None:
            if text.startswith("/"):
                try:
                    if not self._command(text):
                        return
                except GlmctlError as error:
                    self._say(f"{error.message}\n")
            elif text:
                self.ask(text)

    def ask(self, text: str) -> None:
        """Put one message, print the answer, and ask for the results of the tools it calls. `/nothink` at its end
        counts for this and what follows, as it does in the template. Errors of the server are printed."""
        import openai

        if text.endswith("/nothink"):
            self.conversation.thinking = False
            text = text.removesuffix("/nothink").rstrip()
        before = len(self.conversation.messages)
        self.conversation.messages.append({"role": "user", "content": text})
        try:
            for _ in range(_MAX_CALL_ROUNDS):
                calls = self._answer()
                if not calls or not self._results(calls):
                    return
        except openai.OpenAIError as error:
            del self.conversation.messages[before:]
            self._say(f"\n{_clean(_reason(error))}\n")

    # ------------------------------------------------------------------ input

    def _next_message(self) -> str | None:
        try:
            line = self._read("> ")
            if line.strip() == '"""':
                return "\n".join(self._block()).strip()
            lines = [line]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(self._read(". "))
            return "\n".join(lines).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self._say("\n")
            return ""

    def _block(self) -> Iterator[str]:
        while (line := self._read(". ")).strip() != '"""':
            yield line

    def _command(self, text: str) -> bool:
        """Carry out a line that starts with a slash; False to leave. GlmctlError for one that cannot be."""
        word, _, rest = text.partition(" ")
        rest, conversation = rest.strip(), self.conversation
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                self._say(HELP + "\n")
            case "/nothink" | "/think":
                conversation.thinking = word == "/think"
            case "/system":
                conversation.system = rest
            case "/tools":
                conversation.tools = _read_tools(Path(rest)) if rest else []
            case "/clear":
                conversation.messages.clear()
            case "/save":
                self._save(rest)
            case _:
                raise GlmctlError(f"unknown command {word}; /help lists them")
        return True

    def _save(self, name: str) -> None:
        if not name:
            raise GlmctlError("/save needs a file name")
        conversation = self.conversation
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        row: dict[str, Any] = {"messages": [*system, *conversation.messages]}
        if conversation.tools:
            row["tools"] = conversation.tools
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise GlmctlError(f"{name}: {error.strerror}") from error

    def _results(self, calls: list[dict[str, Any]]) -> bool:
        """Ask the user what each call returned; False when there is no answer."""
        for call in calls:
            try:
                result = self._read(f"result of {call['function']['name']}> ")
            except (EOFError, KeyboardInterrupt):
                result = "(no result)"
            self.conversation.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return True

    # ------------------------------------------------------------------ output

    def _answer(self) -> list[dict[str, Any]]:
        """Stream one assistant turn into the conversation; its tool calls. Ctrl-C keeps what came."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        calls: list[dict[str, Any]] = []
        screen = _Screen(self._say, self._colour)
        stream = self._client.chat.completions.create(
            model=self._model, stream=True, **self._sampling, **self.conversation.request()
        )
        finish = None
        try:
            for chunk in stream:
                for choice in chunk.choices:
                    _take(choice.delta, message, calls, screen)
                    finish = choice.finish_reason or finish
        except KeyboardInterrupt:
            finish = "stopped"
        finally:
            stream.close()
        screen.end(finish)
        # a call that was cut off is no call: its arguments are not JSON
        if finish != "tool_calls":
            calls = []
        if calls:
            message["tool_calls"] = calls
        self.conversation.messages.append(message)
        return calls

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class _Screen:
    """Thinking dimmed, the answer plain, calls bold; control characters of the model never reach the terminal."""

    def __init__(self, say: Callable[[str], None], colour: bool) -> None:
        self._say = say
        self._colour = colour
        self._mode = ""

    def show(self, mode: str, text: str) -> None:
        if mode != self._mode:
            self._leave()
            self._mode = mode
            style = {"thinking": _DIM, "call": _BOLD}.get(mode, "")
            self._say(style if self._colour else {"thinking": "(thinking) "}.get(mode, ""))
        self._say(_clean(text))

    def end(self, finish: str | None) -> None:
        self._leave()
        if finish in ("length", "stopped"):
            self._say("(cut off at the token limit)\n" if finish == "length" else "(stopped)\n")

    def _leave(self) -> None:
        if self._mode:
            self._say((_PLAIN if self._colour else "") + "\n")
        self._mode = ""


def _take(delta: Any, message: dict[str, Any], calls: list[dict[str, Any]], screen: _Screen) -> None:
    reasoning = getattr(delta, "reasoning_content", None)
    if reasoning:
        message["reasoning_content"] = message.get("reasoning_content", "") + reasoning
        screen.show("thinking", reasoning)
    if delta.content:
        message["content"] += delta.content
        screen.show("answer", delta.content)
    for part in delta.tool_calls or ():
        if part.index == len(calls):
            function = {"name": part.function.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
            screen.show("call", f"{' ' if part.index else ''}{part.function.name} ")
        if part.function.arguments:
            calls[part.index]["function"]["arguments"] += part.function.arguments
            screen.show("call", part.function.arguments)


def _clean(text: str) -> str:
    """Without the control characters that could move the cursor or rename the window."""
    return _CONTROL.sub("�", text)


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)


def _read_tools(path: Path) -> list[dict[str, Any]]:
    """DataError unless the file is a JSON list of objects."""
    try:
        tools = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{path}: expected a list of tools")
    return tools
