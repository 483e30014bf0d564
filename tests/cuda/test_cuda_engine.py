"""The engine on CUDA: the plain way's tokens, a CPU's where no two logits are tied, and models loaded from folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.convert.run import run as convert
from glmctl.engine.decode_graphs import DecodeGraphs
from glmctl.engine.engine import Engine
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.rounding import round_weights
from glmctl.engine.torch_runner import TorchRunner
from glmctl.kernels.linear_cross_entropy import token_log_probs
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ConvertRecipe
from glmctl.rl.fp8 import load_rounded
from glmctl.run.directory import Run

pytestmark = pytest.mark.cuda

NEW = 24
TIE = 1e-3
"""logits this near may change places by rounding; those of the model here differ by about 1"""


def sharpened(config: ModelConfig, device: torch.device | str, dtype: torch.dtype = torch.float32) -> GlmMoe:
    """Random, with an output matrix large enough that its choices are clear."""
    model = GlmMoe(config, seed=0).requires_grad_(False)
    model.head_weight.mul_(30)
    return model.to(device, dtype)


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    common = [rng.randrange(3, vocabulary) for _ in range(40)]
    drawn = [[rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 70))] for _ in range(count)]
    # every third begins alike, so that blocks are shared
    return [common + one if number % 3 == 0 else one for number, one in enumerate(drawn)]


def answers(model: GlmMoe, asked: list[list[int]], **engine: Any) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    made = Engine(model, **engine).generate([Request(str(n), prompt, params) for n, prompt in enumerate(asked)])
    return [one.tokens for one in made]


def ties(model: GlmMoe, prompt: list[int], found: list[int], right: list[int]) -> bool:
    """Whether the first difference is between two logits that rounding may exchange."""
    at = next(n for n, (a, b) in enumerate(zip(found, right, strict=True)) if a != b)
    tokens = torch.tensor([[*prompt, *right[:at]]], device=model.device)
    with torch.inference_mode():
        logits = model.logits(model(tokens)[0, -1]).float()
    return bool((logits[found[at]] - logits[right[at]]).abs() < TIE)


@pytest.mark.parametrize("setting", [{}, {"speculative": 2}, {"prefill_tokens": 32, "max_slots": 4}], ids=str)
def test_greedy_is_the_plain_way_s_and_a_cpu_s(
    setting: dict[str, int], family_config: ModelConfig, device: torch.device, observe: Callable[..., None]
) -> None:
    """fp32, every architecture; many requests at once against one at a time."""
    if "speculative" in setting and not family_config.num_nextn_predict_layers:
        pytest.skip("no MTP layer")
    model = sharpened(family_config, device)
    asked = prompts(9, family_config.vocab_size)
    found = answers(model, asked, **setting)
    plain = [generate(model, prompt, NEW) for prompt in asked]
    cpu = sharpened(family_config, "cpu")
    there = answers(cpu, asked, runner=TorchRunner, **setting)
    tied = 0
    for prompt, one, right, other in zip(asked, found, plain, there, strict=True):
        for expected in (right, other):
            if one != expected:
                assert ties(model, prompt, one, expected)
                tied += 1
    observe(tied=tied, of=2 * len(asked))
    # of a model whose choices are clear
    assert tied <= 2


def test_log_probs_of_the_engine_are_the_trainer_s(config: ModelConfig, device: torch.device) -> None:
    """What RL's importance ratios are made of."""
    model = sharpened(config, device)
    asked = prompts(6, config.vocab_size)
    params = [SamplingParams(max_tokens=NEW, temperature=0.9, seed=n, logprobs=True) for n in range(6)]
    requests = [Request(str(n), prompt, params[n]) for n, prompt in enumerate(asked)]
    for prompt, one in zip(asked, Engine(model).generate(requests), strict=True):
        tokens = torch.tensor([[*prompt, *one.tokens]], device=device)
        hidden = model(tokens)[0, len(prompt) - 1 : -1]
        made = torch.tensor(one.tokens, device=device)
        right = token_log_probs(hidden, model.head_weight, made, temperature=0.9)
        torch.testing.assert_close(torch.tensor(one.logprobs), right.cpu(), atol=2e-4, rtol=2e-4)


