"""Texts from the engine, cut before the stop string that ended them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Job:
    """A prompt and how to continue it; the first of `params.stop` in the text is not returned."""

    prompt: list[int]
    params: SamplingParams


def generate_texts(engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job]) -> list[str]:
    """The text of every job, special tokens left out, cut before the earliest stop string; in the order of `jobs`.

    The engine's `token_bytes` must leave special tokens out too.
    """
    requests = [Request(str(index), job.prompt, job.params) for index, job in enumerate(jobs)]
    texts = (tokenizer.decode(each.tokens, skip_special=True) for each in engine.generate(requests))
    return [cut(text, job.params.stop) for text, job in zip(texts, jobs, strict=True)]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the earliest of the stop strings."""
    ends = [text.find(stop) for stop in until if stop in text]
    return text[: min(ends)] if ends else text
