"""The three ways from a hidden state to queries, keys and values: GQA, MLA and MFA. What is seen is `Sight`'s matter.

Legend: B batch, T time, D hidden, H query heads, K kv heads, d head dim (queries and keys), n its part without RoPE,
r its part with RoPE, v value dim, c rank of the compressed keys and values.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from glmctl.kernels.rms_norm import rms_norm
from glmctl.kernels.rope import Rotation, norm_rope, rope
from glmctl.model.attention import Sight
from glmctl.model.config import ModelConfig
from glmctl.model.router import RouterStats


class RowParts(NamedTuple):
    """Rows of one stored matrix that belong to several logical ones: `sizes` rows of each in turn, `groups` times."""

    groups: int
    sizes: tuple[int, ...]


class Pass(NamedTuple):
    """What all layers of one forward pass share."""

    turn: Rotation
    sight: Sight
    stats: RouterStats | None


class RmsNorm(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)


def narrowed(x: Tensor) -> Tensor:
    """x as autocast wants it for products, cast once for all that read it; on a CPU each product casts for itself."""
    device = x.device.type
    if device == "cpu" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _turned(x_BTHd: Tensor, norm: RmsNorm | None, turn: Rotation) -> Tensor:
    return norm_rope(x_BTHd, None, 0.0, turn) if norm is None else norm_rope(x_BTHd, norm.weight, norm.eps, turn)


class Attention(nn.Module):
    """Grouped-query attention: q, k, v with bias, o without; QK-norm before RoPE."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        c = config
        self.layer, self.head_dim = layer, c.head_dim
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query, bias=c.attention_bias, dtype=dtype)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias, dtype=dtype)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=c.attention_bias, dtype=dtype)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=False, dtype=dtype)
        self.q_norm = RmsNorm(c.head_dim, c.rms_norm_eps, dtype=dtype) if c.use_qk_norm else None
        self.k_norm = RmsNorm(c.head_dim, c.rms_norm_eps, dtype=dtype) if c.use_qk_norm else None

    def forward(self, x_BTD: Tensor, shared: Pass) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BTHd = self.q_proj(x_BTD).view(B, T, -1, self.head_dim)
        k_BTKd = self.k_proj(x_BTD).view(B, T, -1, self.head_dim)
        v_BTKd = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        q_BTHd = _turned(q_BTHd, self.q_norm, shared.turn).to(v_BTKd.dtype)
        k_BTKd = _turned(k_BTKd, self.k_norm, shared.turn).to(v_BTKd.dtype)
        out_BTHd = shared.sight.attend(self.layer, q_BTHd, k_BTKd, v_BTKd)
        result: Tensor = self.o_proj(out_BTHd.reshape(B, T, -1))
        return result


