"""One RL update: how trajectories become gradients, and the invariants that stop a run."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import GrpoSpec, GspoSpec, OverlongPenalty
from glmctl.rl import invariants, learn
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.invariants import Ledger, check_versions
from glmctl.rl.learn import update, weigh
from glmctl.rl.pack import pack


class Recorder:
    """The Stepper's two halves, keeping the gradient instead of applying it."""

    def __init__(self, model: GlmMoe, bias_moves: bool = False) -> None:
        self.model = model
        self.bias_moves = bias_moves
        self.gradients: dict[str, torch.Tensor] = {}

    def accumulate(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        named = self.model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        if self.bias_moves:
            self.model.routers()[0].e_score_correction_bias.add_(1e-3)
        return 1.0


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    return GlmMoe(tiny_config, seed=0)


def trajectory(model: GlmMoe, seed: int, group: int, reward: float | None, turns: int = 1) -> Trajectory:
    """Random tokens in one or more model turns, with the log-probs that the network gives them."""
    rng = random.Random(seed)
    tokens, mask = [], []
    for _ in range(turns):
        for made, length in ((0, rng.randint(3, 8)), (1, rng.randint(1, 9))):
            tokens += [rng.randrange(500) for _ in range(length)]
            mask += [made] * length
    with torch.no_grad():
        logp = torch.log_softmax(model.logits(model(torch.tensor([tokens]))[0]), -1)
    logprobs = [float(logp[i - 1, tokens[i]]) if mask[i] else 0.0 for i in range(len(tokens))]
    stop = StopReason.INFRASTRUCTURE if reward is None else StopReason.ANSWERED
    return Trajectory(
        f"p{group}", "t", group, seed, tokens=tokens, loss_mask=mask, logprobs=logprobs, reward=reward, stop_reason=stop
    )


@pytest.fixture
def groups(model: GlmMoe) -> list[list[Trajectory]]:
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, None, 0.0]]
    return [
        [trajectory(model, 10 * g + i, g, reward, turns=1 + i % 3) for i, reward in enumerate(group)]
        for g, group in enumerate(rewards)
    ]


def gradients(model: GlmMoe, groups, spec: GrpoSpec | None = None, micro_tokens: int | None = None, **changes):
    spec = spec or GrpoSpec()
    recorder = Recorder(model)
    settings = {"lr": 1e-3, "temperature": 1.0, "mtp_weight": 0.0} | changes
    stats = update(model, recorder, pack(weigh(groups, spec, max_tokens=64), micro_tokens), spec, **settings)
    return recorder.gradients, stats


def assert_same(left: dict, right: dict, atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], atol=atol), name


