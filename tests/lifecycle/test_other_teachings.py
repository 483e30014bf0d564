"""The drivers beside full SFT and rejection sampling, tiny and whole: adapters, reward model, on-policy, logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmctl.commands._stage import execute
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.distill import filters
from glmctl.errors import DataError, Interrupted
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.load import CLASSES
from glmctl.recipe.schema import ArithmeticTask, ProblemsRecipe, RewardFilter
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.run.metrics import MetricsLog
from glmctl.run.report import report
from glmctl.training import session

FAST = {"peak_lr": 0.01, "final_lr": 0.01, "warmup_fraction": 0.0}


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SAMPLE_TOKENS", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    """A base, another model with opinions of its own, problems, conversations and pairs."""
    folder = tmp_path_factory.mktemp("teachings")
    for seed, name in enumerate(("base", "teacher")):
        model = GlmMoe(tiny_config, seed=seed)
        with torch.no_grad():
            model.head_weight.mul_(8.0)  # else every distribution is near uniform
        save_model(model, folder / name)
        tiny_tokenizer.save(folder / name)
    task = ArithmeticTask(terms=(2, 2), max_value=9)
    execute(ProblemsRecipe(name="p", task=task, train=30, heldout=4, cold_start=24), folder / "problems")
    with (folder / "pairs.jsonl").open("w") as stream:
        for a in range(30):
            told = {"prompt": f"{a}+1", "chosen": f"It is {a + 1}.", "rejected": "no idea"}
            stream.write(json.dumps(told) + "\n")
    return folder


def recipe(place: Path, kind: str, **changes: Any) -> Any:
    data = [str(place / "problems/export/cold_start.jsonl")]
    tuned = {"steps": 6, "batch_tokens": 512, "sequence_length": 128, "schedule": FAST, "data": data}
    teacher = {
        "name": "maths",
        "model": str(place / "teacher"),
        "problems": [str(place / "problems/export/train.jsonl")],
        "heldout": [str(place / "problems/export/heldout.jsonl")],
    }
    settings: dict[str, dict[str, Any]] = {
        "sft": {**tuned, "model": str(place / "base"), "lora": {"rank": 4, "alpha": 8}},
        "reward": {
            "model": str(place / "base"),
            "data": [str(place / "pairs.jsonl")],
            "heldout": [str(place / "pairs.jsonl")],
            "steps": 12,
            "pairs_per_step": 6,
            "schedule": {"peak_lr": 0.003, "final_lr": 0.003, "warmup_fraction": 0.0},
        },
        "on_policy_distill": {
            "teachers": [teacher],
            "student": str(place / "base"),
            "steps": 12,
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_tokens": 12,
            "episode_tokens": 96,
            "schedule": {"peak_lr": 0.003, "final_lr": 0.003, "warmup_fraction": 0.0},
        },
        "logit_distill": {**tuned, "teacher": str(place / "teacher"), "student": str(place / "base")},
    }
    return CLASSES[kind].model_validate({"type": kind, "name": kind, **settings[kind], **changes})


def rows(path: Path) -> list[dict[str, Any]]:
    """Metrics without what may differ between two equal runs."""
    varying = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in varying} for row in MetricsLog(path / "metrics.jsonl").rows()]


def test_adapters_are_trained_merged_or_kept_and_convert_joins_them(place: Path, tmp_path: Path) -> None:
    merged = execute(recipe(place, "sft"), tmp_path / "merged")
    assert merged["loss_last"] < merged["loss_first"]
    kept = recipe(place, "sft", lora={"rank": 4, "alpha": 8, "export": "adapter"})
    execute(kept, tmp_path / "kept")
    export = tmp_path / "kept" / "export"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in export.iterdir()}
    assert not (export / "model.safetensors").exists()
    join = CLASSES["convert"].model_validate(
        {"type": "convert", "name": "c", "source": str(place / "base"), "to": "hf", "adapter": str(export)}
    )
    execute(join, tmp_path / "joined")
    one, other = load_model(tmp_path / "merged" / "export"), load_model(tmp_path / "joined" / "export")
    base = dict(load_model(place / "base").named_parameters())
    changed = set()
    for (name, mine), (_, theirs) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)
        changed |= set() if torch.equal(mine, base[name]) else {name.split(".", 2)[2]}
    assert changed == {
        *(f"self_attn.{half}_proj.weight" for half in "qkvo"),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }


def test_a_reward_model_learns_its_pairs_and_filters_samples(place: Path, tmp_path: Path) -> None:
    summary = execute(recipe(place, "reward"), tmp_path / "run")
    assert summary["heldout_accuracy"] == 1.0
    assert summary["pairs"] == 30
    assert "Pairs in order" in report(tmp_path / "run").read_text()
    template = ChatTemplate.load(place / "base")
    scorer = filters.reward_scorer(RewardFilter(model=str(tmp_path / "run")), torch.device("cpu"))

    def sample(text: str, **changes: Any) -> Trajectory:
        talk = [{"role": "user", "content": "7+1"}, {"role": "assistant", "reasoning_content": "r", "content": text}]
        made = template.encode_training(talk)
        known = {"reward": 1.0, "stop_reason": StopReason.ANSWERED, "well_formed": True, "messages": talk}
        return Trajectory("p", "t", 0, 0, tokens=made.tokens, loss_mask=made.loss_mask, **{**known, **changes})

    good, bad = sample("It is 8."), sample("no idea")
    middle = sum(scorer([good, bad])) / 2
    kept, rejections = filters.filter_samples([bad, good], filters.Judge(template, scorer=scorer, min_score=middle))
    assert kept == [good]
    assert rejections.counts == {"low_reward": 1}


def test_on_policy_the_student_comes_nearer_to_its_teacher(place: Path, tmp_path: Path) -> None:
    summary = execute(recipe(place, "on_policy_distill"), tmp_path / "run")
    assert summary["reverse_kl_last"] < summary["reverse_kl_first"] - 0.2
    assert summary["samples"] == 12 * 4 * 4
    assert {"maths_teacher", "maths_start", "maths_student"} <= summary.keys()
    page = report(tmp_path / "run").read_text()
    assert "Reverse KL on the student" in page
    assert "maths, teacher" in page


def test_the_student_takes_over_the_teachers_distribution(place: Path, tmp_path: Path) -> None:
    summary = execute(recipe(place, "logit_distill", steps=8), tmp_path / "run")
    assert summary["loss"] < summary["loss_first"] - 0.2
    execute(recipe(place, "logit_distill", steps=3, micro_tokens=128), tmp_path / "micro")
    for cut, whole in zip(rows(tmp_path / "micro"), rows(tmp_path / "run"), strict=False):
        assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_a_teacher_of_another_tokenizer_is_refused(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_model(load_model(place / "teacher"), other)
    Tokenizer.train(["some other text altogether"] * 4, vocab_size=400).save(other)
    with pytest.raises(DataError, match="another tokenizer than the student's"):
        execute(recipe(place, "logit_distill", teacher=str(other)), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward", "on_policy_distill", "logit_distill"])
def test_an_interrupted_run_goes_on_to_the_same_end(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 4, "checkpoint": {"every_steps": 2}}
    execute(recipe(place, kind, **short), tmp_path / "straight")
    real = session.Session.end_step

    def stops(self: session.Session, step: int, total: int, stop: Any) -> None:
        stop.raised = 143 if step == 3 else None
        real(self, step, total, stop)

    with monkeypatch.context() as patched:
        patched.setattr(session.Session, "end_step", stops)
        with pytest.raises(Interrupted):
            execute(recipe(place, kind, **short), tmp_path / "stopped")
    execute(recipe(place, kind, **short), tmp_path / "stopped")
    assert rows(tmp_path / "stopped") == rows(tmp_path / "straight")
    one, other = (load_model(tmp_path / name / "export") for name in ("straight", "stopped"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
