"""Dense models of other families: GLM-4.5 with no MoE layer, no MTP, and every dimension rotated.

Llama and Mistral have neither biases nor QK-norm, Qwen 2 has biases on q, k and v, Qwen 3 normalises q and k head by
head; GLM-4.5 has a switch for each. Hugging Face's names and RoPE's half-split pairing are the same for all of them;
GGUF's Llama pairs neighbours, so rows of its q and k are permuted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from glmctl.convert.stored import Stored
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig

DENSE: dict[str, Any] = {
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 0,
}
"""what is the same for all of them; one expert, in no layer, since a config must name some"""

FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": False, "use_qk_norm": False},
    "mistral": {"attention_bias": False, "use_qk_norm": False},
    "qwen2": {"attention_bias": True, "use_qk_norm": False},
    "qwen3": {"attention_bias": False, "use_qk_norm": True},
}
"""`model_type` -> its switches"""


def dense_config(body: Mapping[str, Any], path: Path) -> ModelConfig:
    """The shape that a config of one of `FAMILIES` describes. DataError for a feature GLM-4.5 has no place for."""
    switches = FAMILIES[body["model_type"]]
    rope = body.get("rope_scaling") or body.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    sliding = body.get("use_sliding_window", bool(body.get("sliding_window")))
    bias = False if body["model_type"] == "qwen2" else body.get("attention_bias", False)
    for key, value, allowed in (
        ("rope_scaling", kind, "default"),
        ("hidden_act", body.get("hidden_act", "silu"), "silu"),
        ("mlp_bias", body.get("mlp_bias", False), False),
        ("attention_bias", bias, False),  # Llama's is also one of the output projection
        ("use_sliding_window", sliding, False),
    ):
        if value != allowed:
            raise DataError(f"{path}: {key} is {value!r}; only {allowed!r} is supported")
    layers, heads, width = (body.get(k) for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    ours = {"model_type", "attention", "partial_rotary_factor", "quantization_config"}
    fields = {k: v for k, v in body.items() if k not in ours}
    fields |= {**DENSE, **switches, "first_k_dense_replace": layers}
    fields.setdefault("num_key_value_heads", heads)
    if not fields.get("head_dim") and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        fields["head_dim"] = width // heads
    try:
        return ModelConfig.from_hf(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def paired_halves(source: Stored, heads: int) -> Stored:
    """q or k of a GGUF Llama (neighbours 2i and 2i + 1 are rotated together) -> halves (i and i + d / 2).

    Rows [heads * d, D] (or a bias as one row) are reordered within each head.
    """
    return _reordered(source, heads, neighbours_first=True)


def paired_neighbours(source: Stored, heads: int) -> Stored:
    """The inverse of `paired_halves`, for writing a GGUF Llama."""
    return _reordered(source, heads, neighbours_first=False)


def _reordered(source: Stored, heads: int, *, neighbours_first: bool) -> Stored:
    d = source.rows // heads
    assert d * heads == source.rows, "rows are heads"
    assert d % 2 == 0, "heads of even width"
    # position of each row of a head in the source
    order = torch.arange(d).view(d // 2, 2).T if neighbours_first else torch.arange(d).view(2, d // 2).T
    order_d = order.reshape(-1)

    def read(start: int, stop: int) -> Tensor:
        first, last = start // d * d, -(-stop // d) * d
        rows = source.read_rows(first, last)
        return rows.view(-1, d, source.width)[:, order_d].reshape(last - first, -1)[start - first : stop - first]

    return Stored(source.shape, source.dtype, read)
