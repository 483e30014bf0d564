"""Texts from the engine, cut before the stop string that ended them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt and how to continue it; the first of `params.stop` in the text is not returned."""

    prompt: list[int]
    params: SamplingParams
    cut: int = 0
    """tokens that were taken off its beginning to make it fit"""


def generate_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
    done: Callable[[int, str], None] = lambda place, text: None,
) -> list[str]:
    """The text of every job, special tokens left out, cut before the earliest stop string; in the order of `jobs`.

    All are handed to the engine at once, the longest prompts first: slots that get free late then hold short ones.
    `done` is called with each place and text the moment it is complete. The engine's `token_bytes` must leave special
    tokens out too.
    """
    texts: dict[int, str] = {}
    for place in sorted(range(len(jobs)), key=lambda place: (-len(jobs[place].prompt), jobs[place].prompt)):
        engine.add(Request(str(place), jobs[place].prompt, jobs[place].params))
    while len(texts) < len(jobs):
        for event in engine.step():
            if event.completion is not None:
                place = int(event.id)
                text = tokenizer.decode(event.completion.tokens, skip_special=True)
                texts[place] = cut(text, jobs[place].params.stop)
                done(place, texts[place])
    return [texts[place] for place in range(len(jobs))]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the earliest of the stop strings."""
    ends = [text.find(stop) for stop in until if stop in text]
    return text[: min(ends)] if ends else text
