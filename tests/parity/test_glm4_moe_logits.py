"""Our network against transformers' Glm4MoeForCausalLM, through a model folder on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Glm4MoeForCausalLM

from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe

# fp32 sums in different orders; logits are of size 1 to 10, observed differences stay under 2e-5
TOLERANCE = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "glm-4.5-like": {},
    "air-like": {"use_qk_norm": False, "routed_scaling_factor": 1.0},
    "no-bias": {"attention_bias": False},
    "two-dense": {"first_k_dense_replace": 2, "num_hidden_layers": 4},
    "three-dense": {"first_k_dense_replace": 3, "num_hidden_layers": 4, "routed_scaling_factor": 0.7},
    "groups": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "tied": {"tie_word_embeddings": True},
    "full-rotary-mha": {"partial_rotary_factor": 1.0, "num_key_value_heads": 6, "num_attention_heads": 6},
    "unnormalised-top-1": {"norm_topk_prob": False, "num_experts_per_tok": 1, "rope_theta": 1e6},
    "wide-shared": {"n_shared_experts": 2, "head_dim": 24, "partial_rotary_factor": 0.25},
}


def randomised(shape: dict[str, Any], seed: int) -> GlmMoe:
    """A model in which every tensor matters: biases, norms and router biases are random too."""
    base = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 80,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
    }
    model = GlmMoe(ModelConfig(**{**base, **shape}), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() == 1:
                noise = torch.randn(tensor.shape, generator=generator) * 0.3
                tensor.copy_(noise + 1 if name.endswith("norm.weight") else noise)
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.randn(model.config.n_routed_experts, generator=generator) * 0.2)
    return model


class Pair(NamedTuple):
    ours: GlmMoe
    theirs: Glm4MoeForCausalLM
    tokens_BT: torch.Tensor


@pytest.fixture(params=list(SHAPES), scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    seed = list(SHAPES).index(request.param)
    folder: Path = tmp_path_factory.mktemp("model")
    save_model(randomised(SHAPES[request.param], seed), folder)
    theirs, report = Glm4MoeForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    ours = load_model(folder)
    mtp = f"model.layers.{ours.config.num_hidden_layers}."
    assert not report["missing_keys"], "transformers did not find a tensor in our folder"
    assert not [key for key in report["unexpected_keys"] if not key.startswith(mtp)]
    assert not report["mismatched_keys"]
    tokens_BT = torch.randint(0, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))
    return Pair(ours, theirs.eval(), tokens_BT)


@torch.no_grad()
def test_prefill_logits_are_equal(pair: Pair) -> None:
    ours = pair.ours.logits(pair.ours(pair.tokens_BT))
    theirs = pair.theirs(pair.tokens_BT).logits
    assert theirs.std() > 0.1, "the comparison would be empty"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_cached_decode_equals_theirs_and_our_uncached(pair: Pair) -> None:
    ours, theirs, tokens_BT = pair
    split = 20
    whole = ours.logits(ours(tokens_BT))
    cache = KVCache(ours.config, 2, 64)
    their_output = theirs(tokens_BT[:, :split], use_cache=True)
    hidden = ours(tokens_BT[:, :split], cache=cache)
    torch.testing.assert_close(ours.logits(hidden), their_output.logits, atol=TOLERANCE, rtol=0)
    for position in range(split, tokens_BT.shape[1]):
        step_B1 = tokens_BT[:, position : position + 1]
        their_output = theirs(step_B1, past_key_values=their_output.past_key_values, use_cache=True)
        hidden = ours(step_B1, positions_BT=torch.full((2, 1), position), cache=cache)
        logits = ours.logits(hidden)
        torch.testing.assert_close(logits, their_output.logits, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(logits, whole[:, position : position + 1], atol=TOLERANCE, rtol=0)


def test_64_greedy_tokens_are_equal(pair: Pair) -> None:
    ours, theirs, tokens_BT = pair
    prompt = tokens_BT[:1, :12]
    expected = theirs.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(ours, prompt[0].tolist(), 64) == expected[0, 12:].tolist()


def test_gradients_are_equal(pair: Pair) -> None:
    ours, theirs, tokens_BT = pair
    ours.zero_grad()
    theirs.zero_grad()
    ours.logits(ours(tokens_BT)).square().mean().backward()
    theirs(tokens_BT).logits.square().mean().backward()
    their_grads = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    compared = 0
    for name, parameter in ours.named_parameters():
        if name.startswith("mtp."):
            assert parameter.grad is None, name
            continue
        grad, expected = parameter.grad, their_grads[name]
        assert grad is not None, name
        assert expected is not None, name
        # relative to the largest entry: small entries are sums that nearly cancel
        torch.testing.assert_close(grad, expected, atol=1e-4 * float(expected.abs().max()) + 1e-9, rtol=0, msg=name)
        compared += 1
    assert compared == len(their_grads)
