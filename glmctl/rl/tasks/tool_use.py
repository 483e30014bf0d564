"""Questions about a few shops whose books only the tools can read.

Three kinds: `stock` (one call), `price` (one call, with an integer argument) and `local` (two calls: which shop an
owner has, then the stock there). What the tools return is a hash of the problem's own seed and the arguments, so no
answer can be known, or learnt by heart, without calling. The reward is end to end (spec section 3.5): every call obeys
the protocol, the calls that the question needs were made, and the final content is the number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import ToolUseTask
from glmctl.rl.environment import Environment, Message, Problem, StopReason, Tool, Transition, finished, tool_calls
from glmctl.rl.seeds import derive_seed
from glmctl.rl.tasks.arithmetic import parse_integer
from glmctl.rl.tasks.function_calls import call_problem, end_to_end_reward, same_call

# One digit each, and each after its own word: a digit is a single token, so passing an argument on is one look back,
# which a model of any size can learn in minutes. Words, and codes of several digits, were tried and take far longer.
CODES = tuple("0123456789")
KINDS = {"stock": ("item", "shop", "day"), "price": ("item", "shop", "count"), "local": ("item", "owner", "day")}
"""the kinds of question, and what the state of a problem holds for each"""
MOST_PIECES = 1_000_000
"""more than any question asks for; a number with ten thousand digits cannot even be printed"""


def _tool(name: str, /, **parameters: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


# short on purpose: their JSON stands in every prompt
TOOLS = [
    _tool("stock", item="string", shop="string", day="string"),
    _tool("price", item="string", shop="string", count="integer"),
    _tool("shop", owner="string"),
]


class Shop:
    """The state behind the tools: every value is a hash of the seed and the arguments."""

    def __init__(self, seed: int, max_value: int) -> None:
        self.seed, self.max_value = seed, max_value

    def stock(self, item: str, shop: str, day: str) -> str:
        """Pieces of `item` in `shop` on `day`, 0..max_value."""
        if not {item, shop, day} <= set(CODES):
            return "error: no such item, shop or day"
        return str(derive_seed(self.seed, "stock", item, shop, day) % (self.max_value + 1))

    def price(self, item: str, shop: str, count: int) -> str:
        """What `count` pieces cost in `shop`, 0..max_value: by their number too, as a discount would have it."""
        if not {item, shop} <= set(CODES) or not 1 <= count <= MOST_PIECES:
            return "error: no such item, shop or count"
        return str(derive_seed(self.seed, "price", item, shop, count) % (self.max_value + 1))

    def shop(self, owner: str) -> str:
        """The shop that `owner` has."""
        if owner not in CODES:
            return "error: no such owner"
        return CODES[derive_seed(self.seed, "shop", owner) % len(CODES)]

    def run(self, call: dict[str, Any]) -> str:
        """The result of a call that `call_problem` has found in order."""
        tool = {"stock": self.stock, "price": self.price, "shop": self.shop}[call["name"]]
        return str(tool(**call["arguments"]))  # type: ignore[operator]


def generate(spec: ToolUseTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` problems with distinct prompts, the three kinds about equally often.

    Raises RecipeError when more are asked for than the shop can tell apart.
    """
    most = len(CODES) ** 2 * (2 * len(CODES) + max(spec.max_value - 1, 0))
    if count > most // 2:
        raise RecipeError(f"task: at most {most // 2} tool_use problems with max_value {spec.max_value}, not {count}")
    prompts: dict[str, Problem] = {}
    while len(prompts) < count:
        problem = _draw(spec, rng)
        prompts.setdefault(problem.prompt, problem)
    return list(prompts.values())


def demonstrate(problem: Problem, *, hasty: bool = False) -> Conversation:
    """The scripted solution: the calls one after another, each announced in the reasoning, then the number.

    It is announced in the question's own words, so that each value follows the word it follows there: looking up what
    came after the same word before is the first copying a transformer learns (Olsson et al. 2022, induction heads).

    A hasty one calls nothing and states a number out of nowhere, which earns nothing even where it is right.
    """
    if hasty:
        number = str(derive_seed(problem.state["seed"], "guess") % (problem.state["max_value"] + 1))
        guess = {"role": "assistant", "reasoning_content": f"guess {number}", "content": number}
        return Conversation(messages=[{"role": "user", "content": problem.prompt}, guess], tools=TOOLS)
    shop = _shop(problem)
    messages: list[Message] = [{"role": "user", "content": problem.prompt}]
    result = ""
    for call in expected_calls(problem):
        plan = " ".join([call["name"], *(f"{key} {value}" for key, value in call["arguments"].items())])
        if call["name"] == "shop":
            # what the second call needs is said again near it; from the question, two turns back, it was not found
            plan = f"{_wanted(problem.state)}, {plan}"
        turn = {"role": "assistant", "reasoning_content": plan, "content": ""}
        messages.append({**turn, "tool_calls": [{"type": "function", "function": call}]})
        result = shop.run(call)
        messages.append({"role": "tool", "content": result})
    messages.append({"role": "assistant", "reasoning_content": f"result {result}", "content": result})
    return Conversation(messages=messages, tools=TOOLS)


