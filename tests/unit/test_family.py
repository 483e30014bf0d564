"""What holds for GLM-4.5 holds for every architecture of the family: cache, documents, training, folder names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.engine.cache import PagedCache
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.runners import runner_named
from glmctl.engine.torch_runner import TorchRunner
from glmctl.errors import DataError, GlmctlError
from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.model.attention import WholeRows
from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_config, load_model, open_tensors, save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.model.projections import FactorisedAttention
from glmctl.model.weights import entries, from_hf_names, memory_shapes, to_hf_names
from glmctl.recipe.presets import PRESETS


@pytest.fixture
def model(family_config: ModelConfig) -> GlmMoe:
    """Weights large enough that attention and routing are far from uniform."""
    model = GlmMoe(family_config, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for router in model.routers():
            router.e_score_correction_bias.add_(torch.randn(8, generator=generator) * 0.1)
    return model


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def test_cached_passes_equal_one_uncached_pass(model: GlmMoe) -> None:
    """A prompt, one token, a piece of several, and rows at unequal places; MTP's layer too."""
    tokens_BT = random_tokens(3, 20)
    with torch.no_grad():
        whole = model(tokens_BT)
        cache = KVCache(model.config, 3, 24)
        parts, mtp_parts = [], []
        for start, stop in ((0, 9), (9, 10), (10, 16), (16, 20)):
            positions_BT = torch.arange(start, stop).expand(3, -1)
            parts.append(model(tokens_BT[:, start:stop], positions_BT=positions_BT, cache=cache))
            if model.mtp is not None:
                following = tokens_BT.roll(-1, 1)[:, start:stop]
                mtp_parts.append(model.mtp(parts[-1], following, positions_BT=positions_BT, cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-5, rtol=0)
        if model.mtp is not None:
            whole_mtp = model.mtp(whole, tokens_BT.roll(-1, 1))
            torch.testing.assert_close(torch.cat(mtp_parts, 1), whole_mtp, atol=5e-5, rtol=0)
        # rows rewound to places of their own: what lies beyond is not seen
        start_B = torch.tensor([4, 11, 17])
        positions_BT = start_B[:, None] + torch.arange(3)
        again = model(tokens_BT.gather(1, positions_BT), positions_BT=positions_BT, cache=cache)
        for row, start in enumerate(start_B.tolist()):
            torch.testing.assert_close(again[row], whole[row, start : start + 3], atol=5e-5, rtol=0)


def test_greedy_text_does_not_depend_on_the_cache(model: GlmMoe) -> None:
    prompt = random_tokens(7).tolist()
    assert generate(model, prompt, 24) == generate(model, prompt, 24, use_cache=False)


def test_packed_documents_equal_separate_ones(model: GlmMoe) -> None:
    lengths, tokens_BT = [7, 12, 1, 8], random_tokens(1, 30)
    documents_BT, positions_BT = torch.full((1, 30), -1), torch.zeros(1, 30).long()
    spans, start = [], 0
    for number, length in enumerate(lengths):
        documents_BT[0, start : start + length] = number
        positions_BT[0, start : start + length] = torch.arange(length)
        spans.append((start, start + length))
        start += length
    together = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT)
    for a, b in spans:
        torch.testing.assert_close(together[0, a:b], model(tokens_BT[:, a:b])[0], atol=5e-5, rtol=0)


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_serves_it(model: GlmMoe, drafts: int) -> None:
    """Paged blocks, shared prefixes and MTP drafts: the greedy tokens are those of plain decoding."""
    if drafts and model.mtp is None:
        pytest.skip("no MTP layer to draft with")
    prompts = [random_tokens(length, seed=length).tolist() for length in (3, 21, 34)]
    prompts.append(prompts[2][:20] + prompts[0])
    engine = Engine(model, max_length=80, speculative=drafts)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    made = engine.generate([Request(str(n), prompt, params) for n, prompt in enumerate(prompts)])
    assert [one.tokens for one in made] == [generate(model, prompt, 12) for prompt in prompts]


def test_the_compiled_step_refuses_what_it_would_compute_wrongly(model: GlmMoe) -> None:
    if model.config.attention == "gqa":
        pytest.skip("GLM's own architecture")
    cache = PagedCache(model.config, 4, layers=model.config.num_hidden_layers)
    with pytest.raises(GlmctlError, match=f"this model has attention '{model.config.attention}'"):
        runner_named("native")(model, cache)
    assert isinstance(runner_named("auto")(model, cache), TorchRunner)


