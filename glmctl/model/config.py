"""The shape of a GLM-4.5-style model, in the field names of the released `config.json`.

Pure Python (no torch), so that recipes and `--help` stay instant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ParameterCounts(NamedTuple):
    """Parameters by part. `main` and `mtp` leave out the embedding and output matrices."""

    main: int
    """decoder layers and final norm"""
    mtp: int
    """the multi-token-prediction layer(s), without their shared embedding and head"""
    vocabulary: int
    """embedding plus output matrix (one matrix when tied)"""
    active: int
    """`main` with only the experts that one token passes through"""
    active_mtp: int

    @property
    def total(self) -> int:
        """Everything that is stored once."""
        return self.main + self.mtp + self.vocabulary


class ModelConfig(BaseModel):
    """`Glm4MoeConfig` as released (spec section 1.1); defaults are small and GLM-4.5-shaped."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(2048, gt=0)
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(256, gt=0, description="width of the dense first layers")
    moe_intermediate_size: int = Field(64, gt=0, description="width of one expert")
    num_hidden_layers: int = Field(4, gt=0)
    first_k_dense_replace: int = Field(1, ge=0)
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0)
    n_routed_experts: int = Field(16, gt=0)
    num_experts_per_tok: int = Field(4, gt=0)
    n_shared_experts: int = Field(1, ge=0)
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = True
    attention_bias: bool = True
    attention_dropout: float = Field(0.0, ge=0.0, le=0.0, description="GLM-4.5 trains without dropout")
    partial_rotary_factor: float = Field(0.5, gt=0.0, le=1.0)
    rope_theta: float = Field(10000.0, gt=0.0)
    max_position_embeddings: int = Field(4096, gt=0)
    rms_norm_eps: float = Field(1e-5, gt=0.0)
    initializer_range: float = Field(0.02, gt=0.0)
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = Field(1, ge=0, le=1)
    pad_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        need(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        need(self.rotary_dim % 2 == 0, f"head_dim * partial_rotary_factor = {self.rotary_dim} is odd")
        need(
            self.num_experts_per_tok <= self.n_routed_experts // self.n_group * self.topk_group,
            f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the experts left by the group limit",
        )
        need(
            self.n_routed_experts % self.n_group == 0,
            f"n_routed_experts ({self.n_routed_experts}) is not a multiple of n_group ({self.n_group})",
        )
        need(self.topk_group <= self.n_group, "topk_group exceeds n_group")
        need(self.first_k_dense_replace <= self.num_hidden_layers, "first_k_dense_replace exceeds num_hidden_layers")
        return self

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts, MTP not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a released `config.json`; keys that do not describe the shape are ignored.

        Accepts both the flat `rope_theta` of transformers 4 and the nested `rope_parameters` of 5,
        and a scalar or a list `eos_token_id`.
        """
        known = {k: v for k, v in config.items() if k in cls.model_fields and v is not None}
        rope = config.get("rope_parameters") or {}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                known[key] = rope[key]
        if "num_nextn_predict_layers" not in config:
            known["num_nextn_predict_layers"] = int(config.get("num_mtp_layers") or 0)
        eos = known.get("eos_token_id", ())
        known["eos_token_id"] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        return cls.model_validate(known)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a `Glm4MoeForCausalLM` folder."""
        body = self.model_dump()
        body["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            **body,
            "hidden_act": "silu",
            "rope_scaling": None,
            "torch_dtype": dtype,
            "use_cache": True,
            "transformers_version": "4.54.0",
        }

    def parameter_counts(self) -> ParameterCounts:
        """Exact counts by arithmetic; a test holds them equal to the network on the meta device."""
        d, q, kv = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        hd = self.head_dim
        attention = d * hd * (2 * q + 2 * kv)
        attention += hd * (q + 2 * kv) if self.attention_bias else 0
        attention += 2 * hd if self.use_qk_norm else 0
        expert = 3 * d * self.moe_intermediate_size
        router = self.n_routed_experts * d
        shared = expert * self.n_shared_experts
        dense_layer = attention + 2 * d + 3 * d * self.intermediate_size
        moe_rest = attention + 2 * d + router + shared
        moe_layer = moe_rest + self.n_routed_experts * expert
        moe_active = moe_rest + self.num_experts_per_tok * expert
        # enorm, hnorm, shared_head.norm and eh_proj [H, 2H]
        mtp_extra = 3 * d + 2 * d * d
        n_mtp = self.num_nextn_predict_layers
        dense = self.first_k_dense_replace * dense_layer + d
        return ParameterCounts(
            main=dense + self.num_moe_layers * moe_layer,
            mtp=n_mtp * (moe_layer + mtp_extra),
            vocabulary=self.vocab_size * d * (1 if self.tie_word_embeddings else 2),
            active=dense + self.num_moe_layers * moe_active,
            active_mtp=n_mtp * (moe_active + mtp_extra),
        )
