"""The engine's law: whatever shares blocks, arrives, is cut into pieces, preempted, aborted or drafted, every request
gets the tokens that recomputing its whole text at every step would give.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from glmctl.engine.engine import Engine
from glmctl.engine.request import Completion, Request, SamplingParams
from glmctl.engine.runners import RunnerName, runner_named
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe

LENGTH = 96


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    """Random weights with a wide head, so that the best token leads clearly and rounding cannot decide."""
    model = GlmMoe(tiny_config, seed=3).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    return model


@dataclass(frozen=True)
class Setting:
    drafts: int = 0
    kv_blocks: int | None = None
    prefill_tokens: int = 40
    max_slots: int = 8
    runner: RunnerName = "auto"


SETTINGS = {
    "roomy": Setting(),
    "torch-one-draft-tight": Setting(drafts=1, kv_blocks=8, runner="torch"),
    "tight": Setting(kv_blocks=7, prefill_tokens=17),
    "one-draft": Setting(drafts=1, prefill_tokens=25),
    "two-drafts-tight": Setting(drafts=2, kv_blocks=8),
    "three-drafts": Setting(drafts=3, max_slots=12, prefill_tokens=100),
}


def random_requests(rng: random.Random, count: int, vocab: int) -> list[Request]:
    """Fresh prompts, repetitions, and prompts that share a beginning of any length, some of them long."""
    requests: list[Request] = []
    for index in range(count):
        fresh = [rng.randrange(vocab) for _ in range(rng.randint(1, 70 if index % 5 == 0 else 20))]
        prompt = fresh
        if requests and rng.random() < 0.6:
            other = rng.choice(requests).prompt
            prompt = [*other[: rng.randint(1, len(other))], *(fresh if rng.random() < 0.7 else [])]
        stop = tuple(rng.randrange(vocab) for _ in range(3))
        params = SamplingParams(max_tokens=rng.randint(1, 60), temperature=0.0, stop_token_ids=stop)
        requests.append(Request(f"r{index}", prompt[: LENGTH - 2], params))
    return requests


def run(engine: Engine, requests: list[Request], rng: random.Random) -> tuple[dict[str, Completion], set[str]]:
    """All completions and the names of those that were aborted; arrivals and aborts at random steps."""
    pending, done, aborted = list(requests), dict[str, Completion](), set[str]()
    streamed: dict[str, list[int]] = {}
    while pending or engine.has_work:
        for _ in range(min(len(pending), rng.choice([0, 1, 3]))):
            engine.add(pending.pop(0))
        for event in engine.step():
            streamed.setdefault(event.id, []).append(event.token)
            if event.completion is not None:
                done[event.id] = event.completion
        if rng.random() < 0.1:
            victim = rng.choice(requests).id
            completion = engine.abort(victim)
            if completion is not None:
                done[victim] = completion
                aborted.add(victim)
    assert all(completion.tokens == streamed.get(name, []) for name, completion in done.items())
    return done, aborted


def check(model: GlmMoe, request: Request, completion: Completion, aborted: bool) -> None:
    """By induction over the tokens, one pass over the whole text is recomputation at every step."""
    prompt, made = request.prompt, completion.tokens
    if made:
        logits = model.logits(model(torch.tensor([[*prompt, *made[:-1]]]))[0, len(prompt) - 1 :])
        assert logits.argmax(-1).tolist() == made
    stops, limit = set(request.params.stop_token_ids), min(request.params.max_tokens, LENGTH - len(prompt))
    assert not stops.intersection(made[:-1])
    if aborted:
        assert completion.finish_reason == "aborted"
    elif made[-1] in stops:
        assert completion.finish_reason == "stop"
    else:
        assert (completion.finish_reason, len(made)) == ("length", limit)


def prove(model: GlmMoe, setting: Setting, count: int, seed: int) -> Engine:
    rng = random.Random(seed)
    requests = random_requests(rng, count, model.config.vocab_size)
    engine = Engine(
        model,
        max_slots=setting.max_slots,
        max_length=LENGTH,
        speculative=setting.drafts,
        prefill_tokens=setting.prefill_tokens,
        kv_blocks=setting.kv_blocks,
        runner=runner_named(setting.runner),
    )
    done, aborted = run(engine, requests, rng)
    assert set(done) == {request.id for request in requests}
    for request in requests:
        check(model, request, done[request.id], request.id in aborted)
    assert engine.active == engine.waiting == engine.kv_blocks[0] == 0
    assert aborted
    assert engine.stats.reused_tokens > 0
    if setting.kv_blocks is not None:
        assert engine.stats.preemptions > 0
    if setting.drafts:
        assert engine.stats.drafted > 0
    return engine


@pytest.mark.parametrize("name", SETTINGS)
def test_every_request_gets_what_full_recomputation_gives(model: GlmMoe, name: str) -> None:
    prove(model, SETTINGS[name], 60, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_five_hundred_requests_get_what_full_recomputation_gives(model: GlmMoe, name: str) -> None:
    prove(model, SETTINGS[name], 500, seed=6)


def test_drafts_are_the_same_whether_blocks_were_shared_or_computed(model: GlmMoe) -> None:
    """The MTP layer's part of a shared block is what its own past says, so acceptance does not depend on the cache."""
    rng = random.Random(8)
    prefix = [rng.randrange(512) for _ in range(50)]
    requests = [Request(str(i), [*prefix[: 30 + i], 7 * i], SamplingParams(max_tokens=20)) for i in range(12)]
    counts = []
    for at_once in (True, False):
        engine = Engine(model, max_length=LENGTH, max_slots=12, speculative=3)
        if at_once:
            engine.generate(requests)
            assert engine.stats.reused_tokens > 0
        else:
            for request in requests:
                engine.load_weights(0)
                engine.generate([request])
            assert engine.stats.reused_tokens == 0
        counts.append((engine.stats.drafted, engine.stats.accepted, engine.stats.accepted_at))
    assert counts[0] == counts[1]
