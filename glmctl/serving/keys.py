"""API keys: where they come from, and how they are compared."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

from glmctl.errors import RecipeError

KEY_VARIABLE = "GLMCTL_API_KEY"
ADMIN_KEY_VARIABLE = "GLMCTL_ADMIN_KEY"
_MAX_KEY_BYTES = 4096


def read_key(variable: str, file: str | None, field: str) -> str | None:
    """The key in `file` if one is named, else in the environment variable; None when there is neither.

    RecipeError naming `field` for a file that others may read, that is missing, or that holds no key.
    """
    if file is None:
        return os.environ.get(variable) or None
    path = Path(file).expanduser()
    try:
        with path.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            raw = opened.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{field}: {path}: {error.strerror}") from error
    if mode & 0o077:
        raise RecipeError(f"{field}: {path} can be read by others (mode {mode:04o})", hint=f"chmod 600 {path}")
    try:
        key = raw.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{field}: {path} does not hold an ASCII key") from error
    if not key or not key.isprintable() or " " in key or len(raw) > _MAX_KEY_BYTES:
        raise RecipeError(f"{field}: {path} does not hold one key on one line")
    return key


def carries(headers: dict[bytes, list[bytes]], key: bytes) -> bool:
    """Whether a request carries `key`: one `Authorization: Bearer`, or Anthropic's `x-api-key`. In constant time."""
    bearer, plain = headers.get(b"authorization", []), headers.get(b"x-api-key", [])
    if len(bearer) + len(plain) != 1:
        return False
    if plain:
        return hmac.compare_digest(plain[0].strip(), key)
    scheme, _, given = bearer[0].partition(b" ")
    return hmac.compare_digest(given.strip(), key) and scheme.lower() == b"bearer"
