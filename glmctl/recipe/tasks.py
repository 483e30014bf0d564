"""The verifiable tasks beside arithmetic and tool use, for `problems` recipes. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from glmctl.recipe.sections import Section


class AlgebraTask(Section):
    """Linear equations with rational solutions, judged by math-verify (extra `rl`)."""

    type: Literal["algebra"] = "algebra"
    max_value: int = Field(20, gt=1)


class GymTask(Section):
    """One of reasoning-gym's procedural data sets."""

    type: Literal["gym"] = "gym"
    dataset: str = "chain_sum"
    config: dict[str, Any] = Field({}, description="what the data set is made with")


class CodeTask(Section):
    """Small Python functions with hidden unit tests, run in the sandbox."""

    type: Literal["code"] = "code"
    max_value: int = Field(60, gt=2, description="the largest number in a problem; there are ten kinds for each")
    cases: int = Field(6, gt=0, description="hidden calls a problem")
    hasty: float = Field(0.0, ge=0.0, le=1.0, description="share of demonstrations with a plausible slip in them")


class CodeCallsTask(Section):
    """Tool calls whose argument is code: a probe for how a format of calls carries quotes and line breaks."""

    type: Literal["code_calls"] = "code_calls"
    lines: tuple[int, int] = Field((1, 3), description="fewest and most lines of code")


class ScienceTask(Section):
    """Science questions of your own, multiple choice or open."""

    type: Literal["science"] = "science"
    paths: list[str] = Field(min_length=1)
    filter: Literal["expert_mcq", "mixed"] = Field(
        "expert_mcq", description="expert-verified multiple choice only (the report's finding), or everything"
    )


class InstructionsTask(Section):
    """Texts under constraints that rules can check, seven kinds of them."""

    type: Literal["instructions"] = "instructions"
    constraints: int = Field(2, gt=0, le=4)


class CustomTask(Section):
    """JSON lines of your own, judged by a Python function of your own."""

    type: Literal["custom"] = "custom"
    paths: list[str] = Field(min_length=1)
    verifier: str = Field(pattern=r"^[\w.]+:\w+$", description="package.module:function of (reply, problem) -> -1..1")
