"""Synthetic reasoning (spec section 2, Data): question and answer pairs mined from text, reasoning by a teacher.

A pair is what a page itself marks as question and answer ("Q: ... A: ..."), with an answer short enough to be checked.
The teacher answers each question several times; only traces that end in the mined answer are kept, so what the model
learns from was checked against the text it came from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from glmctl import console
from glmctl.data import hub
from glmctl.data.asked import Asked, Request, sendable
from glmctl.data.reading import BadRows
from glmctl.data.sources import documents
from glmctl.data.teacher import client_of
from glmctl.errors import DataError
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.recipe.data import ReasoningRecipe
    from glmctl.run.directory import Run

_ASKS = r"(?:Q|Question|Problem|Exercise|问题|问)"
_ANSWERS = r"(?:A|Answer|Solution|答案|答)"
_PAIR = re.compile(
    rf"^[ \t]*{_ASKS}[ \t]*\d*[ \t]*[.:)：][ \t]*(?P<question>\S.*?)\n\s*{_ANSWERS}[ \t]*\d*[ \t]*[.:)：][ \t]*"
    rf"(?P<answer>\S[^\n]*)",
    re.MULTILINE | re.DOTALL,
)
_NEXT_QUESTION = re.compile(rf"^[ \t]*{_ASKS}[ \t]*\d*[ \t]*[.:)：]", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_FINAL = re.compile(r"(?:final answer|answer|答案)\s*(?:is|:|：|是)?\s*[:：]?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|[%‰°€£¥]")
_LEAD_INS = {
    "a", "an", "the", "it", "it's", "this", "that", "there", "is", "are", "was", "were", "so", "thus", "hence", "是",
    "therefore", "等于",
}  # fmt: skip
"""words before a number that say nothing of what it counts; behind one, `a` is a unit"""
_DENIALS = {
    "not", "no", "never", "nor", "neither", "cannot", "isn't", "wasn't", "aren't", "than", "least", "most", "half",
    "twice", "不", "不是",
}  # fmt: skip
"""words of a sentence after which the answer at its end is not what it says"""
_THINK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)
MAX_QUESTION_CHARS, MAX_ANSWER_WORDS = 2000, 8
ASKED = "asked.jsonl"
"""in the run: the teacher's replies as they come, until there is an export"""


@dataclass(frozen=True)
class Pair:
    """A question with the answer that its page gives."""

    question: str
    answer: str
    path: str


def mine(text: str, path: str) -> Iterator[Pair]:
    """Pairs that a text marks as such and whose answers are short enough to be checked."""
    for found in _PAIR.finditer(text):
        # questions that nobody answered stand before the one that the answer belongs to
        question, answer = _NEXT_QUESTION.split(found["question"])[-1].strip(), found["answer"].strip()
        if not question or len(question) > MAX_QUESTION_CHARS:
            continue
        if len(answer.split()) <= MAX_ANSWER_WORDS or key_of(answer) is not None:
            yield Pair(question, answer, path)


