"""Laws of drafting: the distribution is the model's, and switching drafts on and off under way changes no token."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from glmctl.engine import draft_vocabulary
from glmctl.engine.draft_control import Timed
from glmctl.engine.draft_vocabulary import DraftVocabulary
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.runners import runner_named
from glmctl.engine.speculative import Drafter
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.use import RunnerName


def agreeing(config: ModelConfig) -> GlmMoe:
    """Drafts are often, not always, right: the MTP layer sees the next token's embedding through the same head."""
    model = GlmMoe(config, seed=1).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            parameter.mul_(0.3)
    assert model.mtp is not None
    model.mtp.eh_proj.weight.zero_()
    model.mtp.eh_proj.weight[:, : config.hidden_size] = torch.eye(config.hidden_size)
    assert model.lm_head is not None
    model.lm_head.weight.mul_(24)
    return model


@pytest.mark.parametrize("drafts", [1, 3])
def test_sampling_with_drafts_follows_the_model_s_distribution(tiny_config: ModelConfig, drafts: int) -> None:
    """Chi-square of the second and third token, given the first, against the model's own softmax."""
    config = tiny_config.model_copy(update={"vocab_size": 24})
    model = agreeing(config)
    prompt, count = [3, 5], 4000
    params = [SamplingParams(max_tokens=4, temperature=1.0, top_p=0.95, seed=seed) for seed in range(count)]
    engine = Engine(model, max_length=16, max_slots=256, speculative=drafts)
    made = engine.generate(Request(str(index), prompt, each) for index, each in enumerate(params))
    assert 0.1 < engine.stats.acceptance < 0.9, "both outcomes must occur for the test to say anything"
    for depth in range(3):
        groups: dict[tuple[int, ...], list[int]] = {}
        for each in made:
            groups.setdefault(tuple(each.tokens[:depth]), []).append(each.tokens[depth])
        statistic = freedom = 0.0
        for before, tokens in groups.items():
            if len(tokens) < 200:
                continue
            p = model.logits(model(torch.tensor([[*prompt, *before]]))[0, -1]).double().softmax(-1)
            order = p.argsort(descending=True)
            outside = p[order].cumsum(-1) - p[order] >= 0.95
            p[order[outside]] = 0.0
            expected = (p / p.sum() * len(tokens)).numpy()
            counts = np.bincount(tokens, minlength=24)
            assert counts[expected == 0].sum() == 0
            common = expected >= 5
            rest = expected[~common].sum()
            pairs = [*zip(counts[common], expected[common], strict=True)]
            pairs += [(counts[~common].sum(), rest)] if rest > 0 else []
            statistic += sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
            freedom += len(pairs) - 1
        assert freedom > 3
        # mean + 5 standard deviations of chi-square; seeds are fixed, so this cannot flicker
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_sampling_with_and_without_drafts_is_one_distribution(tiny_config: ModelConfig) -> None:
    """Chi-square of two samples of whole answers, drawn with seeds of their own, so that none is the other's twin."""
    model = agreeing(tiny_config.model_copy(update={"vocab_size": 24}))
    count = 2500
    samples = []
    for drafts, first in ((0, 0), (2, count)):
        engine = Engine(model, max_length=16, max_slots=256, speculative=drafts)
        params = [SamplingParams(max_tokens=4, temperature=1.3, top_k=6, seed=first + n) for n in range(count)]
        made = engine.generate(Request(str(n), [3, 5], each) for n, each in enumerate(params))
        samples.append(Counter(tuple(each.tokens[:3]) for each in made))
    assert engine.stats.accepted > 0.1 * engine.stats.drafted
    plain, drafted = samples
    common = [answer for answer in plain.keys() | drafted.keys() if plain[answer] + drafted[answer] >= 20]
    pairs = [(plain[answer], drafted[answer]) for answer in common]
    pairs.append((count - sum(a for a, _ in pairs), count - sum(b for _, b in pairs)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    freedom = len(pairs) - 1
    assert freedom > 20
    # mean + 4 standard deviations of chi-square; seeds are fixed, so this cannot flicker
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


class Scripted:
    """A draft control that goes on and off, and probes, as told."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.drafting, self.seen = rng, True, 0

    @property
    def probing(self) -> bool:
        return self.drafting and self.rng.random() < 0.3

    def timed(self, step: Timed, *, plain: bool) -> None:
        self.seen += plain
        self.drafting = self.rng.random() < 0.8

    def rested(self) -> None:
        self.drafting = self.rng.random() < 0.3


def test_switching_drafts_on_and_off_changes_no_token(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = agreeing(tiny_config)
    rng = random.Random(2)
    prefix = [rng.randrange(512) for _ in range(40)]
    requests = [
        Request(
            str(index),
            [*prefix[: rng.randint(1, 40)], rng.randrange(512)],
            SamplingParams(max_tokens=rng.randint(1, 30), temperature=index % 2, seed=index),
        )
        for index in range(60)
    ]
    plain = Engine(model, max_length=80, max_slots=4).generate(requests)
    scripted = Scripted(random.Random(4))
    monkeypatch.setattr("glmctl.engine.engine.DraftControl", lambda: scripted)
    engine = Engine(model, max_length=80, max_slots=4, speculative=2, adaptive=True, kv_blocks=12)
    switched = engine.generate(requests)
    assert [each.tokens for each in plain] == [each.tokens for each in switched]
    assert scripted.seen > 0
    assert engine.stats.accepted > 0
    assert engine.kv_blocks[0] == 0


def test_a_draft_vocabulary_covers_what_was_seen_and_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "EVERY", 1000)
    vocabulary = DraftVocabulary(4096)
    assert not vocabulary.see([7] * 500)
    assert vocabulary.see([*range(100, 200), *([9] * 400)])
    chosen = vocabulary.chosen()
    assert chosen is not None
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 128
    assert {7, 9} <= set(chosen.tolist())
    assert not vocabulary.see([3000] * 999), "a choice begins anew"
    for _ in range(8):
        vocabulary.see([3000] * 1000)
        chosen = vocabulary.chosen()
    assert chosen is not None
    assert 3000 in chosen.tolist()
    vocabulary.see(list(range(4096)) * 20)
    assert vocabulary.chosen() is None, "nothing is gained where half of the vocabulary is in use"


@pytest.mark.parametrize("runner", ["auto", "torch"])
def test_drafting_among_few_tokens_changes_no_token(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, runner: RunnerName
) -> None:
    monkeypatch.setattr(draft_vocabulary, "EVERY", 300)
    model = agreeing(tiny_config)
    requests = [
        Request(str(n), [n % 7, 3], SamplingParams(max_tokens=20, temperature=n % 2, top_k=2, seed=n))
        for n in range(60)
    ]
    plain = Engine(model, max_length=32, max_slots=6, runner=runner_named(runner)).generate(requests)
    limits: list[int] = []
    original = Drafter.limit

    def limit(self: Drafter, tokens: Tensor | None) -> None:
        original(self, tokens)
        limits.append(512 if tokens is None else len(tokens))

    monkeypatch.setattr(Drafter, "limit", limit)
    engine = Engine(model, max_length=32, max_slots=6, speculative=2, runner=runner_named(runner))
    drafted = engine.generate(requests[:30])
    engine.load_weights(1)
    drafted += engine.generate(requests[30:])
    assert [each.tokens for each in drafted] == [each.tokens for each in plain]
    assert min(limits) < 256
    accepted = engine.stats.accepted
    again = engine.generate(requests)
    assert [each.tokens for each in again] == [each.tokens for each in plain]
    assert engine.stats.accepted > accepted, "right drafts are found among the few"
