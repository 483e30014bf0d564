"""The comparison of architectures (spec section 1), every figure computed from configs. Importable without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from glmctl.errors import DataError, RecipeError, nearest
from glmctl.model.config import ModelConfig
from glmctl.model.cost import forward_flops, kv_bytes_per_token
from glmctl.recipe.presets import PRESETS

NOTES = {
    "glm-4.5": "some tables say 355B-A22B; 32B are active. 355B counts MTP and leaves out embedding and output matrix.",
    "glm-4.5-air": "106B leaves out MTP (108B with it) and embedding and output matrix; it has no QK-norm.",
    "step-3": "321B in its report includes the vision tower; the language model alone is 316B.",
    "kimi-k2": "the router scores with sigmoid, not softmax as some tables say; 192 is the width of queries and keys "
    "only (values 128), and its 64 kv heads are nominal: 512 + 64 numbers are cached. Its report says 1.04T and 32.6B, "
    "GLM-4.5's table 1043B and 32B; its config gives 1026B and 32.9B.",
}
"""preset -> where figures printed elsewhere differ from what the config says (spec section 6)"""


def find_config(name: str) -> ModelConfig:
    """The config that `name` means: a preset, a recipe with a model, a run directory, or a model folder.

    Raises RecipeError for a name that means nothing and DataError for a config.json that cannot be read.
    """
    if name in PRESETS:
        return ModelConfig.model_validate(PRESETS[name])
    for path in (Path(name) / "export" / "config.json", Path(name) / "config.json"):
        if path.is_file():
            return read_config(path)
    from glmctl.recipe import names

    run_recipe = Path(name) / "recipe.yaml"
    if run_recipe.is_file():
        return _recipe_config(str(run_recipe))
    if names.looks_like_recipe(name):
        return _recipe_config(name)
    choices = [*PRESETS, *names.shipped_files()]
    match = nearest(name, choices)
    hint = f"did you mean '{match}'?" if match else f"presets: {', '.join(PRESETS)}"
    raise RecipeError(f"unknown model '{name}'; {hint}", hint="a preset, a recipe, a run directory or a model folder")


def read_config(path: Path) -> ModelConfig:
    """The config of a `config.json`, without torch. DataError naming the file."""
    try:
        return ModelConfig.from_hf(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}") from error


def _recipe_config(name: str) -> ModelConfig:
    from glmctl.recipe.load import load

    recipe = load(name)
    model = getattr(recipe, "model", None) or getattr(recipe, "student", None)
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str) and "${" not in model:
        return find_config(model)
    raise RecipeError(f"{name}: a {getattr(recipe, 'type', '')} recipe that names no model that is there yet")


def describe(config: ModelConfig, context: int) -> dict[str, Any]:
    """All figures of one model: integers, floats and short words; JSON-able."""
    c, counts = config, config.parameter_counts()
    flops = forward_flops(c, context)
    average = forward_flops(c, (context + 1) / 2)
    backbone = counts.total - counts.mtp
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return {
        "parameters": counts.total,
        "parameters_without_mtp": backbone,
        "parameters_named": counts.main + counts.mtp,
        "parameters_active": counts.active,
        "parameters_active_with_vocabulary": counts.active + counts.vocabulary,
        "parameters_active_with_head": counts.active + counts.vocabulary - embedding,
        "parameters_mtp": counts.mtp,
        "parameters_vocabulary": counts.vocabulary,
        "layers_dense": c.num_hidden_layers - c.num_moe_layers,
        "layers_moe": c.num_moe_layers,
        "layers_mtp": c.num_nextn_predict_layers,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": c.moe_intermediate_size,
        "attention": c.attention,
        "head_dim": c.head_dim,
        "value_dim": c.value_dim,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "q_lora_rank": c.q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "rotary_dim": c.rotary_dim,
        "rope_theta": c.rope_theta,
        "rope_scaling": c.rope_scaling.factor if c.rope_scaling else None,
        "n_routed_experts": c.n_routed_experts,
        "num_experts_per_tok": c.num_experts_per_tok,
        "n_shared_experts": c.n_shared_experts,
        "n_group": c.n_group,
        "topk_group": c.topk_group,
        "scoring_func": c.scoring_func,
        "norm_topk_prob": c.norm_topk_prob,
        "routed_scaling_factor": c.routed_scaling_factor,
        "use_qk_norm": c.use_qk_norm,
        "attention_bias": c.attention_bias,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "context": context,
        "flops_per_token_prefill": average.total,
        "flops_per_token_decode": forward_flops(c, context, absorbed=True).total,
        "flops_per_token_training": 3 * average.total,
        "attention_share": flops.attention / flops.total,
        "kv_numbers_per_token_and_layer": c.cache_spec.numbers,
        "kv_bytes_per_token": kv_bytes_per_token(c),
        "kv_bytes": kv_bytes_per_token(c) * context,
    }


def table(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of [what, one cell a model] from `describe`'s figures; the first row is the heading."""
    rows = [["", *models]]
    for label, cell in _ROWS:
        rows.append([label, *(cell(figures) for figures in models.values())])
    return rows


