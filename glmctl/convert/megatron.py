"""Megatron-core's names and layouts of GLM-4.5's tensors as one table, there and back (spec section 1.4).

Three things differ from Hugging Face: q, k and v are one matrix, stacked for each KV group as [its query heads, k, v];
gate and up are one matrix; and the norm before a fused matrix carries that matrix's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from glmctl.convert.stored import Stored, concatenated, section
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig

NAMES = "megatron-core"
"""`tensor_names` in the config.json of a folder that has them"""


class Row(NamedTuple):
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    megatron: str
    parts: tuple[str, ...]
    how: Literal["same", "qkv", "stacked"] = "same"


def table(config: ModelConfig) -> Iterator[Row]:
    """Every tensor of a model once; the MTP layer's repetitions of embedding and head have no place in Megatron.

    DataError for an architecture other than GLM's.
    """
    if config.attention != "gqa" or config.scoring_func != "sigmoid":
        raise DataError("Megatron's names are known for GLM's architecture only (attention 'gqa', sigmoid router)")
    yield Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    for layer in range(config.num_hidden_layers):
        yield from _layer(config, f"decoder.layers.{layer}", f"model.layers.{layer}", moe=config.is_moe(layer))
    yield Row("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not config.tie_word_embeddings:
        yield Row("output_layer.weight", ("lm_head.weight",))
    if config.num_nextn_predict_layers:
        hf, megatron = f"model.layers.{config.num_hidden_layers}", "mtp.layers.0"
        for name in ("enorm", "hnorm", "eh_proj"):
            yield Row(f"{megatron}.{name}.weight", (f"{hf}.{name}.weight",))
        yield from _layer(config, f"{megatron}.transformer_layer", hf, moe=True)
        yield Row(f"{megatron}.final_layernorm.weight", (f"{hf}.shared_head.norm.weight",))


def _layer(config: ModelConfig, megatron: str, hf: str, *, moe: bool) -> Iterator[Row]:
    attention = f"{megatron}.self_attention"
    yield Row(f"{attention}.linear_qkv.layer_norm_weight", (f"{hf}.input_layernorm.weight",))
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        yield Row(f"{attention}.linear_qkv.{kind}", tuple(f"{hf}.self_attn.{x}_proj.{kind}" for x in "qkv"), "qkv")
    yield Row(f"{attention}.linear_proj.weight", (f"{hf}.self_attn.o_proj.weight",))
    if config.use_qk_norm:
        for x in "qk":
            yield Row(f"{attention}.{x}_layernorm.weight", (f"{hf}.self_attn.{x}_norm.weight",))
    norm = f"{hf}.post_attention_layernorm.weight"
    if not moe:
        yield Row(f"{megatron}.mlp.linear_fc1.layer_norm_weight", (norm,))
        yield from _mlp(f"{megatron}.mlp", f"{hf}.mlp")
        return
    yield Row(f"{megatron}.pre_mlp_layernorm.weight", (norm,))
    yield Row(f"{megatron}.mlp.router.weight", (f"{hf}.mlp.gate.weight",))
    yield Row(f"{megatron}.mlp.router.expert_bias", (f"{hf}.mlp.gate.e_score_correction_bias",))
    for e in range(config.n_routed_experts):
        yield from _mlp(f"{megatron}.mlp.experts", f"{hf}.mlp.experts.{e}", str(e))
    if config.n_shared_experts:
        yield from _mlp(f"{megatron}.mlp.shared_experts", f"{hf}.mlp.shared_experts")


def _mlp(megatron: str, hf: str, number: str = "") -> Iterator[Row]:
    halves = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    yield Row(f"{megatron}.linear_fc1.weight{number}", halves, "stacked")
    yield Row(f"{megatron}.linear_fc2.weight{number}", (f"{hf}.down_proj.weight",))


def to_megatron(config: ModelConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors under Hugging Face's names -> under Megatron's."""
    result: dict[str, Stored] = {}
    for row in table(config):
        parts = [_columns(tensors[name]) for name in row.parts]
        if row.how == "same":
            result[row.megatron] = tensors[row.parts[0]]
            continue
        if row.how == "qkv":
            parts = [section(part, first, shape) for part, first, shape in _groups(config, parts)]
        rows = sum(part.rows for part in parts)
        vector = len(tensors[row.parts[0]].shape) == 1
        whole = concatenated(parts, (rows, parts[0].width))
        result[row.megatron] = _vector(whole) if vector else whole
    return result


def from_megatron(config: ModelConfig, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The inverse of `to_megatron`. KeyError names a tensor that is not there."""
    result: dict[str, Stored] = {}
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    for row in table(config):
        found = tensors[row.megatron]
        if row.how == "same":
            result[row.parts[0]] = found
            continue
        whole, vector = _columns(found), len(found.shape) == 1
        if row.how == "stacked":
            half = whole.rows // 2
            for index, name in enumerate(row.parts):
                result[name] = section(whole, index * half, (half, whole.width))
            continue
        pieces: dict[int, list[Stored]] = {0: [], 1: [], 2: []}
        first = 0
        for index, height in _heights(config):
            pieces[index].append(section(whole, first, (height, whole.width)))
            first += height
        for index, (name, rows) in enumerate(zip(row.parts, (q_rows, kv_rows, kv_rows), strict=True)):
            part = concatenated(pieces[index], (rows, whole.width))
            result[name] = _vector(part) if vector else part
    return result


def _heights(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """(0 = q, 1 = k, 2 = v; rows) of the stacked matrix, in order."""
    d = config.head_dim
    for _ in range(config.num_key_value_heads):
        yield 0, config.num_attention_heads // config.num_key_value_heads * d
        yield 1, d
        yield 2, d


def _groups(config: ModelConfig, parts: list[Stored]) -> Iterator[tuple[Stored, int, tuple[int, int]]]:
    used = [0, 0, 0]
    for index, height in _heights(config):
        yield parts[index], used[index], (height, parts[index].width)
        used[index] += height


def _columns(tensor: Stored) -> Stored:
    """A vector as a column, so that its entries are rows; a matrix as it is."""
    if len(tensor.shape) != 1:
        return tensor

    def read(start: int, stop: int) -> Tensor:
        return tensor.read_rows(0, 1)[0, start:stop, None]

    return Stored((tensor.shape[0], 1), tensor.dtype, read)


def _vector(column: Stored) -> Stored:
    """The inverse of `_columns` for a vector."""
    return Stored((column.rows,), column.dtype, lambda start, stop: column.read_rows(0, column.rows).T[start:stop])
