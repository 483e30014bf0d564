"""What changes during an `rl` run: curriculum, temperature, length, and how rollouts are made. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import Section


class PlateauRule(Section):
    """The mean of the last `window` values is less than `min_gain` above the mean of the `window` before them."""

    window: int = Field(20, gt=0, description="steps")
    min_gain: float = Field(0.005, ge=0.0, description="in units of the reward")


class AfterSteps(Section):
    """A stage ends after a number of steps (the report: about 1500)."""

    type: Literal["steps"] = "steps"
    steps: int = Field(gt=0, description="of this stage")


class OnPlateau(PlateauRule):
    """A stage ends when the mean rollout reward stops rising."""

    type: Literal["plateau"] = "plateau"


Switch = Annotated[AfterSteps | OnPlateau, Field(discriminator="type")]


class PoolStage(Section):
    """What the stages of a curriculum share."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    group_size: int | None = Field(None, gt=1, description="samples a prompt in this stage; null = the recipe's")
    measure: int | None = Field(None, gt=0, description="most problems whose difficulty is measured; null = all")
    until: Switch | None = Field(None, description="what ends the stage; null for the last one only")


class ModerateStage(PoolStage):
    """Problems that the policy solves sometimes, by the share of its samples that are right."""

    type: Literal["moderate"] = "moderate"
    samples: int = Field(16, gt=1, description="drawn for each problem to measure its pass rate")
    low: float = Field(0.1, ge=0.0, le=1.0, description="lowest pass rate that is kept")
    high: float = Field(0.9, ge=0.0, le=1.0, description="highest pass rate that is kept")
    group_size: int | None = Field(16, gt=1)

    @model_validator(mode="after")
    def _ordered(self) -> ModerateStage:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class HardStage(PoolStage):
    """Problems of which the first `failed` samples are all wrong, and one of `solved` samples is right.

    The report's second stage: pass@8 = 0 and pass@512 > 0, with 512 samples a prompt.
    """

    type: Literal["hard"] = "hard"
    failed: int = Field(8, gt=0)
    solved: int = Field(512, gt=1)
    group_size: int | None = Field(512, gt=1)

    @model_validator(mode="after")
    def _ordered(self) -> HardStage:
        if self.solved <= self.failed:
            raise ValueError("solved is not above failed")
        return self


DifficultyStage = Annotated[ModerateStage | HardStage, Field(discriminator="type")]


class Curriculum(Section):
    """Difficulty by pass@k under the policy as it is when a stage begins; only problems with verified answers."""

    stages: list[DifficultyStage] = Field(
        [ModerateStage(name="moderate", until=AfterSteps(steps=1500)), HardStage(name="hard")], min_length=1
    )

    @model_validator(mode="after")
    def _ends(self) -> Curriculum:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("two stages have one name")
        if any(stage.until is None for stage in self.stages[:-1]) or self.stages[-1].until is not None:
            raise ValueError("every stage but the last has an `until`")
        return self


class DynamicTemperature(Section):
    """The report's rule: on a plateau of the reward, and from time to time, validate a range of temperatures.

    The next temperature is the largest whose score is at most `tolerance` (relative) below the best of the grid. The
    report gives neither grid nor window.
    """

    grid: list[float] = Field([0.6, 0.8, 1.0, 1.1, 1.2, 1.3, 1.4], min_length=2)
    plateau: PlateauRule = PlateauRule()
    every: int | None = Field(None, gt=0, description="steps between validations without a plateau; null = never")
    tolerance: float = Field(0.01, ge=0.0, lt=1.0)
    samples: int = Field(4, gt=0, description="of each held-out problem at each temperature")
    problems: int = Field(100, gt=0, description="most held-out problems that are used")

    @model_validator(mode="after")
    def _rises(self) -> DynamicTemperature:
        if sorted(set(self.grid)) != self.grid or not 0 < self.grid[0] <= self.grid[-1] <= 2:
            raise ValueError("grid must rise, from above 0 to at most 2")
        return self


class LengthStage(Section):
    """From step `from_step` on a turn has at most `max_tokens` tokens."""

    from_step: int = Field(gt=0)
    max_tokens: int = Field(gt=0)


class Rollouts(Section):
    """How a batch of rollouts comes about."""

    until_full: bool = Field(
        False, description="draw until prompts_per_step groups are complete and useful, then stop the rest"
    )
    max_draw: float = Field(4.0, ge=1.0, description="most prompts a step, as a multiple of prompts_per_step")
    unfinished: Literal["drop", "carry"] = Field(
        "drop", description="carry: what was stopped goes on in the next step, under its weights"
    )
    max_staleness: int = Field(1, ge=1, description="weight versions that a carried token may be old; older groups go")
    precision: Literal["fp32", "fp8-block"] = Field(
        "fp32", description="fp8-block: weights rounded to E4M3 in 128x128 blocks at every update (emulated in fp32)"
    )
    fp8_gap_limit: float = Field(0.2, gt=0.0, description="takes the place of objective.logprob_gap_limit under FP8")
    speculative: int = Field(0, ge=0, le=3, description="tokens that the MTP layer drafts in a decoding step")
    record: bool = Field(False, description="write every rollout to rollouts/, for train_only and for looking")

    @model_validator(mode="after")
    def _fits(self) -> Rollouts:
        if self.unfinished == "carry" and not self.until_full:
            raise ValueError("unfinished: carry needs until_full; without it every rollout ends in its step")
        return self
