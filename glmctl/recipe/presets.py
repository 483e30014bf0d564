"""Model shapes by name: our small ones, and the two released GLM-4.5 models (spec section 1.1)."""

from __future__ import annotations

from typing import Any

from glmctl.errors import unknown

_GLM = {
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131072,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "eos_token_id": [151329, 151336, 151338],
}

PRESETS: dict[str, dict[str, Any]] = {
    # GLM-4.5 in miniature: heads * head_dim (192) exceeds hidden_size, as 96 * 128 exceeds 5120
    "nano": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "moe_intermediate_size": 96,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 4096,
    },
    "small": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 8,
        "first_k_dense_replace": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 4096,
    },
    "glm-4.5-air": {
        **_GLM,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "glm-4.5": {
        **_GLM,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "first_k_dense_replace": 3,
        "n_routed_experts": 160,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
}


def resolve_model(value: Any) -> Any:
    """Turn `nano`, or `{preset: nano, hidden_size: 96}`, into plain model fields; other values pass through."""
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict) or "preset" not in value:
        return value
    name = value["preset"]
    if name not in PRESETS:
        raise ValueError(unknown("preset", str(name), PRESETS).message)
    return {**PRESETS[name], **{k: v for k, v in value.items() if k != "preset"}}
