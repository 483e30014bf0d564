"""Every kind of recipe, typed. Importable without torch.

A recipe file is YAML with a `type`; the type decides which fields exist. Unknown keys are refused.
Token counts are numbers of tokens, learning rates are per optimizer step, sizes are in the unit named.
A path field may name a file, a folder, a run directory, or (inside a pipeline) `${stage}`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from glmctl.model.config import ModelConfig
from glmctl.recipe.presets import resolve_model


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ----------------------------------------------------------------------------- sources of text


class TextSource(Section):
    """Plain text files, one document a file."""

    type: Literal["text"] = "text"
    domain: str
    paths: list[str]
    weight: float = Field(1.0, gt=0, description="times each document is seen in one epoch (mixture weight)")
    max_bytes: int | None = Field(None, gt=0)


class JsonLinesSource(Section):
    """JSON lines (optionally .gz), one document a line under `field`."""

    type: Literal["jsonl"] = "jsonl"
    domain: str
    paths: list[str]
    field: str = "text"
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class SourceTree(Section):
    """Source code below `root`; `python:stdlib` names the running interpreter's standard library."""

    type: Literal["source_tree"] = "source_tree"
    domain: str
    root: str
    include: list[str] = ["*.py"]
    exclude: list[str] = ["test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data", "__pycache__"]
    repo_level: bool = Field(True, description="join the files of one package, in dependency order, in one document")
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class BundledText(Section):
    """Prose that is at hand without a network: `jargon-file` ships here, `python-topics` with CPython."""

    type: Literal["bundled"] = "bundled"
    domain: str
    text: Literal["jargon-file", "python-topics"]
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


class ConversationsSource(Section):
    """JSON lines of {messages, tools?}, rendered by the chat template: instruction data for mid-training."""

    type: Literal["conversations"] = "conversations"
    domain: str
    paths: list[str]
    weight: float = Field(1.0, gt=0)
    max_bytes: int | None = Field(None, gt=0)


Source = Annotated[
    TextSource | JsonLinesSource | SourceTree | BundledText | ConversationsSource, Field(discriminator="type")
]


class FillInTheMiddle(Section):
    """Applied to source code only; rate and order are not given in the report (spec section 2)."""

    rate: float = Field(0.5, ge=0.0, le=1.0)
    spm_rate: float = Field(0.5, ge=0.0, le=1.0, description="share of FIM documents in suffix-prefix-middle order")


# ----------------------------------------------------------------------------- shared sections


class MuonSpec(Section):
    """Muon for matrices; embedding, biases and norms go to AdamW with the same rate and decay."""

    type: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    ns_steps: int = Field(5, gt=0)
    update_rms: float = Field(0.2, gt=0.0, description="RMS of the orthogonalised update before the rate")
    weight_decay: float = Field(0.1, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)
    head: Literal["adamw", "muon"] = Field("adamw", description="optimizer of lm_head; the report leaves it open")


class AdamWSpec(Section):
    """AdamW for everything; decay on matrices only."""

    type: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.1, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0.0)


Optimizer = Annotated[MuonSpec | AdamWSpec, Field(discriminator="type")]


class Schedule(Section):
    """Linear warm-up from zero, then one cosine to `final_lr` at the end of the last stage."""

    peak_lr: float = Field(2.5e-4, gt=0.0)
    final_lr: float = Field(2.5e-5, ge=0.0)
    warmup_fraction: float = Field(0.01, ge=0.0, lt=1.0, description="of all tokens (pretrain) or steps (else)")

    @model_validator(mode="after")
    def _falls(self) -> Schedule:
        if self.final_lr > self.peak_lr:
            raise ValueError("final_lr is above peak_lr")
        return self


class CheckpointPolicy(Section):
    every_steps: int = Field(50, gt=0)
    keep: int = Field(2, gt=0)


