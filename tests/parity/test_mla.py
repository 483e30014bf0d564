"""MLA against transformers' DeepSeek-V3, through a model folder on disk: attention alone, logits, and both forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from glmctl.kernels.attention import causal_attention
from glmctl.model.attention import WholeRows
from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.projections import LatentAttention, Pass

# fp32 sums in another order; outputs are of size 1 to 10
TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    "attention": "mla",
    "attention_bias": False,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.15,
}
YARN = {"factor": 8.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "kimi-like": {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}, "num_nextn_predict_layers": 0},
    "deepseek-like": {"rope_scaling": YARN, "n_routed_experts": 16, "n_group": 4, "topk_group": 2},
    "uneven-mscale": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "no-mscale": {"rope_scaling": {**YARN, "mscale_all_dim": 0.0}},
    "full-rank-query": {"q_lora_rank": None},
}


def randomised(config: ModelConfig, seed: int) -> GlmMoe:
    """Norms and router biases random too, so that every tensor matters."""
    model = GlmMoe(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + 1)
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.randn(config.n_routed_experts, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_logits_of_a_folder_we_wrote_equal_transformers(name: str, tmp_path: Path) -> None:
    save_model(randomised(ModelConfig(**{**BASE, **SHAPES[name]}), seed=len(name)), tmp_path)
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    ours = load_model(tmp_path)
    mtp = f"model.layers.{ours.config.num_hidden_layers}."
    assert not report["missing_keys"]
    assert not [key for key in report["unexpected_keys"] if not key.startswith(mtp)]
    assert not report["mismatched_keys"]
    tokens_BT = torch.randint(0, 199, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(tokens_BT)), theirs(tokens_BT).logits, atol=TOLERANCE, rtol=0)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    nope, rope = draw(st.integers(1, 24)), 2 * draw(st.integers(1, 12))
    heads = draw(st.integers(1, 6))
    scaling = None
    if draw(st.booleans()):
        slow = draw(st.floats(0.5, 4))
        scaling = {
            "factor": draw(st.floats(1.5, 64)),
            "original_max_position_embeddings": draw(st.sampled_from([16, 64, 4096])),
            "beta_slow": slow,
            "beta_fast": slow * draw(st.floats(1, 40)),
            "mscale": draw(st.sampled_from([0.7, 1.0])),
            "mscale_all_dim": draw(st.sampled_from([0.0, 0.7, 1.0])),
        }
    changes = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": nope + rope,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": draw(st.integers(1, 32)),
        "q_lora_rank": draw(st.none() | st.integers(1, 40)),
        "kv_lora_rank": draw(st.integers(1, 40)),
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 50_000.0])),
        "rope_scaling": scaling,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }
    return ModelConfig(**{**BASE, **changes})


@settings(max_examples=40, deadline=None)
@given(config=configs(), seed=st.integers(0, 1000))
def test_absorbed_equals_expanded_equals_transformers(config: ModelConfig, seed: int) -> None:
    model = randomised(config, seed)
    ours = model.layers[0].self_attn
    assert isinstance(ours, LatentAttention)
    hf = DeepseekV3Config(**{k: v for k, v in config.to_hf().items() if k != "transformers_version"})
    hf._attn_implementation = "eager"
    theirs = DeepseekV3Attention(hf, 0)
    theirs.load_state_dict(ours.state_dict())
    B, T = 2, 24
    x_BTD = torch.randn(B, T, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    positions_BT = torch.arange(T).expand(B, T)
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]

    class Absorbing(WholeRows):
        continues = True

    with torch.no_grad():
        expected, _ = theirs(x_BTD, DeepseekV3RotaryEmbedding(hf)(x_BTD, positions_BT), mask)
        shared = model._share(positions_BT, WholeRows(), None, None)
        expanded = ours(x_BTD, shared)
        absorbed = ours(x_BTD, Pass(shared.turn, Absorbing(), None))
    torch.testing.assert_close(expanded, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(absorbed, expected, atol=TOLERANCE, rtol=0)


def test_the_cache_holds_the_compressed_vector_only() -> None:
    """Kimi K2 and DeepSeek-V3 cache 512 + 64 numbers a position and layer, whatever the number of heads."""
    config = ModelConfig(**BASE)
    assert config.cache_spec == (1, 32 + 8, 0)
    cache = KVCache(config, 2, 10, dtype=torch.bfloat16)
    assert cache.nbytes == 4 * 2 * 10 * 40 * 2


def test_values_may_be_narrower_than_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, 4, 12, generator=generator) for _ in range(2))
    v = torch.randn(2, 5, 4, 7, generator=generator)
    wide = torch.cat([v, torch.zeros(2, 5, 4, 5)], dim=-1)
    torch.testing.assert_close(causal_attention(q, k, v), causal_attention(q, k, wide)[..., :7])
