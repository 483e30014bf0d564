"""The real llama.cpp (prebuilt in `xllamacpp`) as a witness: it loads a GGUF file, tokenises and completes."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest


class LlamaCpp:
    """A running llama.cpp server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            result: dict[str, Any] = json.load(answer)
        return result

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})[
            "tokens"
        ]
        return ids

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True, "ignore_eos": False}
        ids: list[int] = self.post("/completion", body)["tokens"]
        return ids

    def next_logprobs(self, prompt: list[int], vocabulary: int) -> list[tuple[int, float]]:
        """(token, log-probability) of what may follow `prompt`, best first."""
        body = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": vocabulary}
        step = self.post("/completion", body)["completion_probabilities"][0]
        return [(one["id"], one["logprob"]) for one in step["top_logprobs"]]


@contextmanager
def _serving(path: Path, context: int = 512) -> Iterator[LlamaCpp]:
    """llama.cpp serving the file on a free port of this machine."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = context
    params.n_parallel = 1
    params.port = 0
    params.warmup = False
    params.cpuparams.n_threads = 1
    params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server


@pytest.fixture
def llama_cpp() -> Callable[[Path], AbstractContextManager[LlamaCpp]]:
    """`with llama_cpp(path) as llama`: the file served by llama.cpp."""
    return _serving
