"""What a score was measured with, in full: whoever has the results file can ask the same again.

The layout is that of lm-eval's `results_*.json` and `samples_*.jsonl`; `reproduce` is ours. Prompts and answers stand
in the samples, word for word.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from glmctl import __version__
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import END_OF_TEXT
from glmctl.evaluation.catalog import NUMPY_SEED, PYTHON_SEED, TORCH_SEED
from glmctl.evaluation.results import Results
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import EvalRecipe
from glmctl.run import atomic
from glmctl.run.directory import environment


def document(
    results: Results, recipe: EvalRecipe, name: str, folder: Path, model: GlmMoe, template: ChatTemplate, started: float
) -> Results:
    """The results without samples, and everything that they are a function of. started: seconds since the epoch."""
    body = {key: value for key, value in results.items() if key != "samples"}
    return {
        **body,
        "config": _config(recipe, name, model),
        "task_hashes": {task: _task_hash(rows) for task, rows in results.get("samples", {}).items()},
        "git_hash": None,
        "date": started,
        "lm_eval_version": version("lm_eval"),
        "glmctl_version": __version__,
        **_tokenizer(template),
        "max_length": model.config.max_position_embeddings,
        "model_source": "glmctl",
        "model_name": recipe.models[name],
        "model_name_sanitized": re.sub(r"[\"<>:/\|\\?\*\[\]]+", "__", recipe.models[name]),
        **_with_hash("system_instruction", recipe.system_instruction),
        **_with_hash("chat_template", template.source),
        "fewshot_as_multiturn": recipe.fewshot_as_multiturn,
        "start_time": started,
        "end_time": time.time(),
        "total_evaluation_time_seconds": str(time.time() - started),
        "reproduce": {
            "recipe": recipe.model_dump(mode="json"),
            "weights": _weights(folder),
            "tokenizer": template.tokenizer.hash,
            "environment": environment(),
        },
    }


def sample_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """lm-eval's samples as its own writer puts them down: arguments named, answers and target as text."""
    for row in rows:
        arguments = {
            f"gen_args_{number}": {f"arg_{place}": one for place, one in enumerate(given)}
            for number, given in enumerate(row["arguments"])
        }
        yield {
            **row,
            "arguments": arguments,
            "resps": _as_text(row["resps"]),
            "filtered_resps": _as_text(row["filtered_resps"]),
            "target": str(row["target"]),
        }


def _config(recipe: EvalRecipe, name: str, model: GlmMoe) -> dict[str, Any]:
    return {
        "model": "glmctl",
        "model_args": {"pretrained": recipe.models[name]},
        "model_num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_dtype": recipe.weights.get(name, str(model.dtype)),
        "batch_size": recipe.max_slots,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "random_seed": PYTHON_SEED,
        "numpy_seed": NUMPY_SEED,
        "torch_seed": TORCH_SEED,
        **recipe.model_dump(
            mode="json",
            include={
                *("limit", "num_fewshot", "bootstrap_iters", "gen_kwargs", "fewshot_seed", "use_cache", "metadata"),
                *("sampling", "samples_per_problem", "max_turns", "enable_thinking", "apply_chat_template", "seed"),
            },
        ),
    }


def _weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that holds or places weights, from the folder's manifest where it has one."""
    listed = atomic.read_manifest(folder) if (folder / atomic.MANIFEST).is_file() else {}
    names = sorted(path.name for path in folder.iterdir() if ".safetensors" in path.name or path.name == "config.json")
    return {name: listed[name]["sha256"] if name in listed else atomic.sha256_file(folder / name) for name in names}


def _tokenizer(template: ChatTemplate) -> dict[str, Any]:
    tokenizer = template.tokenizer
    eos = tokenizer.eos_ids[0]
    return {
        "tokenizer_pad_token": [tokenizer.decode([tokenizer.pad_id]), str(tokenizer.pad_id)],
        "tokenizer_eos_token": [tokenizer.decode([eos]), str(eos)],
        "tokenizer_bos_token": ["None", "None"],
        "eot_token_id": tokenizer.id(END_OF_TEXT),
    }


def _with_hash(key: str, text: str | None) -> dict[str, str | None]:
    return {key: text, f"{key}_sha": None if text is None else _sha(text)}


def _task_hash(rows: Iterable[dict[str, Any]]) -> str:
    """Digest of every document, prompt and target, as lm-eval's: equal for two runs that asked the same."""
    return _sha("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return str(value)


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
