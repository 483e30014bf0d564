"""Fixed strings in text that arrives in pieces: looking for them, and passing on what stands around them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class Trimmed:
    """Text without white space at either end, passed on as soon as that is certain."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._pieces: list[str] = []
        self._space: list[str] = []

    def add(self, text: str) -> None:
        body = text.rstrip()
        if not body:
            if self._pieces and text:
                self._space.append(text)
            return
        piece = "".join([*self._space, body]) if self._pieces else body.lstrip()
        self._space = [text[len(body) :]]
        self._pieces.append(piece)
        self._emit(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces)


@dataclass(frozen=True)
class Tags:
    """A set of fixed strings to look for."""

    all: tuple[str, ...]
    pattern: re.Pattern[str] = field(init=False)
    longest: int = field(init=False)
    beginnings: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile("|".join(map(re.escape, self.all))))
        object.__setattr__(self, "longest", max(map(len, self.all)))
        proper = (tag[:length] for tag in self.all for length in range(1, len(tag)))
        object.__setattr__(self, "beginnings", frozenset(proper))

    def partial(self, text: str) -> int:
        """Length of the longest end of `text` that could grow into one of the strings."""
        for length in range(min(self.longest - 1, len(text)), 0, -1):
            if text[-length:] in self.beginnings:
                return length
        return 0
