"""Step 3 of agentic data, trajectories: the teacher acts, the tools answer, a user simulator keeps it going."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from glmctl.distill.agentic.actors import Actor, Malformed
from glmctl.distill.agentic.tasks import AgentTask
from glmctl.distill.agentic.worlds import World
from glmctl.rl.environment import Message, Tool
from glmctl.rl.seeds import derive_seed

DONE = "DONE"
"""the word by which a simulated user ends the conversation"""


@dataclass
class AgentTrajectory:
    """What happened over one task."""

    task: str
    sample: int
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    enable_thinking: bool = True
    verdict: float | None = None
    """the environment's, where it has one"""
    problem: str = ""
    """why it broke off; "" when the teacher came to an answer"""
    votes: dict[str, str] = field(default_factory=dict)
    """judge -> "" when it passes, else its reason"""

    @property
    def finished(self) -> bool:
        """It broke off, or the judges have voted."""
        return bool(self.problem or self.votes)

    @property
    def kept(self) -> bool:
        """It ended in an answer and every judge passed it."""
        return not self.problem and bool(self.votes) and not any(self.votes.values())


def play(
    task: AgentTask,
    sample: int,
    world: World,
    teacher: Actor,
    user: Actor | None,
    *,
    max_calls: int,
    user_turns: int,
    thinking: bool,
    seed: int,
) -> AgentTrajectory:
    """One trajectory from the first user message to the last answer. ToolboxDied and EnvironmentProblem pass."""
    found = AgentTrajectory(task.id, sample, [{"role": "user", "content": task.prompt}], world.tools, thinking)
    for turn in range(user_turns):
        try:
            here = derive_seed(seed, "teacher", turn)
            said = _until_answer(found.messages, world, teacher, max_calls, thinking, here)
        except Malformed as error:
            found.problem = str(error)
            return found
        if said is None:
            found.problem = f"no answer after {max_calls} turns"
            return found
        found.verdict = world.answered(said)
        if turn + 1 == user_turns:
            break
        try:
            follow_up = next_message(task, found.messages, user, turn + 1, derive_seed(seed, "user", turn))
        except Malformed as error:
            found.problem = f"the user simulator: {error}"
            return found
        if follow_up is None:
            break
        found.messages.append({"role": "user", "content": follow_up})
    return found


def _until_answer(
    messages: list[Message], world: World, teacher: Actor, most: int, thinking: bool, seed: int
) -> Message | None:
    """The teacher's answer, after as many rounds of calls as it needs; None when it needs more than `most` turns."""
    for number in range(most):
        said = teacher.reply(messages, world.tools, thinking=thinking, seed=derive_seed(seed, number))
        messages.append(said)
        if not said.get("tool_calls"):
            return said
        messages += world.act(said)
    return None


def next_message(task: AgentTask, messages: Sequence[Message], user: Actor | None, turn: int, seed: int) -> str | None:
    """What the person says next, None when they are content: by the script, else by the simulator.

    Raises Malformed for a simulator that says nothing: that is neither a message nor the word that ends it.
    """
    if task.script:
        return task.script[turn].get("user") if turn < len(task.script) else None
    if user is None:
        return None
    talk = "\n\n".join(
        f"{'You' if message['role'] == 'user' else 'Assistant'}: {message['content']}"
        for message in messages
        if message["role"] in ("user", "assistant") and message.get("content")
    )
    request = (
        f"You play a person who talks to an assistant. What you want: {task.goal or task.prompt}\n\n"
        f"The conversation so far:\n{talk}\n\n"
        f"If you have all you want, answer {DONE}. Else write the person's next message: one or two sentences that ask "
        "for what is missing, or add a detail that the assistant needs. Never say that you are a simulation."
    )
    said = user.reply([{"role": "user", "content": request}], None, thinking=False, seed=seed)
    text = str(said.get("content") or "").strip()
    if not text:
        raise Malformed("an empty answer")
    return None if text.strip(" .!\"'").endswith(DONE) else text