def test_packing_loses_no_token_and_crosses_no_trajectory(groups) -> None:
    weighted = weigh(groups, GrpoSpec(), max_tokens=64)
    for micro_tokens in (None, 1, 70):
        batches = pack(weighted, micro_tokens)
        assert sum(len(b.target_N) for b in batches) == sum(w.trajectory.generated_tokens for w in weighted)
        found = []
        for batch in batches:
            tokens, documents = batch.tokens_BT.flatten(), batch.documents_BT.flatten()
            assert torch.equal(tokens[batch.at_N + 1], batch.target_N)
            assert torch.equal(documents[batch.at_N + 1], documents[batch.at_N])
            assert torch.equal(tokens[batch.mtp_at_M + 2], batch.mtp_target_M)
            assert torch.equal(documents[batch.mtp_at_M + 2], documents[batch.mtp_at_M])
            assert torch.equal(batch.next_tokens_BT.flatten()[batch.mtp_at_M], tokens[batch.mtp_at_M + 1])
            for row in range(len(batch.tokens_BT)):
                for document in range(int(batch.documents_BT[row].max()) + 1):
                    here = batch.documents_BT[row] == document
                    found.append(tuple(batch.tokens_BT[row][here].tolist()))
                    assert batch.positions_BT[row][here].tolist() == list(range(int(here.sum())))
        assert sorted(found) == sorted(tuple(w.trajectory.tokens) for w in weighted)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(model, groups, aggregation) -> None:
    spec = GrpoSpec(aggregation=aggregation)
    whole, stats = gradients(model, groups, spec)
    for micro_tokens in (1, 60):
        cut, cut_stats = gradients(model, groups, spec, micro_tokens)
        assert_same(whole, cut)
        assert cut_stats.loss == pytest.approx(stats.loss, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_gradient_is_the_formula_written_out(model, groups, aggregation) -> None:
    """Against an unpacked, unchunked computation: sum over trajectories of -A mean(log p), weighted as documented."""
    model.zero_grad(set_to_none=True)
    valid = [[t for t in group if t.reward is not None] for group in groups]
    total = sum(t.generated_tokens for group in valid for t in group)
    count = sum(len(group) for group in valid)
    loss = torch.zeros(())
    for group in valid:
        rewards = torch.tensor([t.reward for t in group])
        for one, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
            logp = torch.log_softmax(model.logits(model(torch.tensor([one.tokens]))[0]), -1)
            terms = [-advantage * logp[i - 1, one.tokens[i]] for i in range(len(one.tokens)) if one.loss_mask[i]]
            weight = 1 / total if aggregation == "token" else 1 / (count * len(terms))
            loss = loss + weight * torch.stack(terms).sum()
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    found, stats = gradients(model, groups, GrpoSpec(aggregation=aggregation))
    assert_same(found, expected)
    assert stats.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert stats.clip_fraction == 0.0
    assert stats.logprob_gap < 1e-5


def test_groups_of_equal_rewards_have_no_gradient(model) -> None:
    same = [[trajectory(model, i, 0, 1.0) for i in range(4)], [trajectory(model, 9 + i, 1, 0.0) for i in range(4)]]
    found, stats = gradients(model, same)
    assert stats.loss == 0.0
    assert all(not gradient.any() for gradient in found.values())


def test_infrastructure_failures_leave_no_trace_in_the_gradient(model, groups) -> None:
    without = [[t for t in group if t.reward is not None] for group in groups]
    assert sum(map(len, without)) == sum(map(len, groups)) - 1
    assert_same(gradients(model, groups)[0], gradients(model, without)[0], atol=0)


def test_tokens_of_prompts_and_tools_carry_no_loss(model, groups) -> None:
    """A trajectory's weighted tokens are those of its mask: moving the mask moves the gradient, rewards do not."""
    weighted = weigh(groups, GrpoSpec(), max_tokens=64)
    (batch,) = pack(weighted, None)
    masked = [t for w in weighted for t, m in zip(w.trajectory.tokens, w.trajectory.loss_mask, strict=True) if m]
    assert sorted(batch.target_N.tolist()) == sorted(masked)
    assert float(batch.weight_N.sum()) == pytest.approx(1.0)


def test_mtp_gradient_stays_in_the_mtp_layer(model, groups) -> None:
    plain, _ = gradients(model, groups)
    with_mtp, _ = gradients(model, groups, mtp_weight=0.3)
    own = {name for name in with_mtp if name.startswith("mtp.")}
    assert own
    assert not any(name.startswith("mtp.") for name in plain)
    assert any(with_mtp[name].abs().max() > 1e-6 for name in own)
    assert_same(plain, {name: value for name, value in with_mtp.items() if name not in own}, atol=0)


def test_a_ratio_off_one_on_fresh_rollouts_stops_the_run(model, groups) -> None:
    groups[0][0].logprobs = [
        lp - 0.1 if m else 0.0 for lp, m in zip(groups[0][0].logprobs, groups[0][0].loss_mask, strict=True)
    ]
    with pytest.raises(invariants.LogprobMismatch):
        gradients(model, groups)
    model.zero_grad(set_to_none=True)
    # later updates of the same batch are off-policy by design
    old = gradients(model, groups, spec=GrpoSpec(logprob_gap_limit=1.0))[1].logp
    assert gradients(model, groups, old=old)[1].logprob_gap > 1e-3


def test_a_moving_router_bias_stops_the_run(model, groups) -> None:
    copy = GlmMoe(model.config, seed=0)
    batches = pack(weigh(groups, GrpoSpec(), max_tokens=64), None)
    with pytest.raises(invariants.RouterBiasMoved):
        update(
            copy,
            Recorder(copy, bias_moves=True),
            batches,
            GrpoSpec(),
            lr=1.0,
            temperature=1.0,
            mtp_weight=0.0,
        )


def test_rollouts_of_other_weights_stop_the_run(groups) -> None:
    one = dataclasses.replace(groups[0][0], versions=[4, 4])
    check_versions([one], 4)
    with pytest.raises(invariants.StaleRollout):
        check_versions([one, dataclasses.replace(one, versions=[4, 3])], 4)


def test_advantages_that_do_not_cancel_stop_the_run(groups, monkeypatch) -> None:
    monkeypatch.setattr(learn, "group_advantages", lambda rewards, std_normalize: [1.0] * len(rewards))
    with pytest.raises(invariants.AdvantageNotCentred):
        weigh(groups, GrpoSpec(), max_tokens=64)


# --------------------------------------------------------------------------- what recipes can switch on


def off_policy(groups, shift: float = 0.2) -> list[list[Trajectory]]:
    """The groups with behaviour log-probs moved, token by token, up and down."""
    moved = []
    for group in groups:
        moved.append([])
        for one in group:
            steps = [shift * (1 if i % 3 else -1.5) if m else 0.0 for i, m in enumerate(one.loss_mask)]
            logprobs = [lp - s for lp, s in zip(one.logprobs, steps, strict=True)]
            moved[-1].append(dataclasses.replace(one, logprobs=logprobs))
    return moved


WIDE = {"logprob_gap_limit": 10.0}


def test_gspo_has_one_ratio_a_trajectory_written_out(model, groups) -> None:
    """Against s_i = exp(mean of log-ratios), unpacked, with clipping on the trajectory (arXiv 2507.18071, eq. 5-7)."""
    spec = GspoSpec(clip_low=0.05, clip_high=0.05, **WIDE)
    batch = off_policy(groups)
    found, stats = gradients(model, batch, spec, micro_tokens=60)
    valid = [[t for t in group if t.reward is not None] for group in batch]
    count = sum(len(group) for group in valid)
    loss, ratios, clipped = torch.zeros(()), 0.0, 0
    for group in valid:
        rewards = torch.tensor([t.reward for t in group])
        for one, advantage in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6), strict=True):
            logp = torch.log_softmax(model.logits(model(torch.tensor([one.tokens]))[0]), -1)
            made = [i for i, m in enumerate(one.loss_mask) if m]
            new = torch.stack([logp[i - 1, one.tokens[i]] for i in made])
            ratio = (new - torch.tensor([one.logprobs[i] for i in made])).mean().exp()
            clip = ratio.clamp(0.95, 1.05)
            loss = loss - torch.minimum(ratio * advantage, clip * advantage) / count
            ratios += float(ratio.detach()) * len(made)
            clipped += len(made) * bool(clip * advantage < ratio * advantage)
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert_same(found, expected)
    total = sum(t.generated_tokens for group in valid for t in group)
    assert 0 < clipped < total
    assert stats.clip_fraction == clipped / total
    assert stats.ratio_mean == pytest.approx(ratios / total, rel=1e-5)


