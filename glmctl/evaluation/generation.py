"""Generation that also stops at strings, over the engine (which itself knows only stop tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt and how to continue it; generation ends at the first of `until` in the text, which is not returned."""

    prompt: list[int]
    params: SamplingParams
    until: tuple[str, ...] = ()


def generate_texts(engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job]) -> list[str]:
    """The text of every job, special tokens left out, cut before the earliest stop string; in the order of `jobs`."""
    tokens: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        engine.add(Request(str(index), job.prompt, job.params))
        tokens[str(index)] = []
    open_jobs = set(tokens)
    while open_jobs:
        for event in engine.step():
            if event.id not in open_jobs:
                # the second token of a speculative step, after the first one completed a stop string
                continue
            tokens[event.id].append(event.token)
            if event.completion is not None:
                open_jobs.discard(event.id)
            elif _has_stop(tokenizer, tokens[event.id], jobs[int(event.id)].until):
                open_jobs.discard(event.id)
                engine.abort(event.id)
    texts = (tokenizer.decode(tokens[str(index)], skip_special=True) for index in range(len(jobs)))
    return [cut(text, job.until) for text, job in zip(texts, jobs, strict=True)]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the earliest of the stop strings; an empty stop string is none."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)] if ends else text


def _has_stop(tokenizer: Tokenizer, tokens: list[int], until: Sequence[str]) -> bool:
    """Whether the newest token completed a stop string. A token is a byte or more, so a short tail is enough."""
    longest = max((len(stop.encode()) for stop in until), default=0)
    if not longest:
        return False
    tail = tokenizer.decode(tokens[-(longest + 1) :], skip_special=True)
    return any(stop and stop in tail for stop in until)
