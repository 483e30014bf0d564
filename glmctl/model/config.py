"""The shape of a model of the family, in the field names of GLM-4.5's released `config.json`.

Pure Python (no torch), so that recipes and `--help` stay instant. `model.hf_config` reads and writes the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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


class CacheSpec(NamedTuple):
    """What one layer keeps of one position: `heads` keys of `key_dim` and values of `value_dim` numbers each."""

    heads: int
    key_dim: int
    value_dim: int
    """0: a position's value is the first `kv_lora_rank` numbers of its key (MLA's compressed cache)"""

    @property
    def numbers(self) -> int:
        """Stored numbers of one position in one layer."""
        return self.heads * (self.key_dim + self.value_dim)


class YarnScaling(BaseModel):
    """RoPE stretched to longer contexts (YaRN, arXiv 2309.00071), in the keys of DeepSeek-V3's `rope_scaling`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1.0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(32.0, gt=0.0, description="turns within the original length above which a pair is kept")
    beta_slow: float = Field(1.0, gt=0.0, description="turns below which a pair is slowed by the whole factor")
    mscale: float = Field(1.0, ge=0.0)
    mscale_all_dim: float = Field(0.0, ge=0.0)

    @property
    def table_scale(self) -> float:
        """Factor on cosines and sines; 1 where `mscale` equals `mscale_all_dim`."""
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    @property
    def score_scale(self) -> float:
        """Factor m^2 on MLA's attention scores (spec section 1.9: m = 0.1 mscale_all_dim ln factor + 1)."""
        return self._grown(self.mscale_all_dim) ** 2

    def _grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


