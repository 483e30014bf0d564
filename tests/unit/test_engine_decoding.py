"""Laws of the engine: what it generates is what the model alone would, whatever else is in the batch."""

from __future__ import annotations

import random

import pytest
import torch

from glmctl.engine.engine import Engine
from glmctl.engine.request import Completion, Request, SamplingParams
from glmctl.errors import DataError, GlmctlError
from glmctl.model.config import ModelConfig
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe

GREEDY = 0.0


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    """Random weights with a wide head, so that the best token leads clearly and rounding cannot decide."""
    model = GlmMoe(tiny_config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def random_prompt(rng: random.Random, vocab: int, longest: int = 24) -> list[int]:
    return [rng.randrange(vocab) for _ in range(rng.randint(1, longest))]


def drain(engine: Engine) -> dict[str, Completion]:
    done = {}
    while engine.has_work:
        done.update({event.id: event.completion for event in engine.step() if event.completion})
    return done


def test_cached_and_uncached_generation_agree(model: GlmMoe) -> None:
    rng = random.Random(6)
    requests = [
        Request(str(i), random_prompt(rng, model.config.vocab_size), SamplingParams(max_tokens=10, temperature=GREEDY))
        for i in range(12)
    ]
    for request, completion in zip(requests, Engine(model, max_slots=5, max_length=64).generate(requests), strict=True):
        assert completion.tokens == generate(model, request.prompt, 10, use_cache=False)


def test_sampled_tokens_do_not_depend_on_the_batch(model: GlmMoe) -> None:
    rng = random.Random(7)
    requests = [
        Request(
            str(i),
            random_prompt(rng, model.config.vocab_size),
            SamplingParams(max_tokens=12, temperature=rng.choice([0.7, 1.0]), top_k=rng.choice([0, 20]), seed=i),
        )
        for i in range(40)
    ]
    wide = Engine(model, max_slots=40, max_length=64).generate(requests)
    narrow = Engine(model, max_slots=3, max_length=64).generate(list(reversed(requests)))[::-1]
    drafted = Engine(model, max_slots=7, max_length=64, speculative=3).generate(requests)
    for a, b, c in zip(wide, narrow, drafted, strict=True):
        assert a.tokens == b.tokens == c.tokens


def test_equal_prompts_with_different_seeds_differ_and_with_equal_seeds_agree(model: GlmMoe) -> None:
    prompt = list(range(33))
    engine = Engine(model, max_slots=8, max_length=64)
    made = engine.generate([Request(str(i), prompt, SamplingParams(max_tokens=16, seed=i % 4)) for i in range(8)])
    # two whole blocks are shared; the newest token's logits are each request's own
    assert engine.stats.prompt_tokens == 33 + 7
    assert engine.stats.reused_tokens == 7 * 32
    tokens = [completion.tokens for completion in made]
    assert tokens[:4] == tokens[4:]
    assert len({tuple(each) for each in tokens[:4]}) == 4


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_the_recomputed_log_softmax(model: GlmMoe, temperature: float) -> None:
    rng = random.Random(8)
    requests = [
        Request(
            str(i),
            random_prompt(rng, model.config.vocab_size),
            SamplingParams(max_tokens=9, temperature=temperature, top_p=0.9, seed=i, logprobs=True),
        )
        for i in range(10)
    ]
    for speculative in (0, 1):
        engine = Engine(model, max_slots=4, max_length=64, speculative=speculative)
        for completion in engine.generate(requests):
            whole = torch.tensor([completion.prompt + completion.tokens])
            logits = model.logits(model(whole))[0, len(completion.prompt) - 1 : -1] / (temperature or 1.0)
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
            # cached against whole-sequence attention: fp32 rounding over a few layers
            assert torch.allclose(torch.tensor(completion.logprobs), wanted, atol=2e-4)


@pytest.mark.parametrize("sharpen", [1.0, 8.0], ids=["flat", "sharp"])
def test_drafting_changes_no_greedy_token(tiny_config: ModelConfig, sharpen: float) -> None:
    model = GlmMoe(tiny_config, seed=11)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpen)
    rng = random.Random(9)
    requests = [
        Request(
            str(i), random_prompt(rng, tiny_config.vocab_size, 16), SamplingParams(max_tokens=16, temperature=GREEDY)
        )
        for i in range(60)
    ]
    plain = Engine(model, max_slots=32, max_length=48).generate(requests)
    for slots, drafts in ((1, 1), (8, 2), (50, 3)):
        engine = Engine(model, max_slots=slots, max_length=48, speculative=drafts)
        some = requests if slots > 1 else requests[:20]
        for a, b in zip(plain, engine.generate(some), strict=False):
            assert a.tokens == b.tokens
        assert engine.stats.drafted > 0
        assert engine.stats.tokens == 16 * len(some)


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_right_drafts_are_accepted_and_save_steps(tiny_config: ModelConfig, drafts: int) -> None:
    """A model whose every hidden state is its token's embedding, twice: the MTP layer can then predict perfectly."""
    model = GlmMoe(tiny_config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                parameter.zero_()
        # the next token is a fixed function of this one, f = argmax(head . norm(embed)); MTP sees Emb(t_{i+1})
        assert model.mtp is not None
        model.mtp.eh_proj.weight.zero_()
        model.mtp.eh_proj.weight[:, : tiny_config.hidden_size] = torch.eye(tiny_config.hidden_size)
    params = SamplingParams(max_tokens=32, temperature=GREEDY)
    requests = [Request(str(i), [i + 1, i + 2], params) for i in range(8)]
    plain, drafting = (Engine(model, max_slots=8, max_length=64, speculative=s) for s in (0, drafts))
    a, b = plain.generate(requests), drafting.generate(requests)
    assert [c.tokens for c in a] == [c.tokens for c in b]
    assert drafting.stats.acceptance == 1.0
    assert plain.stats.steps == 32
    # the first token comes with the prompt, then each step gives one and its drafts
    assert drafting.stats.steps == 1 + -(-31 // (1 + drafts))
    assert drafting.stats.acceptance_length == pytest.approx(1 + drafts, abs=0.2)
    assert sum(drafting.stats.accepted_at) == drafting.stats.accepted


def test_every_token_names_the_weights_that_made_it(model: GlmMoe, tiny_config: ModelConfig) -> None:
    served = GlmMoe(tiny_config, seed=1)
    engine = Engine(served, max_slots=2, max_length=64)
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=8, temperature=GREEDY)))
    engine.step()
    engine.load_weights(7, model)
    done = drain(engine)["a"]
    assert done.weight_version == [0] + [7] * 7
    assert torch.equal(served.norm.weight, model.norm.weight)
    fresh = engine.generate([Request("b", [1, 2, 3], SamplingParams(max_tokens=8, temperature=GREEDY))])[0]
    assert fresh.tokens == generate(model, [1, 2, 3], 8)
    engine.load_weights(8)
    assert engine.version == 8