def _billions(count: float) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"


def _flops(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}FLOP"
    return f"{value:.0f} FLOP"


def _bytes(value: float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.0f} B"


def _layers(f: dict[str, Any]) -> str:
    mtp = f" + {f['layers_mtp']} MTP" if f["layers_mtp"] else ""
    return f"{f['layers_dense']} dense + {f['layers_moe']} MoE{mtp}"


def _attention(f: dict[str, Any]) -> str:
    ranks = [f"{word} rank {f[key]}" for word, key in (("q", "q_lora_rank"), ("kv", "kv_lora_rank")) if f[key]]
    return ", ".join([f["attention"].upper(), *ranks])


def _heads(f: dict[str, Any]) -> str:
    return f"{f['num_attention_heads']} / {f['num_key_value_heads']}"


def _head_dim(f: dict[str, Any]) -> str:
    return f"{f['head_dim']}" if f["head_dim"] == f["value_dim"] else f"{f['head_dim']} (values {f['value_dim']})"


def _rope(f: dict[str, Any]) -> str:
    scaling = f", YaRN x{f['rope_scaling']:g}" if f["rope_scaling"] else ""
    return f"{f['rope_theta']:,.0f}, {f['rotary_dim']} dims{scaling}"


def _scoring(f: dict[str, Any]) -> str:
    renormalised = "renormalised" if f["norm_topk_prob"] else "not renormalised"
    return f"{f['scoring_func']}, {renormalised}, x{f['routed_scaling_factor']:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _groups(f: dict[str, Any]) -> str:
    return f"{f['topk_group']} of {f['n_group']}" if f["n_group"] > 1 else "-"


_ROWS: list[tuple[str, Any]] = [
    ("parameters, all", lambda f: _billions(f["parameters"])),
    ("  without MTP", lambda f: _billions(f["parameters_without_mtp"])),
    ("  without embedding and head", lambda f: _billions(f["parameters_named"])),
    ("  of these MTP", lambda f: _billions(f["parameters_mtp"]) if f["parameters_mtp"] else "-"),
    ("active, without embedding and head", lambda f: _billions(f["parameters_active"])),
    ("  with both", lambda f: _billions(f["parameters_active_with_vocabulary"])),
    ("layers", _layers),
    ("hidden size", lambda f: str(f["hidden_size"])),
    ("dense width", lambda f: str(f["intermediate_size"])),
    ("expert width", lambda f: str(f["moe_intermediate_size"])),
    ("attention", _attention),
    ("head dim", _head_dim),
    ("heads, query / kv", _heads),
    ("QK-norm", lambda f: _yes(f["use_qk_norm"])),
    ("attention bias", lambda f: _yes(f["attention_bias"])),
    ("RoPE", _rope),
    ("experts, routed", lambda f: str(f["n_routed_experts"])),
    ("  active a token", lambda f: str(f["num_experts_per_tok"])),
    ("  shared", lambda f: str(f["n_shared_experts"])),
    ("  groups", _groups),
    ("scoring", _scoring),
    ("MTP layers", lambda f: str(f["layers_mtp"])),
    ("vocabulary", lambda f: f"{f['vocab_size']:,}"),
    ("longest context", lambda f: f"{f['max_position_embeddings']:,}"),
    ("FLOPs a token, prefill", lambda f: _flops(f["flops_per_token_prefill"])),
    ("  decode at the end", lambda f: _flops(f["flops_per_token_decode"])),
    ("  training", lambda f: _flops(f["flops_per_token_training"])),
    ("KV numbers a token and layer", lambda f: str(f["kv_numbers_per_token_and_layer"])),
    ("KV bytes a token, bf16", lambda f: _bytes(f["kv_bytes_per_token"])),
    ("KV bytes of the context", lambda f: _bytes(f["kv_bytes"])),
]


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; sub-rows are indented by an en space."""
    lines = ["| " + " | ".join(row) + " |" for row in ([cell.replace("  ", "\u2002") for cell in r] for r in rows)]
    return "\n".join([lines[0], "|" + "|".join(["---"] * len(rows[0])) + "|", *lines[1:]])
