"""What training refuses before its first step, and what it is told by."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.shards import ShardWriter
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, RecipeError
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import PretrainRecipe, SftRecipe
from glmctl.training.loss import main_loss
from glmctl.training.plan import plan_steps
from glmctl.training.pretrain import model_config, open_splits, open_stages
from glmctl.training.sft import encode, finetune


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("data") / "export"
    rng = np.random.default_rng(0)
    for split, documents in (("train", 40), ("validation", 8)):
        with ShardWriter(
            root / split,
            vocab_size=512,
            tokenizer_hash=tiny_tokenizer.hash,
            end_of_document=tiny_tokenizer.pad_id,
            shard_tokens=200,
        ) as writer:
            for _ in range(documents):
                writer.add(rng.integers(0, 400, rng.integers(3, 30)).tolist())
    return root.parent


def recipe(data: Path, config: ModelConfig, **changes: Any) -> PretrainRecipe:
    body: dict[str, Any] = {
        "name": "p",
        "model": config.model_dump(),
        "tokenizer": "t",
        "stages": [
            {"name": "a", "data": str(data), "tokens": 300, "sequence_length": 16},
            {"name": "b", "data": str(data / "export"), "tokens": 100, "sequence_length": 32, "rope_theta": 5e4},
            {"name": "c", "data": str(data / "export" / "train"), "tokens": 100, "sequence_length": 32},
        ],
        "batch": {"tokens": 64},
        "validation": {"tokens": 64},
    }
    return PretrainRecipe.model_validate({**body, **changes})


@pytest.mark.parametrize("place", [".", "export", "export/train"])
def test_data_is_found_by_run_by_export_and_by_split(data: Path, place: str) -> None:
    train, validation = open_splits(data / place)
    assert (train.folder.name, validation.folder.name) == ("train", "validation")
    assert train.total_tokens > validation.total_tokens


def test_stages_know_their_base_entropy_and_fixed_validation_rows(
    data: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    stages = open_stages(recipe(data, tiny_config), tiny_tokenizer)
    assert [s.rope_theta for s in stages] == [tiny_config.rope_theta, 5e4, 5e4], "null keeps the base before"
    tokens = np.concatenate([open_splits(data)[1].tokens(0, open_splits(data)[1].total_tokens)])
    p = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert stages[0].entropy == pytest.approx(float(-(p * np.log(p)).sum()))
    assert len(stages[0].validation) == 4
    again = open_stages(recipe(data, tiny_config, seed=7), tiny_tokenizer)
    assert torch.equal(stages[0].validation.tokens_BT, again[0].validation.tokens_BT)
    assert not torch.equal(stages[0].batches.batch(0, 4).tokens_BT, again[0].batches.batch(0, 4).tokens_BT)


@pytest.mark.parametrize("micro_tokens", [None, 16, 40])
def test_validation_loss_is_a_mean_over_tokens_however_it_is_cut(
    data: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, micro_tokens: int | None
) -> None:
    from glmctl.parallel.accelerate import make_accelerator

    stage = open_stages(recipe(data, tiny_config), tiny_tokenizer)[0]
    model = GlmMoe(tiny_config, seed=0)
    loss, count = main_loss(model, stage.validation)
    assert stage.validation_loss(model, make_accelerator(), micro_tokens) == pytest.approx(loss / count, rel=1e-5)


def test_ranks_share_the_rows_of_a_step_and_idle_ones_say_so(
    data: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    r = recipe(data, tiny_config)
    stage, steps = open_stages(r, tiny_tokenizer)[0], plan_steps(r)
    ranks = [SimpleNamespace(process_index=i, num_processes=3) for i in range(3)]
    parts = [stage.micro_batches(steps[0], rank, 16) for rank in ranks]  # type: ignore[arg-type]
    rows = torch.cat([b.tokens_BT for batches, _ in parts for b in batches])
    assert torch.equal(rows, stage.batches.batch(0, steps[0].sequences).tokens_BT)
    last = next(s for s in steps if s.stage == 0 and s.ends_stage)
    assert last.sequences == 3
    crowd = [SimpleNamespace(process_index=i, num_processes=5) for i in range(5)]
    assert sum(stage.micro_batches(last, rank, None)[1] for rank in crowd) == 2  # type: ignore[arg-type]


def test_shards_of_another_tokenizer_are_refused(data: Path, tiny_config: ModelConfig) -> None:
    other = Tokenizer.train(["something else entirely", "and more of it"], vocab_size=400, digits=3)
    with pytest.raises(DataError, match="another tokenizer"):
        open_stages(recipe(data, tiny_config), other)


def test_rows_longer_than_the_positions_are_refused(
    data: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    short = tiny_config.model_copy(update={"max_position_embeddings": 16})
    with pytest.raises(RecipeError, match=r"stages\.1\.sequence_length 32 exceeds model\.max_position_embeddings 16"):
        open_stages(recipe(data, short), tiny_tokenizer)


def test_the_model_takes_its_special_ids_from_the_tokenizer(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    config = model_config(tiny_config, tiny_tokenizer)
    assert config.pad_token_id == tiny_tokenizer.pad_id
    assert config.eos_token_id == tuple(tiny_tokenizer.eos_ids)
    named = tiny_config.model_copy(update={"pad_token_id": 1, "eos_token_id": (2,)})
    assert model_config(named, tiny_tokenizer) == named


def test_a_conversation_with_nothing_to_learn_is_named(tiny_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(tiny_tokenizer)
    good = Conversation([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
    bad = Conversation([{"role": "assistant", "content": "ho"}, {"role": "user", "content": "hi"}])
    assert len(encode([good, good], template, "last_turn")) == 2
    with pytest.raises(DataError, match="conversation 2 of 3"):
        encode([good, bad, good], template, "last_turn")


def test_sft_rows_longer_than_the_positions_are_refused(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> None:
    settings = SftRecipe(name="s", model="m", data=["d"], steps=1, sequence_length=1024)
    with pytest.raises(RecipeError, match="exceeds the model's 512 positions"):
        finetune(
            GlmMoe(tiny_config),
            [],
            ChatTemplate(tiny_tokenizer),
            settings,
            SimpleNamespace(path=Path("unused")),  # type: ignore[arg-type]
            Path("unused"),
        )