def test_generation_leaves_the_training_model_trainable(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=2)
    engine = Engine(model, max_slots=4, max_length=64, speculative=1)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.logits(model(torch.tensor([[1, 2, 3, 4]]))).logsumexp(-1).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    engine.generate([Request(str(i), [1, 2, 3], SamplingParams(max_tokens=5, seed=i)) for i in range(6)])
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_the_context_bounds_what_is_generated(model: GlmMoe) -> None:
    for speculative in (0, 1):
        engine = Engine(model, max_slots=2, max_length=12, speculative=speculative)
        made = engine.generate([Request("a", [1] * 7, SamplingParams(max_tokens=100, temperature=GREEDY))])[0]
        assert len(made.tokens) == 5
        assert made.finish_reason == "length"


def test_stop_tokens_end_a_request_unless_ignored(model: GlmMoe) -> None:
    first = generate(model, [4, 4, 4], 1)[0]
    engine = Engine(model, max_slots=2, max_length=64)
    stop = SamplingParams(max_tokens=6, temperature=GREEDY, stop_token_ids=(first,))
    ignore = SamplingParams(max_tokens=6, temperature=GREEDY, stop_token_ids=(first,), ignore_eos=True)
    a, b = engine.generate([Request("a", [4, 4, 4], stop), Request("b", [4, 4, 4], ignore)])
    assert (a.tokens, a.finish_reason) == ([first], "stop")
    assert (len(b.tokens), b.finish_reason) == (6, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([1] * 64, "64 tokens"), ([512], "512"), ([-1], "-1")],
    ids=["empty", "long", "beyond", "negative"],
)
def test_bad_prompts_are_refused_before_any_work(model: GlmMoe, prompt: list[int], message: str) -> None:
    engine = Engine(model, max_slots=2, max_length=64)
    with pytest.raises(GlmctlError, match=message):
        engine.add(Request("x", prompt))
    assert not engine.has_work