class FactorisedAttention(nn.Module):
    """Multi-matrix factorisation attention (MFA, arXiv 2412.19255; Step 3, spec section 1.8).

    q = W_qu RMSNorm(W_qd x), one low-rank space shared by all heads; k and v have (in Step 3) a single head.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        c = config
        assert c.q_lora_rank is not None
        self.layer, self.head_dim = layer, c.head_dim
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False, dtype=dtype)
        self.inter_norm = RmsNorm(c.q_lora_rank, c.rms_norm_eps, dtype=dtype)
        self.wq = nn.Linear(c.q_lora_rank, query, bias=False, dtype=dtype)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=False, dtype=dtype)

    def forward(self, x_BTD: Tensor, shared: Pass) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BTHd = self.wq(self.inter_norm(self.q_proj(x_BTD))).view(B, T, -1, self.head_dim)
        k_BTKd = self.k_proj(x_BTD).view(B, T, -1, self.head_dim)
        v_BTKd = self.v_proj(x_BTD).view(B, T, -1, self.head_dim)
        q_BTHd = _turned(q_BTHd, None, shared.turn).to(v_BTKd.dtype)
        k_BTKd = _turned(k_BTKd, None, shared.turn).to(v_BTKd.dtype)
        out_BTHd = shared.sight.attend(self.layer, q_BTHd, k_BTKd, v_BTKd)
        result: Tensor = self.o_proj(out_BTHd.reshape(B, T, -1))
        return result


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA, DeepSeek-V2 section 2.1; spec section 1.9).

    Keys and values of all heads come from one compressed vector of c numbers a position, and one rotated key of r
    numbers is shared by all heads; those c + r are all that a cache keeps. In a pass that sees nothing but itself,
    keys and values are expanded (cheaper: d < c); in one that continues a cache, the expansion is absorbed into
    queries and outputs instead, and nothing that was cached is ever expanded.
    """

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        c = config
        assert c.kv_lora_rank is not None
        assert c.qk_nope_head_dim is not None
        self.layer, self.heads, self.value_dim = layer, c.num_attention_heads, c.value_dim
        self.rank, self.plain_dim, self.rotated_dim = c.kv_lora_rank, c.qk_nope_head_dim, c.rope_head_dim
        self.score_scale = c.rope_scaling.score_scale if c.rope_scaling else 1.0
        query = self.heads * c.head_dim
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, query, bias=False, dtype=dtype)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False, dtype=dtype)
            self.q_a_layernorm = RmsNorm(c.q_lora_rank, c.rms_norm_eps, dtype=dtype)
            self.q_b_proj = nn.Linear(c.q_lora_rank, query, bias=False, dtype=dtype)
        self.low_rank_query = c.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, self.rank + self.rotated_dim, bias=False, dtype=dtype)
        self.kv_a_layernorm = RmsNorm(self.rank, c.rms_norm_eps, dtype=dtype)
        expanded = self.heads * (self.plain_dim + self.value_dim)
        self.kv_b_proj = nn.Linear(self.rank, expanded, bias=False, dtype=dtype)
        self.o_proj = nn.Linear(self.heads * self.value_dim, c.hidden_size, bias=False, dtype=dtype)

    def forward(self, x_BTD: Tensor, shared: Pass) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BTHd = self._query(x_BTD).view(B, T, self.heads, -1)
        plain_BTHn, turned_BTHr = torch.split(q_BTHd, [self.plain_dim, self.rotated_dim], dim=-1)
        compressed_BTk = self.kv_a_proj_with_mqa(x_BTD)
        latent_BTc, key_BTr = torch.split(compressed_BTk, [self.rank, self.rotated_dim], dim=-1)
        latent_BTc = self.kv_a_layernorm(latent_BTc)
        dtype = latent_BTc.dtype
        turned_BTHr = rope(_deinterleave(turned_BTHr), shared.turn).to(dtype)
        key_BT1r = rope(_deinterleave(key_BTr)[:, :, None], shared.turn).to(dtype)
        stored_BT1k = torch.cat([latent_BTc[:, :, None], key_BT1r], dim=-1)
        form = self._absorbed if shared.sight.continues else self._expanded
        out_BTHv = form(plain_BTHn.to(dtype), turned_BTHr, stored_BT1k, shared.sight)
        result: Tensor = self.o_proj(out_BTHv.reshape(B, T, -1))
        return result

    def row_parts(self) -> dict[str, RowParts]:
        """By parameter: latent and rotated key; keys and values of every head."""
        return {
            "kv_a_proj_with_mqa.weight": RowParts(1, (self.rank, self.rotated_dim)),
            "kv_b_proj.weight": RowParts(self.heads, (self.plain_dim, self.value_dim)),
        }

    def _query(self, x_BTD: Tensor) -> Tensor:
        if not self.low_rank_query:
            return cast(Tensor, self.q_proj(x_BTD))
        return cast(Tensor, self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD))))

    def _expanded(self, plain_BTHn: Tensor, turned_BTHr: Tensor, stored_BT1k: Tensor, sight: Sight) -> Tensor:
        B, T, H, _ = plain_BTHn.shape
        latent_BTc, key_BT1r = stored_BT1k[:, :, 0, : self.rank], stored_BT1k[..., self.rank :]
        expanded = self.kv_b_proj(latent_BTc).view(B, T, H, -1)
        key_BTHn, v_BTHv = torch.split(expanded, [self.plain_dim, self.value_dim], dim=-1)
        k_BTHd = torch.cat([key_BTHn, key_BT1r.expand(-1, -1, H, -1)], dim=-1)
        q_BTHd = torch.cat([plain_BTHn, turned_BTHr], dim=-1)
        if self.score_scale != 1.0:
            q_BTHd = q_BTHd * self.score_scale
        return sight.attend(self.layer, q_BTHd, k_BTHd, v_BTHv, stored_BT1k)

    def _absorbed(self, plain_BTHn: Tensor, turned_BTHr: Tensor, stored_BT1k: Tensor, sight: Sight) -> Tensor:
        """q W_UK and (scores c) W_UV instead of W_UK c and W_UV c: (q W_UK) c = q (W_UK c)."""
        weight_Hec = self.kv_b_proj.weight.to(plain_BTHn.dtype).view(self.heads, -1, self.rank)
        key_Hnc, value_Hvc = torch.split(weight_Hec, [self.plain_dim, self.value_dim], dim=1)
        q_BTHk = torch.cat([torch.einsum("bthn,hnc->bthc", plain_BTHn, key_Hnc), turned_BTHr], dim=-1)
        # attention divides by the root of the width it sees; the scores are those of heads of n + r
        width = self.plain_dim + self.rotated_dim
        q_BTHk = q_BTHk * (self.score_scale * (q_BTHk.shape[-1] / width) ** 0.5)
        out_BTHc = sight.attend(self.layer, q_BTHk, stored_BT1k, stored_BT1k[..., : self.rank], stored_BT1k)
        return torch.einsum("bthc,hvc->bthv", out_BTHc, value_Hvc)


def _deinterleave(x: Tensor) -> Tensor:
    """DeepSeek's weights pair dimension 2i with 2i + 1; ours, i with i + r / 2. Scores do not see the order."""
    return x.view(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)


ATTENTIONS: dict[str, type[Attention] | type[LatentAttention] | type[FactorisedAttention]] = {
    "gqa": Attention,
    "mla": LatentAttention,
    "mfa": FactorisedAttention,
}
"""by `ModelConfig.attention`"""
