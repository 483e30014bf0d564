"""What an RL run writes down besides its metrics: trajectories for machines, samples for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmctl.data.chat import ChatTemplate
from glmctl.recipe.schema import PolicySpec, Sampling
from glmctl.rl.collect import Batch
from glmctl.rl.episode import Trajectory
from glmctl.rl.learn import breakdown
from glmctl.rl.score import Score
from glmctl.run.directory import Run
from glmctl.run.metrics import MetricsLog

EVERY_STEPS = 10
"""steps between trajectories written down"""
TRAJECTORIES = 4
SAMPLES = 6
"""held-out problems whose answers are kept at each evaluation: the same ones, so that they can be compared"""


class Journal:
    """`metrics.jsonl`, `trajectories.jsonl` (whole training rollouts), `samples.jsonl` (held-out answers as text)."""

    def __init__(self, run: Run, template: ChatTemplate) -> None:
        self._metrics = run.metrics
        self._trajectories = MetricsLog(run.path / "trajectories.jsonl")
        self._samples = MetricsLog(run.samples)
        self._template = template

    def truncate(self, done: int) -> None:
        """Drop trajectories after step `done`, which was not in the checkpoint that is resumed.

        The session has done so for metrics and samples.
        """
        self._trajectories.truncate("step", done)

    def evaluated(self, step: int, score: Score, fields: Mapping[str, Any]) -> None:
        """A score without a training step: the one before the first."""
        self._metrics.append({"step": step, **fields, **self._score(step, score)})

    def stepped(
        self,
        step: int,
        row: Mapping[str, Any],
        batch: Batch,
        spec: PolicySpec,
        sampling: Sampling,
        score: Score | None,
    ) -> dict[str, Any]:
        """One training step, with the score after it if there is one; the first and every tenth with rollouts.

        Returns the row of metrics.
        """
        held = self._score(step, score) if score is not None else {}
        body = {"step": step, **row, **held}
        self._metrics.append(body)
        if step == 1 or step % EVERY_STEPS == 0:
            for one, parts in _sampled(batch, spec, sampling.max_tokens):
                reply = sample_row(one, self._template)["reply"]
                self._trajectories.append({"step": step, "reply": reply, "breakdown": parts, **one.to_row()})
        return body

    def _score(self, step: int, score: Score) -> dict[str, Any]:
        for one in score.samples[:SAMPLES]:
            self._samples.append({"step": step, **sample_row(one, self._template)})
        return {
            "heldout": score.accuracy,
            "heldout_by_task": score.by_task,
            "heldout_well_formed": score.well_formed,
            "heldout_tokens": score.mean_tokens,
        }


def _sampled(
    batch: Batch, spec: PolicySpec, max_tokens: int
) -> list[tuple[Trajectory, dict[str, float | None] | None]]:
    """A few rollouts of the batch, each with what became of its reward; None where its group was not trained on."""
    parts = {id(one): part for group in batch.groups for one, part in _with_parts(group, spec, max_tokens)}
    return [(one, parts.get(id(one))) for one in batch.ended[:TRAJECTORIES]]


def _with_parts(
    group: Sequence[Trajectory], spec: PolicySpec, max_tokens: int
) -> Iterator[tuple[Trajectory, dict[str, float | None]]]:
    return zip(group, breakdown(group, spec, max_tokens=max_tokens), strict=True)


def sample_row(trajectory: Trajectory, template: ChatTemplate) -> dict[str, Any]:
    """A trajectory for people: the question, and everything after the prompt as text, role tokens in sight."""
    start = trajectory.loss_mask.index(1) if 1 in trajectory.loss_mask else len(trajectory.tokens)
    question = next((m["content"] for m in trajectory.messages if m["role"] == "user"), "")
    return {
        "task": trajectory.task,
        "prompt": question,
        "reply": template.tokenizer.decode(trajectory.tokens[start:]).removesuffix("<|user|>").strip(),
        "reward": trajectory.reward,
        "stop_reason": trajectory.stop_reason,
    }