def test_a_name_in_flight_is_refused_and_free_again_afterwards(model: GlmMoe) -> None:
    engine = Engine(model, max_slots=2, max_length=64)
    request = Request("x", [1], SamplingParams(max_tokens=2))
    engine.add(request)
    with pytest.raises(GlmctlError, match="already"):
        engine.add(request)
    drain(engine)
    engine.add(request)
    assert engine.abort("x") is not None
    assert engine.abort("x") is None


def test_damaged_weights_are_reported_not_sampled(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=2)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="finite"):
        Engine(model, max_slots=2, max_length=64).generate([Request("x", [1], SamplingParams(max_tokens=2))])


def test_drafts_need_an_mtp_layer(tiny_config: ModelConfig) -> None:
    without = GlmMoe(tiny_config.model_copy(update={"num_nextn_predict_layers": 0}), seed=1)
    with pytest.raises(GlmctlError, match="MTP"):
        Engine(without, speculative=1)
    with pytest.raises(GlmctlError, match="speculative: 4"):
        Engine(without, speculative=4)


def test_top_logprobs_travel_with_the_events(model: GlmMoe) -> None:
    for speculative in (0, 1):
        engine = Engine(model, max_slots=2, max_length=64, speculative=speculative)
        engine.add(
            Request("a", [9, 8], SamplingParams(max_tokens=4, temperature=GREEDY, logprobs=True, top_logprobs=2))
        )
        engine.add(Request("b", [9, 8], SamplingParams(max_tokens=4, temperature=GREEDY)))
        events = []
        while engine.has_work:
            events += engine.step()
        for event in events:
            if event.id == "b":
                assert event.top_logprobs is event.logprob is None
                continue
            assert event.top_logprobs is not None
            assert len(event.top_logprobs) == 2
            assert event.top_logprobs[0][0] == event.token
            assert event.top_logprobs[0][1] == pytest.approx(event.logprob, abs=1e-6)


def test_memory_that_cannot_hold_one_request_is_refused(model: GlmMoe) -> None:
    with pytest.raises(GlmctlError, match="kv_blocks: 3 given; one request of 64 tokens needs 4"):
        Engine(model, max_length=64, kv_blocks=3)
    assert Engine(model, max_length=64, kv_blocks=4).kv_blocks == (0, 4)


def test_prompt_logprobs_are_the_recomputed_log_softmax_also_after_a_preemption(model: GlmMoe) -> None:
    rng = random.Random(12)
    requests = [
        Request(str(i), [rng.randrange(512) for _ in range(length)], SamplingParams(max_tokens=20, prompt_logprobs=2))
        for i, length in enumerate((1, 2, 17, 40, 40))
    ]
    engine = Engine(model, max_length=64, kv_blocks=6, prefill_tokens=13)
    for completion in engine.generate(requests):
        n = len(completion.prompt)
        wanted = model.logits(model(torch.tensor([completion.prompt])))[0].log_softmax(-1)
        got = completion.prompt_logprobs
        assert got is not None
        assert len(got) == n - 1
        for place, each in enumerate(got):
            assert each.logprob == pytest.approx(wanted[place, completion.prompt[place + 1]].item(), abs=2e-4)
            assert [token for token, _ in each.top] == wanted[place].topk(2).indices.tolist()
    assert engine.stats.preemptions > 0


def text_of(token: int) -> bytes:
    return bytes([97 + token % 26])


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_stop_string_ends_a_request_across_token_borders(model: GlmMoe, drafts: int) -> None:
    prompt = [3, 1, 4]
    tokens = generate(model, prompt, 20)
    text = b"".join(map(text_of, tokens)).decode()
    engine = Engine(model, max_length=64, token_bytes=text_of, speculative=drafts)
    for start, end in ((0, 1), (2, 5), (7, 11), (18, 20)):
        stop = text[start:end]
        params = SamplingParams(max_tokens=20, temperature=GREEDY, stop=("never!", stop))
        (made,) = engine.generate([Request("x", prompt, params)])
        assert len(made.tokens) == text.index(stop) + len(stop)
        assert (made.finish_reason, made.matched_stop) == ("stop", stop)
    params = SamplingParams(max_tokens=20, temperature=GREEDY, stop=(text[:1],), min_tokens=len(text))
    assert len(engine.generate([Request("x", prompt, params)])[0].tokens) == 20
    with pytest.raises(GlmctlError, match="token_bytes"):
        Engine(model, max_length=64).add(Request("x", prompt, params))


