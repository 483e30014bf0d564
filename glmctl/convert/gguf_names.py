"""GGUF's names of GLM-4.5's tensors (llama.cpp's `glm4moe`, spec section 1.4), and the package for the format."""

from __future__ import annotations

import re
from typing import Any

from glmctl.errors import EnvironmentProblem

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
"""Hugging Face's name inside a layer -> GGUF's, both without `.weight` or `.bias`"""

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_NAME = re.compile(r"^model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
EXPERT = re.compile(r"^(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")
"""(layer prefix, expert, gate | up | down) of a routed expert's matrix"""
_BIAS = re.compile(r"^model\.layers\.(\d+)\.mlp\.gate\.e_score_correction_bias$")


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor that is not one of the routed experts."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if match := _BIAS.match(name):
        return f"blk.{match[1]}.exp_probs_b.bias"
    match = _NAME.match(name)
    assert match is not None, name
    return f"blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"


def gguf_package() -> Any:
    """The `gguf` module. EnvironmentProblem when it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentProblem("the package 'gguf' is not installed", hint="pip install 'glmctl[gguf]'") from error
    return gguf
