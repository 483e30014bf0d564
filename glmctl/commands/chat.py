"""`glmctl chat`: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import GlmctlError

if TYPE_CHECKING:
    from glmctl.serving.server import Server

app = typer.Typer(**stage.PLAIN)

HISTORY = "glmctl/chat_history"
_HISTORY_LINES = 1000


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A run directory or a model folder.", show_default=False),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="Talk to a running server instead; its key is in GLMCTL_API_KEY.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="A system message.")] = "",
    nothink: Annotated[bool, typer.Option("--nothink", help="Answer directly, without reasoning.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=2.0, help="0 = greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens up to this mass.")] = 0.95,
) -> None:
    """Chat with a model: answers stream, thinking is dimmed, /help lists what else there is."""
    if (model is None) == (base_url is None):
        raise GlmctlError("give either a MODEL or --base-url")
    if console.is_json():
        raise GlmctlError("chat is a conversation; for one JSON answer use `glmctl generate`")
    import openai

    from glmctl.serving.keys import KEY_VARIABLE
    from glmctl.serving.terminal import Terminal

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p}
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    with contextlib.ExitStack() as stack:
        key = os.environ.get(KEY_VARIABLE) or secrets.token_urlsafe()
        if model is not None:
            server = stack.enter_context(_serving(model, key))
            base_url = f"{server.url}/v1"
        client = stack.enter_context(openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=600.0))
        stack.enter_context(_history())
        try:
            name = client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise GlmctlError(f"{base_url}: {error}") from error
        terminal = Terminal(client, name, sampling, read=input, colour=sys.stdout.isatty())
        terminal.conversation.system = system
        terminal.conversation.thinking = not nothink
        console.note(f"{name}; /help for help, Ctrl-D to leave")
        terminal.run()


@contextlib.contextmanager
def _serving(model: str, key: str) -> Iterator[Server]:
    """The model behind a server of our own on a free port of this machine, with a key that others do not know."""
    from glmctl.recipe.build import build
    from glmctl.recipe.schema import ServeRecipe
    from glmctl.serving.run import load_service
    from glmctl.serving.server import Server

    recipe = build("serve", {"name": ("name", "chat"), "model": ("MODEL", model), "max_slots": ("", 1)})
    assert isinstance(recipe, ServeRecipe)
    server = Server(load_service(recipe), "127.0.0.1", 0, key=key, drain_seconds=0)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Line editing with a history that outlives the session, readable by its owner only."""
    if not sys.stdin.isatty():
        yield
        return
    import readline

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    path = state / HISTORY
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(_HISTORY_LINES)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)
        except OSError as error:
            console.warn(f"the history could not be saved: {path}: {error.strerror}")
