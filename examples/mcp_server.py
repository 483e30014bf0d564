"""A small MCP server: a library that lends books. `python mcp_server.py`, or `python mcp_server.py --http PORT`.

What it knows is drawn from the arguments, so no answer can be guessed; what is lent stays lent while it runs. With
`--die-after N` it exits without a word at call N + 1: for trying out what a client does then.
"""

from __future__ import annotations

import argparse
import hashlib
import os

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("library", log_level="WARNING")
lent: dict[str, str] = {}
left: list[int] = []


def _count() -> None:
    """One call more; dies where it was told to."""
    if left:
        if left[0] == 0:
            os._exit(1)
        left[0] -= 1


@server.tool()
def find_book(title: str) -> dict[str, str | int]:
    """Find a book by its title: its shelf mark and the number of copies."""
    _count()
    drawn = hashlib.sha256(title.lower().encode()).digest()
    return {"mark": f"{'ABCDEF'[drawn[0] % 6]}{drawn[1] % 90 + 10}", "copies": drawn[2] % 4 + 1}


@server.tool()
def lend(mark: str, reader: str) -> str:
    """Lend the book with a shelf mark to a reader; says until which day."""
    _count()
    if mark in lent:
        raise ToolError(f"{mark} is lent to {lent[mark]}")
    lent[mark] = reader
    return f"until day {hashlib.sha256(f'{mark}/{reader}'.encode()).digest()[0] % 28 + 1}"


@server.tool()
def give_back(mark: str) -> str:
    """Give a lent book back."""
    _count()
    reader = lent.pop(mark, None)
    return f"{mark} is back from {reader}" if reader else f"{mark} was not lent"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http", type=int, metavar="PORT", help="serve streamable HTTP at http://127.0.0.1:PORT/mcp")
    parser.add_argument("--die-after", type=int, metavar="N", help="calls that are answered")
    options = parser.parse_args()
    left += [options.die_after] if options.die_after is not None else []
    if options.http is None:
        server.run()
    else:
        server.run("streamable-http", host="127.0.0.1", port=options.http)
