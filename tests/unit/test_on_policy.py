"""On-policy distillation: the update is the gradient of the reverse KL, the grades are the teacher's own log-probs."""

from __future__ import annotations

import torch

from glmctl.distill.on_policy import grade, update
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.rl.episode import Trajectory
from glmctl.rl.pack import Weighted, pack

PROMPT = [5, 6, 7]


class Recorder:
    """The Stepper's two halves, which keep the gradient."""

    def accumulate(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        return 0.0


def logp(model: GlmMoe, tokens: list[int]) -> torch.Tensor:
    """Log-probs of every next token behind each place [T, V]."""
    return torch.log_softmax(model.logits(model(torch.tensor([tokens]))[0]).double(), -1)


def trajectory(made: list[int], logprobs: list[float], sample: int = 0) -> Trajectory:
    return Trajectory(
        "p", "t", 0, sample, tokens=[*PROMPT, *made], loss_mask=[0] * len(PROMPT) + [1] * len(made),
        logprobs=[0.0] * len(PROMPT) + logprobs, reward=0.0,
    )  # fmt: skip


def test_the_expected_update_is_the_gradient_of_the_reverse_kl(tiny_config: ModelConfig) -> None:
    """Every first token that can be drawn, weighted by how often it is, against autograd on the whole divergence."""
    student, teacher = GlmMoe(tiny_config, seed=0), GlmMoe(tiny_config, seed=1)
    with torch.no_grad():
        for model in (student, teacher):
            model.head_weight.mul_(20.0)  # distributions that differ
        graded, shares = logp(teacher, PROMPT)[-1], logp(student, PROMPT)[-1].exp()
    rollouts = [
        Weighted(trajectory([token], [float(graded[token])], token), 0.0, float(shares[token]))
        for token in range(tiny_config.vocab_size)
    ]
    mean, _ = update(student, Recorder(), pack(rollouts, 512), lr=0.0)  # type: ignore[arg-type]
    ours = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    own = logp(student, PROMPT)[-1]
    kl = (own.exp() * (own - graded)).sum()
    kl.backward()
    assert float(kl.detach()) > 0.1, "the teacher has something to teach"
    assert abs(mean - float((own - graded).mean())) < 1e-3
    for name, p in student.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=2e-4 * float(p.grad.abs().max()), msg=name)


def test_grades_are_the_teachers_log_probs_of_what_the_student_wrote(tiny_config: ModelConfig) -> None:
    teacher = GlmMoe(tiny_config, seed=1)
    engine = Engine(teacher, max_slots=4, max_length=64)
    samples = [trajectory([9, 10, 11], [-1.0] * 3), trajectory([12], [-1.0], 1)]
    samples[0].loss_mask[4] = 0  # a tool's token
    for one, found in zip(samples, grade(engine, samples), strict=True):
        with torch.no_grad():
            expected = logp(teacher, one.tokens)
        for at, (token, mine) in enumerate(zip(one.tokens, one.loss_mask, strict=True)):
            wanted = float(expected[at - 1, token]) if mine else 0.0
            assert abs(found.logprobs[at] - wanted) < 1e-4
        assert one.logprobs != found.logprobs, "a copy is graded"
