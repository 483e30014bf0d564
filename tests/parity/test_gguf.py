"""GGUF files are accepted by the real llama.cpp, which then reads and writes exactly what we do."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glmctl.convert.gguf_export import FILE
from glmctl.convert.run import run as convert
from glmctl.data.chat import ChatTemplate
from glmctl.data.template_source import exported_template
from glmctl.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run.directory import Run

gguf = pytest.importorskip("gguf")

Serving = Callable[[Path], AbstractContextManager[Any]]

CORPUS = Path(__file__).parents[2] / "glmctl" / "data" / "corpora" / "jargon-4.4.7.jsonl.gz"
Q8_0_KL = 1e-3
"""nats, over the next-token distributions of 8 prompts of a random model; seen: 1e-4"""


def corpus(n: int) -> list[str]:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line, _ in zip(file, range(n), strict=False)]


def random_model(tokenizer: Tokenizer, **changes: Any) -> GlmMoe:
    """Wide enough initialisation that the 64 greedy tokens are far from ties."""
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size + 12,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_ids,
        "pad_token_id": tokenizer.pad_id,
    }
    model = GlmMoe(ModelConfig(**(fields | changes)), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias.normal_(0.0, 0.1, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def exported(model: GlmMoe, tokenizer: Tokenizer, folder: Path, dtype: str) -> Path:
    """The GGUF file of a model, by way of its folder."""
    if not (folder / "model").exists():
        save_model(model, folder / "model")
        tokenizer.save(folder / "model")
    run = Run.open(ConvertRecipe(name="c", source=str(folder / "model"), to="gguf", dtype=dtype), folder / dtype)
    try:
        convert(run.recipe, run)
        return run.export / FILE
    finally:
        run.close()


@pytest.fixture(scope="module", params=[3, 1], ids=["three-digits", "one-digit"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(corpus(200), 1024, digits=request.param)


def greedy(model: GlmMoe, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(model.logits(model(torch.tensor([ids])))[0, -1].argmax()))
            if ids[-1] in model.config.eos_token_id:
                break
    return ids[len(prompt) :]


def probes() -> list[str]:
    """Over 1,000 strings: prose, code, digits, every special token in place and cut, white space, many scripts."""
    words = " ".join(corpus(260)[200:]).split(" ")
    prose = [" ".join(words[i : i + 9]) for i in range(0, 9 * 600, 9)]
    source = Path(__file__).read_text(encoding="utf-8")
    code = [source[i : i + 23] for i in range(0, len(source) - 23, 23)]
    specials = [f"a {token}b{token}\n{token[:-1]} {token[1:]}" for token in SPECIAL_TOKENS]
    digits = [f"{'7' * n} x{'0123456789'[:n]}.{n}" for n in range(1, 31)]
    spaces = [f"a{' ' * n}b{chr(10) * n} {chr(9) * n}c \r\n{' ' * n}" for n in range(1, 31)]
    scripts = [
        "你好，世界",
        "Привет",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "😀👩‍👩‍👧",
        "naïve café",
        "DON'T we'LL I'm",
        "ﬁ Å",
        "१२३",
    ]
    return [p for p in prose + code + specials + digits + spaces + [a + b for a in scripts for b in scripts] if p]


def test_llama_cpp_reads_and_continues_as_we_do(tokenizer: Tokenizer, tmp_path: Path, llama_cpp: Serving) -> None:
    model = random_model(tokenizer)
    prompts = [tokenizer.encode(text) for text in ("[gMASK]<sop><|user|>\nHello 2025", "def f(x):\n")]
    with llama_cpp(exported(model, tokenizer, tmp_path, "float32")) as llama:
        strings = probes()
        assert len(strings) >= 1000
        wrong = [text for text in strings if llama.tokenize(text) != tokenizer.encode(text)]
        assert not wrong, f"{len(wrong)} of {len(strings)}: {wrong[:3]}"
        for prompt in prompts:
            assert llama.greedy(prompt, 64) == greedy(model, prompt, 64)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Compute 3+4."}]
        ours = ChatTemplate(tokenizer).render(messages, add_generation_prompt=True)
        assert llama.post("/apply-template", {"messages": messages})["prompt"] == ours


@pytest.mark.parametrize("changes", [{"use_qk_norm": False}, {"num_nextn_predict_layers": 0, "n_shared_experts": 2}])
def test_other_shapes_of_the_family(
    tiny_tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any], llama_cpp: Serving
) -> None:
    """Air has no QK-norm; folders written by transformers have no MTP layer."""
    model = random_model(tiny_tokenizer, **changes)
    prompt = tiny_tokenizer.encode("The quick")
    with llama_cpp(exported(model, tiny_tokenizer, tmp_path, "float32")) as llama:
        assert llama.greedy(prompt, 16) == greedy(model, prompt, 16)


def test_q8_0_is_near_and_half_precision_nearer(tiny_tokenizer: Tokenizer, tmp_path: Path, llama_cpp: Serving) -> None:
    model = random_model(tiny_tokenizer)
    prompts = [tiny_tokenizer.encode(t) for t in ("add", "34+57", "fox", "{", "\n", "The answer is", "a b", "get_")]
    divergence = {}
    for dtype in ("q8_0", "float16", "bfloat16"):
        total = 0.0
        with llama_cpp(exported(model, tiny_tokenizer, tmp_path, dtype)) as llama:
            for prompt in prompts:
                theirs_V = torch.empty(model.config.vocab_size)
                found = llama.next_logprobs(prompt, model.config.vocab_size)
                theirs_V[[token for token, _ in found]] = torch.tensor([logprob for _, logprob in found])
                with torch.inference_mode():
                    ours_V = model.logits(model(torch.tensor([prompt])))[0, -1].log_softmax(-1)
                total += float((ours_V.exp() * (ours_V - theirs_V)).sum())
        divergence[dtype] = total / len(prompts)
    assert 0 < divergence["q8_0"] < Q8_0_KL
    assert divergence["float16"] < divergence["q8_0"] / 10


def test_every_tensor_is_in_the_file_bit_for_bit(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Read back by the `gguf` package: the MTP layer, router biases and stacked experts included."""
    model = random_model(tiny_tokenizer)
    reader = gguf.GGUFReader(exported(model, tiny_tokenizer, tmp_path, "float32"))
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    same = {
        "token_embd.weight": state["embed_tokens.weight"],
        "output.weight": state["lm_head.weight"],
        "blk.1.exp_probs_b.bias": state["layers.1.mlp.gate.e_score_correction_bias"],
        "blk.1.ffn_gate_exps.weight": state["layers.1.mlp.experts.gate_up_proj"][:, :32],
        "blk.1.ffn_up_exps.weight": state["layers.1.mlp.experts.gate_up_proj"][:, 32:],
        "blk.3.ffn_down_exps.weight": state["mtp.layer.mlp.experts.down_proj"],
        "blk.3.nextn.eh_proj.weight": state["mtp.eh_proj.weight"],
        "blk.3.nextn.enorm.weight": state["mtp.enorm.weight"],
        "blk.3.nextn.hnorm.weight": state["mtp.hnorm.weight"],
        "blk.3.nextn.shared_head_norm.weight": state["mtp.norm.weight"],
        "blk.2.attn_q.bias": state["layers.2.self_attn.q_proj.bias"],
    }
    for name, expected in same.items():
        assert np.array_equal(found[name], expected), name
    assert (
        sum(data.size for data in found.values())
        == sum(tensor.size for tensor in state.values()) + 2 * model.config.vocab_size * model.config.hidden_size
    ), "all, and the MTP layer's copies of embedding and head"
    fields = reader.fields
    assert fields["glm4moe.nextn_predict_layers"].contents() == 1
    assert fields["glm4moe.block_count"].contents() == 4
    assert fields["tokenizer.chat_template"].contents() == exported_template()
    assert fields["tokenizer.ggml.eot_token_id"].contents() == tiny_tokenizer.id("<|user|>")


def test_q8_0_blocks_decode_to_within_half_a_step(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_model(tiny_tokenizer)
    reader = gguf.GGUFReader(exported(model, tiny_tokenizer, tmp_path, "q8_0"))
    stored = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    exact = model.embed_tokens.weight.detach().numpy().reshape(-1, 32)
    error = np.abs(gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(-1, 32) - exact)
    step = np.abs(exact).max(axis=1, keepdims=True) / 127
    assert (error <= step * 0.5 + np.abs(exact).max() * 2**-11).all(), "half a step, and the fp16 rounding of the scale"


def test_a_model_without_tokenizer_is_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(random_model(tiny_tokenizer), tmp_path / "model")
    with pytest.raises(DataError, match="no tokenizer"):
        exported(random_model(tiny_tokenizer), tiny_tokenizer, tmp_path, "float32")


def test_pieces_that_llama_cpp_cuts_differently_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["12 34 hello"], 300, digits=2)
    with pytest.raises(DataError, match="pre-tokenizer"):
        exported(random_model(tokenizer), tokenizer, tmp_path, "float32")
    assert not (tmp_path / "float32" / "export").exists()
