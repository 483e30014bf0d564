"""What an RL run writes down besides its metrics: trajectories for machines, samples for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmctl.data.chat import ChatTemplate
from glmctl.rl.episode import Trajectory
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
        self.heldout = 0.0
        """the latest held-out accuracy"""

    def truncate(self, done: int) -> None:
        """Drop trajectories after step `done`, which was not in the checkpoint that is resumed.

        The session has done so for metrics and samples.
        """
        self._trajectories.truncate("step", done)
        self.heldout = next((row["heldout"] for row in reversed(self._metrics.rows()) if "heldout" in row), 0.0)

    def evaluated(self, step: int, score: Score) -> None:
        """A score without a training step: the one before the first."""
        self._metrics.append({"step": step, **self._score(step, score)})

    def stepped(
        self, step: int, row: Mapping[str, Any], trajectories: Sequence[Trajectory], score: Score | None
    ) -> None:
        """One training step, with the score after it if there is one; the first and every tenth with rollouts."""
        held = self._score(step, score) if score is not None else {}
        self._metrics.append({"step": step, **row, **held})
        if step == 1 or step % EVERY_STEPS == 0:
            for one in trajectories[:TRAJECTORIES]:
                self._trajectories.append({"step": step, **one.to_row()})

    def _score(self, step: int, score: Score) -> dict[str, Any]:
        for one in score.samples[:SAMPLES]:
            self._samples.append({"step": step, **sample_row(one, self._template)})
        self.heldout = score.accuracy
        return {
            "heldout": score.accuracy,
            "heldout_by_task": score.by_task,
            "heldout_well_formed": score.well_formed,
            "heldout_tokens": score.mean_tokens,
        }


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