class Balance(Section):
    """Loss-free balancing plus the sequence-level loss (spec section 2)."""

    bias_update_rate: float = Field(1e-3, ge=0.0)
    until_tokens: int | None = Field(None, gt=0, description="rate is 0 from here on; null = never")
    center: bool = Field(False, description="subtract the mean of the signs (Moonlight's variant)")
    sequence_loss_weight: float = Field(1e-4, ge=0.0)


class MtpLoss(Section):
    weight: float = Field(0.3, ge=0.0)
    then_weight: float = Field(0.1, ge=0.0)
    switch_tokens: int | None = Field(None, gt=0, description="tokens after which `then_weight` holds; null = never")


class Sampling(Section):
    temperature: float = Field(1.0, ge=0.0, le=2.0, description="0 = greedy")
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0, description="0 = off")
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    max_tokens: int = Field(256, gt=0)


class RecipeBase(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)


# ----------------------------------------------------------------------------- recipes


class TokenizerRecipe(RecipeBase):
    """Train a byte-level BPE that carries GLM's 36 special tokens in their order."""

    type: Literal["tokenizer"] = "tokenizer"
    sources: list[Source]
    vocab_size: int = Field(4096, ge=320, description="with the 36 special tokens")
    digits: Literal[1, 3] = Field(3, description="most digits in one pre-token; GLM uses 3")


class DataRecipe(RecipeBase):
    """Text to token shards with a manifest."""

    type: Literal["data"] = "data"
    tokenizer: str
    sources: list[Source]
    fim: FillInTheMiddle = FillInTheMiddle()
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5, description="of documents, chosen by content hash")
    shard_tokens: int = Field(16_777_216, gt=0)
    max_bad_rows: float = Field(0.01, ge=0.0, le=1.0, description="share of unreadable rows that is tolerated")


class ArithmeticTask(Section):
    """Integer expressions, worked left to right in the reasoning; the answer is verified exactly."""

    type: Literal["arithmetic"] = "arithmetic"
    terms: tuple[int, int] = (2, 3)
    max_value: int = Field(99, gt=0)
    operators: str = Field("+-", pattern=r"^[+*-]+$")
    hasty: float = Field(
        0.0, ge=0.0, le=1.0, description="share of demonstrations that write the result in one go, without steps"
    )


class ToolUseTask(Section):
    """Questions that need one call of a small set of tools, then an answer that uses its result."""

    type: Literal["tool_use"] = "tool_use"
    max_value: int = Field(99, gt=0)


Task = Annotated[ArithmeticTask | ToolUseTask, Field(discriminator="type")]


class ProblemsRecipe(RecipeBase):
    """Generate verifiable problems: train, held-out (disjoint) and scripted cold-start conversations."""

    type: Literal["problems"] = "problems"
    task: Task
    train: int = Field(2000, gt=0)
    heldout: int = Field(200, gt=0)
    cold_start: int = Field(500, ge=0, description="training problems that also get a scripted demonstration")


class TrainStage(Section):
    """One stretch of pretraining with its own data, length and RoPE base."""

    name: str
    data: str
    tokens: int = Field(gt=0)
    sequence_length: int = Field(gt=1)
    packing: Literal["concat", "best_fit"] = "concat"
    rope_theta: float | None = Field(None, gt=0.0, description="null keeps the base of the stage before")


class BatchRamp(Section):
    """Tokens per optimizer step: from `start_tokens`, rising linearly over `ramp_tokens`, to `tokens`."""

    tokens: int = Field(gt=0)
    start_tokens: int | None = Field(None, gt=0)
    ramp_tokens: int = Field(0, ge=0)
    micro_tokens: int | None = Field(None, gt=0, description="most tokens in one forward pass; null = the whole batch")


class Validation(Section):
    every_steps: int = Field(100, gt=0)
    tokens: int = Field(65_536, gt=0)


