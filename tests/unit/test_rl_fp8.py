"""FP8 rollouts: what rounding does to the weights, and that it is what `glmctl convert` would write."""

from __future__ import annotations

import pytest
import torch

from glmctl.convert.fp8 import ErrorReport, quantised
from glmctl.convert.stored import Stored
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.rl.fp8 import load_rounded, rounded


def stored(weight: torch.Tensor) -> Stored:
    return Stored(tuple(weight.shape), weight.dtype, lambda start, stop: weight[start:stop])


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (5, 7), (256, 129)])
def test_rounding_is_that_of_a_converted_folder(shape: tuple[int, int]) -> None:
    """fp8 * scale of the block, as the fp8-block layout stores them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    name = "layers.0.mlp.up_proj.weight"
    folder = quantised({name: stored(weight)}, "fp8-block", ErrorReport())
    packed, scale = (folder[key].read_rows(0, folder[key].rows).float() for key in (name, name + "_scale_inv"))
    spread = scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    assert torch.equal(rounded(weight), packed * spread)


def test_rounding_by_hand() -> None:
    """The largest of a block is exact (448 scales); 3 mantissa bits put 0.30 of a largest 1.0 at 0.3125 * 448 / 448."""
    weight = torch.tensor([[1.0, 0.30, -0.5, 0.0]])
    # 0.30 * 448 = 134.4, between 128 and 144 of E4M3: 128 is nearer
    assert torch.allclose(rounded(weight), torch.tensor([[1.0, 128 / 448, -0.5, 0.0]]), atol=1e-7)
    assert torch.equal(rounded(rounded(weight)), rounded(weight))
    assert torch.equal(rounded(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_blocks_have_scales_of_their_own_and_experts_too() -> None:
    weight = torch.ones(2, 130, 4)
    weight[0, :128] *= 1e-6
    weight[1] *= 1e3
    assert torch.allclose(rounded(weight), weight, rtol=1e-6)


def test_only_the_projections_are_rounded(tiny_config: ModelConfig) -> None:
    source, target = GlmMoe(tiny_config, seed=0), GlmMoe(tiny_config)
    load_rounded(target, source)
    exact = dict(source.named_parameters()) | dict(source.named_buffers())
    changed = {
        name
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]
        if not torch.equal(tensor, exact[name])
    }
    kinds = {name.removesuffix(".weight").split(".")[-1] for name in changed}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
    for name in changed:
        relative = (dict(target.named_parameters())[name] - exact[name]).norm() / exact[name].norm()
        assert 0.005 < float(relative.detach()) < 0.04, name


def test_gate_and_up_do_not_share_a_block(tiny_config: ModelConfig) -> None:
    """In memory they are one tensor; a large gate must not cost the up projection its precision."""
    source, target = GlmMoe(tiny_config, seed=0), GlmMoe(tiny_config)
    experts = source.layers[1].mlp.experts
    width = tiny_config.moe_intermediate_size
    with torch.no_grad():
        experts.gate_up_proj[:, :width] *= 1e6
    load_rounded(target, source)
    up = target.layers[1].mlp.experts.gate_up_proj[:, width:]
    assert torch.equal(up, rounded(experts.gate_up_proj[:, width:]))
