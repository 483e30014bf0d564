"""Laws of the native runner: what it computes is the model, bit by bit the same in every batch and format."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from glmctl.engine.cache import PagedCache
from glmctl.engine.native import NativeRunner
from glmctl.engine.native_weights import INT8_GROUP, WeightFormat
from glmctl.engine.rounding import round_weights
from glmctl.engine.runner import StepBatch
from glmctl.engine.runners import runner_named
from glmctl.engine.torch_runner import TorchRunner
from glmctl.errors import EnvironmentProblem, GlmctlError
from glmctl.kernels.cpu import library as native_library
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.use import RoundedFormat

PLACES = 48
Piece = tuple[int, int, int]
"""sequence, first place, end"""


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    try:
        native_library.find_compiler()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))


def random_config(rng: random.Random) -> ModelConfig:
    """Widths that are and are not multiples of a vector, every option of the architecture."""
    kv_heads, groups = rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 4])
    experts = 4 * rng.randint(1, 4)
    return ModelConfig(
        vocab_size=rng.randint(40, 150),
        hidden_size=rng.choice([20, 48, 64, 80, 130]),
        intermediate_size=rng.choice([16, 50, 96]),
        moe_intermediate_size=rng.choice([8, 24, 33, 64]),
        num_hidden_layers=rng.randint(1, 4),
        first_k_dense_replace=rng.choice([0, 1]),
        num_attention_heads=kv_heads * rng.choice([1, 2, 4, 12]),
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([8, 16, 20, 32, 64, 128]),
        n_routed_experts=experts,
        num_experts_per_tok=min(rng.randint(1, 4), experts // groups),
        n_shared_experts=rng.choice([0, 1, 2]),
        n_group=groups,
        topk_group=rng.randint(1, groups),
        norm_topk_prob=rng.random() < 0.7,
        routed_scaling_factor=rng.choice([1.0, 2.5]),
        use_qk_norm=rng.random() < 0.5,
        attention_bias=rng.random() < 0.5,
        partial_rotary_factor=rng.choice([0.5, 1.0]),
        tie_word_embeddings=rng.random() < 0.5,
        num_nextn_predict_layers=rng.choice([0, 1]),
    )


def random_model(config: ModelConfig, seed: int) -> GlmMoe:
    """Wide enough weights that every part matters; biases and norms that are not trivial."""
    model = GlmMoe(config, seed=seed).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    for router in model.routers():
        router.e_score_correction_bias.add_(torch.randn(config.n_routed_experts, generator=generator) * 0.05)
    return model


class Sequences:
    """Prompts, their scattered blocks, and runners over one cache of their own each."""

    def __init__(self, model: GlmMoe, rng: random.Random, count: int, block_size: int = 16) -> None:
        vocab = model.config.vocab_size
        self.model, self.block_size = model, block_size
        self.tokens = [[rng.randrange(vocab) for _ in range(rng.randint(3, PLACES))] for _ in range(count)]
        each = -(-PLACES // block_size)
        ids = list(range(1, 1 + count * each))
        rng.shuffle(ids)
        self.table = np.array(ids, np.int32).reshape(count, each)

    def runner(self, weights: WeightFormat = "stored", model: GlmMoe | None = None) -> NativeRunner:
        model = model or self.model
        layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
        cache = PagedCache(model.config, self.table.size + 1, layers=layers, block_size=self.block_size)
        for stored in (*cache.keys, *cache.values):
            # what was never written must not matter
            stored.fill_(torch.nan)
        return NativeRunner(model, cache, weights=weights)

    def batch(self, pieces: list[Piece], hidden: Tensor | None = None) -> StepBatch:
        token = [token for s, start, end in pieces for token in self.tokens[s][start:end]]
        return StepBatch.of(
            token,
            [start for _, start, _ in pieces],
            [end - start for _, start, end in pieces],
            self.table[[s for s, _, _ in pieces]],
            list(range(len(token))),
            hidden,
        )

    def in_steps(self, runner: NativeRunner, steps: list[list[Piece]]) -> list[Tensor]:
        """Logits of every token of each sequence, [T, V]."""
        parts: list[list[Tensor]] = [[] for _ in self.tokens]
        for pieces in steps:
            logits = runner.step(self.batch(pieces)).logits_RV
            for (s, start, end), part in zip(
                pieces, logits.split([end - start for _, start, end in pieces]), strict=True
            ):
                assert len(part) == end - start
                parts[s].append(part)
        return [torch.cat(each) for each in parts]

    def whole(self) -> list[list[Piece]]:
        return [[(s, 0, len(tokens))] for s, tokens in enumerate(self.tokens)]

    def ragged(self, rng: random.Random) -> list[list[Piece]]:
        """Steps that mix single tokens, verifications and pieces of prompts, in any order of arrival."""
        filled = [0] * len(self.tokens)
        steps = []
        while any(done < len(tokens) for done, tokens in zip(filled, self.tokens, strict=True)):
            pieces = []
            for s in rng.sample(range(len(filled)), rng.randint(1, len(filled))):
                end = min(len(self.tokens[s]), filled[s] + rng.choice([1, 1, 1, 2, 3, 4, 9, 25]))
                if end > filled[s]:
                    pieces.append((s, filled[s], end))
                    filled[s] = end
            if pieces:
                steps.append(pieces)
        return steps


def in_float64(model: GlmMoe) -> GlmMoe:
    wide = GlmMoe(model.config, dtype=torch.float64).requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    return wide


@pytest.mark.parametrize("seed", range(16))
def test_any_configuration_computes_the_model(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(random_config(rng), seed)
    sequences = Sequences(model, rng, 5, block_size=rng.choice([4, 16, 32]))
    got = sequences.in_steps(sequences.runner(), sequences.ragged(rng))
    truth = in_float64(model)
    for tokens, logits in zip(sequences.tokens, got, strict=True):
        wanted = truth.logits(truth(torch.tensor([tokens])))[0]
        # fp32 rounding over a few layers: torch's own fp32 forward is as far from float64 (1e-6 of the largest logit)
        assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("seed", range(6))
def test_logits_do_not_depend_on_the_batch_bit_by_bit(seed: int) -> None:
    rng = random.Random(100 + seed)
    sequences = Sequences(random_model(random_config(rng), seed), rng, 20)
    alone = sequences.in_steps(sequences.runner(), sequences.whole())
    together = sequences.in_steps(sequences.runner(), sequences.ragged(rng))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_logits_do_not_depend_on_the_number_of_threads(tiny_config: ModelConfig) -> None:
    rng = random.Random(2)
    sequences = Sequences(random_model(tiny_config, 2), rng, 12)
    steps = sequences.ragged(rng)
    single = sequences.in_steps(sequences.runner(), steps)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = sequences.in_steps(sequences.runner(), steps)
    finally:
        torch.set_num_threads(before)
    for one, other in zip(single, several, strict=True):
        assert torch.equal(one, other)


def dequantised(weight: Tensor) -> Tensor:
    """The definition of the int8 format: steps of a 127th of the largest of 64 neighbours in a row."""
    out = torch.empty_like(weight)
    for first in range(0, weight.shape[-1], INT8_GROUP):
        group = weight[..., first : first + INT8_GROUP]
        step = group.abs().amax(-1, keepdim=True) / 127
        inverse = torch.where(step > 0, 1 / step, 0.0)
        out[..., first : first + INT8_GROUP] = (group * inverse).round().clamp(-127, 127) * step
    return out


def dequantised_fp8(weight: Tensor) -> Tensor:
    """The definition of the FP8 format (spec section 1.6): E4M3 with a scale for each 128 x 128 block of a matrix."""
    out = torch.empty_like(weight)
    for rows in range(0, weight.shape[0], 128):
        for cols in range(0, weight.shape[1], 128):
            block = weight[rows : rows + 128, cols : cols + 128]
            scale = block.abs().amax().clamp_min(1e-12) / 448
            out[rows : rows + 128, cols : cols + 128] = (block / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def rounded_by_definition(model: GlmMoe, weights: WeightFormat) -> None:
    kept = (
        "embed_tokens.weight",
        "mlp.gate.weight",
        *(("lm_head.weight", "eh_proj.weight") if weights == "fp8" else ()),
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith(kept):
            continue
        if weights != "fp8":
            parameter.copy_(dequantised(parameter) if weights == "int8" else parameter.bfloat16().float())
            continue
        for matrix in parameter if parameter.dim() == 3 else (parameter,):
            for part in matrix.chunk(2) if name.endswith("gate_up_proj") else (matrix,):
                part.copy_(dequantised_fp8(part))


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("seed", range(3))
def test_a_packed_format_is_the_fp32_runner_over_rounded_weights(weights: WeightFormat, seed: int) -> None:
    rng = random.Random(200 + seed)
    wide = {"tie_word_embeddings": False, **({"hidden_size": 150, "moe_intermediate_size": 133} if seed == 2 else {})}
    model = random_model(random_config(rng).model_copy(update=wide), seed)
    rounded = random_model(model.config, seed)
    rounded_by_definition(rounded, weights)
    sequences = Sequences(model, rng, 8)
    steps = sequences.ragged(rng)
    packed = sequences.in_steps(sequences.runner(weights), steps)
    exact = sequences.in_steps(sequences.runner(model=rounded), steps)
    for one, other in zip(packed, exact, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8-block"])
def test_a_rounded_model_has_the_packed_weights(tiny_config: ModelConfig, format: RoundedFormat) -> None:
    """So that `glmctl eval` measures what a packed runner loses, on any device."""
    config = tiny_config.model_copy(update={"hidden_size": 150, "moe_intermediate_size": 133})
    by_definition, model = random_model(config, 1), random_model(config, 1)
    rounded_by_definition(by_definition, "fp8" if format == "fp8-block" else format)
    round_weights(model, format)
    for (name, one), other in zip(model.named_parameters(), by_definition.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_every_fp8_number_is_read_as_torch_reads_it(tiny_config: ModelConfig) -> None:
    """One matrix holds them all; its block's largest is 448, so the scale is one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[~numbers.isnan()]
    config = tiny_config.model_copy(update={"hidden_size": 256, "num_hidden_layers": 1, "first_k_dense_replace": 1})
    model = random_model(config, 3)
    weight = model.layers[0].self_attn.q_proj.weight
    weight.zero_()
    weight[0, : len(numbers)] = numbers
    weight[0, 255] = 448.0
    sequences = Sequences(model, random.Random(3), 2)
    # every other matrix loses bits: rounded beforehand, too
    rounded_by_definition(model, "fp8")
    assert torch.equal(weight[0, : len(numbers)], numbers)
    for one, other in zip(
        sequences.in_steps(sequences.runner("fp8"), sequences.whole()),
        sequences.in_steps(sequences.runner(), sequences.whole()),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_bf16_model_is_read_in_place(tiny_config: ModelConfig) -> None:
    rng = random.Random(4)
    wide = random_model(tiny_config, 4)
    narrow = GlmMoe(tiny_config, dtype=torch.bfloat16).requires_grad_(False)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    sequences = Sequences(wide, rng, 4)
    runner = sequences.runner(model=narrow)
    assert runner.weights_nbytes < 0.05 * sum(p.nbytes for p in narrow.parameters()), "only vectors are copied"
    for one, other in zip(
        sequences.in_steps(runner, sequences.whole()),
        sequences.in_steps(sequences.runner(), sequences.whole()),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "fp8"])
