"""Muon for the matrices, AdamW for the rest (GLM-4.5 report section 2.4; Moonlight, arXiv 2502.16982).

Muon orthogonalises the momentum of each *logical* matrix: q, k, v and o apart, gate and up apart, each expert apart,
and where MLA stores two in one parameter, those apart. All matrices of one shape, from all layers, go through
Newton-Schulz in one batch; a matrix that is higher than wide travels transposed, so that gate, up and down of an expert
share a batch too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from glmctl.errors import DataError
from glmctl.kernels.newton_schulz import newton_schulz
from glmctl.model.projections import LatentAttention, RowParts
from glmctl.recipe.schema import AdamWSpec, MuonSpec

BATCH_ELEMENTS = 1 << 24
"""largest Newton-Schulz batch, in elements: bounds the scratch memory at a few times 64 MiB in fp32"""

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass
class MuonGroup:
    """The parameters that Muon updates, by name, and their momenta (made at the first step)."""

    named: dict[str, nn.Parameter]
    spec: MuonSpec
    lr: float
    rows: Mapping[str, RowParts] = field(default_factory=dict)
    """how the rows of a parameter are shared out, where it holds several logical matrices"""
    momenta: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self) -> None:
        """M <- mu M + G; O = NewtonSchulz(mu M + G); W <- W - lr (rms sqrt(max(A, B)) O + wd W)."""
        by_shape: dict[tuple[int, int], list[_Pair]] = {}
        names = [name for name, parameter in self.named.items() if parameter.grad is not None]
        if not names:
            return
        gradients = [_gradient(self.named[name]).to(torch.float32) for name in names]
        momenta = [self._momentum(name) for name in names]
        torch._foreach_mul_(momenta, self.spec.momentum)
        torch._foreach_add_(momenta, gradients)
        # Nesterov: the momentum as it will be after the next, equal, gradient
        inputs = torch._foreach_add(gradients, torch._foreach_mul(momenta, self.spec.momentum))
        torch._foreach_mul_([self.named[name] for name in names], 1.0 - self.lr * self.spec.weight_decay)
        for name, direction in zip(names, inputs, strict=True):
            parts = (logical_matrices(name, tensor, self.rows.get(name)) for tensor in (self.named[name], direction))
            for target, part in zip(*parts, strict=True):
                direction_nAB = part.flatten(1, -2)
                shape = direction_nAB.shape[-2:]
                tall = shape[0] > shape[1]
                pair = _Pair(target, direction_nAB.mT if tall else direction_nAB, tall)
                by_shape.setdefault((min(shape), max(shape)), []).append(pair)
        for (A, B), pairs in by_shape.items():
            for chunk in _chunks(pairs, A * B):
                self._apply(chunk, self.spec.update_rms * math.sqrt(max(A, B)))

    def _apply(self, pairs: list[_Pair], scale: float) -> None:
        stacked_nAB = torch.cat([pair.direction_nAB for pair in pairs])
        orthogonal_nAB = newton_schulz(stacked_nAB, self.spec.ns_steps)
        sizes = [len(pair.target) for pair in pairs]
        for pair, update in zip(pairs, torch.split(orthogonal_nAB, sizes), strict=True):
            upright = update.mT if pair.tall else update
            pair.target.add_(upright.reshape(pair.target.shape), alpha=-self.lr * scale)

    def _momentum(self, name: str) -> Tensor:
        if name not in self.momenta:
            self.momenta[name] = torch.zeros_like(self.named[name], dtype=torch.float32)
        return self.momenta[name]


@dataclass
class AdamWGroup:
    """The parameters that AdamW updates, by name. `decayed` names those that weight decay applies to.

    torch's own fused kernel through its functional form: the optimizer class would import torch._dynamo, which
    costs every command seconds.
    """

    named: dict[str, nn.Parameter]
    decayed: frozenset[str]
    spec: MuonSpec | AdamWSpec
    lr: float
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """name -> exp_avg, exp_avg_sq (shaped like the parameter) and step (fp32 scalar)"""

    @torch.no_grad()
    def step(self) -> None:
        """Decoupled weight decay, then the bias-corrected Adam update (Loshchilov and Hutter 2019, algorithm 2)."""
        for decay in {self.spec.weight_decay, 0.0}:
            names = [
                name
                for name, parameter in self.named.items()
                if parameter.grad is not None and (name in self.decayed) == (decay > 0)
            ]
            if names:
                self._apply(names, decay)

    def _apply(self, names: list[str], decay: float) -> None:
        states = [self._state(name) for name in names]
        adamw(
            [self.named[name] for name in names],
            [_gradient(self.named[name]).to(self.named[name].dtype) for name in names],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.spec.betas[0],
            beta2=self.spec.betas[1],
            lr=self.lr,
            weight_decay=decay,
            eps=self.spec.eps,
            maximize=False,
        )

    def _state(self, name: str) -> dict[str, Tensor]:
        if name not in self.state:
            parameter = self.named[name]
            self.state[name] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[name]


class HasNamedParameters(Protocol):
    """A module, as far as an optimizer is concerned."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class MixedOptimizer:
    """Muon and AdamW behind one `step`. A parameter without a gradient is left alone, decay included.

    Its state is a flat dictionary of tensors by parameter name, which is what a checkpoint stores.
    """

    def __init__(self, model: HasNamedParameters, spec: MuonSpec | AdamWSpec, lr: float = 0.0) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.spec = spec
        self.muon: MuonGroup | None = None
        rest = self.named
        if isinstance(spec, MuonSpec):
            matrices = {name: p for name, p in self.named.items() if uses_muon(name, p, spec)}
            rest = {name: p for name, p in self.named.items() if name not in matrices}
            self.muon = MuonGroup(matrices, spec, lr, _row_parts(model))
        self.adamw = AdamWGroup(rest, _decayed(rest, spec), spec, lr)

    def set_lr(self, lr: float) -> None:
        """The rate of the next step, one for all parameters."""
        self.adamw.lr = lr
        if self.muon is not None:
            self.muon.lr = lr

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        if self.muon is not None:
            self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.named.values():
            parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter it updates, in the model's order."""
        return list(self.named.values())

    def state_tensors(self) -> dict[str, Tensor]:
        """`muon.momentum.<name>`, `adamw.{step,exp_avg,exp_avg_sq}.<name>`; empty before the first step."""
        tensors: dict[str, Tensor] = {}
        if self.muon is not None:
            tensors |= {f"muon.momentum.{name}": value for name, value in self.muon.momenta.items()}
        for name, state in self.adamw.state.items():
            tensors |= {f"adamw.{key}.{name}": value for key, value in state.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state that `state_tensors` gave. DataError for a tensor that is missing, extra or mis-shaped."""
        momenta: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for full, value in tensors.items():
            kind, _, rest = full.partition(".")
            key, _, name = rest.partition(".")
            owner = self._owner(kind, key, name)
            if owner is None or (key != "step" and value.shape != owner.shape):
                raise DataError(f"optimizer state '{full}' {list(value.shape)} does not fit this model and optimizer")
            mine = value.to(owner.device, copy=True)
            if kind == "muon":
                momenta[name] = mine
            else:
                moments.setdefault(name, {})[key] = mine
        for name, state in moments.items():
            missing = {"step", "exp_avg", "exp_avg_sq"} - state.keys()
            if missing:
                raise DataError(f"optimizer state '{sorted(missing)[0]}' of '{name}' is missing")
        if self.muon is not None:
            self.muon.momenta = momenta
        self.adamw.state = moments

    def _owner(self, kind: str, key: str, name: str) -> nn.Parameter | None:
        if kind == "muon" and key == "momentum" and self.muon is not None:
            return self.muon.named.get(name)
        if kind == "adamw" and key in ("step", "exp_avg", "exp_avg_sq"):
            return self.adamw.named.get(name)
        return None


def build_optimizer(model: HasNamedParameters, spec: MuonSpec | AdamWSpec, lr: float = 0.0) -> MixedOptimizer:
    """The optimizer of `spec` over the parameters of `model` (the bare GlmMoe, so that names are its own)."""
    return MixedOptimizer(model, spec, lr)


def uses_muon(name: str, parameter: Tensor, spec: MuonSpec) -> bool:
    """Whether Muon updates it: every matrix but the word embedding and, unless asked for, the output head."""
    if parameter.dim() < 2 or name == EMBEDDING:
        return False
    return name != HEAD or spec.head == "muon"


def _decayed(named: dict[str, nn.Parameter], spec: MuonSpec | AdamWSpec) -> frozenset[str]:
    """Beside Muon everything decays alike (Moonlight); alone, AdamW decays matrices only."""
    if spec.weight_decay == 0:
        return frozenset()
    return frozenset(name for name, p in named.items() if isinstance(spec, MuonSpec) or p.dim() >= 2)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class _Pair(NamedTuple):
    """Matrices of one shape, and what moves them; `tall`: the direction travels transposed."""

    target: Tensor
    """[n, A, B], or [1, groups, rows, B] where the rows of another matrix lie between"""
    direction_nAB: Tensor
    tall: bool


def logical_matrices(name: str, tensor: Tensor, rows: RowParts | None = None) -> list[Tensor]:
    """The logical matrices of a parameter as views [n, A, B]; with `rows`, each as [1, groups, rows, B]."""
    if rows is not None:
        grouped = tensor.view(1, rows.groups, sum(rows.sizes), -1)
        return list(torch.split(grouped, list(rows.sizes), dim=2))
    if tensor.dim() == 2:
        return [tensor.unsqueeze(0)]
    if name.endswith("gate_up_proj"):
        E, twice, D = tensor.shape
        return [tensor.view(E * 2, twice // 2, D)]
    return [tensor]


def _row_parts(model: HasNamedParameters) -> dict[str, RowParts]:
    if not isinstance(model, nn.Module):
        return {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LatentAttention)}
    return {f"{name}.{own}": rows for name, layer in layers.items() for own, rows in layer.row_parts().items()}


def _chunks(pairs: list[_Pair], elements: int) -> Iterator[list[_Pair]]:
    """`pairs` in runs of at most BATCH_ELEMENTS elements (or one matrix); a long stack of experts is cut too."""
    most = max(1, BATCH_ELEMENTS // elements)
    chunk: list[_Pair] = []
    count = 0
    for pair in pairs:
        for target, direction in zip(
            torch.split(pair.target, most), torch.split(pair.direction_nAB, most), strict=True
        ):
            if count + len(target) > most:
                yield chunk
                chunk, count = [], 0
            chunk.append(_Pair(target, direction, pair.tall))
            count += len(target)
    yield chunk
