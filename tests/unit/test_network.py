"""Laws of the network: documents, positions, caches, dtypes, counts, determinism."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from glmctl.kernels.linear_cross_entropy import linear_cross_entropy
from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe, RouterStats
from glmctl.recipe.presets import PRESETS


@pytest.fixture
def model(tiny_config: ModelConfig) -> GlmMoe:
    model = GlmMoe(tiny_config, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [[7, 12, 1, 10], [30], [17, 9], [2, 2, 2, 20, 4]]


def packed(lengths: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and document ids of rows that hold documents of these lengths, padded on the right."""
    positions, documents = torch.zeros(len(lengths), width).long(), torch.full((len(lengths), width), -1)
    number = 0
    for row, row_lengths in enumerate(lengths):
        start = 0
        for length in row_lengths:
            positions[row, start : start + length] = torch.arange(length)
            documents[row, start : start + length] = number
            number, start = number + 1, start + length
    return positions, documents


@pytest.mark.parametrize("with_mtp", [False, True])
def test_packed_documents_equal_separate_ones(model: GlmMoe, with_mtp: bool) -> None:
    tokens_BT = random_tokens(4, 30)
    positions_BT, documents_BT = packed(LENGTHS, 30)
    together = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT)
    if with_mtp:
        assert model.mtp is not None
        together = model.mtp(together, tokens_BT.roll(-1, 1), positions_BT=positions_BT, documents_BT=documents_BT)
    for row, row_lengths in enumerate(LENGTHS):
        start = 0
        for length in row_lengths:
            part = slice(start, start + length)
            alone = model(tokens_BT[row : row + 1, part])
            if with_mtp:
                assert model.mtp is not None
                alone = model.mtp(alone, tokens_BT.roll(-1, 1)[row : row + 1, part])
            torch.testing.assert_close(together[row, part], alone[0], atol=2e-5, rtol=0)
            start += length


def test_gradients_of_packed_documents_equal_separate_ones(model: GlmMoe) -> None:
    tokens_BT = random_tokens(4, 30)
    positions_BT, documents_BT = packed(LENGTHS, 30)
    valid = documents_BT >= 0
    model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT)[valid].square().sum().backward()
    packed_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, row_lengths in enumerate(LENGTHS):
        start = 0
        for length in row_lengths:
            model(tokens_BT[row : row + 1, start : start + length]).square().sum().backward()
            start += length
    for name, grad in packed_grads.items():
        expected = model.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=0, msg=name)


def test_one_padded_document_in_each_row_equals_no_padding(model: GlmMoe) -> None:
    """The shape of an RL batch takes the fast path."""
    tokens_BT = random_tokens(3, 20)
    _, documents_BT = packed([[20], [18], [17]], 20)
    with torch.no_grad():
        padded, whole = model(tokens_BT, documents_BT=documents_BT), model(tokens_BT)
    valid = documents_BT >= 0
    torch.testing.assert_close(padded[valid], whole[valid], atol=1e-5, rtol=0)


