"""Names: those of the released files on disk, ours in memory, experts stacked (spec sections 1.4, 1.5, 1.8, 1.9).

GLM-4.5 and DeepSeek-V3 (Kimi K2) store one tensor for each matrix of each expert, Step 3 stacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from glmctl.model.config import ModelConfig


class Entry(NamedTuple):
    """One tensor of a model folder and where it lives in memory."""

    disk: str
    """name in the safetensors files"""
    memory: str
    """parameter or buffer of GlmMoe"""
    shape: tuple[int, ...]
    """on disk"""
    expert: int | None = None
    """index into the stacked tensor, None = all experts"""
    half: int | None = None
    """0: rows of gate, 1: rows of up, of the stacked gate_up_proj"""
    copy: bool = False
    """a repetition of another entry's tensor, which a folder may leave out"""

    def view(self, tensor: Tensor) -> Tensor:
        """The part of the in-memory tensor that this entry is; shares its memory."""
        part = tensor if self.expert is None else tensor[self.expert]
        if self.half is None:
            return part
        width = part.shape[-2] // 2
        return part[..., self.half * width : (self.half + 1) * width, :]

    @property
    def whole(self) -> bool:
        """Whether it is all of the in-memory tensor."""
        return self.expert is None and self.half is None


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a model folder in file order, the MTP layer's repeated embedding and head included."""
    c = config
    vocabulary = (c.vocab_size, c.hidden_size)
    embedding = Entry("model.embed_tokens.weight", "embed_tokens.weight", vocabulary)
    head = embedding if c.tie_word_embeddings else Entry("lm_head.weight", "lm_head.weight", vocabulary)
    yield embedding
    for layer in range(c.num_hidden_layers):
        yield from _decoder_layer(c, f"model.layers.{layer}", f"layers.{layer}", moe=c.is_moe(layer))
    if c.num_nextn_predict_layers:
        disk = f"model.layers.{c.num_hidden_layers}"
        width = (c.hidden_size,)
        yield Entry(f"{disk}.embed_tokens.weight", embedding.memory, vocabulary, copy=True)
        yield Entry(f"{disk}.enorm.weight", "mtp.enorm.weight", width)
        yield Entry(f"{disk}.hnorm.weight", "mtp.hnorm.weight", width)
        yield Entry(f"{disk}.eh_proj.weight", "mtp.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size))
        yield from _decoder_layer(c, disk, "mtp.layer", moe=True)
        yield Entry(f"{disk}.shared_head.norm.weight", "mtp.norm.weight", width)
        yield Entry(f"{disk}.shared_head.head.weight", head.memory, vocabulary, copy=True)
    yield Entry("model.norm.weight", "norm.weight", (c.hidden_size,))
    if head is not embedding:
        yield head


def _decoder_layer(c: ModelConfig, disk: str, memory: str, *, moe: bool) -> Iterator[Entry]:
    def same(name: str, *shape: int) -> Entry:
        return Entry(f"{disk}.{name}", f"{memory}.{name}", shape)

    D = c.hidden_size
    yield same("input_layernorm.weight", D)
    yield from _ATTENTION[c.attention](same, c)
    yield same("post_attention_layernorm.weight", D)
    if not moe:
        yield from _mlp(same, "mlp", D, c.intermediate_size)
    elif c.attention == "mfa":
        yield from _step3_moe(c, disk, memory)
    else:
        yield from _moe(same, c, disk, memory)


def _gqa(same: Callable[..., Entry], c: ModelConfig) -> Iterator[Entry]:
    D, query, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, width in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        yield same(f"self_attn.{name}.weight", width, D)
        if c.attention_bias:
            yield same(f"self_attn.{name}.bias", width)
    yield same("self_attn.o_proj.weight", D, query)
    if c.use_qk_norm:
        yield same("self_attn.q_norm.weight", c.head_dim)
        yield same("self_attn.k_norm.weight", c.head_dim)


def _mla(same: Callable[..., Entry], c: ModelConfig) -> Iterator[Entry]:
    assert c.kv_lora_rank is not None
    assert c.qk_nope_head_dim is not None
    D, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    if c.q_lora_rank is None:
        yield same("self_attn.q_proj.weight", heads * c.head_dim, D)
    else:
        yield same("self_attn.q_a_proj.weight", c.q_lora_rank, D)
        yield same("self_attn.q_a_layernorm.weight", c.q_lora_rank)
        yield same("self_attn.q_b_proj.weight", heads * c.head_dim, c.q_lora_rank)
    yield same("self_attn.kv_a_proj_with_mqa.weight", rank + c.rope_head_dim, D)
    yield same("self_attn.kv_a_layernorm.weight", rank)
    yield same("self_attn.kv_b_proj.weight", heads * (c.qk_nope_head_dim + c.value_dim), rank)
    yield same("self_attn.o_proj.weight", D, heads * c.value_dim)


def _mfa(same: Callable[..., Entry], c: ModelConfig) -> Iterator[Entry]:
    assert c.q_lora_rank is not None
    D, query, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield same("self_attn.q_proj.weight", c.q_lora_rank, D)
    yield same("self_attn.inter_norm.weight", c.q_lora_rank)
    yield same("self_attn.wq.weight", query, c.q_lora_rank)
    yield same("self_attn.k_proj.weight", kv, D)
    yield same("self_attn.v_proj.weight", kv, D)
    yield same("self_attn.o_proj.weight", D, query)


_ATTENTION = {"gqa": _gqa, "mla": _mla, "mfa": _mfa}


def _moe(same: Callable[..., Entry], c: ModelConfig, disk: str, memory: str) -> Iterator[Entry]:
    """GLM's and DeepSeek's names: one tensor per expert and matrix."""
    D, width = c.hidden_size, c.moe_intermediate_size
    yield same("mlp.gate.weight", c.n_routed_experts, D)
    if c.scoring_func == "sigmoid":
        yield same("mlp.gate.e_score_correction_bias", c.n_routed_experts)
    stacked = f"{memory}.mlp.experts"
    for e in range(c.n_routed_experts):
        one = f"{disk}.mlp.experts.{e}"
        yield Entry(f"{one}.gate_proj.weight", f"{stacked}.gate_up_proj", (width, D), e, 0)
        yield Entry(f"{one}.up_proj.weight", f"{stacked}.gate_up_proj", (width, D), e, 1)
        yield Entry(f"{one}.down_proj.weight", f"{stacked}.down_proj", (D, width), e)
    if c.n_shared_experts:
        yield from _mlp(same, "mlp.shared_experts", D, width * c.n_shared_experts)


def _step3_moe(c: ModelConfig, disk: str, memory: str) -> Iterator[Entry]:
    """Step 3's names: experts stacked on disk too, gate and up apart; the shared expert stands beside `moe`."""
    E, D, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    yield Entry(f"{disk}.moe.gate.weight", f"{memory}.mlp.gate.weight", (E, D))
    if c.scoring_func == "sigmoid":
        bias = "gate.e_score_correction_bias"
        yield Entry(f"{disk}.moe.{bias}", f"{memory}.mlp.{bias}", (E,))
    yield Entry(f"{disk}.moe.gate_proj.weight", f"{memory}.mlp.experts.gate_up_proj", (E, width, D), half=0)
    yield Entry(f"{disk}.moe.up_proj.weight", f"{memory}.mlp.experts.gate_up_proj", (E, width, D), half=1)
    yield Entry(f"{disk}.moe.down_proj.weight", f"{memory}.mlp.experts.down_proj", (E, D, width))

    def shared(name: str, *shape: int) -> Entry:
        return Entry(f"{disk}.share_expert.{name}", f"{memory}.mlp.shared_experts.{name}", shape)

    if c.n_shared_experts:
        width *= c.n_shared_experts
        yield shared("gate_proj.weight", width, D)
        yield shared("up_proj.weight", width, D)
        yield shared("down_proj.weight", D, width)


def _mlp(same: Callable[..., Entry], name: str, hidden_size: int, width: int) -> Iterator[Entry]:
    yield same(f"{name}.gate_proj.weight", width, hidden_size)
    yield same(f"{name}.up_proj.weight", width, hidden_size)
    yield same(f"{name}.down_proj.weight", hidden_size, width)


def to_hf_names(config: ModelConfig, state: Mapping[str, Tensor], *, copies: bool = True) -> dict[str, Tensor]:
    """In-memory tensors by name -> folder tensors by name. Parts of stacked tensors are views, not copies.

    copies: whether the MTP layer repeats embedding and head, as GLM-4.5's files do and GLM-4.6's do not.
    """
    return {e.disk: e.view(state[e.memory]) for e in entries(config) if copies or not e.copy}


def from_hf_names(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Folder tensors by name -> in-memory tensors by name, experts stacked; the MTP layer's repetitions are dropped.

    Raises KeyError for a tensor that is not there. `model.folder.load_model` checks shapes and equality.
    """
    shapes = memory_shapes(config)
    result: dict[str, Tensor] = {}
    for entry in entries(config):
        if entry.copy:
            continue
        tensor = state[entry.disk]
        if entry.whole:
            result[entry.memory] = tensor
            continue
        if entry.memory not in result:
            result[entry.memory] = torch.empty(shapes[entry.memory], dtype=tensor.dtype, device=tensor.device)
        entry.view(result[entry.memory]).copy_(tensor)
    return result


def memory_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of GlmMoe's parameters and router biases by name, without building it."""
    E, D, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(config):
        if entry.whole:
            shapes[entry.memory] = entry.shape
        else:
            shapes[entry.memory] = (E, 2 * width, D) if entry.half is not None else (E, D, width)
    return shapes
