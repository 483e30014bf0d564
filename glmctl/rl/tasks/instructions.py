"""Instruction following: constraints that a rule can check, in seven kinds (spec section 3.5: 7 major kinds).

The report does not name its kinds; these seven follow IFEval's families (Zhou et al. 2023, arXiv 2311.07911). A problem
asks for a short text under one or more constraints of different kinds; the reward is 1 iff all of them hold.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glmctl.data.conversations import Conversation
from glmctl.errors import DataError, RecipeError, unknown
from glmctl.recipe.schema import InstructionsTask
from glmctl.rl.environment import Environment, Problem, content_id
from glmctl.rl.tasks.single_turn import SingleTurn

Check = Callable[..., bool]


@dataclass(frozen=True)
class Constraint:
    """How a constraint is asked for, drawn and checked. `ask` is a format string over what `draw` gives."""

    kind: str
    ask: str
    draw: Callable[[random.Random], dict[str, Any]]
    check: Check
    example: Callable[..., str]
    """a text that obeys, for demonstrations and for the test of the check itself"""


REGISTRY: dict[str, Constraint] = {}
WORDS = ("river", "stone", "cloud", "garden", "lamp", "paper", "window", "bridge", "winter", "music")


def _add(
    name: str, ask: str, draw: Callable[[random.Random], dict[str, Any]], check: Check, example: Callable[..., str]
) -> None:
    REGISTRY[name] = Constraint(name.partition("/")[0], ask, draw, check, example)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text)


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"[.!?]+", text) if part.strip()]


def _bullets(text: str) -> list[str]:
    return re.findall(r"(?m)^\s*[-*] +\S", text)


def _paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text.strip()) if part.strip()]


def _is_json(text: str) -> bool:
    try:
        return isinstance(
            json.loads(text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")), dict
        )
    except (ValueError, RecursionError):
        return False


def _count(low: int, high: int) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: {"n": rng.randint(low, high)}


def _word(rng: random.Random) -> dict[str, Any]:
    return {"word": rng.choice(WORDS)}


def _none(rng: random.Random) -> dict[str, Any]:
    return {}


def _holds(text: str, word: str) -> int:
    return [one.lower() for one in _words(text)].count(word)


# keywords
_add("keywords/include", "Use the word '{word}'.", _word, lambda t, word: _holds(t, word) > 0, lambda word: word)
_add("keywords/exclude", "Do not use the word '{word}'.", _word,
     lambda t, word: bool(_words(t)) and not _holds(t, word), lambda word: "ok")  # fmt: skip
_add(
    "keywords/frequency",
    "Use the word '{word}' exactly {n} times.",
    lambda rng: {**_word(rng), **_count(2, 4)(rng)},
    lambda t, word, n: _holds(t, word) == n,
    lambda word, n: " ".join([word] * n),
)
# length
_add("length/words_exactly", "Write exactly {n} words.", _count(2, 12), lambda t, n: len(_words(t)) == n,
     lambda n: " ".join(["word"] * n))  # fmt: skip
_add("length/words_most", "Write at most {n} words.", _count(3, 20), lambda t, n: 0 < len(_words(t)) <= n,
     lambda n: "short")  # fmt: skip
_add("length/sentences", "Write exactly {n} sentences.", _count(2, 4), lambda t, n: len(_sentences(t)) == n,
     lambda n: " ".join(["This is so."] * n))  # fmt: skip
# format
_add("format/bullets", "Write a list of exactly {n} lines that begin with '- '.", _count(2, 5),
     lambda t, n: len(_bullets(t)) == n, lambda n: "\n".join(["- item"] * n))  # fmt: skip
_add("format/json", "Answer with one JSON object and nothing else.", _none, _is_json, lambda: '{"a": 1}')
_add("format/title", "Begin with a title in double angle brackets, such as <<title>>.", _none,
     lambda t: bool(re.match(r"\s*<<[^<>\n]+>>", t)), lambda: "<<title>> text")  # fmt: skip
_add("format/paragraphs", "Write exactly {n} paragraphs with an empty line between them.", _count(2, 3),
     lambda t, n: len(_paragraphs(t)) == n, lambda n: "\n\n".join(["text"] * n))  # fmt: skip
# content
_add("content/placeholders", "Leave exactly {n} placeholders in square brackets, such as [name].", _count(1, 3),
     lambda t, n: len(re.findall(r"\[[^\[\]\n]+\]", t)) == n, lambda n: " ".join(["[name]"] * n))  # fmt: skip
_add("content/digits", "Mention the number {n}.", _count(10, 99),
     lambda t, n: re.search(rf"(?<!\d){n}(?!\d)", t) is not None, lambda n: str(n))  # fmt: skip
_add("content/postscript", "End with a postscript that begins with 'P.S.'.", _none,
     lambda t: bool(re.search(r"(?m)^P\.S\. ?\S", t)), lambda: "text\nP.S. more")  # fmt: skip
# case
_add("case/lower", "Write in lower case only.", _none, str.islower, lambda: "text")
_add("case/upper", "Write in capitals only.", _none, str.isupper, lambda: "TEXT")
_add("case/capital_words", "Use at least {n} words in capitals.", _count(1, 3),
     lambda t, n: sum(w.isupper() and len(w) > 1 for w in _words(t)) >= n, lambda n: " ".join(["YES"] * n))  # fmt: skip
# punctuation
_add("punctuation/no_comma", "Use no comma.", _none, lambda t: "," not in t and bool(_words(t)), lambda: "text")
_add("punctuation/no_stop", "Use no full stop.", _none, lambda t: "." not in t and bool(_words(t)), lambda: "text")
_add("punctuation/exclaim", "Use exactly {n} exclamation marks.", _count(1, 3), lambda t, n: t.count("!") == n,
     lambda n: "yes" + "!" * n)  # fmt: skip
# position
_add("position/starts", "Begin with the word '{word}'.", _word,
     lambda t, word: [w.lower() for w in _words(t)[:1]] == [word], lambda word: f"{word} text")  # fmt: skip
_add("position/ends", "End with the word '{word}'.", _word,
     lambda t, word: [w.lower() for w in _words(t)[-1:]] == [word], lambda word: f"text {word}")  # fmt: skip
_add("position/quoted", "Put the whole answer in double quotation marks.", _none,
     lambda t: len(t.strip()) > 2 and t.strip()[0] == t.strip()[-1] == '"', lambda: '"text"')  # fmt: skip

KINDS = tuple(dict.fromkeys(one.kind for one in REGISTRY.values()))


def generate(spec: InstructionsTask, count: int, rng: random.Random) -> list[Problem]:
    """`count` distinct problems of `spec.constraints` constraints, each of a kind of its own.

    Only combinations that some text of the registry's examples obeys are kept, so that every problem can be solved.
    Raises RecipeError when too few are found.
    """
    found: dict[str, Problem] = {}
    for _ in range(60 * count):
        names = [rng.choice([n for n, c in REGISTRY.items() if c.kind == kind])
                 for kind in rng.sample(KINDS, spec.constraints)]  # fmt: skip
        constraints: list[dict[str, Any]] = [{"name": name, "arguments": REGISTRY[name].draw(rng)} for name in names]
        solution = next((text for text in _attempts(constraints) if obeys(text, constraints)), None)
        if solution is None:
            continue
        topic = rng.choice(WORDS)
        asks = " ".join(REGISTRY[c["name"]].ask.format(**c["arguments"]) for c in constraints)
        prompt = f"Write about a {topic}. {asks}"
        found.setdefault(
            prompt,
            Problem(content_id("instructions", prompt), "instructions", prompt, solution, {"constraints": constraints}),
        )
        if len(found) == count:
            return list(found.values())
    raise RecipeError(f"task.constraints: {len(found)} different problems were found, {count} are asked for")


def _attempts(constraints: list[dict[str, Any]]) -> list[str]:
    """Texts that might obey: each constraint's example alone, and all of them joined in both orders."""
    texts = [REGISTRY[c["name"]].example(**c["arguments"]) for c in constraints]
    joined = [gap.join(order) for gap in (" ", "\n", "\n\n") for order in (texts, texts[::-1])]
    every = [*texts, *joined]
    return [*every, *(text.lower() for text in every), *(text.upper() for text in every)]


def obeys(text: str, constraints: list[Mapping[str, Any]] | list[dict[str, Any]]) -> bool:
    """Whether a text holds all the constraints `{name, arguments}`. Raises DataError for one that does not exist."""
    for one in constraints:
        if one["name"] not in REGISTRY:
            raise DataError(unknown("constraint", one["name"], REGISTRY).message)
    return all(REGISTRY[one["name"]].check(text, **one["arguments"]) for one in constraints)


def demonstrate(problem: Problem) -> Conversation:
    """The text that generation found to obey."""
    names = ", ".join(one["name"] for one in problem.state["constraints"])
    answer = {"role": "assistant", "reasoning_content": names, "content": str(problem.answer)}
    return Conversation(messages=[{"role": "user", "content": problem.prompt}, answer], tools=None)


def environment(problem: Problem) -> Environment:
    """One text, checked by rules. Raises DataError for a problem without constraints."""
    if not problem.state.get("constraints"):
        raise DataError(f"problem {problem.id}: 'state' holds no constraints")
    return SingleTurn(problem, lambda one, content: float(obeys(content.strip(), one.state["constraints"])))
