"""Fixtures that several folders share, and the thread count that keeps tests reproducible."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# one thread a worker: `make test` runs one worker a core, and two busy OpenMP processes on two cores collapse
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from glmctl import console
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    """What is pinned to a CPU's bits, and asks for no device, gets none."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def _speaks_as_by_default() -> Iterator[None]:
    """How the console speaks is the process's: what one test asks of it must not reach the next."""
    yield
    console.configure()


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The smallest shape in which every part of the architecture is present and no two widths coincide."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=512,
    )


_TINY = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
}
_BARE = {**_TINY, "attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 1.0}
_MLA = {
    **_BARE,
    "attention": "mla",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 20,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
FAMILY: dict[str, dict[str, Any]] = {
    "glm-4.5": _TINY,
    "air": {**_TINY, "use_qk_norm": False, "routed_scaling_factor": 1.0},
    "tied-without-shared": {**_BARE, "tie_word_embeddings": True, "n_shared_experts": 0, "num_nextn_predict_layers": 0},
    "deepseek-v3": {**_MLA, "n_group": 4, "topk_group": 2, "rope_scaling": _YARN},
    "kimi-k2": {**_MLA, "num_nextn_predict_layers": 0, "rope_scaling": {**_YARN, "beta_fast": 1.0}},
    "full-rank-query": {**_MLA, "q_lora_rank": None, "n_shared_experts": 2},
    "step-3": {
        **_BARE,
        "attention": "mfa",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 24,
        "last_k_dense_replace": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
}
"""the architectures of the family in miniature"""


@pytest.fixture(scope="session", params=list(FAMILY))
def family_config(request: pytest.FixtureRequest) -> ModelConfig:
    """Each architecture of the family at a size of its own: what holds for GLM must hold for all."""
    return ModelConfig.model_validate(FAMILY[request.param])


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A tokenizer of 512 tokens (GLM's 36 specials among them), trained on a few lines."""
    texts = [
        "def add(a, b):\n    return a + b\n",
        "Compute 34+57-12. The answer is 79.",
        "The quick brown fox jumps over the lazy dog.",
        '{"name": "get_stock", "parameters": {"type": "object"}}',
    ] * 4
    return Tokenizer.train(texts, vocab_size=512, digits=1)


@pytest.fixture(scope="session")
def training_harness() -> ModuleType:
    """lifecycle/training_harness.py, a program, for its data and recipes."""
    path = Path(__file__).with_name("lifecycle") / "training_harness.py"
    spec = importlib.util.spec_from_file_location("training_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
