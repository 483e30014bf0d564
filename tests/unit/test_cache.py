"""The key-value cache as a container."""

from __future__ import annotations

import pytest
import torch

from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe


def test_the_mtp_layer_has_its_own_place(tiny_config: ModelConfig) -> None:
    cache = KVCache(tiny_config, 3, 10)
    assert cache.keys.shape == (tiny_config.num_hidden_layers + 1, 3, 2, 10, 16)
    assert cache.nbytes == 2 * cache.keys.numel() * 4
    bare = tiny_config.model_copy(update={"num_nextn_predict_layers": 0})
    assert KVCache(bare, 3, 10).keys.shape[0] == tiny_config.num_hidden_layers
    assert KVCache(tiny_config, 3, 10, layers=1, dtype=torch.bfloat16).keys.dtype == torch.bfloat16


def test_move_copies_a_row_and_leaves_the_others(tiny_config: ModelConfig) -> None:
    cache = KVCache(tiny_config, 3, 10)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    cache.values.normal_(generator=torch.Generator().manual_seed(1))
    before = cache.keys.clone()
    cache.move(2, 0, length=4)
    assert torch.equal(cache.keys[:, 0, :, :4], before[:, 2, :, :4])
    assert torch.equal(cache.keys[:, 0, :, 4:], before[:, 0, :, 4:])
    cache.move(2, 0)
    assert torch.equal(cache.keys[:, 0], before[:, 2])
    assert torch.equal(cache.values[:, 0], cache.values[:, 2])
    assert torch.equal(cache.keys[:, 1:], before[:, 1:])
    cache.move(1, 1)
    assert torch.equal(cache.keys[:, 1:], before[:, 1:])


def test_only_the_named_rows_are_written(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    cache = KVCache(tiny_config, 4, 10)
    with torch.no_grad():
        model(torch.arange(6).view(2, 3), cache=cache, rows=slice(1, 3))
    layers = tiny_config.num_hidden_layers
    assert (cache.keys[:, 0] == 0).all()
    assert (cache.keys[:, 3] == 0).all()
    assert (cache.keys[:layers, 1:3, :, :3].abs().sum(-1) > 0).all()
    assert (cache.keys[:layers, 1:3, :, 3:] == 0).all()
    assert (cache.keys[layers:] == 0).all(), "the MTP layer's place is written by mtp() only"


def test_positions_outside_the_cache_are_our_bug(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    cache = KVCache(tiny_config, 1, 4)
    with pytest.raises(AssertionError, match="position outside the cache"):
        model(torch.zeros(1, 1, dtype=torch.long), positions_BT=torch.tensor([[4]]), cache=cache)
    with pytest.raises(AssertionError, match="rows and batch differ"):
        model(torch.zeros(2, 1, dtype=torch.long), positions_BT=torch.zeros(2, 1, dtype=torch.long), cache=cache)
