"""A law of every test that makes an engine: when it is over, all blocks of the cache can be given back."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def blocks_return_to_total(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did to its engines, aborting what is left in flight frees every block."""
    module = sys.modules.get("glmctl.engine.engine")
    if module is None:
        yield
        return
    made = []
    original = module.Engine.__init__

    def recorded(self: object, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(module.Engine, "__init__", recorded)
    yield
    for engine in made:
        for name in list(engine._inside):
            assert engine.abort(name) is not None
        used, total = engine.kv_blocks
        assert used == engine.active == engine.waiting == 0, f"{used} of {total} blocks are lost"
        assert engine._scheduler.blocks.free == total
