"""A chart as a file of its own, for a document to show."""

from __future__ import annotations

import re
from importlib import resources

_GROUND = "<style>svg { background: var(--card); padding: 10px; font-family: system-ui, sans-serif; }</style>"


def standalone(chart: str) -> str:
    """An `<svg>` element of `charts` with the report page's style and ground inside: the text of an .svg file."""
    page = resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>.*?</style>", page, re.DOTALL)
    assert style is not None
    head, body = chart.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style[0]}{_GROUND}{body}\n'