def test_samples_are_a_cpu_s(config: ModelConfig, device: torch.device, observe: Callable[..., None]) -> None:
    """A request's tokens come from its own stream of numbers, on whichever device."""
    asked = prompts(12, config.vocab_size)
    drawn = []
    for where in ("cpu", device):
        params = [SamplingParams(max_tokens=NEW, temperature=0.8, top_p=0.95, top_k=50, seed=n) for n in range(12)]
        engine = Engine(sharpened(config, where), runner=TorchRunner)
        requests = [Request(str(n), prompt, params[n]) for n, prompt in enumerate(asked)]
        drawn.append([one.tokens for one in engine.generate(requests)])
    same = sum(a == b for a, b in zip(*drawn, strict=True))
    observe(same=same, of=12)
    # a number may fall between two sums that differ in their last bits, seldom
    assert same >= 11


def test_bf16_model_decodes(config: ModelConfig, device: torch.device, observe: Callable[..., None]) -> None:
    """A model in bf16 whole: the choices are those of its own logits, near those of fp32 weights."""
    model = sharpened(config, device, torch.bfloat16)
    asked = prompts(8, config.vocab_size)
    found = answers(model, asked, speculative=1)
    assert all(len(one) == NEW for one in found)
    exact = sharpened(config, device)
    first = sum(a[0] == b[0] for a, b in zip(found, answers(exact, asked), strict=True))
    observe(first_tokens_as_in_fp32=first, of=8)
    assert first >= 6
    plain = [generate(model, prompt, NEW) for prompt in asked]
    observe(as_plain=sum(a == b for a, b in zip(found, plain, strict=True)), of=8)


def uneven(asked: list[list[int]], engine: Engine) -> list[list[int]]:
    """Requests that end one after another, so that the shapes of steps change."""
    params = [SamplingParams(max_tokens=12 + 7 * n, temperature=0.0) for n in range(len(asked))]
    made = engine.generate([Request(str(n), prompt, params[n]) for n, prompt in enumerate(asked)])
    return [one.tokens for one in made]


def graphs_of(engine: Engine) -> DecodeGraphs:
    runner = engine._runner
    assert isinstance(runner, TorchRunner)
    assert runner.graphs is not None
    return runner.graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_replayed_steps_are_the_plain_ones(
    dtype: torch.dtype, family_config: ModelConfig, device: torch.device, observe: Callable[..., None]
) -> None:
    """Every architecture, requests of many lengths; the plain ones step by step without graphs."""
    model = sharpened(family_config, device, dtype)
    asked = prompts(9, family_config.vocab_size)
    engine = Engine(model)
    found = uneven(asked, engine)
    right = uneven(asked, Engine(model, runner=partial(TorchRunner, graphs=False)))
    if family_config.rope_scaling is None:
        observe(replayed=graphs_of(engine).replayed, steps=engine.stats.steps)
        assert graphs_of(engine).replayed > engine.stats.steps // 3
    differ = [one for one in zip(asked, found, right, strict=True) if one[1] != one[2]]
    observe(differ=len(differ), of=9)
    if dtype == torch.float32:
        assert all(ties(model, *one) for one in differ)
        assert len(differ) <= 1
    else:
        # bf16's rounding decides many choices
        assert len(differ) <= 5
        assert all(one[1][:3] == one[2][:3] for one in differ)