def test_importance_weights_are_truncated_and_carry_no_gradient(model, groups) -> None:
    """With the correction the gradient is the on-policy one, each token times min(pi_old / pi_engine, cap)."""
    batch, cap = off_policy(groups), 1.1
    weighted = weigh(batch, GrpoSpec(), max_tokens=64)
    (packed,) = pack(weighted, None)
    found, stats = gradients(model, batch, GrpoSpec(importance_cap=cap, **WIDE))
    logp = stats.logp[0]
    weights = torch.exp(logp - packed.behaviour_logp_N).clamp(max=cap)
    assert weights.max() == cap
    assert weights.min() < 1.0
    hidden = model(packed.tokens_BT, positions_BT=packed.positions_BT, documents_BT=packed.documents_BT)
    new = learn.token_log_probs(hidden.flatten(0, 1)[packed.at_N], model.head_weight, packed.target_N)
    (-(packed.weight_N * packed.advantage_N * weights) * new).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert_same(found, expected)
    assert stats.importance_mean == pytest.approx(float(weights.mean()), rel=1e-5)
    assert stats.ratio_mean == pytest.approx(1.0, abs=1e-5)


def test_kl_is_zero_against_the_start_and_pulls_back_to_it(model, groups) -> None:
    spec = GrpoSpec(kl_weight=0.5)
    same, stats = gradients(model, groups, spec, reference=model, reference_is_start=True)
    assert abs(stats.kl) < 1e-6
    assert_same(same, gradients(model, groups)[0], atol=1e-6)  # at the reference the KL has no gradient
    other = GlmMoe(model.config, seed=1)
    with pytest.raises(invariants.FirstStepKl):
        gradients(model, groups, spec, reference=other, reference_is_start=True)
    model.zero_grad(set_to_none=True)
    _, stats = gradients(model, groups, spec, reference=other)
    assert stats.kl > 0.01


