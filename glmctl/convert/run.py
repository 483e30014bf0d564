"""`glmctl convert`: a model in another format, streamed, read back and compared before it counts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from glmctl import console
from glmctl.convert.fp8 import ErrorReport
from glmctl.convert.gguf_export import write_gguf
from glmctl.convert.lora import merge_lora
from glmctl.convert.source import STATE, WEIGHTS, StoredModel, check_copies, open_model
from glmctl.convert.upcycle import upcycle
from glmctl.convert.verify import compare, logit_difference
from glmctl.convert.write import Folder, write_checkpoint, write_folder, write_fp8, write_megatron
from glmctl.errors import DataError
from glmctl.model.direct import keep_memory, sha256_file
from glmctl.model.fp8 import SCALE
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.fingerprint import digest, input_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "keep": None}


def run(recipe: ConvertRecipe, run: Run) -> dict[str, Any]:
    """Convert `recipe.source` into the run's export.

    `to: hf` writes a model folder with the source's tokenizer; `to: checkpoint` a folder with the weights under
    their in-memory names and the shape in state.json, without optimizer state; `to: megatron` a folder with
    Megatron-core's names; `to: gguf` a file for llama.cpp. From an FP8 source, `keep` means the dtype that its config
    names. Memory stays bounded whatever the model's size. An interrupted conversion goes on after its last finished
    file when it is started again with the same recipe and an unchanged source.

    Every large file is read back and compared with the bytes meant for it (`CheckedFile`); folders and checkpoints
    of up to `compare_bytes` are also compared with the source tensor by tensor and by their logits.

    Returns {kind, source, tensors, bytes, verified}; where compared, {identical, max_logit_difference}, and for an
    upcycled model {dense_logit_difference}; and for an FP8 result {quantisation_error} (`fp8.ErrorReport`), whose
    logits are compared but whose tensors differ. Raises DataError when the source is damaged, or when what was written
    does not equal it.
    """
    keep_memory()
    original = open_model(Path(recipe.source))
    if recipe.adapter is not None:
        original = merge_lora(original, Path(recipe.adapter))
    model = original if recipe.upcycle is None else upcycle(original, recipe.upcycle, recipe.seed)
    dtype = _DTYPES[recipe.dtype] or model.packed_as if recipe.dtype in _DTYPES else None
    report = ErrorReport()
    where = model.source.path
    console.note(f"reading {where} ({'model folder' if model.source.kind == 'hf' else model.source.kind})")
    known: dict[str, str] = {}
    body = recipe.model_dump(mode="json")
    with atomic.publish(run.export, known, continuing=digest([body, input_files(body)])) as path:
        folder = Folder(path, report.figures)
        try:
            _convert(recipe, model, folder, dtype, report)
            folder.check()
        finally:
            folder.abandon()
        known.update(folder.digests)
    if model.source.tokenizer_folder is None and not model.tokenizer_files:
        console.note(f"{where}: no tokenizer beside it, so none is exported")
    summary: dict[str, Any] = {
        "kind": recipe.to,
        "source": str(where),
        "tensors": len(model.tensors),
        "bytes": sum((run.export / name).stat().st_size for name in known),
        "verified": "read back",
    }
    if recipe.dtype in SCALE:
        summary["quantisation_error"] = report.summary()
    if recipe.to == "gguf" or model.nbytes > recipe.compare_bytes:
        return summary
    console.note("comparing")
    if model is not original:
        summary["dense_logit_difference"] = logit_difference(original, model)
    return summary | _compared(recipe, model, run.export, dtype)


def _compared(recipe: ConvertRecipe, model: StoredModel, export: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    if recipe.dtype in SCALE:
        difference = logit_difference(model, open_model(export))
        return {"verified": "read back, logits", "max_logit_difference": difference}
    found = compare(model, export, dtype=dtype)
    if not found.identical:
        raise DataError(f"{export}: does not equal {model.source.path}: {found.differences[0]}")
    return {
        "bytes": found.bytes,
        "verified": "tensors and logits",
        "identical": True,
        "max_logit_difference": found.max_logit_difference,
    }


def _convert(
    recipe: ConvertRecipe, model: StoredModel, folder: Folder, dtype: torch.dtype | None, report: ErrorReport
) -> None:
    if model.source.kind == "checkpoint":
        folder.meanwhile(partial(atomic.verify, model.source.path, (WEIGHTS, STATE), sha256_file))
    check_copies(model)
    if recipe.to == "gguf":
        write_gguf(model, folder, recipe.dtype)
    elif recipe.to == "checkpoint":
        write_checkpoint(model, folder, dtype=dtype)
    elif recipe.to == "megatron":
        write_megatron(model, folder, dtype=dtype, shard_bytes=recipe.shard_bytes)
    elif recipe.dtype in SCALE:
        write_fp8(model, folder, recipe.dtype, report, shard_bytes=recipe.shard_bytes)
    else:
        write_folder(model, folder, dtype=dtype, shard_bytes=recipe.shard_bytes)
