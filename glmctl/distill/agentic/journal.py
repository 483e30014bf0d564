"""What an agentic run writes down as it goes: trajectories when they are played, votes when they are judged."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path

from glmctl.distill.agentic.play import AgentTrajectory
from glmctl.run.metrics import MetricsLog


class Journal:
    """`trajectories.jsonl` and `votes.jsonl` of a run; any thread may write.

    Two files, for a trajectory is paid for before a judge is asked, and a judge may not answer.
    """

    def __init__(self, folder: Path) -> None:
        self._trajectories = MetricsLog(folder / "trajectories.jsonl")
        self._votes = MetricsLog(folder / "votes.jsonl")
        self._lock = threading.Lock()

    def read(self) -> dict[tuple[str, int], AgentTrajectory]:
        """All that was played, by task and sample, with the votes on what was judged too."""
        votes = {(row["task"], row["sample"]): row["votes"] for row in self._votes.rows()}
        found = {}
        for row in self._trajectories.rows():
            key = row["task"], row["sample"]
            found[key] = AgentTrajectory(**row, votes=votes.get(key, {}))
        return found

    def played(self, trajectory: AgentTrajectory) -> None:
        """Keep a trajectory that nobody has judged yet."""
        row = asdict(trajectory)
        del row["votes"]
        with self._lock:
            self._trajectories.append(row)

    def judged(self, trajectory: AgentTrajectory) -> None:
        """Keep the votes on a trajectory that was kept before."""
        with self._lock:
            self._votes.append({"task": trajectory.task, "sample": trajectory.sample, "votes": trajectory.votes})
