"""What the serving tests share: a server on a tiny random model, and the official client of it.

A random model cannot be asked to call a tool or to write JSON; grammars make it, which is what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker


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
