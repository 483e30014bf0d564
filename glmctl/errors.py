"""What can go wrong that a user can cause, and the exit code each kind ends in.

Exit codes: 0 ok, 2 usage or recipe, 3 bad data or artifact, 4 environment (disk, port, device),
5 training diverged, 130/143 interrupted and resumable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GlmctlError(Exception):
    """An error the user can act on: one line, an optional hint, and a documented exit code."""

    exit_code = 2
    kind = "usage"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class RecipeError(GlmctlError):
    """A recipe or option is wrong: unknown key, wrong type, missing file, unknown name."""

    kind = "recipe"


class DataError(GlmctlError):
    """An input artifact (data, checkpoint, model folder) is missing pieces or damaged."""

    exit_code = 3
    kind = "data"


class EnvironmentProblem(GlmctlError):
    """The machine is not able: disk full, port taken, device absent, lock held."""

    exit_code = 4
    kind = "environment"


class DivergedError(GlmctlError):
    """Training produced non-finite numbers and was stopped before they reached the weights."""

    exit_code = 5
    kind = "diverged"


class Interrupted(GlmctlError):
    """A signal ended the run after its state was saved. `exit_code` is 130 (SIGINT) or 143 (SIGTERM)."""

    kind = "interrupted"

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice closest to `word`, or None when none is close enough to be what was meant."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, word: str, choices: Iterable[str], *, where: str = "") -> RecipeError:
    """The error for a name that does not exist, with the nearest one that does."""
    options = sorted(choices)
    match = nearest(word, options)
    hint = f"did you mean '{match}'?" if match else f"one of: {', '.join(options[:12])}"
    prefix = f"{where}: " if where else ""
    return RecipeError(f"{prefix}unknown {what} '{word}'; {hint}")
