"""Whatever schemathesis makes of our published OpenAPI document, the answers are the documented ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import CHECKS, load_all_checks

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.serving import openapi
from glmctl.serving.server import Server
from glmctl.serving.service import Service
from glmctl.serving.worker import EngineWorker

load_all_checks()
CHECKED = CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)
schema = schemathesis.openapi.from_dict(openapi.document("tiny"))
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}


@pytest.fixture(scope="module")
def server(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Iterator[Server]:
    engine = Engine(
        GlmMoe(tiny_config, seed=0),
        max_slots=4,
        max_length=64,
        token_bytes=lambda token: tiny_tokenizer.decode_bytes([token]),
    )
    service = Service("tiny", tiny_tokenizer, ChatTemplate(tiny_tokenizer), EngineWorker(engine, 8))
    server = Server(service, "127.0.0.1", 0, drain_seconds=0)
    server.start()
    yield server
    server.stop()


@schema.parametrize()
@settings(max_examples=5, **SETTINGS)
def test_document_and_server_agree(case: Any, server: Server) -> None:
    case.call_and_validate(base_url=server.url, checks=CHECKED)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=int(os.environ.get("GLMCTL_SOAK_EXAMPLES", "200")), **SETTINGS)
def test_document_and_server_agree_at_length(case: Any, server: Server) -> None:
    case.call_and_validate(base_url=server.url, checks=CHECKED)