def test_graphs_follow_the_weights(config: ModelConfig, device: torch.device) -> None:
    """Changed in place, moved, and with another base of RoPE: as an engine that never recorded anything."""
    model = sharpened(config, device)
    asked = prompts(4, config.vocab_size)
    engine = Engine(model)
    seen = [uneven(asked, engine)]
    for change in ("in place", "moved", "rope"):
        if change == "in place":
            model.embed_tokens.weight.copy_(model.embed_tokens.weight.roll(1, 0))
        elif change == "moved":
            model.layers[1].self_attn.o_proj.weight.data = -model.layers[1].self_attn.o_proj.weight.data
        else:
            model.set_rope_theta(100.0)
        engine.load_weights(len(seen))
        before = graphs_of(engine).replayed
        seen.append(uneven(asked, engine))
        assert graphs_of(engine).replayed > before
        assert seen[-1] != seen[-2]
        assert seen[-1] == uneven(asked, Engine(model, runner=partial(TorchRunner, graphs=False)))


def test_weights_are_loaded_in_flight(config: ModelConfig, device: torch.device) -> None:
    """As colocated RL does it, from a model on the same device."""
    engine = Engine(GlmMoe(config, device=device).requires_grad_(False))
    source = sharpened(config, device)
    engine.load_weights(3, source)
    asked = prompts(3, config.vocab_size)
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    made = engine.generate([Request(str(n), prompt, params) for n, prompt in enumerate(asked)])
    assert [one.tokens for one in made] == answers(source, asked)
    assert {version for one in made for version in one.weight_version} == {3}


@pytest.fixture
def folder(config: ModelConfig, tmp_path: Path) -> Path:
    save_model(sharpened(config, "cpu"), tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_from_the_device_and_onto_it_loses_nothing(folder: Path, tmp_path: Path, device: torch.device) -> None:
    there = load_model(folder, device=device)
    assert there.device.type == device.type
    save_model(there, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("layout", ["fp8-channel", "fp8-block"])
def test_fp8_folders(layout: str, folder: Path, tmp_path: Path, device: torch.device) -> None:
    """Converted, loaded onto the device to the CPU's numbers, and generated from."""
    recipe = ConvertRecipe(name="c", source=str(folder), dtype=layout)  # type: ignore[arg-type]
    with Run.open(recipe, tmp_path / "run") as run:
        convert(recipe, run)
        here, there = load_model(run.export), load_model(run.export, device=device)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b.cpu()), name
    asked = prompts(3, 512)
    assert answers(there.requires_grad_(False), asked) == [generate(there, prompt, NEW) for prompt in asked]


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8-channel", "fp8-block"])
def test_rounding_on_the_device_is_the_cpu_s(form: Any, config: ModelConfig, device: torch.device) -> None:
    here, there = sharpened(config, "cpu"), sharpened(config, device)
    round_weights(here, form)
    round_weights(there, form)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-6, atol=0, msg=name)


def test_fp8_rollout_weights_on_the_device(config: ModelConfig, device: torch.device) -> None:
    copies = []
    for where in ("cpu", device):
        copies.append(GlmMoe(config, device=where).requires_grad_(False))
        load_rounded(copies[-1], sharpened(config, where))
    for (name, a), b in zip(copies[0].named_parameters(), copies[1].parameters(), strict=True):
        assert torch.equal(a, b.cpu()), name


def test_transformers_on_the_device_agrees(config: ModelConfig, tmp_path: Path, device: torch.device) -> None:
    """What we export, transformers loads there; its greedy tokens are the engine's."""
    transformers = pytest.importorskip("transformers")
    plain = config.model_copy(update={"num_nextn_predict_layers": 0})
    save_model(sharpened(plain, "cpu"), tmp_path / "model")
    theirs = transformers.Glm4MoeForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).to(device)
    ours = load_model(tmp_path / "model", device=device).requires_grad_(False)
    for prompt in prompts(4, 512):
        tokens = torch.tensor([prompt], device=device)
        with torch.inference_mode():
            right = theirs(tokens).logits[0].float()
            found = ours.logits(ours(tokens))[0]
        torch.testing.assert_close(found, right, atol=2e-4 * float(right.abs().max()), rtol=0)
        made = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        one = answers(ours, [prompt])[0]
        assert one == made or ties(ours, prompt, one, made), json.dumps([one, made])
