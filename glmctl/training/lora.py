"""Low-rank adapters on attention and experts (Hu et al. 2021), trained in place of the weights and saved as PEFT does.

The network keeps its names: an adapted matrix is still `q_proj.weight`, with `q_proj.lora_A` and `q_proj.lora_B` beside
it, so checkpoints, generation and export know nothing of adapters. The multi-token-prediction layer has none: PEFT's
models do not have that layer, and an adapter that only we can read would help nobody.

Legend: E experts, r rank, D hidden, I expert width, O outputs of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmctl.errors import RecipeError
from glmctl.kernels.experts import experts
from glmctl.model.block import DecoderLayer, Experts
from glmctl.model.folder import copy_tokenizer
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import write_tensors
from glmctl.recipe.lora import LoraSpec
from glmctl.run import atomic

ABSORBED = "kv_b_proj"
"""MLA reads this matrix itself when it continues a cache, past the module's forward: it gets no adapter"""
HALVES = ("gate_proj", "up_proj", "down_proj")


class LoraLinear(nn.Linear):
    """y = W x + b + scale * B A x, W and b frozen and shared with the matrix that it stands for."""

    def __init__(self, base: nn.Linear, spec: LoraSpec, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        # in a tuple, so that its weights do not get a second name
        self._base = (base,)
        self.weight, self.bias = base.weight, base.bias
        self.scale = spec.scale
        self.lora_A, self.lora_B = _pair(base.weight, spec.rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., O]."""
        low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight, self.bias) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The matrix that was adapted, with the adapter added into it."""
        self.weight += self.scale * (self.lora_B @ self.lora_A)
        return self._base[0]

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path below this module, A [r, D], B [O, r])."""
        yield "", self.lora_A, self.lora_B


class LoraExperts(Experts):
    """Routed experts with a pair of their own for every gate, up and down of every expert.

    The products B A are added to the stacked weights before the tokens are sent through: each expert meets tokens of
    its own choice only, and the stack is small beside the activations of a training step.
    """

    def __init__(self, base: Experts, spec: LoraSpec, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self._base = (base,)
        self.gate_up_proj, self.down_proj = base.gate_up_proj, base.down_proj
        self.scale = spec.scale
        gate_EID, up_EID = base.gate_up_proj.chunk(2, dim=1)
        for name, weight in zip(HALVES, (gate_EID, up_EID, base.down_proj), strict=True):
            a, b = _pair(weight, spec.rank, generator)
            self.register_parameter(f"{name}_lora_A", a)
            self.register_parameter(f"{name}_lora_B", b)

    def forward(self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """x [N, D] through the chosen experts, weighted and summed: [N, D]."""
        gate_up_EGD, down_EDI = self._adapted()
        return experts(x_ND, index_NK, weight_NK, gate_up_EGD, down_EDI)

    @torch.no_grad()
    def merged(self) -> Experts:
        """The experts that were adapted, with the adapters added into them."""
        gate_up_EGD, down_EDI = self._adapted()
        self.gate_up_proj.copy_(gate_up_EGD)
        self.down_proj.copy_(down_EDI)
        return self._base[0]

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(path below this module, A [r, D], B [O, r]) of every expert's matrices."""
        for expert in range(self.down_proj.shape[0]):
            for name in HALVES:
                a_ErD, b_EOr = self._pair(name)
                yield f".{expert}.{name}", a_ErD[expert], b_EOr[expert]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_parameter(f"{name}_lora_A"), self.get_parameter(f"{name}_lora_B")

    def _adapted(self) -> tuple[Tensor, Tensor]:
        gate, up, down = (torch.bmm(b_EOr, a_ErD) for a_ErD, b_EOr in map(self._pair, HALVES))
        gate_up = torch.cat([gate, up], dim=1)
        return self.gate_up_proj + self.scale * gate_up, self.down_proj + self.scale * down


def _pair(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """A uniform within 1 / sqrt(D) (Kaiming, a = sqrt 5, as PEFT draws it), B zero: the model starts unchanged."""
    *stack, rows, columns = weight.shape
    bound = 1 / math.sqrt(columns)
    drawn = torch.empty(*stack, rank, columns).uniform_(-bound, bound, generator=generator)
    zero = torch.zeros(*stack, rows, rank)
    return (
        nn.Parameter(drawn.to(weight.device, weight.dtype)),
        nn.Parameter(zero.to(weight.device, weight.dtype)),
    )


def add_lora(model: GlmMoe, spec: LoraSpec, seed: int) -> None:
    """Freeze `model` and put adapters on the matrices that `spec` names; its outputs do not change.

    Raises RecipeError when an adapter could not be kept: Step 3's files stack the experts, PEFT's format does not.
    """
    if spec.export == "adapter" and model.config.attention == "mfa":
        raise RecipeError("lora.export: PEFT's format has no name for Step 3's stacked experts; 'merged' works")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for parent, name, module in list(_adaptable(model, spec)):
        kind = LoraExperts if isinstance(module, Experts) else LoraLinear
        setattr(parent, name, kind(module, spec, generator))  # type: ignore[arg-type]


def merge_adapters(model: GlmMoe) -> None:
    """Add every adapter into its matrix and leave the plain network, trainable again."""
    for _, parent, name, module in list(_adapters(model)):
        setattr(parent, name, module.merged())
    model.requires_grad_(True)


def adapter_tensors(model: GlmMoe) -> dict[str, Tensor]:
    """The adapters by their names in PEFT's files (`base_model.model.<module>.lora_A.weight`)."""
    found = {}
    for path, _, _, module in _adapters(model):
        for below, a, b in module.pairs():
            prefix = f"base_model.model.model.{path}{below}"
            found[f"{prefix}.lora_A.weight"], found[f"{prefix}.lora_B.weight"] = a.detach(), b.detach()
    return found


def save_adapter(model: GlmMoe, spec: LoraSpec, folder: Path, base: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors` for the model in `base`, and its tokenizer."""
    tensors = adapter_tensors(model)
    body: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": sorted({name.rsplit(".", 3)[1] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    atomic.write_json(folder / "adapter_config.json", body)
    write_tensors(folder / "adapter_model.safetensors", ((name, one.contiguous()) for name, one in tensors.items()))
    copy_tokenizer(base, folder)


def _adaptable(model: GlmMoe, spec: LoraSpec) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every matrix, or stack of experts, that `spec` puts an adapter on."""
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        rooms: list[nn.Module] = []
        if "attention" in spec.targets:
            rooms.append(layer.self_attn)
        if "experts" in spec.targets:
            rooms.append(layer.mlp)
        for room in rooms:
            for name, child in room.named_children():
                # of a feed-forward the routed experts only: see the top of this file
                wanted = nn.Linear if room is layer.self_attn else Experts
                if isinstance(child, wanted) and name != ABSORBED:
                    yield room, name, child


def _adapters(model: GlmMoe) -> Iterator[tuple[str, nn.Module, str, LoraLinear | LoraExperts]]:
    """(path, parent, name, module) of every adapter."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear | LoraExperts):
            parent, _, name = path.rpartition(".")
            yield path, model.get_submodule(parent), name, module