def test_changed_weights_are_those_of_the_next_step_after_a_refresh(
    tiny_config: ModelConfig, weights: WeightFormat
) -> None:
    rng = random.Random(5)
    model = random_model(tiny_config, 5)
    sequences = Sequences(model, rng, 3)
    runner = sequences.runner(weights)
    before = sequences.in_steps(runner, sequences.whole())
    for parameter in model.parameters():
        parameter.mul_(1.25)
    model.set_rope_theta(500.0)
    runner.refresh_weights()
    after = sequences.in_steps(runner, sequences.whole())
    fresh = sequences.in_steps(sequences.runner(weights), sequences.whole())
    for old, one, other in zip(before, after, fresh, strict=True):
        assert not torch.equal(old, one)
        assert torch.equal(one, other)


def test_fp32_weights_take_no_memory_of_their_own(tiny_config: ModelConfig) -> None:
    model = random_model(tiny_config, 6)
    runner = Sequences(model, random.Random(6), 1).runner()
    # the table of RoPE's frequencies and the routers' buffers, which are not parameters
    assert runner.weights_nbytes < 1024


@pytest.mark.parametrize("seed", range(4))
def test_the_mtp_layer_at_shifted_places_is_the_mtp_layer(seed: int) -> None:
    rng = random.Random(300 + seed)
    model = random_model(random_config(rng).model_copy(update={"num_nextn_predict_layers": 1}), seed)
    truth = in_float64(model)
    assert truth.mtp is not None
    sequences = Sequences(model, rng, 4)
    runner = sequences.runner()
    hidden = [truth(torch.tensor([tokens]))[0] for tokens in sequences.tokens]
    got: list[list[Tensor]] = [[] for _ in hidden]
    for pieces in sequences.ragged(rng):
        pieces = [(s, max(1, start), end) for s, start, end in pieces if end > max(1, start)]
        if not pieces:
            continue
        before = torch.cat([hidden[s][start - 1 : end - 1] for s, start, end in pieces]).float()
        logits = runner.draft(sequences.batch(pieces, before)).logits_RV
        for (s, _, _), part in zip(pieces, logits.split([end - start for _, start, end in pieces]), strict=True):
            got[s].append(part)
    for tokens, states, parts in zip(sequences.tokens, hidden, got, strict=True):
        wanted = truth.logits(truth.mtp(states[None, :-1], torch.tensor([tokens[1:]])))[0]
        # rounding of angles at places one higher, besides that of sums
        assert (torch.cat(parts) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_only_the_rows_asked_for_get_logits(tiny_config: ModelConfig) -> None:
    sequences = Sequences(random_model(tiny_config, 7), random.Random(7), 2)
    batch = sequences.batch([(0, 0, 3), (1, 0, 2)])
    every = sequences.runner().step(batch)
    some = sequences.runner().step(
        StepBatch(
            batch.token_N, batch.position_N, batch.sequence_N, batch.block_table_SM, logit_rows_R=torch.tensor([2, 4])
        )
    )
    assert torch.equal(some.logits_RV, every.logits_RV[[2, 4]])
    assert torch.equal(some.hidden_ND, every.hidden_ND)


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "fp8"])
def test_damaged_weights_show_in_the_logits(tiny_config: ModelConfig, weights: WeightFormat, damage: float) -> None:
    model = random_model(tiny_config, 8)
    model.layers[0].self_attn.o_proj.weight[3, 5] = damage
    sequences = Sequences(model, random.Random(8), 1)
    logits = sequences.in_steps(sequences.runner(weights), sequences.whole())[0]
    assert not torch.isfinite(logits).any()


