"""`glmctl convert`: a run's checkpoint to a Hugging Face folder, or back, read again and compared before it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.convert.source import STATE, WEIGHTS, Source, find_source, load_source, stored_dtype
from glmctl.convert.verify import compare
from glmctl.errors import DataError
from glmctl.model.folder import copy_tokenizer, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import write_tensors
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "keep": None}


def run(recipe: ConvertRecipe, run: Run) -> dict[str, Any]:
    """Convert `recipe.source` into the run's export and verify it tensor by tensor.

    `to: hf` writes a model folder with the source's tokenizer; `to: checkpoint` a folder with the weights under
    their in-memory names and the shape in state.json, without optimizer state. Router biases stay fp32.

    Returns {kind, source, tensors, bytes, identical, max_logit_difference}. Raises DataError when the source is
    damaged, or when what was written does not equal it.
    """
    source = find_source(Path(recipe.source))
    dtype = _DTYPES[recipe.dtype]
    console.note(f"reading {source.path} ({'model folder' if source.kind == 'hf' else 'checkpoint'})")
    model = load_source(source)
    with atomic.publish(run.export) as folder:
        if recipe.to == "hf":
            save_model(
                model, folder, tokenizer_folder=source.tokenizer_folder, dtype=dtype, shard_bytes=recipe.shard_bytes
            )
        else:
            _write_checkpoint(model, folder, source, dtype)
        del model
        if source.tokenizer_folder is None:
            console.note(f"{source.path}: no tokenizer beside it, so none is exported")
    console.note("verifying")
    found = compare(source.path, run.export, dtype=dtype)
    if not found.identical:
        raise DataError(f"{run.export}: does not equal {source.path}: {found.differences[0]}")
    return {
        "kind": recipe.to,
        "source": str(source.path),
        "tensors": found.tensors,
        "bytes": found.bytes,
        "identical": True,
        "max_logit_difference": found.max_logit_difference,
    }


def _write_checkpoint(model: GlmMoe, folder: Path, source: Source, dtype: torch.dtype | None) -> None:
    listed = ((name, tensor.to(stored_dtype(name, tensor, dtype))) for name, tensor in model.state_dict().items())
    write_tensors(folder / WEIGHTS, listed)
    state = {"step": 0, "model": model.config.model_dump(mode="json"), "mtp_copies": model.stores_mtp_copies}
    (folder / STATE).write_text(json.dumps({"version": 1, "state": state}, indent=2) + "\n", encoding="utf-8")
    if source.tokenizer_folder is not None:
        copy_tokenizer(source.tokenizer_folder, folder)
