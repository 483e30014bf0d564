"""The command line: a table of commands, and the one place where errors become a line and an exit code.

A command's module is imported when the command is called, so `glmctl --help` costs what Typer costs.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from glmctl import __version__, console
from glmctl.errors import EnvironmentProblem, GlmctlError, Interrupted, nearest

TABLE = {
    "run": "Run a pipeline of stages: `glmctl run demo` takes a small model through its whole life.",
    "study": "Run stages under several settings and seeds, and compare what comes out.",
    "data": "Prepare text: train a tokenizer, make token shards, generate verifiable problems.",
    "pretrain": "Pretrain (and mid-train) a model from token shards.",
    "sft": "Fine-tune a model on conversations.",
    "reward": "Train a reward model on pairs of answers.",
    "rl": "Train a model by reinforcement learning on verifiable rewards.",
    "distill": "Unify experts into one hybrid model by rejection sampling.",
    "eval": "Evaluate models with lm-eval and the offline tasks.",
    "convert": "Convert between run checkpoints, Hugging Face folders and GGUF files, verified.",
    "serve": "Serve a model behind an OpenAI-compatible API.",
    "generate": "Generate one reply on the terminal.",
    "plan": "Say what a recipe needs of N devices: memory, communication, time, layouts and their cost.",
    "info": "Compare architectures: sizes, FLOPs a token, cache; every figure computed.",
    "chat": "Chat with a model on the terminal.",
    "recipe": "List, show and check recipes.",
    "doctor": "Say what this machine offers, and how to get the rest.",
    "runs": "List, show and compare runs.",
}
"""command -> its line of help; the module is glmctl.commands.<name>"""

GLOBAL_FLAGS = {"--json": "json", "--quiet": "quiet", "-q": "quiet", "--debug": "debug"}
EVERYWHERE = "Also everywhere: --json (result as one JSON object), --quiet, --debug."
ENVIRONMENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
TORN_PIPE = 128 + signal.SIGPIPE


class CommandGroup(TyperGroup):
    """A group that names the nearest command when one is unknown, and does not load pydantic to parse its flags."""

    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        for parameter in parameters:
            # Typer skips its (pydantic) coercion for a flag that has a bool, not for one that was left at None
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word, names = args[0], self.list_commands(ctx)
        if not word.startswith("-") and word not in names and not ctx.resilient_parsing:
            match = nearest(word, names)
            hint = f"did you mean '{match}'?" if match else f"one of: {', '.join(names)}"
            raise GlmctlError(f"unknown command '{ctx.command_path} {word}'; {hint}")
        return super().resolve_command(ctx, args)


class Table(CommandGroup):
    """The root group: names and help lines from `TABLE`, modules imported on demand."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(TABLE)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in TABLE:
            return None
        module = importlib.import_module(f"glmctl.commands.{cmd_name}")
        command: Any = typer.main.get_command(module.app)
        command.name = cmd_name
        for one in (command, *getattr(command, "commands", {}).values()):
            one.epilog = one.epilog or EVERYWHERE
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(TABLE.items()))

    def invoke(self, ctx: Any) -> Any:
        # Typer's own `main` would turn these into bare exit codes before `main` below could say a word
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted", exit_code=130) from error
        except BrokenPipeError as error:
            raise typer.Exit(_torn()) from error


app = typer.Typer(
    cls=Table,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.result({"version": __version__}, text=f"glmctl {__version__}")
        raise typer.Exit


@app.callback(epilog="Recipes are named (`glmctl recipe list`) or given as a .yaml path.")
def _options(
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notices, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (also GLMCTL_DEBUG=1).")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The whole life of a GLM-4.5-style model: data, training, reinforcement, serving.

    These options are accepted before and after the command.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (see glmctl.errors)."""
    words = _configure(list(sys.argv[1:] if argv is None else argv))
    # a stream that the caller closed (`>&-`) is None; these stay open to the end of the process
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        code = _invoke(words)
        sys.stdout.flush()
        return code
    except GlmctlError as error:
        return _say(error)
    except BrokenPipeError:
        return _torn()
    except KeyboardInterrupt:
        return _say(Interrupted("interrupted", exit_code=130))
    except MemoryError:
        return _say(EnvironmentProblem("out of memory"))
    except OSError as error:
        if error.errno in ENVIRONMENT_ERRNOS:
            where = f"{error.filename}: " if error.filename else ""
            return _say(EnvironmentProblem(f"{where}{error.strerror}"))
        return _bug(error)
    except Exception as error:  # noqa: BLE001 - the outermost frame: whatever is left is our bug, said in one line
        return _bug(error)


def _configure(words: list[str]) -> list[str]:
    """Take the flags that are accepted everywhere out of the words, up to a `--`."""
    end = words.index("--") if "--" in words else len(words)
    given = {GLOBAL_FLAGS[word] for word in words[:end] if word in GLOBAL_FLAGS}
    debug = "debug" in given or os.environ.get("GLMCTL_DEBUG", "") not in ("", "0")
    rank = os.environ.get("RANK", "")
    console.configure(
        json="json" in given, quiet="quiet" in given, debug=debug, rank=int(rank) if rank.isdecimal() else 0
    )
    return [word for word in words[:end] if word not in GLOBAL_FLAGS] + words[end:]


def _invoke(words: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    try:
        value = command.main(args=words or ["--help"], prog_name="glmctl", standalone_mode=False)
    except typer.TyperException as error:
        raise _usage(error) from error
    except typer.Abort:
        return 130
    return value if isinstance(value, int) else 0


def _usage(error: typer.TyperException) -> GlmctlError:
    """Typer's complaint in our form: lower case, one line, the nearest option that exists."""
    context = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".").replace(": Input should ", ": must ")
    option = getattr(error, "option_name", None)
    if option is not None and context is not None and message.startswith("No such option"):
        match = nearest(option, [word for parameter in context.command.params for word in parameter.opts])
        message = f"unknown option '{option}'" + (f"; did you mean '{match}'?" if match else "")
    hint = f"`{context.command_path} --help` shows the options" if context is not None else None
    return GlmctlError(message[:1].lower() + message[1:], hint=hint)


def _say(error: GlmctlError) -> int:
    if console.is_debug():
        traceback.print_exception(error)
    try:
        _report(error.kind, error.message, error.hint, error.exit_code)
    except OSError:
        # the terminal or the full disk behind stdout is what went wrong; the exit code still says it
        _torn()
    return error.exit_code


def _bug(error: BaseException) -> int:
    if console.is_debug():
        traceback.print_exception(error)
    message = f"internal error: {type(error).__name__}: {error} (run with --debug for the traceback)"
    _report("internal", message, None, 1)
    return 1


def _report(kind: str, message: str, hint: str | None, exit_code: int) -> None:
    """Say an error; in a rank that `--processes` started, the launcher makes the object of it."""
    from glmctl.parallel.launch import TOGETHER, tell

    told = tell(kind, message, hint, exit_code)
    if kind not in TOGETHER or not (told or console.rank()):
        console.error(kind, message, hint, exit_code, final=not told)


def _torn() -> int:
    """Stdout's reader has gone (`| head`): say nothing, and let the interpreter's last flush go nowhere."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(devnull, stream.fileno())
    return TORN_PIPE
