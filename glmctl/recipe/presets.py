"""Model shapes by name: our small ones, and the released models of the family (spec sections 1.1, 1.8, 1.9)."""

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

_GLM_4_5 = {
    **_GLM,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "first_k_dense_replace": 3,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
_MLA = {
    "attention": "mla",
    "attention_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "head_dim": 192,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
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
    "glm-4.5": _GLM_4_5,
    "glm-4.6": {**_GLM_4_5, "max_position_embeddings": 202752},
    "glm-4.7": {**_GLM_4_5, "max_position_embeddings": 202752},
    "step-3": {
        "attention": "mfa",
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
        "vocab_size": 128815,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 5120,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 4,
        "last_k_dense_replace": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "q_lora_rank": 2048,
        "n_routed_experts": 48,
        "num_experts_per_tok": 3,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "rope_theta": 500_000.0,
        "max_position_embeddings": 65536,
        "num_nextn_predict_layers": 0,
    },
    "kimi-k2": {
        **_MLA,
        "vocab_size": 163840,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50_000.0,
        "rope_scaling": {
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
    },
    # DeepSeek-V3's report, section 4.2, and its released config.json
    "deepseek-v3": {
        **_MLA,
        "vocab_size": 129280,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
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
