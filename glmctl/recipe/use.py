"""Recipes that use a model: `convert`, `serve`. Importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from glmctl.recipe.sections import RecipeBase, Section

RunnerName = Literal["auto", "torch", "native", "native-bf16", "native-int8", "native-fp8"]
"""who computes the engine's steps, and for the native ones in which format the weights are (docs/native-decoder.md)"""

RoundedFormat = Literal["bf16", "int8", "fp8-block", "fp8-channel"]
"""bf16 and int8 as `native-bf16` and `native-int8` pack; FP8 as `convert` writes it, `native-fp8` in blocks"""


class Upcycling(Section):
    """Sparse upcycling: a dense model's feed-forward becomes every expert of a MoE layer."""

    experts: int = Field(8, gt=1)
    experts_per_token: int = Field(2, gt=0)
    dense_layers: int = Field(1, ge=0, description="first layers that stay dense")

    @model_validator(mode="after")
    def _enough(self) -> Upcycling:
        if self.experts_per_token > self.experts:
            raise ValueError("experts_per_token exceeds experts")
        return self


class ConvertRecipe(RecipeBase):
    """A model in another format; what is written is read back, and small models are compared tensor by tensor."""

    type: Literal["convert"] = "convert"
    source: str = Field(description="model folder, checkpoint or run")
    to: Literal["hf", "checkpoint", "gguf", "megatron"] = "hf"
    dtype: Literal["keep", "float32", "bfloat16", "float16", "q8_0", "fp8-channel", "fp8-block"] = "keep"
    adapter: str | None = Field(None, description="a LoRA adapter in PEFT's layout, to be merged into the weights")
    upcycle: Upcycling | None = Field(None, description="make a dense model's layers mixtures of experts")
    shard_bytes: int = Field(5_000_000_000, gt=0)
    compare_bytes: int = Field(
        2_000_000_000, ge=0, description="models up to this size are also compared tensor by tensor and by logits"
    )

    @model_validator(mode="after")
    def _possible(self) -> ConvertRecipe:
        if self.dtype == "q8_0" and self.to != "gguf":
            raise ValueError("dtype q8_0 exists in GGUF files only; set to=gguf")
        if self.dtype.startswith("fp8") and self.to != "hf":
            raise ValueError(f"dtype {self.dtype} exists in Hugging Face folders only; set to=hf")
        return self


class ServeRecipe(RecipeBase):
    """The OpenAI-compatible server; with `ask`, it starts, answers these through the official client, and stops."""

    type: Literal["serve"] = "serve"
    model: str
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 = any free port")
    served_name: str | None = None
    max_slots: int = Field(16, gt=0)
    max_queue: int = Field(64, gt=0)
    runner: RunnerName = Field("auto", description="auto = native code for an fp32 model on a CPU, else torch")
    max_length: int | None = Field(None, gt=1, description="prompt plus answer, in tokens; none = the model's context")
    speculative: int = Field(1, ge=0, le=3, description="tokens drafted by the MTP layer")
    strict: bool = Field(False, description="refuse request fields that no known API has, rather than ignore them")
    drain_seconds: float = Field(30.0, ge=0, description="how long a stopping server lets answers finish")
    stall_seconds: float = Field(60.0, gt=0, description="longest step of the engine; beyond it, the server gives up")
    api_key_file: str | None = Field(None, description="file of mode 0600; none = GLMCTL_API_KEY, and no key without")
    admin_key_file: str | None = Field(None, description="for /admin/; none = GLMCTL_ADMIN_KEY, and no route without")
    ask: list[str] = Field([], description="questions to answer through the official client before stopping")
    ask_problems: list[str] = Field([], description="problem files; the first problem of each is asked too")
