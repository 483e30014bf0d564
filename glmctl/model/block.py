"""The decoder layer: attention and a dense or mixture-of-experts feed-forward, pre-norm (spec section 1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glmctl.kernels.experts import experts
from glmctl.kernels.swiglu import swiglu
from glmctl.model.config import ModelConfig
from glmctl.model.projections import ATTENTIONS, Pass, RmsNorm, narrowed
from glmctl.model.router import Router, RouterStats


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
        # only the router reads all digits
        x_BTD = narrowed(x_BTD)
        out_BTD: Tensor = self.experts(x_BTD.reshape(x_ND.shape), index_NK, weight_NK).view(x_BTD.shape)
        if self.shared_experts is not None:
            out_BTD = out_BTD + self.shared_experts(x_BTD)
        return out_BTD


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = ATTENTIONS[config.attention](config, layer, dtype=dtype)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp: MoE | Mlp
        # layers beyond the decoder's are MTP's, always MoE even if every layer of the decoder is dense
        if config.is_moe(layer) or layer >= config.num_hidden_layers:
            self.mlp = MoE(config, dtype=dtype)
        else:
            self.mlp = Mlp(config.hidden_size, config.intermediate_size, dtype=dtype)

    def forward(self, x_BTD: Tensor, shared: Pass) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.self_attn(narrowed(self.input_layernorm(x_BTD)), shared)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        moe = isinstance(self.mlp, MoE)
        out_BTD: Tensor = self.mlp(normed_BTD, shared.stats) if moe else self.mlp(narrowed(normed_BTD))
        return x_BTD + out_BTD