def mean_loss(model: GlmMoe, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    total, count = linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten())
    return total / count


def test_a_few_steps_of_training_lower_the_loss(family_config: ModelConfig) -> None:
    """Every matrix gets a gradient; the loss of a repeated batch falls by a third."""
    model = GlmMoe(family_config, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_BT = random_tokens(4, 32)
    losses = []
    for _ in range(12):
        stats = RouterStats()
        hidden_BTD = model(tokens_BT, stats=stats)
        total, count = linear_cross_entropy(
            hidden_BTD[:, :-1].flatten(0, 1), model.head_weight, tokens_BT[:, 1:].flatten()
        )
        loss = total / count
        if model.mtp is not None:
            guess_BTD = model.mtp(hidden_BTD[:, :-2], tokens_BT[:, 1:-1], stats=stats)
            extra, extra_count = linear_cross_entropy(
                guess_BTD.flatten(0, 1), model.head_weight, tokens_BT[:, 2:].flatten()
            )
            loss = loss + 0.3 * extra / extra_count
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + 1e-4 * stats.sequence_loss).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing
        optimizer.step()
    assert losses[-1] < losses[0] * 2 / 3, losses


def test_the_table_covers_exactly_the_networks_state(family_config: ModelConfig) -> None:
    state = {name: tuple(t.shape) for name, t in GlmMoe(family_config, device="meta").state_dict().items()}
    assert memory_shapes(family_config) == state
    listed = list(entries(family_config))
    assert len({e.disk for e in listed}) == len(listed)
    assert sum(torch.Size(e.shape).numel() for e in listed if not e.copy) == sum(
        torch.Size(shape).numel() for shape in state.values()
    )


def test_names_there_and_back_keep_every_value(model: GlmMoe) -> None:
    state = model.state_dict()
    disk = to_hf_names(model.config, state)
    assert {name: tuple(t.shape) for name, t in disk.items()} == {e.disk: e.shape for e in entries(model.config)}
    back = from_hf_names(model.config, disk)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("shard_bytes", [5e9, 60_000])
def test_a_folder_is_read_back_bit_for_bit(model: GlmMoe, tmp_path: Path, shard_bytes: float) -> None:
    save_model(model, tmp_path / "first", shard_bytes=shard_bytes)
    assert load_config(tmp_path / "first") == model.config
    loaded = load_model(tmp_path / "first")
    save_model(loaded, tmp_path / "second", shard_bytes=shard_bytes)
    first, second = open_tensors(tmp_path / "first"), open_tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].read(name), second[name].read(name)) for name in first)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_key_sets_are_compared_both_ways(model: GlmMoe, tmp_path: Path, change: str) -> None:
    """A config with one layer less or more than the files is refused, naming a tensor."""
    save_model(model, tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    step = 1 if change == "missing" else -1
    body["num_hidden_layers"] += step
    if "moe_layers_enum" in body:
        body["moe_layers_enum"] = ",".join(str(n) for n in range(1, 3 + step))
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"tensor 'model\.layers\."):
        load_model(tmp_path)


def test_released_names_of_step_3() -> None:
    """Spec section 1.8."""
    config = ModelConfig.model_validate(PRESETS["step-3"])
    shapes = {e.disk: e.shape for e in entries(config)}
    attention = ("q_proj", "inter_norm", "wq", "k_proj", "v_proj", "o_proj")
    assert {f"model.layers.60.self_attn.{name}.weight" for name in attention} <= shapes.keys()
    assert shapes["model.layers.4.moe.gate_proj.weight"] == (48, 5120, 7168)
    assert shapes["model.layers.59.moe.down_proj.weight"] == (48, 7168, 5120)
    assert shapes["model.layers.59.share_expert.up_proj.weight"] == (5120, 7168)
    assert shapes["model.layers.60.mlp.gate_proj.weight"] == (18432, 7168)
    assert not [name for name in shapes if "bias" in name]
    body = config.to_hf()
    assert body["moe_layers_enum"].split(",")[0] == "4"
    assert body["moe_layers_enum"].split(",")[-1] == "59"
    assert ModelConfig.from_hf(body) == config


