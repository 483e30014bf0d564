"""Who uses which block of the cache, and what finished ones still hold. Pure bookkeeping, no tensors."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: 128 bits over its tokens and the name of the block before it.

    A cryptographic hash, because prompts come from strangers: a collision would show one of them another's text.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Reference counts of blocks 1..blocks-1 (0 is padding), and the names of those whose content may be shared.

    A block that nobody uses any more keeps its name and content until it is handed out again, the one that has been
    free for longest first; blocks without a name go before any that has one.
    """

    def __init__(self, blocks: int) -> None:
        assert blocks >= 2
        self.total = blocks - 1
        self._users = [0] * blocks
        self._name: list[bytes | None] = [None] * blocks
        self._named: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, blocks))

    @property
    def free(self) -> int:
        """Blocks that can be handed out, those with content that could be shared included."""
        return len(self._free)

    def users(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._users[block]

    def find(self, name: bytes) -> int | None:
        """The block that holds the content of this name."""
        return self._named.get(name)

    def take(self, count: int) -> list[int]:
        """`count` blocks of one user each, whose content is undefined."""
        assert count <= len(self._free)
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """One more user of a block that `find` gave."""
        assert self._name[block] is not None
        if self._users[block] == 0:
            del self._free[block]
        self._users[block] += 1

    def publish(self, block: int, name: bytes) -> None:
        """Name a block in use; from now on nobody writes to it. Where the name is taken, the earlier block keeps it."""
        assert self._users[block] > 0
        assert self._name[block] is None
        if name not in self._named:
            self._named[name] = block
            self._name[block] = name

    def release(self, blocks: Sequence[int]) -> None:
        """One user less of each; a sequence's blocks in order, so that its end is handed out before its beginning."""
        for block in reversed(blocks):
            assert self._users[block] > 0
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None
                if self._name[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget(self) -> None:
        """Take every name away: what the blocks hold is not to be shared."""
        for block in list(self._named.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        name = self._name[block]
        if name is not None:
            del self._named[name]
            self._name[block] = None