@torch.no_grad()
def test_ragged_prefill_then_decode_equals_each_row_alone(model: GlmMoe) -> None:
    """Right padding is garbage that later tokens overwrite before anyone can see it."""
    lengths, more = [5, 13, 9], 6
    tokens_BT = random_tokens(3, 30)
    cache = KVCache(model.config, 5, 40)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))  # an earlier request's remains
    rows = slice(2, 5)
    model(tokens_BT[:, : max(lengths)], cache=cache, rows=rows)
    for step in range(more):
        positions_BT = torch.tensor([[n + step] for n in lengths])
        hidden = model(tokens_BT.gather(1, positions_BT), positions_BT=positions_BT, cache=cache, rows=rows)
        for row, n in enumerate(lengths):
            alone = model(tokens_BT[row : row + 1, : n + step + 1])[:, -1]
            torch.testing.assert_close(hidden[row], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_several_tokens_at_once_continue_a_cache(model: GlmMoe) -> None:
    """Chunked prefill and draft verification: rows at different positions, several tokens each."""
    tokens_BT = random_tokens(2, 24)
    cache = KVCache(model.config, 2, 32)
    starts = torch.tensor([[6], [11]])
    model(tokens_BT[:, :11], cache=cache)
    positions_BT = starts + torch.arange(5)
    hidden = model(tokens_BT.gather(1, positions_BT), positions_BT=positions_BT, cache=cache)
    for row in range(2):
        alone = model(tokens_BT[row : row + 1, : int(starts[row]) + 5])
        torch.testing.assert_close(hidden[row], alone[0, -5:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cache_rows_can_be_moved(model: GlmMoe) -> None:
    tokens_BT = random_tokens(2, 12)
    cache = KVCache(model.config, 3, 16)
    model(tokens_BT[:, :11], cache=cache, rows=slice(0, 2))
    cache.move(1, 2)
    step = model(tokens_BT[1:, 11:], positions_BT=torch.tensor([[11]]), cache=cache, rows=slice(2, 3))
    torch.testing.assert_close(step[0, -1], model(tokens_BT[1:])[0, -1], atol=1e-5, rtol=0)


def test_generation_with_and_without_cache_agree(model: GlmMoe) -> None:
    prompt = random_tokens(9).tolist()
    assert generate(model, prompt, 20) == generate(model, prompt, 20, use_cache=False)


def test_generation_stops_at_a_stop_token_and_is_reproducible(model: GlmMoe) -> None:
    def sample(seed: int) -> list[int]:
        return generate(model, [1, 2], 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    made = sample(0)
    assert made == sample(0)
    assert made != sample(1)
    greedy = generate(model, [1, 2], 12)
    assert generate(model, [1, 2], 12, stop_ids=[greedy[3]]) == greedy[: greedy.index(greedy[3]) + 1]


def test_positions_are_relative(model: GlmMoe) -> None:
    """RoPE: shifting every position changes nothing; stretching them does."""
    tokens_BT = random_tokens(1, 12)
    base = torch.arange(12)[None]
    with torch.no_grad():
        plain = model(tokens_BT)
        torch.testing.assert_close(model(tokens_BT, positions_BT=base + 40), plain, atol=1e-4, rtol=0)
        assert (model(tokens_BT, positions_BT=base * 3) - plain).abs().max() > 1e-3


def test_rope_theta_changes_later_passes_and_the_config(model: GlmMoe) -> None:
    tokens_BT = random_tokens(1, 12)
    with torch.no_grad():
        before = model(tokens_BT)
        model.set_rope_theta(1e6)
        after = model(tokens_BT)
    assert model.config.rope_theta == 1e6
    assert model.config.to_hf()["rope_theta"] == 1e6
    assert (before - after).abs().max() > 1e-3
    fresh = GlmMoe(model.config, seed=0)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(tokens_BT), after)


def test_two_runs_give_the_same_bits(model: GlmMoe) -> None:
    tokens_BT = random_tokens(4, 30)
    positions_BT, documents_BT = packed(LENGTHS, 30)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        stats = RouterStats()
        hidden = model(tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, stats=stats)
        loss, count = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens_BT.flatten())
        (loss / count + stats.sequence_loss).backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_a_seed_fixes_the_weights_and_leaves_ambient_randomness_alone(tiny_config: ModelConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (GlmMoe(tiny_config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
    for name, parameter in a.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            assert 0.015 < parameter.std() < 0.025, name
            assert parameter.mean().abs() < 0.004, name


def test_router_bias_stays_fp32_when_the_model_is_cast(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=0)
    exact = torch.linspace(0, 1, tiny_config.n_routed_experts) + 1e-3
    for router in model.routers():
        router.e_score_correction_bias.copy_(exact)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for router in [*model.routers(), *copy.deepcopy(model).routers()]:
        assert torch.equal(router.e_score_correction_bias, exact)
    hidden = model(random_tokens(2, 8))
    assert hidden.dtype == torch.bfloat16
    assert model.logits(hidden).dtype == torch.float32


def test_bf16_and_autocast_stay_near_fp32(model: GlmMoe) -> None:
    tokens_BT = random_tokens(2, 16)
    with torch.no_grad():
        exact = model.logits(model(tokens_BT))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.logits(model(tokens_BT))
        half = copy.deepcopy(model).to(torch.bfloat16)
        rounded = half.logits(half(tokens_BT))
    # bf16 has 8 bits; a flipped expert choice moves single logits further, so the mean is compared
    assert (mixed - exact).abs().mean() < 0.1 * exact.std()
    assert (rounded - exact).abs().mean() < 0.1 * exact.std()


def test_training_under_autocast_gives_fp32_gradients_near_the_exact_ones(model: GlmMoe) -> None:
    tokens_BT = random_tokens(2, 16)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        hidden = model(tokens_BT)
        loss, _ = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, tokens_BT.flatten())
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        return torch.cat([g.flatten() for g in grads])

    exact = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gradient()
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.98


@pytest.mark.parametrize(
    ("preset", "main", "mtp", "active"),
    [("glm-4.5", 351.2, 3.99, 32.1), ("glm-4.5-air", 105.6, 2.38, 12.2)],
)
def test_released_sizes_on_the_meta_device(preset: str, main: float, mtp: float, active: float) -> None:
    """In billions, spec section 1.1; and the config's arithmetic equals the network's tensors."""
    config = ModelConfig(**PRESETS[preset])
    model = GlmMoe(config, device="meta")
    counts = config.parameter_counts()
    by_part = {"mtp": 0, "vocabulary": 0, "main": 0}
    for name, parameter in model.named_parameters():
        part = "mtp" if name.startswith("mtp.") else "vocabulary" if name.startswith(("embed", "lm_head")) else "main"
        by_part[part] += parameter.numel()
    assert by_part == {"main": counts.main, "mtp": counts.mtp, "vocabulary": counts.vocabulary}
    assert [round(counts.main / 1e9, 1), round(counts.mtp / 1e9, 2), round(counts.active / 1e9, 1)] == [
        main,
        mtp,
        active,
    ]


@pytest.mark.parametrize("preset", ["nano", "tiny", "small"])
def test_arithmetic_counts_equal_the_network(preset: str) -> None:
    for extra in ({}, {"tie_word_embeddings": True}, {"num_nextn_predict_layers": 0}, {"attention_bias": False}):
        config = ModelConfig(**{**PRESETS[preset], **extra})
        model = GlmMoe(config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == config.parameter_counts().total


def test_building_on_meta_draws_no_compiler_in() -> None:
    """torch._dynamo costs seconds; building a model must not import it."""
    code = (
        "import sys; from glmctl.model.network import GlmMoe; from glmctl.model.config import ModelConfig; "
        "GlmMoe(ModelConfig(), seed=0); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
