"""Sparse upcycling (Komatsuzaki et al. 2023): a dense model as a mixture of experts that computes the same function."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from glmctl.convert.source import StoredModel
from glmctl.convert.stored import Stored, from_tensor
from glmctl.errors import DataError
from glmctl.model.weights import entries
from glmctl.recipe.schema import Upcycling

_ROUTED = re.compile(r"^(model\.layers\.\d+\.mlp)\.(experts\.\d+|gate)\.(.+)$")


def upcycle(model: StoredModel, how: Upcycling, seed: int) -> StoredModel:
    """Every expert of a layer is the dense layer's feed-forward, the router is random.

    Weights of the chosen experts sum to one and the routed scaling is one, so whatever the router chooses the result
    is that of the dense layer: training starts at the dense model's loss, and the experts part because each sees its
    own tokens. DataError for a model that has experts already, or an MTP layer (which always has).
    """
    config = model.config
    if config.num_moe_layers or config.num_nextn_predict_layers:
        raise DataError(f"{model.source.path}: has experts already; upcycling starts from a dense model")
    if how.dense_layers >= config.num_hidden_layers:
        raise DataError(f"{model.source.path}: dense_layers={how.dense_layers} leaves none of its layers to upcycle")
    sparse = config.model_copy(
        update={
            "first_k_dense_replace": how.dense_layers,
            "n_routed_experts": how.experts,
            "num_experts_per_tok": how.experts_per_token,
            "n_shared_experts": 0,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }
    )
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Stored] = {}
    for entry in entries(sparse):
        match = _ROUTED.match(entry.disk)
        if match is None:
            tensors[entry.disk] = model.tensors[entry.disk]
        elif match[2] != "gate":
            tensors[entry.disk] = model.tensors[f"{match[1]}.{match[3]}"]
        elif match[3] == "weight":
            weight_ED = torch.randn(entry.shape, generator=generator) * config.initializer_range
            tensors[entry.disk] = from_tensor(weight_ED.to(model.dtype))
        else:
            tensors[entry.disk] = from_tensor(torch.zeros(entry.shape))
    return replace(model, config=sparse, tensors=tensors)