class PretrainRecipe(RecipeBase):
    type: Literal["pretrain"] = "pretrain"
    model: ModelConfig
    tokenizer: str
    stages: list[TrainStage] = Field(min_length=1)
    batch: BatchRamp
    optimizer: Optimizer = MuonSpec()
    schedule: Schedule = Schedule()
    balance: Balance = Balance()
    mtp: MtpLoss = MtpLoss()
    grad_clip: float = Field(1.0, gt=0.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    validation: Validation = Validation()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    sample_prompts: list[str] = []
    trackers: list[str] = Field([], description="Accelerate trackers beside metrics.jsonl")

    @field_validator("model", mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return resolve_model(value)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)


class SftRecipe(RecipeBase):
    """Packed supervised fine-tuning on conversations; loss on assistant tokens and the closing role token."""

    type: Literal["sft"] = "sft"
    model: str
    data: list[str] = Field(min_length=1, description="JSON lines of {messages, tools?, enable_thinking?}")
    steps: int = Field(gt=0)
    batch_tokens: int = Field(8192, gt=0)
    micro_tokens: int | None = Field(None, gt=0)
    sequence_length: int = Field(512, gt=1)
    loss_on: Literal["last_turn", "all_turns"] = "last_turn"
    optimizer: Optimizer = MuonSpec()
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-5, warmup_fraction=0.05)
    mtp_weight: float = Field(0.1, ge=0.0)
    grad_clip: float = Field(1.0, gt=0.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    trackers: list[str] = []


class GrpoSpec(Section):
    """GRPO without KL (spec section 3.3); clip values are slime's, the report gives none."""

    type: Literal["grpo"] = "grpo"
    clip_low: float = Field(0.2, gt=0.0)
    clip_high: float = Field(0.28, gt=0.0)
    std_normalize: bool = True
    aggregation: Literal["token", "sequence"] = "token"
    updates_per_batch: int = Field(1, gt=0)


class RlRecipe(RecipeBase):
    """Synchronous, colocated RL on verifiable rewards, rollouts from our own engine."""

    type: Literal["rl"] = "rl"
    model: str
    problems: list[str] = Field(min_length=1, description="problem files to train on")
    heldout: list[str] = Field(min_length=1, description="problem files never trained on")
    heldout_limit: int = Field(200, gt=0)
    steps: int = Field(gt=0)
    prompts_per_step: int = Field(16, gt=0)
    group_size: int = Field(8, gt=1)
    max_turns: int = Field(4, gt=0)
    episode_tokens: int = Field(1024, gt=1, description="most tokens of an episode, prompt and tool results counted")
    dynamic_sampling: bool = Field(True, description="replace groups whose rewards are all equal")
    oversample: float = Field(1.5, ge=1.0, description="prompts drawn per step, as a multiple of prompts_per_step")
    enable_thinking: bool = True
    sampling: Sampling = Sampling()
    objective: GrpoSpec = GrpoSpec()
    optimizer: Optimizer = AdamWSpec(weight_decay=0.0, betas=(0.9, 0.98))
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-4, warmup_fraction=0.0)
    mtp_weight: float = Field(0.0, ge=0.0, description="MTP loss on rollouts, gradient kept out of the main model")
    micro_tokens: int | None = Field(None, gt=0)
    grad_clip: float = Field(1.0, gt=0.0)
    evaluate_every: int = Field(20, gt=0)
    checkpoint: CheckpointPolicy = CheckpointPolicy(every_steps=10)
    trackers: list[str] = []


class Teacher(Section):
    """An expert and the problems it is asked."""

    name: str
    model: str
    problems: list[str] = Field(min_length=1)
    heldout: list[str] = Field(min_length=1)
    prompts: int = Field(gt=0)
    samples_per_prompt: int = Field(4, gt=0)
    direct_fraction: float = Field(0.3, ge=0.0, le=1.0, description="share of kept samples turned into /nothink ones")


