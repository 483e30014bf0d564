"""The section of a recipe that asks for low-rank adapters. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from glmctl.recipe.sections import Section

LoraTarget = Literal["attention", "experts"]


class LoraSpec(Section):
    """Train low-rank adapters and nothing else (Hu et al. 2021): W + alpha / rank * B A."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)
    targets: tuple[LoraTarget, ...] = Field(("attention", "experts"), description="experts: the routed ones")
    export: Literal["merged", "adapter"] = Field(
        "merged", description="a whole model, or the adapter alone in PEFT's format"
    )

    @field_validator("targets")
    @classmethod
    def _some(cls, value: tuple[LoraTarget, ...]) -> tuple[LoraTarget, ...]:
        if not value:
            raise ValueError("name at least one of attention and experts")
        return value

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank
