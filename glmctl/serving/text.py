"""Generated tokens to text, ending at a stop string wherever it falls between tokens."""

from __future__ import annotations

from collections.abc import Sequence

from glmctl.data.tokenizer import Tokenizer


class StopStrings:
    """Passes text on up to the first of `stops`, holding back what may still become one.

    Time is linear in the text: each push looks only at what was held back and what is new.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.hit = False
        """whether a stop string came; nothing is passed on after it"""

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that is now certain to come before any stop string. One that ends in text pushed while not
        `armed` does not count."""
        if self.hit:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = min((at for at in map(text.find, self._stops) if at >= 0), default=-1) if armed else -1
        if found >= 0:
            self.hit, self._held = True, ""
            return text[:found]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """One answer's tokens to text: special tokens hidden (think and tool tags are not), stop strings cut off."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        """min_tokens: stop strings that end before so many tokens do not count."""
        self._decoder = tokenizer.detokenizer(skip_special=True)
        self._stops = StopStrings(stops)
        self._unarmed = max(0, min_tokens - 1)

    @property
    def stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stops.hit

    def push(self, token: int) -> str:
        """Text that became certain with `token`."""
        armed = not self._unarmed
        self._unarmed = max(0, self._unarmed - 1)
        return self._stops.push(self._decoder.push(token), armed=armed)

    def finish(self) -> str:
        """The rest, at the end of the tokens."""
        return self._stops.push(self._decoder.flush()) + self._stops.finish()
