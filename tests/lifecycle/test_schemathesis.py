"""Whatever schemathesis makes of our published OpenAPI document, the answers are the documented ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import negative_data_rejection

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
# what a schema cannot say: how long a prompt is in tokens, what a grammar can follow, which fields go together, that a
# string holds JSON, and that a number with too many digits is refused even where nobody knows the field
BEYOND_A_SCHEMA = {
    "context_length_exceeded",
    "invalid_schema",
    "grammar_too_complex",
    "conflicting_fields",
    "invalid_messages",
    "invalid_tokens",
    "invalid_number",
    "invalid_tool_arguments",
}


@schemathesis.check
def valid_requests_are_understood(ctx: Any, response: Any, case: Any) -> None:
    """Stands for `positive_data_acceptance`, which has no room for refusals beyond the schema."""
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or response.status_code != 400:
        return
    error = response.json()["error"]
    if case.path.startswith("/v1/messages"):
        return  # Anthropic's errors carry no code
    if "valid integer" in error["message"]:
        return  # JSON Schema takes 2.0 for one
    assert error["code"] in BEYOND_A_SCHEMA, error


DOCUMENT = openapi.document("tiny")


def fits(case: Any) -> bool:
    """Whether the case's JSON body is valid by the document, whatever it was meant to be."""
    kind = case.media_type
    if kind is None or kind not in DOCUMENT["paths"][case.path][case.method.lower()].get("requestBody", {})["content"]:
        return False
    place = "/".join(part.replace("~", "~0").replace("/", "~1") for part in (case.path, case.method.lower()))
    pointer = f"#/paths/{place}/requestBody/content/{kind.replace('/', '~1')}/schema"
    return Draft202012Validator({**DOCUMENT, "$ref": pointer}).is_valid(case.body)


@schemathesis.check
def invalid_requests_are_refused(ctx: Any, response: Any, case: Any) -> None:
    """Stands for `negative_data_rejection`, which takes 413 for no refusal.

    It also breaks one branch of a choice and may thereby fit another branch.
    """
    if response.status_code == 413:
        return
    broken = (
        [] if case.meta is None else [place for place, part in case.meta.components.items() if part.mode.is_negative]
    )
    if broken != [ParameterLocation.BODY] or not fits(case):
        negative_data_rejection(ctx, response, case)


STANDING_FOR = {"positive_data_acceptance", "negative_data_rejection"}
CHECKED = [check for check in CHECKS.get_all() if check.__name__ not in STANDING_FOR]
schema = schemathesis.openapi.from_dict(DOCUMENT)
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
