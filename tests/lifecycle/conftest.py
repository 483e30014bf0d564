"""What the serving tests share: a server on a tiny random model, the official client of it, and a tiny GLM that has
learnt a few conversations by heart.

A random model cannot be asked to call a tool or to write JSON; grammars make it, which is what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_stock",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string"}, "count": {"type": "integer"}},
                "required": ["item", "count"],
            },
        },
    }
]
SUM = "What is 2+3?"
STOCK = "Stock of 3 bolts?"
CALL = {"name": "get_stock", "arguments": {"item": "bolt", "count": 3}}
CALLING = {
    "role": "assistant",
    "reasoning_content": "look it up",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALL}],
}
CONVERSATIONS: list[tuple[list[dict[str, Any]], Any, bool]] = [
    (
        [{"role": "user", "content": SUM}, {"role": "assistant", "reasoning_content": "2+3=5", "content": "It is 5."}],
        None,
        True,
    ),
    ([{"role": "user", "content": SUM}, {"role": "assistant", "content": "Five."}], None, False),
    (
        [
            {"role": "user", "content": STOCK},
            CALLING,
            {"role": "tool", "content": "12"},
            {"role": "assistant", "reasoning_content": "12 found", "content": "There are 12."},
        ],
        TOOLS,
        True,
    ),
]


@pytest.fixture(scope="session")
def learnt_tokenizer() -> Tokenizer:
    """Trained on the conversations as rendered, which keeps them short."""
    plain = ChatTemplate(Tokenizer.train([], vocab_size=292))
    texts = [plain.render(messages, tools, enable_thinking=thinking) for messages, tools, thinking in CONVERSATIONS]
    return Tokenizer.train(texts * 2, vocab_size=640, digits=1)


@pytest.fixture(scope="session")
def learnt(learnt_tokenizer: Tokenizer) -> GlmMoe:
    """Trained until it knows every conversation by heart."""
    template = ChatTemplate(learnt_tokenizer)
    batches = []
    for messages, tools, thinking in CONVERSATIONS:
        row = template.encode_training(messages, tools, enable_thinking=thinking)
        tokens, mask = torch.tensor([row.tokens]), torch.tensor([row.loss_mask])
        batches.append((tokens, torch.where(mask.bool(), tokens, -100)[0, 1:]))
    config = ModelConfig(
        vocab_size=learnt_tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    model = GlmMoe(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(300):
        worst = 0.0
        optimizer.zero_grad()
        for tokens, targets in batches:
            loss = torch.nn.functional.cross_entropy(model.logits(model(tokens))[0, :-1], targets)
            loss.backward()
            worst = max(worst, loss.item())
        if worst < 0.02:
            return model
        optimizer.step()
    raise AssertionError(f"the tiny model did not learn its lines: loss {worst:.3f}")


@pytest.fixture(scope="session")
def random_server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    engine = Engine(
        GlmMoe(tiny_config.model_copy(update={"max_position_embeddings": 2048}), seed=0),
        max_slots=8,
        speculative=1,
        token_bytes=lambda token: tiny_tokenizer.decode_bytes([token]),
    )
    service = Service("tiny", tiny_tokenizer, ChatTemplate(tiny_tokenizer), EngineWorker(engine, 16))
    server = Server(service, "127.0.0.1", 0, drain_seconds=0)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def random_client(random_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{random_server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
