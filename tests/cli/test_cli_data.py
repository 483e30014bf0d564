"""`glmctl data prepare | inspect | stats`, as typed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from glmctl.cli import main
from glmctl.data.shards import ShardWriter
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.recipe.schema import PretrainRecipe
from glmctl.training.pretrain import open_stages

Cli = Callable[..., CompletedProcess[str]]

RECIPE = """\
type: data
name: d
tokenizer: tokenizer
sources:
  - {type: jsonl, domain: web, paths: [rows.jsonl]}
  - {type: jsonl, domain: more, paths: [more.jsonl]}
stages:
  - {type: web_rules, min_words: 5}
  - {type: exact}
validation_fraction: 0.2
"""


def test_a_life_of_a_data_set(
    cli: Cli,
    tmp_path: Path,
    tiny_tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    rows = [f"This is the text of page number {i}, which says something." for i in range(40)]
    rows += ["Too short.", rows[3]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"More: {row}"}) + "\n" for row in rows[:30]))
    (tmp_path / "r.yaml").write_text(RECIPE)
    made = cli("data", "prepare", "r.yaml", "--workers", "2", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["summary"]["dropped"] == 2

    # what follows only reads, so one process will do
    monkeypatch.chdir(tmp_path)

    def said(*words: str, code: int = 0) -> str:
        assert main(["data", *words]) == code
        return capsys.readouterr().out

    stats = said("stats", "runs/d")
    assert "exact: same text" in stats
    assert "web_rules: too few words" in stats
    assert json.loads(said("stats", "runs/d", "--json"))["duplicates"] == {"exact": 1}

    way = said("inspect", "runs/d", "--find", "This is the text of page number 3,")
    assert way.count("-> in") == 2  # and what `more` makes of it
    assert "like rows.jsonl:4, which came first" in way
    short = json.loads(said("inspect", "runs/d", "--find", "Too short", "--json"))
    assert short["documents"][0]["steps"][0]["verdict"] == "dropped"

    row = said("inspect", "runs/d", "--length", "64")
    assert "── document 0: " in row
    assert "‹" in row  # the first token of a document is nobody's target

    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(talk) + "\n")
    learnt = json.loads(said("inspect", "talk.jsonl", "--tokenizer", "tokenizer", "--json"))
    text = tiny_tokenizer.decode([t for t, mask in zip(learnt["tokens"], learnt["learnt"], strict=True) if mask])
    assert "answer" in text
    assert "q" not in text

    assert learnt["text"].endswith("\nanswer")

    said("stats", "nowhere", code=2)
    said("inspect", "runs/d", "--split", "nowhere", code=2)
    said("inspect", "runs/d", "--stage", "first", code=2)
    said("inspect", "talk.jsonl", code=2)
    said("inspect", "talk.jsonl", "--tokenizer", "tokenizer", "--row", "1", code=2)
    said("inspect", "nowhere", "--find", "x", code=2)


@pytest.fixture
def trained(tmp_path: Path, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> PretrainRecipe:
    """A pretrain run of two stages over the same shards, as far as inspecting it needs one."""
    tiny_tokenizer.save(tmp_path / "tokenizer")
    rng = random.Random(0)
    for split in ("train", "validation"):
        with ShardWriter(
            tmp_path / "shards" / split,
            vocab_size=tiny_tokenizer.vocab_size,
            tokenizer_hash=tiny_tokenizer.hash,
            end_of_document=tiny_tokenizer.pad_id,
            shard_tokens=1000,
        ) as writer:
            for _ in range(60):
                text = str(rng.random()) * rng.randrange(1, 4)
                writer.add([*tiny_tokenizer.encode_plain(text), tiny_tokenizer.pad_id])
    stage = {"data": str(tmp_path / "shards"), "tokens": 640}
    recipe = PretrainRecipe.model_validate(
        {
            "name": "p",
            "seed": 3,
            "model": tiny_config.model_dump(),
            "tokenizer": str(tmp_path / "tokenizer"),
            "stages": [
                {**stage, "name": "first", "sequence_length": 16},
                {**stage, "name": "second", "sequence_length": 24, "packing": "best_fit"},
            ],
            "batch": {"tokens": 64},
        }
    )
    (tmp_path / "p").mkdir()
    (tmp_path / "p/recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return recipe


def test_a_row_of_a_pretrain_run_is_the_one_that_training_saw(
    trained: PretrainRecipe, tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "p")
    for stage in open_stages(trained, tiny_tokenizer):
        later = stage.batches.sequences_per_epoch + 2  # in the second epoch, in another order
        for row in (0, 5, later):
            assert main(["data", "inspect", run, "--stage", stage.name, "--row", str(row), "--json"]) == 0
            shown = json.loads(capsys.readouterr().out)
            batch = stage.batches.batch(row, 1)
            assert shown["tokens"] == batch.tokens_BT[0].tolist()
            assert shown["documents"] == batch.documents_BT[0].tolist()
    refused = {
        "--stage is missing; one of: first, second": [run],
        "did you mean 'second'": [run, "--stage", "secnd"],
        "has its own": [run, "--stage", "first", "--length", "64"],
        "is a 'pretrain' recipe": [run, "--find", "x"],
    }
    for message, words in refused.items():
        assert main(["data", "inspect", *words]) == 2
        assert message in capsys.readouterr().err


def test_conversations_of_any_format_are_checked_written_and_shown(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save(tmp_path / "tokenizer")
    good = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": f"<think>why</think>a{i}"}] * 2}
        for i in range(2)
    ]
    Path("talks.json").write_text("[\n" + ",\n".join(map(json.dumps, [*good, {"conversations": []}])) + "\n]")
    assert main(["data", "conversations", "talks.json", "--to", "one.jsonl"]) == 3
    said = capsys.readouterr()
    assert "talks.json:4: 'conversations' must be a non-empty list\n" in said.out
    assert "1 of 3 rows" in said.err
    assert main(["data", "conversations", "one.jsonl", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["conversations"], counts["turns"], counts["with_reasoning"]) == (2, 4, 2)
    shown = {}
    for name in ("talks.json", "one.jsonl"):
        words = ["data", "inspect", name, "--tokenizer", "tokenizer", "--row", "1", "--loss-on", "all_turns"]
        assert main(words) == 0
        shown[name] = capsys.readouterr().out.split("\n", 1)[1]
    assert shown["talks.json"] == shown["one.jsonl"]
    # each turn of a thinker is an example of its own: as inference met it, before its reasoning was dropped
    assert shown["talks.json"].count("── document") == 2
    assert main(["data", "inspect", "talks.json", "--tokenizer", "tokenizer", "--row", "2"]) == 3


def test_a_hub_source_without_a_network_exits_4(cli: Cli, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    tiny_tokenizer.save(tmp_path / "tokenizer")
    source = "{type: huggingface, domain: web, dataset: nobody/nothing}"
    (tmp_path / "r.yaml").write_text(f"type: data\ntokenizer: tokenizer\nsources: [{source}]\n")
    made = cli("data", "prepare", "r.yaml", HF_HUB_OFFLINE="1")
    assert made.returncode == 4
    assert "the Hugging Face hub does not give it" in made.stderr
