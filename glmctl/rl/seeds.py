"""Seeds as pure functions of what they are for, so that nothing depends on the order in which work happens."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the run's seed and the names of the thing it is for, e.g. `(seed, "rollout", step, group)`.

    Equal parts give equal seeds on every platform and in every process; `1` and `"1"` are different parts.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
