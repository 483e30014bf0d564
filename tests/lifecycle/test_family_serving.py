"""Every architecture of the family, from its folder on disk to an answer over HTTP."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import torch

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ServeRecipe
from glmctl.serving.run import load_service
from glmctl.serving.server import Server


@pytest.fixture(scope="module")
def model(family_config: ModelConfig) -> GlmMoe:
    # drawn wide, so that greedy choices are far from ties
    return GlmMoe(family_config.model_copy(update={"initializer_range": 0.15}), seed=3)


def test_served_text_is_that_of_plain_decoding(model: GlmMoe, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Whole and streamed, with the drafts of the MTP layer where there is one."""
    save_model(model, tmp_path / "model")
    tiny_tokenizer.save(tmp_path / "model")
    prompt = tiny_tokenizer.encode("def add(a, b):")
    with torch.no_grad():
        made = generate(model, prompt, 12, stop_ids=tiny_tokenizer.eos_ids)
    expected = tiny_tokenizer.decode(made, skip_special=True)
    recipe = ServeRecipe(name="s", model=str(tmp_path / "model"), max_slots=2)
    server = Server(load_service(recipe), "127.0.0.1", 0, drain_seconds=0)
    server.start()
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            asked = {"model": "model", "prompt": prompt, "max_tokens": 12, "temperature": 0}
            whole = client.completions.create(**asked)
            streamed = client.completions.create(**asked, stream=True)
            pieces = [choice.text for chunk in streamed for choice in chunk.choices]
            chat = client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
            )
    finally:
        server.stop()
    assert whole.choices[0].text == "".join(pieces) == expected
    assert chat.usage.completion_tokens in range(1, 5)
