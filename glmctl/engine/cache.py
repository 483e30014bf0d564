"""Keys and values in blocks of a fixed number of places, handed out one by one to the sequences that need them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from glmctl.model.config import ModelConfig

BLOCK_SIZE = 16


class PagedCache:
    """Room for `blocks` x `block_size` places in every layer.

    `keys[l]` and `values[l]` are contiguous [blocks, K, block_size, d], K and the widths those of
    `ModelConfig.cache_spec` (MLA's values have none: they are the leading part of its keys); layer `num_hidden_layers`
    is the MTP layer's, when `layers` counts it. A sequence's place p lies in block `table[p // block_size]` at offset
    `p % block_size`, where `table` is its row of block ids. Block 0 belongs to nobody: tables are padded with it.
    Keys are stored rotated.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        *,
        layers: int,
        block_size: int = BLOCK_SIZE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert blocks >= 2, "block 0 is padding; at least one more is needed"
        assert block_size >= 1
        assert block_size & (block_size - 1) == 0, "block_size must be a power of two"
        self.config, self.blocks, self.block_size = config, blocks, block_size
        spec = config.cache_spec
        shape = (blocks, spec.heads, block_size)
        self.keys = [_zeros((*shape, spec.key_dim), device, dtype) for _ in range(layers)]
        self.values = [_zeros((*shape, spec.value_dim), device, dtype) for _ in range(layers)]

    def store(
        self, layer: int, place_P: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, stored_BT1k: Tensor | None = None
    ) -> None:
        """Keep these keys and values, or the one vector of MLA instead of both; `place_P` as in a [places, d] view."""
        keys, values = self.keys[layer], self.values[layer]
        d = keys.shape[-1]
        # a compressed cache keeps one vector a place, which is the key; its values are that key's leading part
        for stored, new in ((keys, k_BTKd), (values, v_BTKd)) if stored_BT1k is None else ((keys, stored_BT1k),):
            stored.view(-1, d).index_copy_(0, place_P, new.reshape(-1, d).to(stored.dtype))

    @property
    def nbytes(self) -> int:
        """Memory reserved."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @staticmethod
    def bytes_per_block(config: ModelConfig, layers: int, block_size: int, dtype: torch.dtype) -> int:
        """What one block costs."""
        return layers * config.cache_spec.numbers * block_size * dtype.itemsize


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros, not empty: a masked place meets a weight of exactly 0, and 0 * NaN would be NaN.

    On a CPU through numpy, whose zeros are calloc: pages that are never used are never committed.
    """
    if torch.device(device).type == "cpu" and dtype == torch.float32:
        return torch.from_numpy(np.zeros(shape, np.float32))
    return torch.zeros(shape, device=device, dtype=dtype)
