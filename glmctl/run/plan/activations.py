"""What a training step keeps for its backward, in bytes a token, counted from the config.

The counts are those of this implementation's own autograd functions (`kernels`): a test compares them with what
torch really saves. `n` is the bytes of a number in the matrix products: 4, or 2 in bf16. Scores of the router, scales
of norms and log-sums of attention are fp32 in both. Legend: D hidden, H heads, K kv heads, d head dim, v value dim,
E experts, k experts a token, I expert width.
"""

from __future__ import annotations

from glmctl.model.config import ModelConfig

WIDE = 4
INDEX = 8
"""torch's integers"""
BATCH_BYTES = 6 * INDEX
"""a token in `data.batches.Batch`: six int64 tensors"""


def layer_kept(config: ModelConfig, moe: bool, n: int, *, balance: bool = True, scores: int = 0) -> int:
    """Of one decoder layer, its input included. `scores`: see `whole_scores`."""
    D = config.hidden_size
    norms = 2 * (2 * D * n + WIDE)
    ffn = _moe_kept(config, n, balance) if moe else 3 * config.intermediate_size * n
    return norms + _attention_kept(config, n, scores) + ffn


def whole_scores(config: ModelConfig, device: str, length: int) -> int:
    """Scores a token and head that are kept whole: the row's length where torch has no fused attention for values
    narrower than keys, which is on the CPU; 0 elsewhere."""
    return length if device == "cpu" and config.value_dim != config.head_dim else 0


def _attention_kept(config: ModelConfig, n: int, scores: int) -> int:
    c = config
    H, K, d, v = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.value_dim
    out = H * v * n + H * WIDE  # and its log-sums
    if c.attention == "mla":
        assert c.kv_lora_rank is not None
        assert c.qk_nope_head_dim is not None
        query = 2 * c.q_lora_rank * n + WIDE if c.q_lora_rank else 0
        latent = (2 * c.kv_lora_rank + c.rope_head_dim) * n + WIDE
        if scores:
            return query + latent + 2 * H * (d + v) * n + H * scores * n
        return query + latent + H * (c.qk_nope_head_dim + v) * n + 2 * H * d * n + out
    # queries and keys before and after their norm and rotation
    turned = 2 * (H + K) * d * n + K * v * n
    if c.attention == "mfa":
        assert c.q_lora_rank is not None
        return turned + 2 * c.q_lora_rank * n + WIDE + out
    return turned + ((H + K) * WIDE if c.use_qk_norm else 0) + out


def _moe_kept(config: ModelConfig, n: int, balance: bool) -> int:
    c = config
    D, k, width = c.hidden_size, c.num_experts_per_tok, c.moe_intermediate_size
    scores = c.n_routed_experts * WIDE + (WIDE if balance else 0)
    if n < WIDE:
        scores += D * WIDE  # the router's own copy of its input
    chosen = k * INDEX + ((k + 1) * WIDE if c.norm_topk_prob else 0)
    sent = k * (D + 2 * width) * n + k * WIDE
    order = 3 * k * INDEX
    return scores + chosen + sent + order + 3 * width * c.n_shared_experts * n


def layer_work(config: ModelConfig, moe: bool, n: int) -> int:
    """Most that the backward of one layer needs beside what was kept: gradients of one operation's intermediates."""
    c = config
    D, H, K = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    attention = 2 * (H + K) * c.head_dim * n + K * c.value_dim * n + H * c.value_dim * n
    sent = c.num_experts_per_tok * (2 * D + 4 * c.moe_intermediate_size) * n
    return max(attention, sent if moe else 3 * c.intermediate_size * n) + 2 * D * n


def shared_kept(config: ModelConfig, *, passes: int) -> int:
    """The batch and RoPE's tables, which all layers share; `passes`: 2 with the MTP layer, which makes its own."""
    return BATCH_BYTES + passes * 2 * config.rope_head_dim * WIDE


def mtp_kept(config: ModelConfig, n: int) -> int:
    """Around the MTP layer: two norms in, the projection's input, the norm out."""
    return (5 * config.hidden_size) * n + 3 * WIDE


def final_kept(config: ModelConfig, n: int) -> int:
    """The final norm and the hidden states that it gives."""
    return 2 * config.hidden_size * n + WIDE


def head_kept(config: ModelConfig, tokens: int, n: int) -> int:
    """Of one pass through the output matrix, for `tokens` tokens: gradients of hidden states and matrix, made on
    the way (`kernels.linear_cross_entropy`). The matrix's is summed in fp32."""
    return tokens * config.hidden_size * n + config.vocab_size * config.hidden_size * WIDE
