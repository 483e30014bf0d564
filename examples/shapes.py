"""Functions that become tools: `glmctl data agentic` reads their signatures and docstrings."""

from __future__ import annotations

import math
from typing import Literal


def area(shape: Literal["circle", "square"], size: float) -> float:
    """Area of a circle of a given radius, or of a square of a given side."""
    return round(math.pi * size**2 if shape == "circle" else size**2, 4)


def convert(value: float, unit: Literal["cm", "inch"] = "inch") -> str:
    """Convert a length in metres."""
    return f"{value * 100:g} cm" if unit == "cm" else f"{value / 0.0254:.2f} inch"
