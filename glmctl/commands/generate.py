"""`glmctl generate`: one reply on the terminal, as it is written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError

if TYPE_CHECKING:
    from glmctl.data.chat import ChatTemplate
    from glmctl.engine.request import SamplingParams
    from glmctl.model.network import GlmMoe

app = typer.Typer(**stage.PLAIN)


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run directory or a model folder.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask; - reads it from standard input.")],
    system: Annotated[str | None, typer.Option("--system", help="A system message before it.")] = None,
    nothink: Annotated[bool, typer.Option("--nothink", help="Answer directly, without reasoning.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, no template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 = greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this mass.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")] = 0,
) -> None:
    """Generate one reply (greedy unless --temperature says otherwise): reasoning on stderr, the answer on stdout."""
    if raw and (system is not None or nothink):
        raise GlmctlError("--raw continues plain text; it takes neither --system nor --nothink")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise GlmctlError("--prompt: the prompt is empty")

    from glmctl.data.chat import ChatTemplate
    from glmctl.engine.request import SamplingParams
    from glmctl.engine.runners import device_for
    from glmctl.model.folder import load_model
    from glmctl.run.directory import resolve_model

    folder = resolve_model(model)
    template = ChatTemplate.load(folder)
    network = load_model(folder, device=device_for())
    template.tokenizer.require_fits(network.config.vocab_size, str(folder))
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_token_ids=tuple(template.tokenizer.eos_ids),
    )
    if raw:
        ids = template.tokenizer.encode_plain(text)
        _plain(network, template, ids, params)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        ids = template.encode_prompt(messages, enable_thinking=not nothink)
        _reply(network, template, ids, params, thinking=not nothink)


def _plain(network: GlmMoe, template: ChatTemplate, ids: list[int], params: SamplingParams) -> None:
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        _write(sys.stdout, piece)

    facts = _stream(network, template, ids, params, show)
    _end(sys.stdout)
    console.result({"text": "".join(pieces), **facts}, text="")


def _reply(network: GlmMoe, template: ChatTemplate, ids: list[int], params: SamplingParams, *, thinking: bool) -> None:
    parser, screen = template.stream_parser(thinking=thinking), _Screen()

    def show(piece: str) -> None:
        screen.show(parser.feed(piece))

    facts = _stream(network, template, ids, params, show)
    screen.show(parser.finish())
    _end(sys.stdout)
    parsed = parser.parsed
    if not parsed.well_formed:
        console.note(f"(not well-formed: {parsed.problem})")
    body = {"reasoning": parsed.reasoning, "content": parsed.content, "tool_calls": parsed.tool_calls}
    console.result({**body, "well_formed": parsed.well_formed, **facts}, text="")


def _stream(
    network: GlmMoe, template: ChatTemplate, ids: list[int], params: SamplingParams, show: Callable[[str], None]
) -> dict[str, Any]:
    """Generate to the end, giving every piece of text to `show`; the closing token is not text."""
    from glmctl.engine.engine import Engine
    from glmctl.engine.request import Request

    drafts = int(params.temperature == 0 and network.mtp is not None)
    engine = Engine(network, max_slots=1, speculative=drafts)
    engine.add(Request("reply", ids, params))
    decoder = template.tokenizer.detokenizer()
    reason = None
    while reason is None:
        for event in engine.step():
            reason = event.finish_reason
            show(decoder.flush() if reason == "stop" else decoder.push(event.token))
    if reason != "stop":
        show(decoder.flush())
    facts: dict[str, Any] = {"finish_reason": reason, "prompt_tokens": len(ids), "tokens": engine.stats.tokens}
    return {**facts, "mtp_acceptance": engine.stats.acceptance} if drafts else facts


class _Screen:
    """Reasoning goes to stderr (unless quiet), the answer and the calls to stdout."""

    def __init__(self) -> None:
        self.reasoning = False

    def show(self, deltas: list[Any]) -> None:
        for delta in deltas:
            if delta.reasoning is not None:
                if not console.is_quiet():
                    self.reasoning = True
                    _write(sys.stderr, delta.reasoning)
                continue
            if self.reasoning:
                self.reasoning = False
                _end(sys.stderr)
            if delta.tool_name is not None:
                _write(sys.stdout, f"\n{delta.tool_name}")
            else:
                _write(sys.stdout, delta.content if delta.content is not None else delta.arguments)


def _write(stream: Any, text: str | None) -> None:
    if text and not console.is_json():
        stream.write(text)
        stream.flush()


def _end(stream: Any) -> None:
    _write(stream, "\n")
