"""What the techniques of the report are for, seen to happen in small (spec section 5)."""

from __future__ import annotations

import random

import pytest
import torch

from glmctl.data import fim
from glmctl.data.batches import Batch, pad_batch
from glmctl.data.tokenizer import Tokenizer
from glmctl.kernels.rms_norm import rms_norm
from glmctl.model.config import ModelConfig
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import make_accelerator
from glmctl.recipe.schema import FillInTheMiddle, MuonSpec
from glmctl.training.balance import max_vio
from glmctl.training.optim import build_optimizer
from glmctl.training.step import Stepper

ROWS, STEPS = 8, 20


def stepper(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Stepper:
    model = GlmMoe(config, seed=0, dtype=dtype)
    return Stepper(model, build_optimizer(model, MuonSpec()), make_accelerator(), grad_clip=1.0)


def batch(seed: int, rows: int = ROWS) -> Batch:
    """Rows of unequal length and mask, of a text with a rule: each token is the one before plus a fixed stride."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(rows):
        start = int(torch.randint(0, 512, (1,), generator=generator))
        tokens = [(start + 7 * i) % 512 for i in range(6 + 4 * row)]
        made.append((tokens, [int(i % (row % 3 + 1) == 0) for i in range(len(tokens))]))
    return pad_batch(made, pad_id=0)


def after_training(config: ModelConfig, micro_rows: int) -> dict[str, torch.Tensor]:
    one = stepper(config, torch.float64)
    for step in range(STEPS):
        parts = batch(step).split(micro_rows)
        one.lm_step(parts, lr=2e-3, mtp_weight=0.3, sequence_loss_weight=1e-3, bias_update_rate=1e-3)
    return {name: value.detach().double() for name, value in one.model.named_parameters()}


def test_eight_rows_at_once_or_in_turn_train_the_same_parameters(tiny_config: ModelConfig) -> None:
    """1 x 8 = 2 x 4 = 8 x 1 within 1e-6 of every parameter after 20 steps.

    In float64, so that what differs is the arithmetic of accumulation (weights, counts, biases) and not its rounding,
    which twenty steps of fp32 amplify through the router's choices.
    """
    whole = after_training(tiny_config, 8)
    for micro_rows in (4, 1):
        cut = after_training(tiny_config, micro_rows)
        for name, value in whole.items():
            assert float((cut[name] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-12, name


def test_mtp_learns_the_token_after_next(tiny_config: ModelConfig) -> None:
    one = stepper(tiny_config)
    losses = [one.lm_step([batch(step)], lr=0.02, mtp_weight=0.3).mtp_loss for step in range(60)]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


@pytest.mark.parametrize("rate", [0.0, 0.02])
def test_experts_even_out_with_the_bias_and_not_without(tiny_config: ModelConfig, rate: float) -> None:
    """From a router that prefers two experts; no balance loss, so that only the bias can help."""
    one = stepper(tiny_config)
    with torch.no_grad():
        for router in one.model.routers():
            router.weight.mul_(0.1)
            router.e_score_correction_bias[:2] = 0.3
    found = [
        max_vio(one.lm_step([batch(step)], lr=1e-4, mtp_weight=0.3, bias_update_rate=rate).counts_LE)
        for step in range(40)
    ]
    start, end = found[0], sum(found[-5:]) / 5
    assert start > 2.5
    if rate:
        assert end < 0.6 * start
    else:
        assert end > 0.9 * start


def test_qk_norm_bounds_attention_logits_whatever_the_weights(tiny_config: ModelConfig) -> None:
    """|q k| / sqrt(d) <= sqrt(d) for unit norm weights; without the norm it grows with the square of the scale."""
    d = tiny_config.head_dim
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, tiny_config.hidden_size, generator=generator)

    def largest(scale: float, normed: bool) -> float:
        projections = torch.randn(2, d, tiny_config.hidden_size, generator=torch.Generator().manual_seed(1)) * scale
        q, k = (x @ w.t() for w in projections)
        if normed:
            q, k = (rms_norm(y, torch.ones(d), 1e-5) for y in (q, k))
        return float((q @ k.t()).abs().max()) / d**0.5

    assert largest(1000.0, True) <= d**0.5 * (1 + 1e-5)
    assert largest(1000.0, False) == pytest.approx(1e6 * largest(1.0, False), rel=1e-3)


# ----------------------------------------------------------------------------- fill in the middle

THINGS = [f"{a}{b}" for a in "abcd" for b in "wxyz"]
"""16 middles; what follows one names it, what precedes it does not"""


def infilled(config: ModelConfig, tokenizer: Tokenizer, rate: float) -> float:
    """Share of middles that a model, trained on texts with FIM at `rate`, fills in exactly from both sides."""
    rng = random.Random(0)
    spec = FillInTheMiddle(rate=rate, spm_rate=0.5)
    texts = [f"take {thing} of {thing.upper()}" for thing in THINGS]

    def tokens(parts: list[fim.Part]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [tokenizer.id(part.sentinel)] if part.sentinel else []
            ids += tokenizer.encode_plain(part.text)
        return [*ids, tokenizer.pad_id]

    one = stepper(config)
    for _ in range(STEPS_OF_FIM):
        rows = [tokens(fim.rearrange(text, spec, rng)) for text in rng.choices(texts, k=24)]
        one.lm_step([pad_batch([(row, [1] * len(row)) for row in rows], pad_id=tokenizer.pad_id)], lr=0.01)
    right = 0
    for thing in THINGS:
        gap = [fim.Part(fim.PREFIX, "take "), fim.Part(fim.SUFFIX, f" of {thing.upper()}"), fim.Part(fim.MIDDLE, "")]
        prompt = tokens(gap)[:-1]
        filled = tokenizer.decode(generate(one.model, prompt, 4, stop_ids=[tokenizer.pad_id]))
        right += filled.removesuffix("<|endoftext|>") == thing
    return right / len(THINGS)


STEPS_OF_FIM = 200


@pytest.mark.slow
def test_infilling_is_learnt_with_fim_and_not_without(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    assert infilled(tiny_config, tiny_tokenizer, 0.0) < 0.2
    assert infilled(tiny_config, tiny_tokenizer, 0.7) > 0.5
