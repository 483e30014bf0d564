"""Routed SwiGLU experts: y = sum_k w_k down_e(silu(gate_e x) * up_e x) for the k experts of each token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmctl.kernels.fused import passes
from glmctl.kernels.registry import op, variant

ALL_EXPERTS_BYTES = 1536 << 10
"""While all experts' weights and everybody's intermediates fit in a core's cache, it is cheaper to send every token
through every expert in two batched products than to sort tokens by expert (decoding a small model). Measured: the
two meet at 64 tokens for 8 experts of 128 x 96, and larger experts never gain."""

ALL_EXPERTS_ON_DEVICE_BYTES = 64 << 20
"""The same on a GPU, of everybody's intermediates alone: a product for each expert is a launch for each expert, and the
host has to wait for the order."""


def experts(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    """Send each token through its experts and add up the results, weighted.

    x [N, D]; index [N, k] int64, distinct in a row; weight [N, k]; gate_up [E, 2I, D] (gate first);
    down [E, D, I]. Returns [N, D] in the dtype of x. Differentiable in x, weight, gate_up and down, once.
    Deterministic: nothing is accumulated in an order that can change.
    """
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_ND, gate_up_EGD, down_EDI = x_ND.to(dtype), gate_up_EGD.to(dtype), down_EDI.to(dtype)
    result: Tensor = op("experts", device, x_ND.dtype)(x_ND, index_NK, weight_NK.to(x_ND.dtype), gate_up_EGD, down_EDI)
    return result


@variant("experts", "reference")
def reference(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    """The definition: every expert on every token, weight zero where it was not chosen."""
    dense_NE = torch.zeros(x_ND.shape[0], gate_up_EGD.shape[0], dtype=x_ND.dtype, device=x_ND.device)
    dense_NE = dense_NE.scatter(1, index_NK, weight_NK)
    gate, up = torch.einsum("nd,egd->neg", x_ND, gate_up_EGD).chunk(2, dim=-1)
    hidden_NEI = F.silu(gate) * up * dense_NE.unsqueeze(-1)
    return torch.einsum("nei,edi->nd", hidden_NEI, down_EDI)


@variant("experts", "sorted", devices=("cpu", "cuda"))
def by_expert(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    """Tokens sorted by expert, one matrix product for each contiguous run, in one autograd node.

    The routing weight is applied to the expert's intermediate, which is narrower than its output and makes
    the unweighted output unnecessary in the backward.
    """
    inputs = (x_ND, weight_NK, gate_up_EGD, down_EDI)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        result: Tensor = _Experts.apply(x_ND, index_NK, weight_NK, gate_up_EGD, down_EDI)  # type: ignore[no-untyped-call]
        return result
    if _few(len(x_ND), gate_up_EGD, down_EDI):
        return _through_all(x_ND, index_NK, weight_NK, gate_up_EGD, down_EDI)
    order = _sort(index_NK, gate_up_EGD.shape[0])
    return _forward(x_ND, order, weight_NK, gate_up_EGD, down_EDI)[0]


def _few(rows: int, gate_up_EGD: Tensor, down_EDI: Tensor) -> bool:
    """Whether so few rows had better go through all experts."""
    intermediate = rows * gate_up_EGD.shape[0] * gate_up_EGD.shape[1] * gate_up_EGD.element_size()
    if gate_up_EGD.device.type == "cpu":
        return gate_up_EGD.nbytes + down_EDI.nbytes + intermediate <= ALL_EXPERTS_BYTES
    return intermediate <= ALL_EXPERTS_ON_DEVICE_BYTES


def waits_for_device(rows: int, gate_up_EGD: Tensor, down_EDI: Tensor) -> bool:
    """Whether `experts` without gradients makes the host wait for a GPU, which no CUDA graph can record."""
    grouped = gate_up_EGD.dtype == torch.bfloat16 and _aligned(gate_up_EGD) and _aligned(down_EDI)
    return not grouped and not _few(rows, gate_up_EGD, down_EDI)


def _through_all(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    dense_NE = torch.zeros(x_ND.shape[0], gate_up_EGD.shape[0], dtype=x_ND.dtype, device=x_ND.device)
    dense_NE.scatter_(1, index_NK, weight_NK)
    gate_up_ENG = torch.matmul(x_ND, gate_up_EGD.mT)
    gate, up = gate_up_ENG.chunk(2, dim=-1)
    hidden_ENI = F.silu(gate).mul_(up).mul_(dense_NE.t().unsqueeze(-1))
    return torch.bmm(hidden_ENI, down_EDI.mT).sum(0)


GROUPED_ALIGNMENT = 16
"""bytes that every row and every address of a grouped product must be a multiple of"""


@variant("experts", "grouped", devices=("cuda",), dtypes=(torch.bfloat16,))
def by_group(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor) -> Tensor:
    """As `sorted`, with one grouped product for all experts: few kernels, and the host never waits for the device.

    Not for fp32, which torch's grouped product takes apart into products of single experts. Widths that are no multiple
    of 8 go to `sorted`.
    """
    if index_NK.numel() == 0 or not (_aligned(gate_up_EGD) and _aligned(down_EDI)):
        return by_expert(x_ND, index_NK, weight_NK, gate_up_EGD, down_EDI)
    inputs = (x_ND, weight_NK, gate_up_EGD, down_EDI)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        result: Tensor = _Grouped.apply(x_ND, index_NK, weight_NK, gate_up_EGD, down_EDI)  # type: ignore[no-untyped-call]
        return result
    order = _sort_on_device(index_NK, gate_up_EGD.shape[0])
    return _forward_grouped(x_ND, order, weight_NK, gate_up_EGD, down_EDI)[0]


def _aligned(weights_EAB: Tensor) -> bool:
    """Whether a grouped product takes these; then the activations that go with them are aligned as well."""
    row = weights_EAB.shape[2] * weights_EAB.element_size()
    dense = weights_EAB.is_contiguous()
    return dense and row % GROUPED_ALIGNMENT == 0 and weights_EAB.data_ptr() % GROUPED_ALIGNMENT == 0


class _Order(NamedTuple):
    """Assignments (token, choice) sorted by expert; S = N k of them."""

    token_S: Tensor
    """token of each sorted assignment"""
    slot_S: Tensor
    """sorted place -> place in the flattened [N, k]"""
    place_NK: Tensor
    """sorted place of each token's choices"""
    runs: list[tuple[int, int, int]]
    """(expert, first, last + 1) of each expert that has tokens"""


