"""Whether two stored models are the same model, bit for bit, read back from disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glmctl.convert.source import StoredModel, load, open_model
from glmctl.convert.stored import Stored
from glmctl.convert.write import plain_tensors

PROMPT_LENGTH = 32


@dataclass
class Comparison:
    """What `compare` found."""

    tensors: int = 0
    """compared, under their Hugging Face names"""
    bytes: int = 0
    """of those tensors, as the second model stores them"""
    max_logit_difference: float | None = None
    """largest absolute difference of main and MTP logits on a fixed prompt; None when not computed"""
    differences: list[str] = field(default_factory=list)
    """one line for each tensor that is missing, extra or different"""

    @property
    def identical(self) -> bool:
        """Same names, shapes, dtypes and bytes."""
        return not self.differences


def compare(
    a: Path | StoredModel, b: Path | StoredModel, *, dtype: torch.dtype | None = None, logits: bool = True
) -> Comparison:
    """Compare two models, each a model folder, a checkpoint, a GGUF file, a run, or one of them opened.

    Names are compared both ways, then shape, dtype and SHA-256 of every tensor, in bounded memory; the logits of
    both, unless `logits` is off, with both in memory one after the other. With `dtype`, `b` is expected to be `a`
    converted to it (router biases excepted). Raises DataError or RecipeError when one cannot be read.
    """
    first, second = (x if isinstance(x, StoredModel) else open_model(x) for x in (a, b))
    a, b = first.source.path, second.source.path
    left, right = plain_tensors(first, dtype), second.tensors
    result = Comparison()
    result.differences += [f"tensor '{name}' is only in {a}" for name in sorted(left.keys() - right.keys())]
    result.differences += [f"tensor '{name}' is only in {b}" for name in sorted(right.keys() - left.keys())]
    for name in sorted(left.keys() & right.keys()):
        result.tensors += 1
        result.bytes += right[name].nbytes
        problem = _difference(left[name], right[name])
        if problem:
            result.differences.append(f"tensor '{name}' {problem}")
    if logits and first.config == second.config:
        result.max_logit_difference = logit_difference(first, second)
    return result


def _difference(expected: Stored, found: Stored) -> str | None:
    if expected.shape != found.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    if expected.dtype != found.dtype:
        return f"has dtype {found.dtype}, expected {expected.dtype}"
    if tensor_sha256(expected) != tensor_sha256(found):
        return "has other values"
    return None


def tensor_sha256(tensor: Stored) -> str:
    """SHA-256 of the tensor's bytes in row-major order; distinguishes -0.0 from 0.0 and NaNs from each other."""
    digest = hashlib.sha256()
    for block in tensor.blocks():
        if block.numel():
            digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def logit_difference(first: StoredModel, second: StoredModel) -> float:
    """Largest absolute difference of main and MTP logits on a fixed prompt that spreads over the vocabulary."""
    ours, theirs = fixed_prompt_logits(first), fixed_prompt_logits(second)
    return max(float((x - y).abs().max()) for x, y in zip(ours, theirs, strict=True))


@torch.inference_mode()
def fixed_prompt_logits(model: StoredModel) -> list[Tensor]:
    """Main and, where there is one, MTP logits [1, T, V] of the fixed prompt."""
    network = load(model)
    step = max(1, network.config.vocab_size // PROMPT_LENGTH)
    tokens_BT = (torch.arange(PROMPT_LENGTH + 1) * step % network.config.vocab_size)[None]
    hidden_BTD = network(tokens_BT[:, :-1])
    result = [network.logits(hidden_BTD)]
    if network.mtp is not None:
        result.append(network.logits(network.mtp(hidden_BTD, tokens_BT[:, 1:])))
    return result