def test_released_names_of_kimi_k2() -> None:
    """Spec section 1.9; `model_type` kimi_k2 is DeepSeek-V3's architecture."""
    config = ModelConfig.model_validate(PRESETS["kimi-k2"])
    shapes = {e.disk: e.shape for e in entries(config)}
    assert shapes["model.layers.7.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.7.self_attn.kv_b_proj.weight"] == (64 * 256, 512)
    assert shapes["model.layers.7.self_attn.q_b_proj.weight"] == (64 * 192, 1536)
    assert shapes["model.layers.60.mlp.experts.383.down_proj.weight"] == (7168, 2048)
    assert ModelConfig.from_hf({**config.to_hf(), "model_type": "kimi_k2"}) == config


def naive_mfa(attention: FactorisedAttention, x_TD: Tensor, heads: int, theta: float, eps: float) -> Tensor:
    """MFA from the paper's formulas (arXiv 2412.19255; spec section 1.8), one position and one head at a time."""
    T, d = x_TD.shape[0], attention.head_dim
    weights = {name: p.detach().double() for name, p in attention.named_parameters()}
    x_TD = x_TD.double()

    def turned(vector: Tensor, position: int) -> Tensor:
        # NeoX pairs: dimension i turns together with i + d / 2, by position * theta^(-2i / d)
        pairs = torch.complex(vector[: d // 2], vector[d // 2 :])
        angles = position * theta ** (-2 * torch.arange(d // 2).double() / d)
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag])

    rows = []
    for t in range(T):
        c = weights["q_proj.weight"] @ x_TD[t]
        c = c / (c.square().mean() + eps).sqrt() * weights["inter_norm.weight"]
        out = []
        for h in range(heads):
            q = turned(weights["wq.weight"][h * d : (h + 1) * d] @ c, t)
            scores = torch.stack([q @ turned(weights["k_proj.weight"] @ x_TD[s], s) for s in range(t + 1)]) / d**0.5
            values = torch.stack([weights["v_proj.weight"] @ x_TD[s] for s in range(t + 1)])
            out.append(scores.softmax(0) @ values)
        rows.append(weights["o_proj.weight"] @ torch.cat(out))
    return torch.stack(rows)


def test_mfa_is_the_papers(family_config: ModelConfig) -> None:
    if family_config.attention != "mfa":
        pytest.skip("MFA only")
    c = family_config.model_copy(update={"initializer_range": 0.2, "rope_theta": 500.0})
    model = GlmMoe(c, seed=3)
    attention = model.layers[0].self_attn
    assert isinstance(attention, FactorisedAttention)
    with torch.no_grad():
        attention.inter_norm.weight.normal_(1.0, 0.3, generator=torch.Generator().manual_seed(0))
        x_BTD = torch.randn(1, 12, c.hidden_size, generator=torch.Generator().manual_seed(1))
        positions_BT = torch.arange(12)[None]
        shared = model._share(positions_BT, WholeRows(), None, None)
        ours = attention(x_BTD, shared)[0]
    expected = naive_mfa(attention, x_BTD[0], c.num_attention_heads, c.rope_theta, c.rms_norm_eps)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


def test_a_softmax_router_weighs_by_its_plain_probabilities(family_config: ModelConfig) -> None:
    """Spec section 1.8: softmax over all experts in fp32, the top k of it, not renormalised, no bias."""
    if family_config.scoring_func != "softmax":
        pytest.skip("softmax only")
    router = GlmMoe(family_config, seed=2).routers()[0]
    router.e_score_correction_bias.normal_()
    x_ND = torch.randn(10, family_config.hidden_size, generator=torch.Generator().manual_seed(4)) * 30
    index_NK, weight_NK = router(x_ND, rows=1, stats=None)
    chances_NE = F.linear(x_ND, router.weight).softmax(-1)
    best = chances_NE.topk(family_config.num_experts_per_tok)
    torch.testing.assert_close(weight_NK.sort(-1, descending=True).values, best.values)
    assert torch.equal(index_NK.sort(-1).values, best.indices.sort(-1).values)
    assert (weight_NK.sum(-1) < 1.0).all()
