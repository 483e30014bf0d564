"""The reward model: scores of packed conversations, the Bradley-Terry loss by hand, pairs in every shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation
from glmctl.data.preferences import preference_of, read_preferences
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import RewardRecipe
from glmctl.training.reward import (
    load_reward_model,
    pair_loss,
    pairs_of_step,
    save_reward_model,
    score_conversations,
    scores,
    with_score,
)

TEXTS = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11, 12, 13, 14, 15, 16], [1, 2, 4], [40]]


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    return with_score(GlmMoe(tiny_config, seed=0).double(), seed=5)


def test_a_conversation_scores_the_same_packed_and_alone(model: GlmMoe) -> None:
    """... and the score is the row times the hidden state of the last token."""
    with torch.no_grad():
        together = scores(model, TEXTS)
        for text, found in zip(TEXTS, together, strict=True):
            hidden_D = model(torch.tensor([text]))[0, -1]
            assert float(found) == pytest.approx(float(model.get_parameter("score.weight")[0] @ hidden_D), abs=1e-6)
    assert len({round(float(one), 6) for one in together}) == len(TEXTS)


def test_the_loss_is_bradley_and_terrys(model: GlmMoe) -> None:
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    with torch.no_grad():
        found = pair_loss(model, pairs, center_weight=0.5)
        a, b, c, d = (float(one) for one in scores(model, TEXTS[:4]))
    margins = torch.tensor([a - b, c - d], dtype=torch.float64)
    by_hand = torch.log1p(torch.exp(-margins)).sum() + 0.5 * ((a + b) ** 2 + (c + d) ** 2)
    assert float(found.loss) == pytest.approx(float(by_hand), rel=1e-6)
    torch.testing.assert_close(found.margins_N.double(), margins, rtol=0, atol=1e-6)


def test_the_folder_is_a_model_with_a_score_beside_it(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_model(GlmMoe(tiny_config, seed=0), base)
    tiny_tokenizer.save(base)
    with pytest.raises(DataError, match=r"no score\.safetensors, so not a reward model"):
        load_reward_model(base)
    model = with_score(GlmMoe(tiny_config, seed=0), seed=1)
    (tmp_path / "reward").mkdir()
    save_reward_model(model, tmp_path / "reward", base)
    template = ChatTemplate.load(tmp_path / "reward")
    talks = [Conversation([{"role": "user", "content": "2+3"}, {"role": "assistant", "content": c}]) for c in "567"]
    before = score_conversations(model, template, talks, tokens=20)
    assert score_conversations(load_reward_model(tmp_path / "reward"), template, talks) == pytest.approx(before)


SAID = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}]
WORSE = [SAID[0], {"role": "assistant", "content": "bad"}]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": SAID, "rejected": WORSE},
        {"prompt": SAID[:1], "chosen": SAID[1:], "rejected": WORSE[1:]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ],
    ids=["whole", "with prompt", "text"],
)
def test_pairs_in_trls_shapes_mean_the_same(row: dict) -> None:
    found = preference_of(row)
    assert (found.chosen.messages, found.rejected.messages) == (SAID, WORSE)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "a"}, "no 'rejected'"),
        ({"chosen": "a", "rejected": "a"}, "the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: messages"),
        ({"chosen": SAID, "rejected": SAID[:1]}, "rejected: the last message"),
        ([], "not an object"),
    ],
)
def test_what_is_no_pair_is_said_with_its_line(row: object, why: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": SAID, "rejected": WORSE}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{why}"):
        read_preferences([str(path)])
    assert len(read_preferences([str(path)], bad_rows=0.5)) == 1


def test_every_epoch_meets_every_pair_once() -> None:
    pairs = [([at], [at + 100]) for at in range(10)]
    recipe = RewardRecipe(name="r", model="m", data=["d"], steps=5, pairs_per_step=4)
    met = [pair for step in range(1, 6) for pair in pairs_of_step(pairs, step, recipe)]
    assert sorted(met[:10]) == sorted(met[10:]) == pairs
    assert met[:10] != met[10:] != pairs
