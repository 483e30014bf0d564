"""Tools of Model Context Protocol servers through the official SDK, over stdio or streamable HTTP."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from glmctl.distill.agentic.toolbox import Arguments, ToolboxDied, declare
from glmctl.errors import EnvironmentProblem
from glmctl.recipe.agentic import McpTools
from glmctl.rl.environment import Tool


class McpToolbox:
    """One connection to a server. Used from one thread; the SDK's own loop runs in another."""

    def __init__(self, spec: McpTools) -> None:
        """Connect and list the tools. EnvironmentProblem when the server does not start or answer, or has none."""
        try:
            from mcp import Client, StdioServerParameters
        except ImportError as error:
            raise EnvironmentProblem("tools of MCP servers need the SDK", hint="pip install 'glmctl[mcp]'") from error
        from anyio.from_thread import start_blocking_portal

        self._where = spec.url or " ".join(spec.command)
        self._timeout = spec.timeout_seconds
        server: Any = spec.url or StdioServerParameters(command=spec.command[0], args=spec.command[1:])
        self._stack = ExitStack()
        try:
            self._portal = self._stack.enter_context(start_blocking_portal())
            client = Client(server, read_timeout_seconds=spec.timeout_seconds, cache=None)
            self._client = self._stack.enter_context(self._portal.wrap_async_context_manager(client))
            self.tools = self._list()
        except Exception as error:
            self._stack.close()
            raise EnvironmentProblem(f"{self._where}: the MCP server does not start: {_said(error)}") from error
        if not self.tools:
            self.close()
            raise EnvironmentProblem(f"{self._where}: the MCP server has no tools")

    def call(self, name: str, arguments: Arguments) -> str:
        """See `Toolbox`. A tool's own error is its answer; a lost connection or no answer in time is ToolboxDied."""
        from mcp import MCPError

        try:
            result = self._portal.call(self._client.call_tool, name, dict(arguments), self._timeout)
        except MCPError as error:
            if error.code not in REFUSALS:
                raise ToolboxDied(f"{self._where}: {_said(error)}") from error
            return f"error: {error}"
        except Exception as error:
            raise ToolboxDied(f"{self._where}: {_said(error)}") from error
        text = "\n".join(part.text for part in result.content if part.type == "text")
        return f"error: {text}" if result.is_error else text

    def close(self) -> None:
        """End the connection, and the server if we started it."""
        # of a server that is dead already nothing more is wanted
        with suppress(Exception):
            self._stack.close()

    def _list(self) -> list[Tool]:
        found: list[Tool] = []
        cursor: str | None = None
        while True:
            page = self._portal.call(partial(self._client.list_tools, cursor=cursor))
            found += [declare(one.name, one.description or "", one.input_schema) for one in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                return found


REFUSALS = frozenset({-32601, -32602, -32603})
"""JSON-RPC: no such method, invalid parameters, internal error: the server is there and said no"""


def _said(error: BaseException) -> str:
    """The innermost of grouped exceptions, in words."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
