"""Step 4 of agentic data, judging: several judges, and only what all of them call completed is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from glmctl.distill.agentic.actors import Actor, Malformed
from glmctl.distill.agentic.play import AgentTrajectory
from glmctl.distill.agentic.tasks import AgentTask
from glmctl.rl.environment import tool_calls
from glmctl.rl.tasks.function_calls import call_problem

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def by_rules(task: AgentTask, found: AgentTrajectory) -> str:
    """ "" when every call obeys the protocol and all that the task expects is there, else what is amiss."""
    calls = [call for message in found.messages for call in tool_calls(message)]
    for call in calls:
        problem = call_problem(call, found.tools)
        if problem:
            return problem
    if found.verdict is not None and found.verdict < 1.0:
        return f"the environment's verdict is {found.verdict:g}"
    made = [call["name"] for call in calls]
    missing = [name for name in task.expect.get("calls", []) if name not in made]
    if missing:
        return f"{missing[0]} was never called"
    wanted, last = task.expect.get("answer"), str(found.messages[-1].get("content") or "")
    if wanted is not None and str(wanted) not in last:
        return f"the answer does not hold {str(wanted)!r}"
    return ""


def by_model(task: AgentTask, found: AgentTrajectory, judge: Actor, focus: str, seed: int) -> str:
    """ "" when the judge says that the task was completed, else its words. A reply without a verdict is a no."""
    shown = "\n".join(_line(message) for message in found.messages)
    request = (
        "Judge whether an assistant completed a task with its tools. It is completed only if the final answer is "
        "right and complete, every claim in it is supported by what the tools returned, and nothing that was asked "
        f"for is missing.{' ' + focus if focus else ''}\n\n"
        f"The person wants: {task.goal or task.prompt}\n\nWhat happened:\n{shown}\n\n"
        "Give your reason in one sentence, then on a line of its own yes if the task was completed, else no."
    )
    try:
        said = judge.reply([{"role": "user", "content": request}], None, thinking=False, seed=seed)
    except Malformed as error:
        return f"the judge lost the format: {error}"
    text = str(said.get("content") or "").strip()
    verdicts = _VERDICT.findall(text)
    return "" if verdicts and verdicts[-1].lower() == "yes" else text or "the judge said nothing"


def _line(message: dict[str, object]) -> str:
    calls = tool_calls(message)
    if calls:
        return "\n".join(f"assistant calls {c['name']} {json.dumps(c['arguments'], ensure_ascii=False)}" for c in calls)
    return f"{message['role']}: {message['content']}"


def rejections(found: Sequence[AgentTrajectory]) -> dict[str, dict[str, object]]:
    """Why trajectories were not kept: for every cause its count and one example."""
    causes: dict[str, dict[str, object]] = {}
    for one in found:
        if one.kept:
            continue
        cause, why = ("broken off", one.problem) if one.problem else next((k, v) for k, v in one.votes.items() if v)
        example = {"task": one.task, "why": why, "messages": one.messages}
        entry = causes.setdefault(cause, {"count": 0, "example": example})
        entry["count"] = int(str(entry["count"])) + 1
    return causes