def key_of(text: str) -> Fraction | None:
    """The one number of a text that is an answer ("x = 3/4."), None when there is none or several."""
    found = set(_NUMBER.findall(text.rsplit("=", 1)[-1]))
    if len(found) != 1:
        return None
    try:
        return Fraction(found.pop().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def final_answer(reply: str) -> str:
    """What a reply settles on: its last box, else what follows its last "answer", else its last line."""
    boxed = _BOXED.findall(reply)
    if boxed:
        return str(boxed[-1]).strip()
    named = _FINAL.findall(reply)
    if named:
        return str(named[-1]).strip()
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def agrees(reply: str, answer: str) -> bool:
    """Whether a reply's final answer is `answer`: the same number of the same thing, or the same words.

    A number without words agrees with the same number of anything, so a reply may leave the unit out.
    """
    given, wanted = final_answer(reply), key_of(answer)
    if wanted is None:
        return bool(_plain(answer)) and _plain(given) == _plain(answer)
    if key_of(given) != wanted:
        return False
    (lead, unit), (wanted_lead, wanted_unit) = _around_number(given), _around_number(answer)
    if not lead + unit or not wanted_lead + wanted_unit:
        return True
    # one may be the end of the other's sentence: "60 km/h", "The train goes 60 km/h"
    short, long = sorted((lead, wanted_lead), key=len)
    sentence, end = long[: len(long) - len(short)], long[len(long) - len(short) :]
    return unit == wanted_unit and end == short and _DENIALS.isdisjoint(sentence)


def _around_number(text: str) -> tuple[list[str], list[str]]:
    """Words before and behind the number of an answer, signs of units among them; a bare number has neither."""
    plain = _COMMAND.sub(" ", text.rsplit("=", 1)[-1]).casefold().replace("’", "'")
    before, *behind = _NUMBER.split(plain)
    return [word for word in _WORD.findall(before) if word not in _LEAD_INS], _WORD.findall(" ".join(behind))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def split_reasoning(message: Any) -> tuple[str, str]:
    """(reasoning, content) of a chat reply: from `reasoning_content`, or from a `<think>` block in the content."""
    content = message.content or ""
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if reasoning:
        return str(reasoning).strip(), content.strip()
    found = _THINK.fullmatch(content)
    return (found[1].strip(), found[2].strip()) if found else ("", content.strip())


def run(recipe: ReasoningRecipe, run: Run) -> dict[str, Any]:
    """Mine pairs, ask the teacher, keep what agrees: `conversations.jsonl` in the run's export, and `report.json`.

    Every reply is written down as it comes, so an interrupted run asks only what is missing.

    Raises:
        DataError: the sources hold no pairs, too many bad rows, or no trace was right.
        EnvironmentProblem: the teacher does not answer.
    """
    pairs: dict[str, Pair] = {}
    bad = BadRows()
    sources = hub.pinned(recipe.sources, run.export.with_name(hub.COMMITS))
    for document in documents(sources, recipe.seed, bad=bad):
        for pair in mine(document.text, document.path):
            pairs.setdefault(pair.question, pair)
        if len(pairs) >= recipe.questions:
            break
    chosen = list(pairs.values())[: recipe.questions]
    if not chosen:
        raise DataError("the sources hold no marked questions with answers that can be checked")
    if bad.total:
        console.warn(f"{bad.total} rows left out: {bad.summary()}")
    journal = run.export.with_name(ASKED)
    rows, counts = _ask(recipe, chosen, Asked(journal))
    if not rows:
        journal.unlink()  # the same replies would be as wrong again
        raise DataError(f"none of {counts['traces']} traces ends in the answer that the text gives")
    with atomic.publish(run.export) as folder:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "conversations.jsonl").write_text(lines, encoding="utf-8")
        report = {**counts, "bad_rows": {"by_kind": dict(bad.kinds), "places": bad.places}}
        (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    journal.unlink()
    return {**counts, "bad_rows": bad.total}


def _ask(recipe: ReasoningRecipe, pairs: Sequence[Pair], asked: Asked) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Verified conversations in the pairs' order, at most `keep_per_question` each, and what was counted."""
    teacher = recipe.teacher
    client = client_of(teacher.base_url)

    def samples(request: Request) -> list[tuple[str, str]]:
        reply = client.chat.completions.create(**request)
        return [_whole(split_reasoning(choice.message)) for choice in reply.choices]

    requests = [
        {
            "model": teacher.model,
            "messages": [{"role": "user", "content": sendable(pair.question)}],
            "n": recipe.samples,
            "temperature": teacher.temperature,
            "max_tokens": teacher.max_tokens,
        }
        for pair in pairs
    ]
    counts: Counter[str] = Counter(questions=len(pairs), traces=0, wrong=0, without_reasoning=0, kept=0)
    rows = []
    found = asked.answers(requests, samples, teacher.base_url)
    with closing(found), console.progress("reasoning", len(pairs), "question") as progress:
        for pair, replies in zip(pairs, found, strict=True):
            kept = 0
            for reasoning, content in replies:
                counts["traces"] += 1
                if not agrees(content, pair.answer):
                    counts["wrong"] += 1
                elif not reasoning:
                    counts["without_reasoning"] += 1
                elif kept < recipe.keep_per_question:
                    kept += 1
                    question = {"role": "user", "content": sendable(pair.question)}
                    said = {"role": "assistant", "content": content, "reasoning_content": reasoning}
                    rows.append({"messages": [question, said], "path": pair.path})
            counts["kept"] += kept
            progress.advance(kept=counts["kept"])
    return rows, counts


def _whole(reply: tuple[str, str]) -> tuple[str, str]:
    """A reply, or an empty one when half a character is in it (a lone surrogate): no file and no tokenizer takes it."""
    return reply if all(sendable(text) == text for text in reply) else ("", "")
