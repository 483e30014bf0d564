"""Which problems a step draws from: everything, or the pools of a curriculum's stages one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from glmctl import console
from glmctl.errors import DataError
from glmctl.recipe.schema import AfterSteps, HardStage, ModerateStage, OnPlateau, RlRecipe
from glmctl.rl.difficulty import Attempt, Pool, hard_pool, moderate_pool
from glmctl.rl.environment import Problem
from glmctl.rl.plateau import Plateau
from glmctl.rl.prompts import Prompts


class Curriculum:
    """The current stage, its pool and its prompts. Without a curriculum in the recipe: one stage with every problem."""

    def __init__(self, recipe: RlRecipe, problems: Sequence[Problem]) -> None:
        self._problems = problems
        self._seed = recipe.seed
        self._stages = () if recipe.curriculum is None else tuple(recipe.curriculum.stages)
        self._all = recipe.group_size
        self._at = -1
        """the stage; -1 before the first"""
        self._began = 1
        self._kept = list(range(len(problems)))
        """the pool, as places in `problems`"""
        self._pool_name = ""
        self._plateau: Plateau | None = None
        self.prompts = Prompts(problems, recipe.seed)

    @property
    def group_size(self) -> int:
        """Samples a prompt in this stage."""
        stage = self._stage
        return self._all if stage is None or stage.group_size is None else stage.group_size

    @property
    def due(self) -> bool:
        """Whether the next stage is to begin before the next step."""
        return bool(self._stages) and self._at < 0

    def fields(self) -> dict[str, Any]:
        """What a step's row says of it; nothing without a curriculum."""
        return {} if self._stage is None else {"stage": self._stage.name, "pool": len(self._kept)}

    def enter(self, step: int, attempt: Attempt) -> dict[str, Any]:
        """Begin the next stage with `step`: measure the problems and keep the stage's. Returns the pool's statistics.

        A later stage without a single problem is passed over, with a warning, and the pool before it stays. Raises
        DataError when the first one has none.
        """
        self._at += 1
        stage, self._began = self._stages[self._at], step
        until = stage.until
        self._plateau = Plateau(until) if isinstance(until, OnPlateau) else None
        pool = _measured(stage, self._problems, attempt)
        shown = ", ".join(f"{key} {value}" for key, value in pool.statistics.items() if not isinstance(value, dict))
        console.note(f"curriculum stage {stage.name}: {shown}")
        if pool.kept:
            self._kept, self._pool_name = pool.kept, stage.name
            self._draw_from_pool(0)
        elif self._at == 0:
            raise DataError(
                f"curriculum: no problem is in stage '{stage.name}' for this policy: {shown}",
                hint="widen the stage's bounds, or begin with other problems or a better model",
            )
        else:
            console.warn(f"curriculum: no problem is in stage '{stage.name}'; the pool before it stays")
        return {"stage": stage.name, "kept": len(pool.kept), **pool.statistics}

    def after_step(self, step: int, reward: float) -> bool:
        """See the mean reward of `step`; whether the stage is over, so that `enter` is to be called."""
        stage = self._stage
        if stage is None or stage.until is None:
            return False
        if isinstance(stage.until, AfterSteps):
            return step - self._began + 1 >= stage.until.steps
        assert self._plateau is not None
        self._plateau.see(reward)
        return self._plateau.reached

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "stage": self._at,
            "began": self._began,
            "pool": self._pool_name,
            "kept": self._kept if self._stages else None,
            "drawn": self.prompts.drawn,
            "rewards": [] if self._plateau is None else list(self._plateau.values),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._at, self._began = int(state["stage"]), int(state["began"])
        self._pool_name = str(state["pool"])
        if state["kept"] is not None:
            self._kept = [int(i) for i in state["kept"]]
        self._draw_from_pool(int(state["drawn"]))
        if self._stage is not None and isinstance(self._stage.until, OnPlateau):
            self._plateau = Plateau(self._stage.until, state["rewards"])

    def _draw_from_pool(self, drawn: int) -> None:
        kept = [self._problems[i] for i in self._kept]
        self.prompts = Prompts(kept, self._seed, name=self._pool_name, drawn=drawn)

    @property
    def _stage(self) -> ModerateStage | HardStage | None:
        return self._stages[self._at] if self._stages and self._at >= 0 else None


def _measured(stage: ModerateStage | HardStage, problems: Sequence[Problem], attempt: Attempt) -> Pool:
    if isinstance(stage, ModerateStage):
        return moderate_pool(problems, stage, attempt)
    return hard_pool(problems, stage, attempt)