def environment(problem: Problem) -> Environment:
    """The shop, its tools and the question."""
    return ToolUseEnvironment(problem)


class ToolUseEnvironment:
    """Executes calls; ends on a call that breaks the protocol (reward 0) or on the final answer."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.shop = _shop(problem)
        self.made: list[dict[str, Any]] = []

    def reset(self) -> tuple[list[Message], list[Tool] | None]:
        self.made = []
        return [{"role": "user", "content": self.problem.prompt}], TOOLS

    def step(self, message: Message) -> Transition:
        calls = tool_calls(message)
        if not calls:
            return self._judge(str(message.get("content") or ""))
        for call in calls:
            problem = call_problem(call, TOOLS)
            if problem:
                return finished(0.0, StopReason.MALFORMED, problem=problem)
        self.made += calls
        return Transition([{"role": "tool", "content": self.shop.run(call)} for call in calls], None, False)

    def _judge(self, content: str) -> Transition:
        # every call was checked when it was made, so the format part holds by construction
        looked_up = all(any(same_call(made, call) for made in self.made) for call in expected_calls(self.problem))
        right = parse_integer(content) == self.problem.answer
        reward = end_to_end_reward([True] * len(self.made), looked_up and right)
        return finished(reward, StopReason.ANSWERED, looked_up=looked_up)


def expected_calls(problem: Problem) -> list[dict[str, Any]]:
    """The calls `{name, arguments}` that the question needs, in order."""
    state, shop = problem.state, _shop(problem)
    if state["kind"] == "price":
        return [_call("price", item=state["item"], shop=state["shop"], count=state["count"])]
    if state["kind"] == "stock":
        return [_call("stock", item=state["item"], shop=state["shop"], day=state["day"])]
    return [
        _call("shop", owner=state["owner"]),
        _call("stock", item=state["item"], shop=shop.shop(state["owner"]), day=state["day"]),
    ]


def _wanted(state: Mapping[str, Any]) -> str:
    """What is asked for, as a call would say it: `stock item 3 owner 4 day 7`."""
    named = " ".join(f"{key} {state[key]}" for key in KINDS[state["kind"]])
    return f"{'price' if state['kind'] == 'price' else 'stock'} {named}"


def _call(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def _shop(problem: Problem) -> Shop:
    missing = {"seed", "max_value", "kind", *KINDS.get(problem.state.get("kind", ""), ())} - problem.state.keys()
    if missing or problem.state["kind"] not in KINDS:
        raise DataError(f"problem {problem.id}: 'state' is not of a tool_use problem: {dict(problem.state)}")
    return Shop(problem.state["seed"], problem.state["max_value"])


def _draw(spec: ToolUseTask, rng: random.Random) -> Problem:
    kind, item = rng.choice(list(KINDS)), rng.choice(CODES)
    state: dict[str, Any] = {"kind": kind, "item": item, "seed": rng.getrandbits(32), "max_value": spec.max_value}
    if kind == "price":
        state |= {"shop": rng.choice(CODES), "count": rng.randint(2, max(2, spec.max_value))}
    elif kind == "stock":
        state |= {"shop": rng.choice(CODES), "day": rng.choice(CODES)}
    else:
        state |= {"owner": rng.choice(CODES), "day": rng.choice(CODES)}
    words = _wanted(state)
    prompt = f"{words[0].upper()}{words[1:].replace(' item', ' of item', 1)}?"
    unsolved = Problem(f"tool_use/{prompt}", "tool_use", prompt, 0, state)
    answer = int(_shop(unsolved).run(expected_calls(unsolved)[-1]))
    return Problem(unsolved.id, unsolved.task, prompt, answer, state)
