"""`config.json` of the three folder formats: GLM-4.5's, DeepSeek-V3's (Kimi K2 uses it too) and Step 3's.

Keys that do not describe the shape are ignored; a key that states something this code does otherwise is refused.
Pure Python (no torch).
"""

from __future__ import annotations

from typing import Any

from glmctl.model.config import ModelConfig

MODEL_TYPES = {"glm4_moe": "gqa", "deepseek_v3": "mla", "kimi_k2": "mla", "step3_text": "mfa"}
"""`model_type` -> the attention it means"""

ARCHITECTURES = {
    "gqa": ("glm4_moe", "Glm4MoeForCausalLM"),
    "mla": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "mfa": ("step3_text", "Step3TextForCausalLM"),
}
"""attention -> `model_type` and class of the folders written"""

_STEP3 = {
    "num_key_value_heads": "num_attention_groups",
    "q_lora_rank": "share_q_dim",
    "n_routed_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "norm_topk_prob": "norm_expert_weight",
    "routed_scaling_factor": "moe_router_scaling_factor",
    "scoring_func": "moe_router_activation",
    "max_position_embeddings": "max_position_embedding",
}
"""our field -> Step 3's"""

_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "topk_method": ("noaux_tc",),
    "rope_interleave": (True,),
    "moe_layer_freq": (1,),
    "use_moe_router_bias": (False,),
    "use_head_wise_attn_gate": (False,),
}
"""keys some releases state and this code has one answer to; absent or null is that answer"""

_FAMILY_ONLY = {
    "gqa": {"use_qk_norm", "partial_rotary_factor"},
    "mla": {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"},
    "mfa": {"q_lora_rank"},
}
_NEVER_WRITTEN = {"attention", "last_k_dense_replace"}


def read(body: dict[str, Any]) -> ModelConfig:
    """A released `config.json` -> our config.

    Accepts both the flat `rope_theta` / `rope_scaling` of transformers 4 and the nested `rope_parameters` of 5, and a
    scalar or a list `eos_token_id`; an absent `model_type` means GLM's. Raises ValueError (pydantic's is one) naming
    the key for another architecture and for values that no field of ours expresses.
    """
    model_type = body.get("model_type", "glm4_moe")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}, expected {' or '.join(repr(name) for name in MODEL_TYPES)}")
    for key, allowed in _FIXED.items():
        if body.get(key) is not None and body[key] not in allowed:
            raise ValueError(f"{key} is {body[key]!r}; only {allowed[0]!r} is supported")
    attention = MODEL_TYPES[model_type]
    if attention == "mfa":
        body = _from_step3(body)
    known = {k: v for k, v in body.items() if k in ModelConfig.model_fields and v is not None}
    if attention == "mla":
        # released files leave them out, or state the width of the rotated part only
        known["head_dim"] = known.get("qk_nope_head_dim", 0) + known.get("qk_rope_head_dim", 0)
        known["num_key_value_heads"] = known.get("num_attention_heads")
    if attention != "gqa":
        known.setdefault("attention_bias", False)
        known["use_qk_norm"] = False
    rope = body.get("rope_parameters") or {}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            known[key] = rope[key]
    known["rope_scaling"] = _scaling(body.get("rope_scaling") or rope)
    if attention != "gqa":
        known["partial_rotary_factor"] = 1.0
    if "num_nextn_predict_layers" not in body:
        known["num_nextn_predict_layers"] = int(body.get("num_mtp_layers") or 0)
    eos = known.get("eos_token_id", ())
    known["eos_token_id"] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    return ModelConfig.model_validate({**known, "attention": attention})


def write(config: ModelConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a folder of this config; `read` gives the config back."""
    model_type, architecture = ARCHITECTURES[config.attention]
    body = config.model_dump()
    others = set().union(*_FAMILY_ONLY.values()) - _FAMILY_ONLY[config.attention]
    body = {k: v for k, v in body.items() if k not in others | _NEVER_WRITTEN}
    body["eos_token_id"] = list(config.eos_token_id)
    if config.attention == "mla":
        # transformers calls the rotated part the head
        body["head_dim"] = config.rope_head_dim
        body |= {"topk_method": "noaux_tc", "rope_interleave": True, "moe_layer_freq": 1}
    elif config.attention == "mfa":
        body = _to_step3(config, body)
    if config.attention == "gqa" and config.scoring_func == "sigmoid":
        # the one answer of this architecture, which its files do not state
        del body["scoring_func"]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **body,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "use_cache": True,
        "transformers_version": "4.54.0",
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    if not isinstance(rope, dict):
        raise ValueError(f"RoPE scaling {rope!r} is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"RoPE scaling {kind!r} is not supported")
    known = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {key: rope[key] for key in known if rope.get(key) is not None}


def _from_step3(body: dict[str, Any]) -> dict[str, Any]:
    result = {**body, **{ours: body[theirs] for ours, theirs in _STEP3.items() if body.get(theirs) is not None}}
    result.setdefault("scoring_func", "softmax")
    result.setdefault("norm_topk_prob", False)
    layers, width = int(body.get("num_hidden_layers", 0)), int(body.get("moe_intermediate_size", 0))
    shared = int(body.get("share_expert_dim", width))
    if not width or shared % width:
        raise ValueError(f"share_expert_dim {shared} is not a multiple of moe_intermediate_size {width}")
    result["n_shared_experts"] = shared // width
    listed = body.get("moe_layers_enum")
    if isinstance(listed, str):
        listed = [x for x in listed.split(",") if x.strip()]
    moe = sorted(int(x) for x in (range(1, layers) if listed is None else listed))
    if moe and moe != list(range(moe[0], moe[-1] + 1)):
        raise ValueError("moe_layers_enum has gaps: only one run of MoE layers is supported")
    result["first_k_dense_replace"] = moe[0] if moe else layers
    result["last_k_dense_replace"] = layers - 1 - moe[-1] if moe else 0
    return result


def _to_step3(config: ModelConfig, body: dict[str, Any]) -> dict[str, Any]:
    body = {_STEP3.get(key, key): value for key, value in body.items()}
    for key in ("n_shared_experts", "first_k_dense_replace"):
        del body[key]
    body["share_expert_dim"] = config.n_shared_experts * config.moe_intermediate_size
    moe = [str(layer) for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    body["moe_layers_enum"] = ",".join(moe)
    return body