def _sort(index_NK: Tensor, n_experts: int) -> _Order:
    flat = index_NK.reshape(-1)
    slot_S = torch.argsort(flat, stable=True)
    place = torch.empty_like(slot_S)
    place[slot_S] = torch.arange(slot_S.numel(), device=flat.device)
    ends = torch.bincount(flat, minlength=n_experts).cumsum(0).tolist()
    runs = [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]
    return _Order(slot_S // index_NK.shape[1], slot_S, place.view_as(index_NK), runs)


def _forward(
    x_ND: Tensor, order: _Order, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y [N, D] and what the backward needs: sorted inputs, gate and up, sorted weights."""
    x_SD = passes.gather_sum(x_ND, order.token_S[:, None])
    gate_up_SG = x_ND.new_empty(x_SD.shape[0], gate_up_EGD.shape[1])
    for e, a, b in order.runs:
        torch.mm(x_SD[a:b], gate_up_EGD[e].t(), out=gate_up_SG[a:b])
    weight_S = weight_NK.reshape(-1).index_select(0, order.slot_S)
    gate, up = gate_up_SG.chunk(2, dim=-1)
    hidden_SI = passes.swiglu(gate, up, weight_S)
    out_SD = torch.empty_like(x_SD)
    for e, a, b in order.runs:
        torch.mm(hidden_SI[a:b], down_EDI[e].t(), out=out_SD[a:b])
    return passes.gather_sum(out_SD, order.place_NK), x_SD, gate_up_SG, weight_S


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        order = _sort(index_NK, gate_up_EGD.shape[0])
        out, x_SD, gate_up_SG, weight_S = _forward(x_ND.contiguous(), order, weight_NK, gate_up_EGD, down_EDI)
        ctx.save_for_backward(x_SD, gate_up_SG, weight_S, gate_up_EGD, down_EDI)
        ctx.order = order
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        x_SD, gate_up_SG, weight_S, gate_up_EGD, down_EDI = ctx.saved_tensors
        order: _Order = ctx.order
        gate, up = gate_up_SG.chunk(2, dim=-1)
        grad_SD = passes.gather_sum(grad_ND.contiguous(), order.token_S[:, None])
        grad_hidden_SI = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        for e, a, b in order.runs:
            torch.mm(grad_SD[a:b], down_EDI[e], out=grad_hidden_SI[a:b])
        grad_gate_up_SG = torch.empty_like(gate_up_SG)
        grad_gate, grad_up = grad_gate_up_SG.chunk(2, dim=-1)
        extra = passes.swiglu_back(grad_hidden_SI, gate, up, grad_gate, grad_up, weight_S)
        assert extra is not None
        grad_weight_S, weighted_SI = extra
        grad_x_SD = torch.empty_like(x_SD)
        grad_gate_up_EGD, grad_down_EDI = _like_weights(gate_up_EGD, order), _like_weights(down_EDI, order)
        for e, a, b in order.runs:
            torch.mm(grad_SD[a:b].t(), weighted_SI[a:b], out=grad_down_EDI[e])
            torch.mm(grad_gate_up_SG[a:b], gate_up_EGD[e], out=grad_x_SD[a:b])
            torch.mm(grad_gate_up_SG[a:b].t(), x_SD[a:b], out=grad_gate_up_EGD[e])
        grad_x_ND = passes.gather_sum(grad_x_SD, order.place_NK)
        return grad_x_ND, None, grad_weight_S[order.place_NK], grad_gate_up_EGD, grad_down_EDI


class _DeviceOrder(NamedTuple):
    """As `_Order`, all on the device."""

    token_S: Tensor
    slot_S: Tensor
    place_NK: Tensor
    ends_E: Tensor
    """int32: where each expert's assignments end"""


def _sort_on_device(index_NK: Tensor, n_experts: int) -> _DeviceOrder:
    # narrow keys, of which a radix sort needs fewer passes
    key_S, slot_S = index_NK.reshape(-1).to(torch.int16).sort(stable=True)
    place = torch.empty_like(slot_S)
    place.scatter_(0, slot_S, torch.arange(slot_S.numel(), device=slot_S.device))
    # bincount would make the host wait
    experts_E = torch.arange(n_experts, dtype=torch.int16, device=key_S.device)
    ends_E = torch.searchsorted(key_S, experts_E, right=True, out_int32=True)
    token_S = torch.div(slot_S, index_NK.shape[1], rounding_mode="floor")
    return _DeviceOrder(token_S, slot_S, place.view(index_NK.shape), ends_E)


def _forward_grouped(
    x_ND: Tensor, order: _DeviceOrder, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns."""
    x_SD = x_ND.index_select(0, order.token_S)
    gate_up_SG = F.grouped_mm(x_SD, gate_up_EGD.mT, offs=order.ends_E)
    weight_S = weight_NK.reshape(-1).index_select(0, order.slot_S)
    gate, up = gate_up_SG.chunk(2, dim=-1)
    hidden_SI = passes.swiglu(gate, up, weight_S)
    out_SD = F.grouped_mm(hidden_SI, down_EDI.mT, offs=order.ends_E)
    return passes.gather_sum(out_SD, order.place_NK), x_SD, gate_up_SG, weight_S


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        order = _sort_on_device(index_NK, gate_up_EGD.shape[0])
        out, *kept = _forward_grouped(x_ND, order, weight_NK, gate_up_EGD, down_EDI)
        ctx.save_for_backward(*kept, gate_up_EGD, down_EDI, *order)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, Tensor | None]:
        x_SD, gate_up_SG, weight_S, gate_up_EGD, down_EDI, *order = ctx.saved_tensors
        token_S, _, place_NK, ends_E = order
        gate, up = gate_up_SG.chunk(2, dim=-1)
        grad_SD = grad_ND.to(x_SD.dtype).index_select(0, token_S)
        grad_hidden_SI = F.grouped_mm(grad_SD, down_EDI, offs=ends_E)
        grad_gate_up_SG = torch.empty_like(gate_up_SG)
        grad_gate, grad_up = grad_gate_up_SG.chunk(2, dim=-1)
        extra = passes.swiglu_back(grad_hidden_SI, gate, up, grad_gate, grad_up, weight_S)
        assert extra is not None
        grad_weight_S, weighted_SI = extra
        grad_x_SD = F.grouped_mm(grad_gate_up_SG, gate_up_EGD, offs=ends_E)
        for_gate_up, for_down = ctx.needs_input_grad[3:]
        idle_E11 = torch.diff(ends_E, prepend=ends_E.new_zeros(1))[:, None, None] == 0
        grad_gate_up_EGD = _weight_gradient(grad_gate_up_SG, x_SD, ends_E, idle_E11) if for_gate_up else None
        grad_down_EDI = _weight_gradient(grad_SD, weighted_SI, ends_E, idle_E11) if for_down else None
        grad_x_ND = passes.gather_sum(grad_x_SD, place_NK)
        return grad_x_ND, None, grad_weight_S[place_NK], grad_gate_up_EGD, grad_down_EDI


def _weight_gradient(grad_SA: Tensor, input_SB: Tensor, ends_E: Tensor, idle_E11: Tensor) -> Tensor:
    """grad^T input of each expert's rows: [E, A, B]; zero for experts without any, which a product may leave unset."""
    return F.grouped_mm(grad_SA.t(), input_SB, offs=ends_E).masked_fill_(idle_E11, 0)


def _like_weights(weights: Tensor, order: _Order) -> Tensor:
    """Room for the gradient of stacked weights; zero for experts that saw no token."""
    grad = torch.empty_like(weights)
    if len(order.runs) < weights.shape[0]:
        busy = {e for e, _, _ in order.runs}
        for e in range(weights.shape[0]):
            if e not in busy:
                grad[e].zero_()
    return grad
