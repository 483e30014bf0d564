"""The multi-token-prediction layer against a plain re-implementation that reads the released names from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRotaryEmbedding

from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe, RouterStats


@pytest.fixture
def model(tiny_config: ModelConfig) -> GlmMoe:
    model = GlmMoe(tiny_config, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
        for router in model.routers():
            router.e_score_correction_bias.normal_(0, 0.2, generator=generator)
    return model


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


@torch.no_grad()
def expected_mtp_logits(folder: Path, config: ModelConfig, hidden_BTD: Tensor, next_BT: Tensor) -> Tensor:
    """Spec section 1.5 word for word, with transformers' decoder layer as the block."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    disk = {k.removeprefix(prefix): v for k, v in load_file(folder / "model.safetensors").items()}
    theirs = Glm4MoeConfig(**config.to_hf())
    theirs._attn_implementation = "eager"
    layer = Glm4MoeDecoderLayer(theirs, layer_idx=config.num_hidden_layers).eval()
    block = {k: v for k, v in disk.items() if k in layer.state_dict()}
    experts = [f"mlp.experts.{e}." for e in range(config.n_routed_experts)]
    block["mlp.experts.gate_up_proj"] = torch.stack(
        [torch.cat([disk[e + "gate_proj.weight"], disk[e + "up_proj.weight"]]) for e in experts]
    )
    block["mlp.experts.down_proj"] = torch.stack([disk[e + "down_proj.weight"] for e in experts])
    layer.load_state_dict(block, strict=True)
    # the embedding of the next token comes first, the hidden state second
    embedded = disk["embed_tokens.weight"][next_BT]
    joined = torch.cat([norm(embedded, disk["enorm.weight"]), norm(hidden_BTD, disk["hnorm.weight"])], dim=-1)
    x = joined @ disk["eh_proj.weight"].T
    T = next_BT.shape[1]
    angles = Glm4MoeRotaryEmbedding(theirs)(x, torch.arange(T)[None])
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    x = layer(x, position_embeddings=angles, attention_mask=mask)
    return norm(x, disk["shared_head.norm.weight"]) @ disk["shared_head.head.weight"].T


@torch.no_grad()
def test_mtp_logits_equal_the_specification(model: GlmMoe, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    tokens_BT = torch.randint(0, 512, (2, 25), generator=torch.Generator().manual_seed(0))
    hidden_BTD = model(tokens_BT[:, :-1])
    assert model.mtp is not None
    ours = model.logits(model.mtp(hidden_BTD, tokens_BT[:, 1:]))
    expected = expected_mtp_logits(tmp_path, model.config, hidden_BTD, tokens_BT[:, 1:])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_order_of_the_two_halves_matters(model: GlmMoe) -> None:
    """So the test above would notice if they were swapped."""
    assert model.mtp is not None
    tokens_BT = torch.arange(10)[None]
    hidden_BTD = model(tokens_BT)
    before = model.mtp(hidden_BTD, tokens_BT)
    weight = model.mtp.eh_proj.weight
    weight.copy_(torch.cat(list(reversed(weight.chunk(2, dim=1))), dim=1))
    assert (model.mtp(hidden_BTD, tokens_BT) - before).abs().max() > 0.1


@torch.no_grad()
def test_cached_mtp_equals_uncached(model: GlmMoe) -> None:
    assert model.mtp is not None
    tokens_BT = torch.randint(0, 512, (3, 20), generator=torch.Generator().manual_seed(1))
    hidden_BTD = model(tokens_BT)
    whole = model.mtp(hidden_BTD[:, :-1], tokens_BT[:, 1:])
    cache = KVCache(model.config, 4, 32)
    rows = slice(1, 4)
    first = model.mtp(hidden_BTD[:, :12], tokens_BT[:, 1:13], cache=cache, rows=rows)
    torch.testing.assert_close(first, whole[:, :12], atol=1e-5, rtol=0)
    for i in range(12, 19):
        position = torch.full((3, 1), i)
        one = slice(i, i + 1)
        step = model.mtp(hidden_BTD[:, one], tokens_BT[:, i + 1 : i + 2], positions_BT=position, cache=cache, rows=rows)
        torch.testing.assert_close(step, whole[:, one], atol=1e-5, rtol=0)


def test_mtp_shares_embedding_and_head(model: GlmMoe) -> None:
    """One memory: neither is a parameter of the MTP layer, and both get its gradient."""
    assert model.mtp is not None
    assert not [name for name, _ in model.mtp.named_parameters() if "embed" in name or "head" in name]
    tokens_BT = torch.arange(12)[None]
    stats = RouterStats()
    hidden_BTD = model(tokens_BT[:, :-1], stats=stats).detach()
    model.logits(model.mtp(hidden_BTD, tokens_BT[:, 1:], stats=stats)).square().mean().backward()
    assert model.embed_tokens.weight.grad is not None
    assert model.head_weight.grad is not None
    assert stats.counts_LE.shape == (len(model.routers()), model.config.n_routed_experts)
