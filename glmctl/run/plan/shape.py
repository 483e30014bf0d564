"""The model by the parts that layouts divide, and the matrices that Muon works on."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from glmctl.model.config import ModelConfig
from glmctl.model.cost import vectors
from glmctl.recipe.schema import MuonSpec


class Part(NamedTuple):
    """Parameters of one layer."""

    rest: int
    """attention, norms, router, shared expert or dense feed-forward"""
    experts: int
    """all routed experts"""
    moe: bool

    @property
    def total(self) -> int:
        return self.rest + self.experts


def layer_part(config: ModelConfig, moe: bool) -> Part:
    """One decoder layer; the MTP layer's is always MoE."""
    c = config
    D = c.hidden_size
    _, mtp_vectors = vectors(c.model_copy(update={"num_nextn_predict_layers": 1}))
    vector = mtp_vectors - 3 * D
    rest = vector + sum(a * b * count for (a, b), count in _attention_matrices(c).items())
    if not moe:
        return Part(rest + 3 * D * c.intermediate_size, 0, False)
    width = c.moe_intermediate_size
    rest += c.n_routed_experts * D + 3 * D * width * c.n_shared_experts
    return Part(rest, 3 * c.n_routed_experts * D * width, True)


class Run(NamedTuple):
    """Consecutive layers that are alike."""

    part: Part
    layers: int
    mtp: bool = False


def layer_runs(config: ModelConfig, *, mtp: bool) -> list[Run]:
    """The decoder's layers in order, then the MTP layer with its own projection and norms."""
    c = config
    dense, moe = layer_part(c, False), layer_part(c, True)
    counts = ((dense, c.first_k_dense_replace), (moe, c.num_moe_layers), (dense, c.last_k_dense_replace))
    runs = [Run(part, count) for part, count in counts if count]
    if mtp and c.num_nextn_predict_layers:
        D = c.hidden_size
        runs.append(Run(moe._replace(rest=moe.rest + 3 * D + 2 * D * D), 1, mtp=True))
    return runs


def muon_shapes(config: ModelConfig, spec: MuonSpec) -> Counter[tuple[int, int]]:
    """How many logical matrices of each shape (short side, long side) Muon orthogonalises."""
    c = config
    D, shapes = c.hidden_size, Counter[tuple[int, int]]()
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        shapes.update(_attention_matrices(c))
        if not c.is_moe(layer) and layer < c.num_hidden_layers:
            shapes[D, c.intermediate_size] += 3
            continue
        shapes[D, c.moe_intermediate_size] += 3 * c.n_routed_experts
        shapes[D, c.n_routed_experts] += 1
        if c.n_shared_experts:
            shapes[D, c.moe_intermediate_size * c.n_shared_experts] += 3
    if c.num_nextn_predict_layers:
        shapes[D, 2 * D] += 1
    if spec.head == "muon" and not c.tie_word_embeddings:
        shapes[D, c.vocab_size] += 1
    sorted_shapes = Counter[tuple[int, int]]()
    for shape, count in shapes.items():
        sorted_shapes[min(shape), max(shape)] += count
    return sorted_shapes


def _attention_matrices(config: ModelConfig) -> Counter[tuple[int, int]]:
    c = config
    D, H = c.hidden_size, c.num_attention_heads
    shapes = Counter[tuple[int, int]]()
    if c.q_lora_rank is None:
        shapes[D, H * c.head_dim] += 1
    else:
        shapes[D, c.q_lora_rank] += 1
        shapes[c.q_lora_rank, H * c.head_dim] += 1
    if c.attention == "mla":
        assert c.kv_lora_rank is not None
        assert c.qk_nope_head_dim is not None
        # in storage two matrices: latent with rotated key, keys with values
        shapes[D, c.kv_lora_rank] += 1
        shapes[D, c.rope_head_dim] += 1
        shapes[c.kv_lora_rank, H * c.qk_nope_head_dim] += 1
        shapes[c.kv_lora_rank, H * c.value_dim] += 1
    else:
        shapes[D, c.num_key_value_heads * c.head_dim] += 2
    shapes[H * c.value_dim, D] += 1
    return shapes
