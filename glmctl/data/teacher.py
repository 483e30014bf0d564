"""Teachers: whoever rates a sample of documents so that a classifier can learn to rate the rest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data.asked import Asked, Request, sendable
from glmctl.data.reading import numbered_lines, open_maybe_packed
from glmctl.data.scores import HEURISTICS
from glmctl.data.units import files_of
from glmctl.data.words import words
from glmctl.errors import DataError

if TYPE_CHECKING:
    from openai import OpenAI

    from glmctl.data.sources import Document
    from glmctl.recipe.curation import EndpointTeacher, Heuristic, LabelsTeacher

MAX_UNREADABLE = 0.1
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def rate(
    teacher: Heuristic | EndpointTeacher | LabelsTeacher, sample: Sequence[Document], asked: Asked
) -> tuple[list[str], list[float]]:
    """(texts, scores in [0, 1]) to learn from: the sample's, or those of `labels`, which brings its own texts.

    asked: what an endpoint has answered before.
    EnvironmentProblem when an endpoint does not answer; DataError when its replies hold no numbers.
    """
    if teacher.type == "labels":
        return read_labels(teacher.paths)
    texts = [document.text for document in sample]
    if teacher.type == "endpoint":
        found = ask(teacher, texts, asked)
        return [text for text, score in zip(texts, found, strict=True) if score is not None], [
            score for score in found if score is not None
        ]
    score = HEURISTICS[teacher.what]
    return texts, [score(document.text, words(document.text), document.language) for document in sample]


def ask(teacher: EndpointTeacher, texts: Sequence[str], asked: Asked) -> list[float | None]:
    """The endpoint's score of each text, None where its reply holds no number."""
    client = client_of(teacher.base_url)

    def one(request: Request) -> str | None:
        reply = client.chat.completions.create(**request)
        found = _NUMBER.search(reply.choices[0].message.content or "")
        return found.group() if found else None

    requests = [
        {
            "model": teacher.model,
            "messages": [
                {"role": "user", "content": teacher.prompt.replace("{text}", sendable(text[: teacher.max_chars]))}
            ],
            "temperature": 0.0,
            "max_tokens": 16,
        }
        for text in texts
    ]
    found = asked.answers(requests, one, teacher.base_url)
    scores = [parse_score(number or "", teacher.scale) for number in found]
    missing = sum(score is None for score in scores)
    if missing > MAX_UNREADABLE * len(texts):
        raise DataError(
            f"{teacher.base_url}: {missing} of {len(texts)} replies hold no score from 0 to {teacher.scale:g}"
        )
    return scores


def embed(base_url: str, model: str, texts: Sequence[str], asked: Asked) -> list[list[float]]:
    """The endpoint's embedding of each text. EnvironmentProblem when it does not answer."""
    client = client_of(base_url)

    def some(request: Request) -> list[list[float]]:
        return [row.embedding for row in client.embeddings.create(**request).data]

    requests = [{"model": model, "input": list(map(sendable, texts[at : at + 32]))} for at in range(0, len(texts), 32)]
    return [row for rows in asked.answers(requests, some, base_url) for row in rows]


def parse_score(reply: str, scale: float) -> float | None:
    """The first number of a reply as a share of `scale`; None when there is none or it is out of range."""
    found = _NUMBER.search(reply)
    if found is None or not 0.0 <= float(found.group()) <= scale:
        return None
    return float(found.group()) / scale


def read_labels(paths: Sequence[str]) -> tuple[list[str], list[float]]:
    """Texts and scores of JSON lines of {text, score}. DataError names the first line that is not one."""
    texts: list[str] = []
    scores: list[float] = []
    for path in files_of(paths):
        with open_maybe_packed(Path(path)) as stream:
            for number, line in numbered_lines(stream):
                text, score = _label(line, f"{path}:{number}")
                texts.append(text)
                scores.append(score)
    return texts, scores


def _label(line: bytes | None, place: str) -> tuple[str, float]:
    try:
        row: Any = json.loads(line or b"")
    except ValueError as error:
        raise DataError(f"{place}: not JSON: {error}") from error
    score = row.get("score") if isinstance(row, dict) else None
    if not isinstance(score, int | float) or not 0 <= score <= 1 or not isinstance(row.get("text"), str):
        raise DataError(f"{place}: a label is {{'text': ..., 'score': 0 to 1}}")
    return row["text"], float(score)


def client_of(base_url: str) -> OpenAI:
    """A client of an OpenAI-compatible endpoint; the key, if it wants one, is in OPENAI_API_KEY."""
    from openai import OpenAI

    return OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=2)
