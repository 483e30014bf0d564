"""What a token costs in arithmetic and in cache, counted from the config. Pure Python (no torch).

A multiply-add is 2 FLOPs. Counted are matrix products and attention; norms, activations, RoPE and the embedding's
look-up, which cost less than 1% of them at the released sizes, are not.
"""

from __future__ import annotations

from typing import NamedTuple

from glmctl.model.config import ModelConfig


class Flops(NamedTuple):
    """Forward FLOPs of one token."""

    matrices: int
    """2 times the matrix elements it meets: projections, router, its experts, dense layers"""
    head: int
    """the output matrix"""
    attention: float
    """scores and weighted values over the positions it sees"""

    @property
    def total(self) -> float:
        """All of it."""
        return self.matrices + self.head + self.attention


def vectors(config: ModelConfig) -> tuple[int, int]:
    """Parameters that are no matrix (norms and biases): of the decoder with its final norm, and of the MTP layer."""
    d = config.hidden_size
    layer = 2 * d + (2 * config.head_dim if config.use_qk_norm else 0)
    if config.attention_bias:
        layer += config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
    layer += config.q_lora_rank or 0
    layer += config.kv_lora_rank or 0
    return config.num_hidden_layers * layer + d, config.num_nextn_predict_layers * (layer + 3 * d)


def forward_flops(config: ModelConfig, seen: float, *, mtp: bool = False, absorbed: bool = False) -> Flops:
    """Forward FLOPs of one token that attends to `seen` positions, itself included.

    seen: T for the T-th token of a text, (T + 1) / 2 on average over T tokens. mtp: of the MTP layer (its own pass
    through the output matrix included) instead of the network. absorbed: MLA as it decodes, over the compressed cache
    (scores over c + r numbers and values of c, not d and v); the products with `kv_b_proj` cost the same either way.
    """
    counts = config.parameter_counts()
    plain, mtp_plain = vectors(config)
    matrices = counts.active_mtp - mtp_plain if mtp else counts.active - plain
    layers = config.num_nextn_predict_layers if mtp else config.num_hidden_layers
    width = config.head_dim + config.value_dim
    if absorbed and config.kv_lora_rank is not None:
        width = 2 * config.kv_lora_rank + config.rope_head_dim
    head = 2 * config.vocab_size * config.hidden_size
    return Flops(2 * matrices, head, 2 * layers * config.num_attention_heads * width * seen)


def kv_bytes_per_token(config: ModelConfig, bytes_per_number: float = 2, *, mtp: bool = False) -> float:
    """Bytes one position adds to the cache over all layers; bfloat16 by default. mtp: with the MTP layer's."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * config.cache_spec.numbers * bytes_per_number