def test_a_row_outside_the_vocabulary_is_our_bug_and_not_a_crash(tiny_config: ModelConfig) -> None:
    sequences = Sequences(random_model(tiny_config, 9), random.Random(9), 1)
    batch = sequences.batch([(0, 0, 3)])
    batch.token_N[1] = tiny_config.vocab_size
    with pytest.raises(AssertionError, match="row 1"):
        sequences.runner().step(batch)


@pytest.fixture
def other_instructions(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    monkeypatch.setenv("GLMCTL_CACHE", str(tmp_path))
    plain = [f for f in native_library.flags() if not f.startswith("-m")]
    monkeypatch.setattr(native_library, "flags", lambda: [*plain, f"-march={request.param}"])
    native_library.library.cache_clear()
    yield
    native_library.library.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("other_instructions", ["x86-64", "haswell"], indirect=True)
def test_narrower_vectors_compute_the_same_model(other_instructions: None, tiny_config: ModelConfig) -> None:
    for seed in range(6):
        test_any_configuration_computes_the_model(seed)
        test_logits_do_not_depend_on_the_batch_bit_by_bit(seed)
    for weights in ("bf16", "int8", "fp8"):
        test_a_packed_format_is_the_fp32_runner_over_rounded_weights(weights, 2)  # type: ignore[arg-type]
    test_every_fp8_number_is_read_as_torch_reads_it(tiny_config)


def test_auto_is_native_for_fp32_on_a_cpu_and_torch_otherwise(tiny_config: ModelConfig) -> None:
    for dtype, kind in ((torch.float32, NativeRunner), (torch.bfloat16, TorchRunner)):
        model = GlmMoe(tiny_config, dtype=dtype)
        cache = PagedCache(tiny_config, 2, layers=tiny_config.num_hidden_layers, dtype=dtype)
        assert isinstance(runner_named("auto")(model, cache), kind)


def test_without_a_compiler_auto_says_so_once_and_takes_torch(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for cached in (native_library.library, native_library.compiled):
        cached.cache_clear()
    model = GlmMoe(tiny_config)
    cache = PagedCache(tiny_config, 2, layers=tiny_config.num_hidden_layers)
    try:
        assert isinstance(runner_named("auto")(model, cache), TorchRunner)
        assert isinstance(runner_named("auto")(model, cache), TorchRunner)
        with pytest.raises(EnvironmentProblem, match="no C"):
            runner_named("native")(model, cache)
    finally:
        for cached in (native_library.library, native_library.compiled):
            cached.cache_clear()
    said = capsys.readouterr().err
    assert said.count("generating with torch") == 1
    assert said.count("\n") == 1


def test_an_unknown_runner_names_the_nearest() -> None:
    with pytest.raises(GlmctlError, match="did you mean 'native-int8'"):
        runner_named("native-int4")  # type: ignore[arg-type]
