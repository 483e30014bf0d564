"""GGUF files for llama.cpp: names, metadata and number formats of its `glm4moe` architecture (spec section 1.4)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glmctl.convert.gguf_names import EXPERT, gguf_name, gguf_package
from glmctl.convert.gguf_vocabulary import add_vocabulary
from glmctl.convert.source import StoredModel
from glmctl.convert.stored import Stored, cast, concatenated, mapped
from glmctl.convert.write import Folder
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "model.gguf"
_ALIGNMENT = 32
_Q8_WIDTH = 32


def write_gguf(model: StoredModel, folder: Folder, dtype: str) -> None:
    """Write `model.gguf`: every tensor (the MTP layer as `nextn`), the tokenizer and the chat template.

    dtype: float32, bfloat16, float16, q8_0, or keep (the widest that the source has). Vectors and router weights stay
    fp32, as llama.cpp wants them; matrices whose rows are no multiple of 32 long stay fp16 in a q8_0 file. The
    model's main layers are what llama.cpp runs by default; it keeps the `nextn` tensors for drafting.

    Raises DataError when there is no tokenizer, or one whose pieces llama.cpp would cut differently, and
    EnvironmentProblem when the `gguf` package is absent.
    """
    if model.config.attention != "gqa" or model.config.rope_scaling or model.config.scoring_func != "sigmoid":
        raise DataError(f"{model.source.path}: GGUF export knows GLM's architecture only")
    gguf = gguf_package()
    kind = str(model.dtype).removeprefix("torch.") if dtype == "keep" else dtype
    tensors = {name: _encode(name, tensor, kind) for name, tensor in _stacked(model)}
    with tempfile.TemporaryDirectory() as scratch:
        head = Path(scratch) / "head"
        writer = gguf.GGUFWriter(head, "glm4moe")
        writer.add_file_type(
            {
                "float32": gguf.LlamaFileType.ALL_F32,
                "float16": gguf.LlamaFileType.MOSTLY_F16,
                "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
                "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
            }[kind]
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, model.config)
        add_vocabulary(writer, model.source.tokenizer_folder, model.config.vocab_size, where=model.source.path)
        for name, (stored, shape, form) in tensors.items():
            writer.add_tensor_info(name, shape, np.dtype(np.float32), stored.nbytes, gguf.GGMLQuantizationType[form])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        start = head.read_bytes()
    if folder.finished(FILE):
        return
    with folder.file(FILE) as file:
        file.write(start + bytes(-len(start) % _ALIGNMENT))
        for stored, _, _ in tensors.values():
            for block in stored.blocks():
                file.write(block)
            file.write(bytes(-stored.nbytes % _ALIGNMENT))


def _stacked(model: StoredModel) -> Iterator[tuple[str, Stored]]:
    """The tensors under GGUF's names, the experts of a layer as one [E, rows, columns]."""
    E = model.config.n_routed_experts
    for name, tensor in model.tensors.items():
        match = EXPERT.match(name)
        if match is None:
            yield gguf_name(name), tensor
        elif match[2] == "0":
            layer = match[1].split(".")[2]
            parts = [model.tensors[f"{match[1]}.{e}.{match[3]}_proj.weight"] for e in range(E)]
            dtype = parts[0].dtype
            for part in parts:
                dtype = torch.promote_types(dtype, part.dtype)
            stack = concatenated([cast(part, dtype) for part in parts], (E, *tensor.shape))
            yield f"blk.{layer}.ffn_{match[3]}_exps.weight", stack


def _encode(name: str, tensor: Stored, kind: str) -> tuple[Stored, tuple[int, ...], str]:
    """(bytes to write, shape in numbers, GGML's name of the format)."""
    if len(tensor.shape) == 1 or ".ffn_gate_inp." in name or kind == "float32":
        return cast(tensor, torch.float32), tensor.shape, "F32"
    if kind == "bfloat16":
        return cast(tensor, torch.bfloat16), tensor.shape, "BF16"
    if kind == "float16" or tensor.width % _Q8_WIDTH:
        return cast(tensor, torch.float16), tensor.shape, "F16"
    packed = tensor.width // _Q8_WIDTH * (_Q8_WIDTH + 2)
    return mapped(tensor, _q8_0, torch.uint8, width=packed), tensor.shape, "Q8_0"


def _q8_0(rows: Tensor) -> Tensor:
    """Rows [n, width] -> [n, width / 32 * 34] bytes: of every 32 numbers an fp16 scale and 32 int8."""
    gguf = gguf_package()
    packed: np.ndarray[Any, np.dtype[np.uint8]] = gguf.quants.quantize(
        rows.float().numpy(), gguf.GGMLQuantizationType.Q8_0
    )
    return torch.from_numpy(packed)


def _add_shape(writer: GGUFWriter, c: ModelConfig) -> None:
    from gguf import ExpertGatingFuncType

    writer.add_block_count(c.num_hidden_layers + c.num_nextn_predict_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.rotary_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    if c.n_group > 1:
        writer.add_expert_group_count(c.n_group)
        writer.add_expert_group_used_count(c.topk_group)
    writer.add_nextn_predict_layers(c.num_nextn_predict_layers)
