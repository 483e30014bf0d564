"""The `ablation` recipe: one pretraining, changed in one thing at a time. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import RecipeBase, Section


class Variant(Section):
    """What is compared: the common recipe with these keys set."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    set: dict[str, Any] = Field({}, description="overrides by dotted key")
    search: list[dict[str, Any]] = Field(
        [], description="settings of its own, such as learning rates: the best on the first seed is run on all of them"
    )


class AblationRecipe(RecipeBase):
    """Variants of one pretraining at equal tokens, each at its own best setting, over several seeds."""

    type: Literal["ablation"] = "ablation"
    recipe: str = Field(description="the pretrain recipe that every variant changes")
    set: dict[str, Any] = Field({}, description="overrides that all variants share")
    variants: list[Variant] = Field(min_length=2)
    seeds: int = Field(3, gt=0, description="runs of each variant: `seed`, `seed` + 1, ...")
    figure: str = Field("validation_loss", description="key of a run's summary, lower is better")

    @model_validator(mode="after")
    def _named_apart(self) -> AblationRecipe:
        names = [variant.name for variant in self.variants]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two variants are called '{twice}'")
        return self

    @property
    def trials(self) -> int:
        """Pretrainings in all."""
        return sum(max(1, len(variant.search)) - 1 + self.seeds for variant in self.variants)
