"""Counts by arithmetic against the network: parameters on meta, FLOPs by torch's counter, cache bytes by size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glmctl.kernels import registry
from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.cost import forward_flops, kv_bytes_per_token, vectors
from glmctl.model.network import GlmMoe
from glmctl.recipe.presets import PRESETS


@contextmanager
def as_defined() -> Iterator[None]:
    """Kernels whose matrix products are the model's own and seen by torch: the fast RoPE exchanges halves by a product,
    without gradients a small model's tokens go through all experts, and compiled attention is not counted."""
    in_torch = patch("glmctl.kernels.fused.attention.usable", return_value=False)
    with in_torch, registry.forced("rope", "reference"), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def parts(model: GlmMoe) -> tuple[int, int, int]:
    """Parameters of the decoder with its final norm, of MTP, and of embedding and head, by looking at the network."""
    names = {name: p.numel() for name, p in model.named_parameters()}
    mtp = sum(n for name, n in names.items() if name.startswith("mtp."))
    vocabulary = sum(n for name, n in names.items() if name.startswith(("embed_tokens.", "lm_head.")))
    return sum(names.values()) - mtp - vocabulary, mtp, vocabulary


@pytest.mark.parametrize("preset", PRESETS)
def test_arithmetic_counts_what_is_built_at_real_size(preset: str) -> None:
    """The meta device allocates nothing."""
    check_counts(ModelConfig.model_validate(PRESETS[preset]))


def test_arithmetic_counts_what_is_built(family_config: ModelConfig) -> None:
    check_counts(family_config)


def check_counts(config: ModelConfig) -> None:
    model = GlmMoe(config, device="meta")
    counts = config.parameter_counts()
    assert (counts.main, counts.mtp, counts.vocabulary) == parts(model)
    flat = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 1}
    mtp = sum(n for name, n in flat.items() if name.startswith("mtp."))
    assert vectors(config) == (sum(flat.values()) - mtp, mtp)


def test_flops_are_those_torch_counts(family_config: ModelConfig) -> None:
    config = family_config
    model = GlmMoe(config, seed=0)
    B, T = 2, 16
    tokens_BT = torch.randint(0, config.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
    with as_defined():
        with FlopCounterMode(display=False) as counter:
            hidden_BTD = model(tokens_BT)
            model.logits(hidden_BTD)
        # torch's counter knows no causality: every token is counted as seeing all T
        expected = forward_flops(config, T)
        assert counter.get_total_flops() == B * T * expected.total
        if model.mtp is not None:
            with FlopCounterMode(display=False) as counter:
                model.logits(model.mtp(hidden_BTD, tokens_BT))
            assert counter.get_total_flops() == B * T * forward_flops(config, T, mtp=True).total


def test_flops_of_a_cached_step(family_config: ModelConfig) -> None:
    """One token on top of 15; MLA in its absorbed form."""
    config = family_config
    model = GlmMoe(config, seed=0)
    cache = KVCache(config, 1, 16)
    with as_defined():
        model(torch.zeros(1, 15, dtype=torch.long), cache=cache)
        with FlopCounterMode(display=False) as counter:
            last = torch.tensor([[15]])
            model.logits(model(torch.zeros(1, 1, dtype=torch.long), positions_BT=last, cache=cache))
    assert counter.get_total_flops() == forward_flops(config, 16, absorbed=True).total


def test_cache_bytes_are_the_caches(family_config: ModelConfig) -> None:
    config = family_config
    for mtp in (False, True):
        layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
        cache = KVCache(config, 3, 10, dtype=torch.bfloat16, layers=layers)
        assert cache.nbytes == 30 * kv_bytes_per_token(config, mtp=mtp)
