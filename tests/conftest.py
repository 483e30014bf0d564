"""Fixtures that several folders share, and the thread count that keeps tests reproducible."""

from __future__ import annotations

import os

# one thread a worker: `make test` runs one worker a core, and two busy OpenMP processes on two cores collapse
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


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