def test_truncated_samples_are_masked_only_when_asked(model, groups) -> None:
    groups[0][1] = dataclasses.replace(groups[0][1], stop_reason=StopReason.TRUNCATED)
    without = [[t for t in group if t.stop_reason is not StopReason.TRUNCATED] for group in groups]
    assert len(weigh(groups, GrpoSpec(), max_tokens=64)) == 7
    assert_same(
        gradients(model, groups, GrpoSpec(mask_truncated=True))[0],
        gradients(model, without, GrpoSpec(mask_truncated=True))[0],
        atol=0,
    )


def test_the_overlong_penalty_is_of_the_longest_turn_and_part_of_the_advantage() -> None:
    """max_tokens 10, cache 4: free up to 6 tokens, -0.25 for each more."""
    mask = [0, *[1] * 3, 0, *[1] * 8, 0, *[1] * 2]
    one = Trajectory("p", "t", 0, 0, loss_mask=mask, tokens=[1] * 16, reward=1.0, stop_reason=StopReason.ANSWERED)
    two = dataclasses.replace(one, loss_mask=[0, *[1] * 6], tokens=[1] * 7, sample=1)
    spec = GrpoSpec(overlong=OverlongPenalty(cache_tokens=4), std_normalize=False)
    assert learn.shaped_reward(one, spec, 10) == 0.5
    assert learn.shaped_reward(two, spec, 10) == 1.0
    assert [w.advantage for w in weigh([[one, two]], spec, max_tokens=10)] == [-0.25, 0.25]


def test_old_tokens_are_not_held_to_ratio_one(groups, model) -> None:
    """Carried over from older weights, their ratio may be anything; the fresh ones are still checked."""
    stale = [[dataclasses.replace(t, versions=[3]) for t in g] for g in off_policy(groups[:1])]
    fresh = [[dataclasses.replace(t, versions=[4]) for t in g] for g in groups[1:]]
    weighted = weigh([*stale, *fresh], GrpoSpec(), max_tokens=64, version=4)
    assert {w.fresh for w in weighted} == {True, False}
    settings = {"lr": 1e-3, "temperature": 1.0, "mtp_weight": 0.0}
    stats = update(model, Recorder(model), pack(weighted, None), GrpoSpec(), **settings)
    assert stats.logprob_gap < 1e-5
    assert abs(stats.ratio_mean - 1) > 1e-2
    check_versions([*stale[0], *fresh[0]], 4, max_staleness=1)
    with pytest.raises(invariants.StaleRollout):
        check_versions(stale[0], 5, max_staleness=1)
    with pytest.raises(invariants.StaleRollout):
        check_versions(fresh[0], 3, max_staleness=9)  # from the future


def test_nothing_is_trained_twice_in_two_steps(groups) -> None:
    ledger = Ledger(memory=2)
    ledger.enter(groups[0], 1)
    ledger.enter([dataclasses.replace(t, born=2) for t in groups[0]], 2)
    with pytest.raises(invariants.TrainedTwice, match=r"^TrainedTwice: .* trained in step 1 and again in step 3"):
        ledger.enter(groups[0], 3)
    # a resumed run remembers
    resumed = Ledger(memory=2)
    resumed.load_state(json.loads(json.dumps(ledger.state())))
    with pytest.raises(invariants.TrainedTwice, match="trained in step 1 and again in step 3"):
        resumed.enter(groups[0], 3)


def test_every_broken_invariant_names_itself_and_exits_with_5() -> None:
    kinds = [v for v in vars(invariants).values() if isinstance(v, type) and issubclass(v, invariants.InvariantBroken)]
    assert len(kinds) == 8
    for kind in kinds:
        assert kind("x").message == f"{kind.__name__}: x"
        assert kind("x").exit_code == 5
