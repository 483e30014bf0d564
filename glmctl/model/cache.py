"""Keys and values of earlier positions, one compact row for each sequence in flight."""

from __future__ import annotations

import torch

from glmctl.model.config import ModelConfig


class KVCache:
    """Room for `rows` sequences of up to `max_length` positions in every layer.

    `keys` and `values` are [L, rows, K, max_length, d], K and the widths those of `ModelConfig.cache_spec`; the MTP
    layer, when the config has one, is layer `num_hidden_layers`. A row is reused by writing from position 0 again: what
    lies beyond a query's position is never seen. Keys are stored rotated.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        layers: int | None = None,
    ) -> None:
        if layers is None:
            layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.config, self.rows, self.max_length = config, rows, max_length
        spec = config.cache_spec
        shape = (layers, rows, spec.heads, max_length)
        # zeros, not empty: masked places meet a weight of exactly 0, and 0 * NaN would be NaN
        self.keys = torch.zeros((*shape, spec.key_dim), device=device, dtype=dtype)
        self.values = torch.zeros((*shape, spec.value_dim), device=device, dtype=dtype)

    def move(self, src_row: int, dst_row: int, length: int | None = None) -> None:
        """Copy row `src_row` over `dst_row`, all of it or its first `length` positions."""
        if src_row == dst_row:
            return
        for stored in (self.keys, self.values):
            stored[:, dst_row, :, :length] = stored[:, src_row, :, :length]

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.keys.nbytes + self.values.nbytes
