"""The same model behind vLLM or SGLang: their command lines for what a serve recipe says.

Both load our model folders as they are. Flags as of vLLM 0.11 and SGLang 0.5; GLM-4.5's parsers are `glm45` in both,
and calls written as JSON are what both know as `hermes`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from glmctl.data.chat import ChatTemplate
from glmctl.data.tool_styles import Calls
from glmctl.errors import RecipeError, unknown
from glmctl.recipe.schema import ServeRecipe
from glmctl.run.directory import resolve_model
from glmctl.serving.keys import KEY_VARIABLE, read_key
from glmctl.serving.server import check_exposure

ENGINES = ("vllm", "sglang")
_CALL_PARSERS: dict[Calls, str] = {"tags": "glm45", "json": "hermes"}


def command(engine: str, recipe: ServeRecipe) -> list[str]:
    """The words of the command line. RecipeError for an unknown engine, a public host without a key, and whatever
    the engine has no way to say. The key itself is never among them: every user of a machine can read those."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ("glmctl", *ENGINES))
    key = read_key(KEY_VARIABLE, recipe.api_key_file, "api_key_file")
    check_exposure(recipe.host, key)
    if key is not None and engine == "sglang":
        raise RecipeError(
            "sglang takes its API key on the command line, where every user of the machine can read it",
            hint="serve on 127.0.0.1 without a key, behind a proxy that checks it",
        )
    if recipe.strict:
        raise RecipeError(f"strict: {engine} has no such switch")
    folder = resolve_model(recipe.model)
    name = recipe.served_name or Path(recipe.model).resolve().name
    has_mtp = bool(json.loads((folder / "config.json").read_text()).get("num_nextn_predict_layers"))
    drafts = recipe.speculative if has_mtp else 0
    words = (_vllm if engine == "vllm" else _sglang)(recipe, str(folder), name, drafts)
    return [*words, "--tool-call-parser", _CALL_PARSERS[ChatTemplate.load(folder).calls], "--reasoning-parser", "glm45"]


def environment(engine: str, recipe: ServeRecipe) -> dict[str, str]:
    """Of the command: vLLM takes its key from there."""
    key = read_key(KEY_VARIABLE, recipe.api_key_file, "api_key_file")
    return {**os.environ, "VLLM_API_KEY": key} if key is not None and engine == "vllm" else dict(os.environ)


def _vllm(recipe: ServeRecipe, folder: str, name: str, drafts: int) -> list[str]:
    words = ["vllm", "serve", folder, "--served-model-name", name]
    words += ["--host", recipe.host, "--port", str(recipe.port), "--max-num-seqs", str(recipe.max_slots)]
    words.append("--enable-auto-tool-choice")
    if recipe.max_length is not None:
        words += ["--max-model-len", str(recipe.max_length)]
    if drafts:
        words += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": drafts})]
    return words


def _sglang(recipe: ServeRecipe, folder: str, name: str, drafts: int) -> list[str]:
    words = [sys.executable, "-m", "sglang.launch_server", "--model-path", folder, "--served-model-name", name]
    words += ["--host", recipe.host, "--port", str(recipe.port), "--max-running-requests", str(recipe.max_slots)]
    words += ["--max-queued-requests", str(recipe.max_queue)]
    if recipe.max_length is not None:
        words += ["--context-length", str(recipe.max_length)]
    if drafts:
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(drafts)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(drafts + 1)]
    return words