class ModelConfig(BaseModel):
    """One architecture with its seams: GLM-4.5's fields and defaults (spec section 1.1), and those of its kin.

    `attention` chooses grouped-query attention (GLM), multi-head latent attention (DeepSeek-V3, Kimi K2; spec section
    1.9) or multi-matrix factorisation attention (Step 3; section 1.8), and with it the folder format:
    `glm4_moe`, `deepseek_v3` or `step3_text`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention: Literal["gqa", "mla", "mfa"] = "gqa"

    vocab_size: int = Field(2048, gt=0)
    hidden_size: int = Field(128, gt=0)
    intermediate_size: int = Field(256, gt=0, description="width of the dense first layers")
    moe_intermediate_size: int = Field(64, gt=0, description="width of one expert")
    num_hidden_layers: int = Field(4, gt=0)
    first_k_dense_replace: int = Field(1, ge=0)
    last_k_dense_replace: int = Field(0, ge=0, description="dense layers at the end, as Step 3 has one")
    num_attention_heads: int = Field(8, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    head_dim: int = Field(32, gt=0, description="of queries and keys; MLA: qk_nope_head_dim + qk_rope_head_dim")
    q_lora_rank: int | None = Field(None, gt=0, description="rank of the query projection; MFA needs one, MLA may")
    kv_lora_rank: int | None = Field(None, gt=0, description="MLA: width of the compressed keys and values")
    qk_nope_head_dim: int | None = Field(None, gt=0, description="MLA: query and key dimensions without RoPE")
    qk_rope_head_dim: int | None = Field(None, gt=0, description="MLA: query and key dimensions with RoPE")
    v_head_dim: int | None = Field(None, gt=0, description="MLA: width of a value; else it is head_dim")
    n_routed_experts: int = Field(16, gt=0)
    num_experts_per_tok: int = Field(4, gt=0)
    n_shared_experts: int = Field(1, ge=0)
    n_group: int = Field(1, gt=0)
    topk_group: int = Field(1, gt=0)
    scoring_func: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="of the router; only sigmoid has the bias that balances the load"
    )
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_qk_norm: bool = True
    attention_bias: bool = True
    attention_dropout: float = Field(0.0, ge=0.0, le=0.0, description="GLM-4.5 trains without dropout")
    partial_rotary_factor: float = Field(0.5, gt=0.0, le=1.0)
    rope_theta: float = Field(10000.0, gt=0.0)
    rope_scaling: YarnScaling | None = None
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
        need(
            self.first_k_dense_replace + self.last_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace exceeds num_hidden_layers"
            if not self.last_k_dense_replace
            else "first_k_dense_replace + last_k_dense_replace exceeds num_hidden_layers",
        )
        self._check_attention(need)
        return self

    def _check_attention(self, need: Callable[[bool, str], None]) -> None:
        latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.attention == "gqa":
            need(self.q_lora_rank is None, "attention 'gqa' has no q_lora_rank; set attention to mfa or mla")
        else:
            need(not self.attention_bias, f"attention '{self.attention}' has no biases: attention_bias must be false")
            need(not self.use_qk_norm, f"attention '{self.attention}' has no QK-norm: use_qk_norm must be false")
        if self.attention == "mfa":
            need(self.q_lora_rank is not None, "attention 'mfa' needs q_lora_rank")
        if self.attention != "mla":
            for name in latent:
                need(getattr(self, name) is None, f"{name} belongs to attention 'mla', not '{self.attention}'")
            return
        for name in latent:
            need(getattr(self, name) is not None, f"attention 'mla' needs {name}")
        assert self.qk_nope_head_dim is not None
        assert self.qk_rope_head_dim is not None
        width = self.qk_nope_head_dim + self.qk_rope_head_dim
        need(self.head_dim == width, f"head_dim ({self.head_dim}) is not qk_nope_head_dim + qk_rope_head_dim = {width}")
        need(
            self.num_key_value_heads == self.num_attention_heads,
            f"num_key_value_heads ({self.num_key_value_heads}) is not num_attention_heads, as attention 'mla' has it",
        )

    @property
    def rope_head_dim(self) -> int:
        """Width of what RoPE is applied to: a head, or MLA's separate rotated part."""
        return self.qk_rope_head_dim or self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many leading dimensions of that are rotated."""
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor)

    @property
    def value_dim(self) -> int:
        """Width of one head's value, and so of its output."""
        return self.v_head_dim or self.head_dim

    @property
    def cache_spec(self) -> CacheSpec:
        """What a layer stores of a position to attend to it later."""
        if self.attention == "mla":
            assert self.kv_lora_rank is not None
            return CacheSpec(1, self.kv_lora_rank + self.rope_head_dim, 0)
        return CacheSpec(self.num_key_value_heads, self.head_dim, self.head_dim)

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has routed experts."""
        return self.first_k_dense_replace <= layer < self.num_hidden_layers - self.last_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with routed experts, MTP not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace - self.last_k_dense_replace

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a released `config.json` of any architecture of the family (`model.hf_config.read`)."""
        from glmctl.model import hf_config

        return hf_config.read(config)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a model folder (`model.hf_config.write`)."""
        from glmctl.model import hf_config

        return hf_config.write(self, dtype)

    def parameter_counts(self) -> ParameterCounts:
        """Exact counts by arithmetic; a test holds them equal to the network on the meta device."""
        d = self.hidden_size
        attention = self._attention_parameters()
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
        dense = (self.num_hidden_layers - self.num_moe_layers) * dense_layer + d
        return ParameterCounts(
            main=dense + self.num_moe_layers * moe_layer,
            mtp=n_mtp * (moe_layer + mtp_extra),
            vocabulary=self.vocab_size * d * (1 if self.tie_word_embeddings else 2),
            active=dense + self.num_moe_layers * moe_active,
            active_mtp=n_mtp * (moe_active + mtp_extra),
        )

    def _attention_parameters(self) -> int:
        d, heads, width = self.hidden_size, self.num_attention_heads, self.head_dim
        rank = self.q_lora_rank
        query = d * heads * width if rank is None else d * rank + rank + rank * heads * width
        output = heads * self.value_dim * d
        if self.attention == "mla":
            assert self.kv_lora_rank is not None
            assert self.qk_nope_head_dim is not None
            latent = self.kv_lora_rank
            down = d * (latent + self.rope_head_dim) + latent
            return query + down + latent * heads * (self.qk_nope_head_dim + self.value_dim) + output
        kv = 2 * d * self.num_key_value_heads * width
        bias = width * (heads + 2 * self.num_key_value_heads) if self.attention_bias else 0
        return query + kv + bias + output + (2 * width if self.use_qk_norm else 0)
