"""Writing what is streamed: files that are hashed and read back while they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmctl.convert.checked_file import CheckedFile
from glmctl.convert.fp8 import ErrorReport, description, quantisable, quantised
from glmctl.convert.megatron import NAMES, to_megatron
from glmctl.convert.source import STATE, WEIGHTS, StoredModel, in_memory, stored_dtype
from glmctl.convert.stored import Stored, cast
from glmctl.errors import EnvironmentProblem
from glmctl.model.direct import sha256_file
from glmctl.model.folder import copy_tokenizer, plan_shards, write_config, write_index
from glmctl.model.tensor_file import encode_header
from glmctl.run import atomic

FINISHED = "finished.json"
"""which files an interrupted conversion has finished; not part of the result"""


class Folder:
    """The files of one conversion's result, each hashed and read back as it is written.

    Files that an interrupted conversion finished in the same folder are not written again, but read once more.
    """

    def __init__(self, path: Path, memory: dict[str, dict[str, float]] | None = None) -> None:
        """memory: figures that grow as files are written, kept with them and brought back when going on."""
        self.path = path
        self.memory = {} if memory is None else memory
        self.digests: dict[str, str] = {}
        """SHA-256 of the bytes meant for each large file"""
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="check")
        self._checks: dict[str, Future[str]] = {}
        self._tasks: list[Future[None]] = []
        self._earlier: dict[str, str] = {}
        if (path / FINISHED).is_file():
            body = json.loads((path / FINISHED).read_text(encoding="utf-8"))
            self._earlier = body["files"]
            for key, figures in body["memory"].items():
                self.memory[key].update(figures)

    def finished(self, name: str) -> bool:
        """Whether an interrupted conversion wrote this file, which then counts and need not be written."""
        if name not in self._earlier:
            return False
        self.digests[name] = self._earlier[name]
        self._checks[name] = self._checker.submit(sha256_file, self.path / name)
        return True

    def meanwhile(self, task: Callable[[], None]) -> None:
        """Have `task` done in the background; `check` raises what it raises."""
        self._tasks.append(self._checker.submit(task))

    @contextmanager
    def file(self, name: str) -> Iterator[CheckedFile]:
        """A writer of one file; when the body ends, the file is on the disk and has been read back."""
        writer = CheckedFile(self.path / name)
        try:
            yield writer
            self.digests[name] = writer.close()
        except BaseException:
            writer.abandon()
            (self.path / name).unlink(missing_ok=True)
            raise
        atomic.write_json(self.path / FINISHED, {"files": self.digests, "memory": self.memory})

    def check(self) -> None:
        """Wait for the background. EnvironmentProblem when a file finished earlier holds other bytes by now."""
        for task in self._tasks:
            task.result()
        for name, check in self._checks.items():
            if check.result() != self.digests[name]:
                (self.path / FINISHED).unlink(missing_ok=True)
                raise EnvironmentProblem(f"{self.path / name}: read back other bytes than written; is the disk well?")
        self._checker.shutdown()
        (self.path / FINISHED).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Stop reading back."""
        self._checker.shutdown(cancel_futures=True)


def write_safetensors(folder: Folder, name: str, tensors: Mapping[str, Stored]) -> None:
    """Write one safetensors file, block by block, in the order given, unless that would misalign a tensor."""
    if folder.finished(name):
        return
    listed = list(tensors.items())
    if not _aligned(tensor for _, tensor in listed):
        listed.sort(key=lambda item: -item[1].dtype.itemsize)
    with folder.file(name) as file:
        file.write(encode_header((key, tensor.dtype, tensor.shape) for key, tensor in listed))
        for _, tensor in listed:
            for block in tensor.blocks():
                file.write(block)


def _aligned(tensors: Iterable[Stored]) -> bool:
    offset = 0
    for tensor in tensors:
        if offset % tensor.dtype.itemsize:
            return False
        offset += tensor.nbytes
    return True


def write_folder(
    model: StoredModel,
    folder: Folder,
    *,
    dtype: torch.dtype | None,
    shard_bytes: float,
    tensors: Mapping[str, Stored] | None = None,
    config_extra: Mapping[str, Any] | None = None,
) -> None:
    """A Hugging Face folder of `model`: config, shards with their index, tokenizer.

    tensors: other tensors than the model's own, with keys of `config_extra` that tell a reader what they are.
    """
    listed = plain_tensors(model, dtype) if tensors is None else tensors
    write_config(model.config, folder.path, dtype or model.dtype, config_extra)
    sizes = {name: tensor.nbytes for name, tensor in listed.items()}
    shards = plan_shards(sizes, shard_bytes)
    for file_name, names in shards.items():
        write_safetensors(folder, file_name, {name: listed[name] for name in names})
    write_index(folder.path, shards, sizes)
    _bring_tokenizer(model, folder)


def write_fp8(model: StoredModel, folder: Folder, layout: str, report: ErrorReport, *, shard_bytes: float) -> None:
    """A Hugging Face folder with FP8 projections (`convert.fp8`), everything else bf16, router biases fp32."""
    listed = {
        name: tensor if quantisable(name, tensor) else cast(tensor, stored_dtype(name, tensor, torch.bfloat16))
        for name, tensor in model.tensors.items()
    }
    write_folder(
        model,
        folder,
        dtype=torch.bfloat16,
        shard_bytes=shard_bytes,
        tensors=quantised(listed, layout, report),
        config_extra={"quantization_config": description(listed, layout)},
    )


def write_megatron(model: StoredModel, folder: Folder, *, dtype: torch.dtype | None, shard_bytes: float) -> None:
    """A folder of safetensors under Megatron-core's names and in its layouts (`convert.megatron`)."""
    write_folder(
        model,
        folder,
        dtype=dtype,
        shard_bytes=shard_bytes,
        tensors=to_megatron(model.config, plain_tensors(model, dtype)),
        config_extra={"tensor_names": NAMES, "mtp_copies": model.copies},
    )


def plain_tensors(model: StoredModel, dtype: torch.dtype | None) -> dict[str, Stored]:
    """The model's tensors as `dtype` (None = as they are), router biases in fp32."""
    return {name: cast(tensor, stored_dtype(name, tensor, dtype)) for name, tensor in model.tensors.items()}


def write_checkpoint(model: StoredModel, folder: Folder, *, dtype: torch.dtype | None) -> None:
    """The weights under their in-memory names and the shape in state.json, without optimizer state."""
    listed = in_memory(replace(model, tensors=plain_tensors(model, dtype)))
    write_safetensors(folder, WEIGHTS, listed)
    state = {"step": 0, "model": model.config.model_dump(mode="json"), "mtp_copies": model.copies}
    body = json.dumps({"version": 1, "state": state}, indent=2)
    (folder.path / STATE).write_text(body + "\n", encoding="utf-8")
    _bring_tokenizer(model, folder)


def _bring_tokenizer(model: StoredModel, folder: Folder) -> None:
    if model.source.tokenizer_folder is not None:
        copy_tokenizer(model.source.tokenizer_folder, folder.path)
    for name, text in model.tokenizer_files.items():
        (folder.path / name).write_text(text, encoding="utf-8", newline="")
