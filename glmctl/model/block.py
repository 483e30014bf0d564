"""The decoder layer: attention and a dense or mixture-of-experts feed-forward, pre-norm (spec section 1.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from glmctl.kernels.experts import experts
from glmctl.kernels.rms_norm import rms_norm
from glmctl.kernels.rope import Rotation, norm_rope
from glmctl.kernels.swiglu import swiglu
from glmctl.model.attention import Sight
from glmctl.model.config import ModelConfig
from glmctl.model.router import Router, RouterStats


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
        q_BTHd = self._turned(q_BTHd, self.q_norm, shared.turn).to(v_BTKd.dtype)
        k_BTKd = self._turned(k_BTKd, self.k_norm, shared.turn).to(v_BTKd.dtype)
        out_BTHd = shared.sight.attend(self.layer, q_BTHd, k_BTKd, v_BTKd)
        result: Tensor = self.o_proj(out_BTHd.reshape(B, T, -1))
        return result

    @staticmethod
    def _turned(x_BTHd: Tensor, norm: RmsNorm | None, turn: Rotation) -> Tensor:
        return norm_rope(x_BTHd, None, 0.0, turn) if norm is None else norm_rope(x_BTHd, norm.weight, norm.eps, turn)


class Mlp(nn.Module):
    """SwiGLU feed-forward: down(silu(gate x) * up x), no bias."""

    def __init__(self, hidden_size: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, width, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape."""
        result: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return result


class Experts(nn.Module):
    """The stacked weights of the routed experts: gate_up_proj [E, 2I, D] (gate first), down_proj [E, D, I]."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, D, width, dtype=dtype))

    def forward(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """x [N, D] through the chosen experts, weighted and summed: [N, D]."""
        return experts(x_ND, index_NK, weight_NK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which the routing scale does not touch."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config, dtype=dtype)
        self.experts = Experts(config, dtype=dtype)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = Mlp(config.hidden_size, width, dtype=dtype)

    def forward(self, x_BTD: Tensor, stats: RouterStats | None) -> Tensor:
        """x [B, T, D], normed -> [B, T, D]."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        index_NK, weight_NK = self.gate(x_ND, rows=x_BTD.shape[0], stats=stats)
        out_BTD: Tensor = self.experts(x_ND, index_NK, weight_NK).view(x_BTD.shape)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype=dtype)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp: MoE | Mlp
        if layer >= config.first_k_dense_replace:
            self.mlp = MoE(config, dtype=dtype)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, dtype=dtype)

    def forward(self, x_BTD: Tensor, shared: Pass) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), shared)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        out_BTD: Tensor = self.mlp(normed_BTD, shared.stats) if isinstance(self.mlp, MoE) else self.mlp(normed_BTD)
        return x_BTD + out_BTD
