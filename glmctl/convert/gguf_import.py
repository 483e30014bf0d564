"""GGUF files in: Llama-shaped models (SmolLM2 and the like) and our own `glm4moe`, in any format `gguf` unpacks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from glmctl.convert.dense import DENSE, paired_halves
from glmctl.convert.gguf_names import gguf_name, gguf_package
from glmctl.convert.gguf_vocabulary import Vocabulary
from glmctl.convert.stored import Stored, cast, concatenated, from_tensor, section
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.weights import Entry, entries

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_VOCABULARY_MULTIPLE = 64


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, Stored], Mapping[str, str]]:
    """(config, tensors under Hugging Face's names, tokenizer files by name) of a GGUF file.

    Packed numbers are unpacked to fp32, exactly. A tokenizer without GLM's special tokens gets them at its end, and
    the vocabulary grows by rows that are the mean of all, so that every part of this toolkit can use the model; the
    logits of its own tokens stay as they were. DataError for another architecture, and for a damaged file.
    """
    gguf = gguf_package()
    with _damage_named(path):
        reader = gguf.GGUFReader(path)
        fields = {name: value.contents() for name, value in reader.fields.items()}
        found = {tensor.name: _stored(tensor) for tensor in reader.tensors}
        config = _config(fields, found)
        tensors = dict(_renamed(path, config, found, llama=fields["general.architecture"] == "llama"))
        vocabulary = Vocabulary.from_gguf(fields)
    missing = [e.disk for e in entries(config) if e.disk not in tensors and not e.copy]
    if missing:
        raise DataError(f"{path}: tensor '{missing[0]}' is missing")
    for entry in entries(config):
        if entry.disk in tensors and tensors[entry.disk].shape != entry.shape:
            shape = list(tensors[entry.disk].shape)
            raise DataError(f"{path}: tensor '{entry.disk}' has shape {shape}, expected {list(entry.shape)}")
    if vocabulary.size > config.vocab_size:
        size = -(-vocabulary.size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        config = config.model_copy(update={"vocab_size": size})
        for entry in entries(config):
            if entry.disk in tensors and tensors[entry.disk].shape != entry.shape:
                tensors[entry.disk] = _grown(tensors[entry.disk], entry.shape)
    return config, tensors, vocabulary.files()


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """The reader of strangers' bytes fails in many ways; each means that the file is not what it says."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error.message}", hint=error.hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except KeyError as error:
        raise DataError(f"{path}: the file does not say {error.args[0]!r}") from error
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError, OSError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a readable GGUF file: {what}") from error


def _stored(tensor: Any) -> Stored:
    """A tensor of GGUFReader, whose data is a map of the file; its shape there is written backwards."""
    gguf = gguf_package()
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    kind = tensor.tensor_type
    rows = tensor.data.reshape(math.prod(shape[:-1]), -1)
    dtype = _PLAIN.get(kind.name, torch.float32)

    def read(start: int, stop: int) -> Tensor:
        unpacked: Tensor = torch.from_numpy(gguf.quants.dequantize(rows[start:stop], kind).copy())
        return unpacked.to(dtype).view(stop - start, shape[-1])

    return Stored(shape, dtype, read)


def _config(fields: Mapping[str, Any], found: Mapping[str, Stored]) -> ModelConfig:
    kind = fields["general.architecture"]
    if kind not in ("llama", "glm4moe"):
        raise DataError(f"architecture {kind!r} is not supported; llama and glm4moe are")

    def of(key: str, default: Any = None) -> Any:
        return fields[f"{kind}.{key}"] if default is None else fields.get(f"{kind}.{key}", default)

    heads, width = of("attention.head_count"), of("embedding_length")
    head_dim = of("attention.key_length", width // max(1, heads))
    mtp = of("nextn_predict_layers", 0)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    body: dict[str, Any] = {
        "vocab_size": found["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": of("block_count") - mtp,
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_theta": of("rope.freq_base", 10000.0),
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in found,
        "attention_bias": "blk.0.attn_q.bias" in found,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "eos_token_id": tuple(dict.fromkeys(end for end in ends if end is not None)),
    }
    if kind == "llama":
        if of("rope.dimension_count", head_dim) != head_dim or "rope_freqs.weight" in found:
            raise DataError("partial or scaled RoPE in a Llama is not supported")
        return ModelConfig(**body | DENSE | {"first_k_dense_replace": body["num_hidden_layers"]})
    return ModelConfig(
        **body,
        first_k_dense_replace=of("leading_dense_block_count"),
        n_routed_experts=of("expert_count"),
        num_experts_per_tok=of("expert_used_count"),
        n_shared_experts=of("expert_shared_count", 0) if "glm4moe.expert_shared_count" in fields else 0,
        moe_intermediate_size=of("expert_feed_forward_length"),
        n_group=of("expert_group_count", 1),
        topk_group=of("expert_group_used_count", 1),
        routed_scaling_factor=of("expert_weights_scale"),
        norm_topk_prob=fields["glm4moe.expert_weights_norm"],
        use_qk_norm="blk.0.attn_q_norm.weight" in found,
        partial_rotary_factor=of("rope.dimension_count") / head_dim,
        num_nextn_predict_layers=mtp,
    )


def _renamed(
    path: Path, config: ModelConfig, found: Mapping[str, Stored], *, llama: bool
) -> Iterator[tuple[str, Stored]]:
    used = set()
    for entry in entries(config):
        name = _source_name(entry)
        if llama:
            name = name.replace("post_attention_norm", "ffn_norm")
        if name not in found:
            continue
        used.add(name)
        tensor = found[name]
        if entry.expert is not None:
            yield entry.disk, section(tensor, entry.expert * entry.shape[0], entry.shape)
        elif llama and ".attn_q." in name:
            yield entry.disk, paired_halves(tensor, config.num_attention_heads)
        elif llama and ".attn_k." in name:
            yield entry.disk, paired_halves(tensor, config.num_key_value_heads)
        else:
            yield entry.disk, tensor
    extra = sorted(found.keys() - used)
    if extra:
        raise DataError(f"{path}: tensor '{extra[0]}' is not part of this model")


def _source_name(entry: Entry) -> str:
    if entry.expert is None:
        return gguf_name(entry.disk)
    parts = entry.disk.split(".")
    return f"blk.{parts[2]}.ffn_{parts[-2].removesuffix('_proj')}_exps.weight"


def _grown(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    total_D = sum((block.double().sum(0) for block in tensor.blocks()), torch.zeros(tensor.width, dtype=torch.float64))
    mean_D = (total_D / tensor.rows).to(tensor.dtype)
    more = from_tensor(mean_D.expand(shape[0] - tensor.rows, -1))
    return concatenated([cast(tensor, more.dtype), more], shape)
