"""Whether two stored models are the same model, bit for bit, read back from disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glmctl.convert.source import Source, StoredTensors, find_source, load_source, stored_dtype

PROMPT_LENGTH = 32


@dataclass
class Comparison:
    """What `compare` found."""

    tensors: int = 0
    """compared, under their Hugging Face names"""
    bytes: int = 0
    """of those tensors, as the second model stores them"""
    max_logit_difference: float = 0.0
    """largest absolute difference of main and MTP logits on a fixed prompt"""
    differences: list[str] = field(default_factory=list)
    """one line for each tensor that is missing, extra or different"""

    @property
    def identical(self) -> bool:
        """Same names, shapes, dtypes and bytes."""
        return not self.differences


def compare(a: Path, b: Path, *, dtype: torch.dtype | None = None, logits: bool = True) -> Comparison:
    """Compare two models, each a model folder, a checkpoint or a run.

    Names are compared both ways, then shape, dtype and SHA-256 of every tensor. With `dtype`, `b` is expected to be
    `a` converted to it (router biases excepted). Raises DataError or RecipeError when one cannot be read.
    """
    first, second = find_source(a), find_source(b)
    left, right = StoredTensors(first), StoredTensors(second)
    result = Comparison()
    result.differences += [f"tensor '{name}' is only in {a}" for name in sorted(left.names - right.names)]
    result.differences += [f"tensor '{name}' is only in {b}" for name in sorted(right.names - left.names)]
    for name in sorted(left.names & right.names):
        original, copy = left.read(name), right.read(name)
        expected = original.to(stored_dtype(name, original, dtype))
        result.tensors += 1
        result.bytes += copy.nbytes
        problem = _difference(expected, copy)
        if problem:
            result.differences.append(f"tensor '{name}' {problem}")
    if logits and not result.differences:
        result.max_logit_difference = _logit_difference(first, second)
    return result


def _difference(expected: Tensor, found: Tensor) -> str | None:
    if expected.shape != found.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"has dtype {found.dtype}, expected {expected.dtype}"
    if tensor_sha256(expected) != tensor_sha256(found):
        return "has other values"
    return None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of the tensor's bytes in row-major order; distinguishes -0.0 from 0.0 and NaNs from each other."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()


def _logit_difference(first: Source, second: Source) -> float:
    ours, theirs = _logits(first), _logits(second)
    return max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True))


@torch.inference_mode()
def _logits(source: Source) -> list[Tensor]:
    """Main and, where there is one, MTP logits of a fixed prompt that spreads over the vocabulary."""
    model = load_source(source)
    step = max(1, model.config.vocab_size // PROMPT_LENGTH)
    tokens_BT = (torch.arange(PROMPT_LENGTH + 1) * step % model.config.vocab_size)[None]
    hidden_BTD = model(tokens_BT[:, :-1])
    result = [model.logits(hidden_BTD)]
    if model.mtp is not None:
        result.append(model.logits(model.mtp(hidden_BTD, tokens_BT[:, 1:])))
    return result
