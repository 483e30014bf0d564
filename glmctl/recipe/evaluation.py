"""The `eval` recipe and its sections. Importable without torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from glmctl.recipe.rl import SandboxSpec
from glmctl.recipe.sections import RecipeBase, Sampling, Section
from glmctl.recipe.use import RoundedFormat


class Needle(Section):
    """`glmctl_needle`: one sentence hidden at every depth of haystacks of every length, then asked for."""

    lengths: list[int] = Field(
        [], description="tokens of haystack, question and answer; none = an eighth to the whole of the model's context"
    )
    depths: int = Field(5, gt=1, description="places, from the beginning (0%) to the end (100%), evenly")
    samples: int = Field(4, gt=0, description="haystacks for each length and depth")
    needles: int = Field(1, gt=0, le=20, description="sentences hidden in one haystack, of which one is asked for")
    digits: int = Field(5, gt=0, le=12, description="of the number that is to be found")
    statement: str = "The {key} number is {value}."
    question: str = Field("\nThe {key} number is", description="follows the haystack; the answer follows after a space")
    between: str = Field("\n", description="between the sentences of the haystack")
    keys: list[str] = Field([], description="words that name the hidden sentences; none = twenty English ones")
    texts: list[str] = Field([], description="JSON lines to hide it in; none = the Jargon File, which ships here")

    @model_validator(mode="after")
    def _placeholders(self) -> Needle:
        for name, text, wanted in (
            ("statement", self.statement, ("{key}", "{value}")),
            ("question", self.question, ("{key}",)),
        ):
            for place in wanted:
                if place not in text:
                    raise ValueError(f"needle.{name} has no {place}")
        if self.keys and len(set(self.keys)) < self.needles:
            raise ValueError(f"needle.keys: {len(set(self.keys))} different words cannot name {self.needles} needles")
        return self


class EvalRecipe(RecipeBase):
    """lm-eval over one or several models; tasks are lm-eval names, our own offline ones, or problem files."""

    type: Literal["eval"] = "eval"
    models: dict[str, str] = Field(min_length=1)
    weights: dict[str, RoundedFormat] = Field(
        {}, description="model -> packed format that its weights are rounded to first: what a quantised runner loses"
    )
    tasks: list[str] = Field([], description="lm-eval names of tasks and groups; `glmctl eval --list` shows ours")
    problems: dict[str, str] = Field({}, description="task name -> problem file, scored by its verifier")
    perplexity_texts: list[str] = Field([], description="JSON lines for glmctl_perplexity; none = the set that ships")
    needle: Needle = Needle()
    limit: int | float | None = Field(None, gt=0, description="questions of each task; below 1 a share of them")
    num_fewshot: int | None = Field(None, ge=0)
    fewshot_seed: int = Field(1234, ge=0, description="draws the examples; 1234 is lm-eval's own")
    apply_chat_template: bool = Field(False, description="for tasks that are not ours; ours know when")
    fewshot_as_multiturn: bool = Field(True, description="with a chat template: each example a turn of its own")
    system_instruction: str | None = Field(None, description="before every prompt of tasks that are not ours")
    gen_kwargs: dict[str, Any] = Field({}, description="laid over the generation settings of tasks that are not ours")
    think_end_token: str | None = Field(
        None, description="of tasks that are not ours, only what follows it is the answer, e.g. </think>"
    )
    include_path: str | None = Field(None, description="a folder with lm-eval tasks of your own")
    metadata: dict[str, Any] = Field({}, description="handed to lm-eval's tasks, as its --metadata")
    confirm_run_unsafe_code: bool = Field(False, description="let lm-eval's tasks run what the model wrote, unboxed")
    enable_thinking: bool = True
    sampling: Sampling = Sampling(temperature=0.0)
    max_turns: int = Field(4, gt=0, description="model turns in one episode of a problem")
    samples_per_problem: int = Field(
        1, gt=0, description="more than 1: avg@n and pass@k; needs sampling.temperature > 0"
    )
    sandbox: SandboxSpec = SandboxSpec()
    speculative_limit: int = Field(16, ge=0, description="problems of each file decoded with and without MTP drafts")
    batch_tokens: int = Field(8192, gt=0, description="most tokens in one forward pass")
    max_slots: int = Field(64, gt=0, description="requests that generate at once")
    bootstrap_iters: int = Field(100_000, ge=0, description="for standard errors that need it; 0 = no standard errors")
    use_cache: str | None = Field(None, description="folder of answers to keep beyond this run")

    @model_validator(mode="after")
    def _rounds_its_models(self) -> EvalRecipe:
        for name in self.weights:
            if name not in self.models:
                raise ValueError(f"weights: '{name}' is none of the models: {', '.join(self.models)}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> EvalRecipe:
        if self.samples_per_problem > 1 and self.sampling.temperature == 0:
            raise ValueError("samples_per_problem > 1 with sampling.temperature 0 would be the same answer again")
        if self.limit is not None and self.limit > 1 and self.limit != int(self.limit):
            raise ValueError("limit is a number of questions, or a share below 1")
        return self