@pytest.mark.parametrize("drafts", [0, 2])
def test_stop_tokens_wait_for_min_tokens(model: GlmMoe, drafts: int) -> None:
    prompt = [4, 4, 4]
    engine = Engine(model, max_length=64, speculative=drafts)
    every = tuple(range(0, 512, 2))
    params = SamplingParams(max_tokens=30, min_tokens=6, temperature=GREEDY, stop_token_ids=every)
    made = engine.generate([Request("x", prompt, params)])[0]
    assert all(token % 2 for token in made.tokens[:6])
    assert len(made.tokens) >= 6
    if made.finish_reason == "stop":
        assert made.matched_stop == made.tokens[-1]


class Alternate:
    """A grammar of two states: even tokens, then odd ones, and so on; counts what was asked of it."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> torch.Tensor:
        return torch.arange(512) % 2 == len(self.taken) % 2

    def accept(self, token: int) -> None:
        assert self.mask()[token], "the engine accepted what the mask forbids"
        self.taken.append(token)

    def rollback(self, count: int) -> None:
        assert 0 <= count <= len(self.taken)
        self.taken = self.taken[: len(self.taken) - count]

    def fresh(self) -> Alternate:
        return Alternate()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_holds_with_and_without_drafts_and_through_preemption(model: GlmMoe, temperature: float) -> None:
    shared = Alternate()
    requests = [
        Request(str(i), [i, i + 1], SamplingParams(max_tokens=25, temperature=temperature, seed=i), shared)
        for i in range(6)
    ]
    outputs = []
    for drafts, blocks in ((0, 24), (3, 24), (2, 5)):
        engine = Engine(model, max_length=64, speculative=drafts, kv_blocks=blocks)
        made = engine.generate(requests)
        assert all(token % 2 == place % 2 for each in made for place, token in enumerate(each.tokens))
        outputs.append([each.tokens for each in made])
    assert engine.stats.preemptions > 0
    assert outputs[0] == outputs[1] == outputs[2]
    assert shared.taken == []


def test_penalties_see_drafts_as_tokens(model: GlmMoe) -> None:
    params = [
        SamplingParams(max_tokens=30, temperature=GREEDY, repetition_penalty=1.3),
        SamplingParams(max_tokens=30, temperature=GREEDY, frequency_penalty=1.5, presence_penalty=0.5),
        SamplingParams(max_tokens=30, temperature=0.8, presence_penalty=2.0, logit_bias={7: 4.0, 9: -100}, seed=3),
    ]
    requests = [Request(str(i), [1, 2, 3 + i], each) for i, each in enumerate(params)]
    plain, drafted = (Engine(model, max_length=64, speculative=s).generate(requests) for s in (0, 3))
    assert [each.tokens for each in plain] == [each.tokens for each in drafted]
    assert 9 not in plain[2].tokens
    free = Engine(model, max_length=64).generate([Request("x", [1, 2, 3], SamplingParams(temperature=GREEDY))])[0]
    assert plain[0].tokens != free.tokens[:30]


def test_a_step_that_fails_leaves_nothing_to_share(tiny_config: ModelConfig) -> None:
    model = GlmMoe(tiny_config, seed=4)
    engine = Engine(model, max_length=64)
    prompt = list(range(40))
    weight = model.norm.weight.detach().clone()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    engine.add(Request("bad", prompt, SamplingParams(temperature=GREEDY, max_tokens=3)))
    with pytest.raises(DataError):
        engine.step()
    engine.abort("bad")
    with torch.no_grad():
        model.norm.weight.copy_(weight)
    made = engine.generate([Request("good", prompt, SamplingParams(temperature=GREEDY, max_tokens=3))])[0]
    assert engine.stats.reused_tokens == 0
    assert made.tokens == generate(model, prompt, 3)
