"""Stage `serve`: the OpenAI-compatible server, or with questions: start it, ask, print, stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.engine.engine import Engine
from glmctl.engine.runners import device_for, runner_named
from glmctl.errors import Interrupted, RecipeError
from glmctl.model.folder import load_model
from glmctl.recipe.schema import ServeRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run, resolve_model
from glmctl.serving.ask import MAX_TOKENS, Question, Reply, ask
from glmctl.serving.keys import ADMIN_KEY_VARIABLE, KEY_VARIABLE, read_key
from glmctl.serving.server import Server, check_exposure
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker


def run(recipe: ServeRecipe, run: Run) -> dict[str, Any]:
    """Serve until SIGTERM (drains, then returns), SIGINT (drains, then Interrupted) or the engine's death
    (EnvironmentProblem).

    With `ask` or `ask_problems`: serve on a thread, put every question through the official client, print and
    record the replies, stop. The summary then holds the first reply, its reasoning, and the MTP acceptance.
    """
    key = read_key(KEY_VARIABLE, recipe.api_key_file, "api_key_file")
    admin_key = read_key(ADMIN_KEY_VARIABLE, recipe.admin_key_file, "admin_key_file")
    check_exposure(recipe.host, key)
    questions = _questions(recipe)
    service = load_service(recipe)
    server = Server(
        service,
        recipe.host,
        recipe.port,
        key=key,
        admin_key=admin_key,
        drain_seconds=recipe.drain_seconds,
        stall_seconds=recipe.stall_seconds,
    )
    console.note(f"serving {service.name} on {server.url}/v1" + (" (API key needed)" if key else ""))
    console.note(f"chat in a browser: {server.url}/")
    if not questions:
        number = server.serve_until_signal()
        console.note(f"stopped after {service.worker.stats.tokens} tokens")
        if number == signal.SIGINT:
            raise Interrupted("the server was interrupted", exit_code=130)
        return _summary(service)
    server.start()
    try:
        limit = min(MAX_TOKENS, service.worker.max_length // 2)
        replies = ask(server.url, key, service.name, questions, limit)
    finally:
        server.stop()
    for reply in replies:
        console.note(f"? {reply.prompt}" + ("" if reply.thinking else "  [/nothink]"))
        if reply.reasoning:
            console.note(f"  (thinks) {reply.reasoning}")
        console.note(f"  {reply.text}")
    rows = [json.dumps(reply.row(), ensure_ascii=False) for reply in replies]
    atomic.write_text(run.samples, "\n".join(rows) + "\n")
    return {**_summary(service), **_of_replies(replies)}


def load_service(recipe: ServeRecipe) -> Service:
    """Model, tokenizer, template and engine of the recipe's model folder.

    RecipeError or DataError naming the file when the folder is missing pieces or damaged.
    """
    folder = resolve_model(recipe.model)
    model = load_model(folder, device=device_for(recipe.runner))
    template = ChatTemplate.load(folder)
    template.tokenizer.require_fits(model.config.vocab_size, str(folder))
    speculative = recipe.speculative if model.mtp is not None else 0
    if recipe.speculative and not speculative:
        console.note(f"{folder}: no MTP layer, so decoding is plain")
    tokenizer = template.tokenizer
    engine = Engine(
        model,
        max_slots=recipe.max_slots,
        max_length=recipe.max_length,
        speculative=speculative,
        adaptive=True,
        token_bytes=lambda token: tokenizer.decode_bytes([token]),
        runner=runner_named(recipe.runner),
    )
    name = recipe.served_name or Path(recipe.model).resolve().name
    return Service(name, tokenizer, template, EngineWorker(engine, recipe.max_queue), strict=recipe.strict)


def _questions(recipe: ServeRecipe) -> list[Question]:
    """Each `ask` streamed with thinking, the first also with /nothink; of each problem file the first problem."""
    questions = [Question(prompt, streamed=True) for prompt in recipe.ask]
    questions += [Question(prompt, thinking=False) for prompt in recipe.ask[:1]]
    # imported here: a plain server needs no problems
    from glmctl.rl.environment import read_problems
    from glmctl.rl.tasks import environment

    for file in recipe.ask_problems:
        messages, tools = environment(read_problems(Path(file))[0]).reset()
        texts = {message["role"]: message["content"] for message in messages}
        if "user" not in texts:
            raise RecipeError(f"ask_problems: the first problem of {file} has no question")
        questions.append(Question(texts["user"], streamed=True, tools=tools, system=texts.get("system")))
    return questions


def _summary(service: Service) -> dict[str, Any]:
    stats = service.worker.stats
    return {
        "model": service.name,
        "tokens": stats.tokens,
        "mtp_drafted": stats.drafted,
        "mtp_acceptance": stats.acceptance,
    }


def _of_replies(replies: list[Reply]) -> dict[str, Any]:
    first = replies[0]
    summary: dict[str, Any] = {"reply": first.text, "reasoning": first.reasoning, "questions": len(replies)}
    direct = next((reply for reply in replies if not reply.thinking), None)
    if direct is not None:
        summary["reply_nothink"] = direct.text
    tool = next((reply for reply in replies if reply.tool_calls), None)
    if tool is not None:
        summary["tool_call"] = tool.text
    return summary