class DistillRecipe(RecipeBase):
    """Rejection-sample the experts and train one hybrid model from the base (overall SFT)."""

    type: Literal["distill"] = "distill"
    teachers: list[Teacher] = Field(min_length=1)
    student: str = Field(description="the base model, before any expert training")
    sampling: Sampling = Sampling(temperature=0.8)
    min_tokens: int = Field(4, ge=0)
    max_turns: int = Field(4, gt=0)
    episode_tokens: int = Field(1024, gt=1, description="most tokens of an episode, prompt and tool results counted")
    select_hard_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="share of prompts kept, longest responses first; the report keeps 0.5"
    )
    responses_per_prompt: int = Field(4, gt=0, description="most verified responses kept of one prompt")
    heldout_limit: int = Field(200, gt=0)
    steps: int = Field(gt=0)
    batch_tokens: int = Field(8192, gt=0)
    micro_tokens: int | None = Field(None, gt=0)
    sequence_length: int = Field(512, gt=1)
    loss_on: Literal["last_turn", "all_turns"] = "last_turn"
    optimizer: Optimizer = MuonSpec()
    schedule: Schedule = Schedule(peak_lr=1e-4, final_lr=1e-5, warmup_fraction=0.05)
    mtp_weight: float = Field(0.1, ge=0.0)
    grad_clip: float = Field(1.0, gt=0.0)
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    trackers: list[str] = []


class EvalRecipe(RecipeBase):
    """lm-eval over one or several models; tasks are lm-eval names, our own offline ones, or problem files."""

    type: Literal["eval"] = "eval"
    models: dict[str, str] = Field(min_length=1)
    tasks: list[str] = Field([], description="lm-eval task names; ours are listed by `glmctl eval --list`")
    problems: dict[str, str] = Field({}, description="task name -> problem file, scored by its verifier")
    perplexity_texts: list[str] = Field([], description="JSON lines for glmctl_perplexity; none = the set that ships")
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    apply_chat_template: bool = Field(False, description="for tasks that are not ours; ours know when")
    enable_thinking: bool = True
    sampling: Sampling = Sampling(temperature=0.0)
    max_turns: int = Field(4, gt=0, description="model turns in one episode of a problem")
    speculative_limit: int = Field(16, ge=0, description="problems of each file decoded with and without MTP drafts")
    batch_tokens: int = Field(8192, gt=0, description="most tokens in one forward pass")
    max_slots: int = Field(64, gt=0, description="requests that generate at once")
    bootstrap_iters: int = Field(0, ge=0)


class ConvertRecipe(RecipeBase):
    """Run checkpoint to Hugging Face folder or back, verified tensor by tensor."""

    type: Literal["convert"] = "convert"
    source: str
    to: Literal["hf", "checkpoint"] = "hf"
    dtype: Literal["float32", "bfloat16", "keep"] = "keep"
    shard_bytes: int = Field(5_000_000_000, gt=0)


class ServeRecipe(RecipeBase):
    """The OpenAI-compatible server; with `ask`, it starts, answers these through the official client, and stops."""

    type: Literal["serve"] = "serve"
    model: str
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 = any free port")
    served_name: str | None = None
    max_slots: int = Field(16, gt=0)
    max_queue: int = Field(64, gt=0)
    speculative: int = Field(1, ge=0, le=1, description="tokens drafted by the MTP layer")
    ask: list[str] = []
    ask_problems: list[str] = Field([], description="problem files; the first problem of each is asked too")


class PipelineStage(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    recipe: str
    set: dict[str, Any] = Field({}, description="overrides by dotted key; `${stage}` is that stage's run directory")


class PipelineRecipe(RecipeBase):
    """Several recipes as one resumable run."""

    type: Literal["pipeline"] = "pipeline"
    stages: list[PipelineStage] = Field(min_length=1)


Recipe = Annotated[
    TokenizerRecipe
    | DataRecipe
    | ProblemsRecipe
    | PretrainRecipe
    | SftRecipe
    | RlRecipe
    | DistillRecipe
    | EvalRecipe
    | ConvertRecipe
    | ServeRecipe
    | PipelineRecipe,
    Field(discriminator="type"),
]
