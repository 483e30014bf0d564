"""The report: one self-contained page from whatever stages there are, with nothing from a model left unescaped."""

from __future__ import annotations

import html.parser
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from glmctl.errors import DataError
from glmctl.model.config import ModelConfig
from glmctl.run.report import report
from glmctl.run.report_samples import marked, message_text, row_prompt, row_reply

ENV = {
    "glmctl": "0.1.0",
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "transformers": None},
    "system": "Linux",
    "machine": "x86_64",
    "cpus": 2,
}
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\x00&amp; \"quoted\" `tick` ${title}"


def write_stage(
    root: Path,
    name: str,
    recipe: dict[str, Any],
    summary: dict[str, Any],
    *,
    seconds: float,
    rows: list[dict[str, Any]] | None = None,
    samples: list[dict[str, Any]] | None = None,
    state: str = "finished",
) -> Path:
    """One run directory with the files that every driver leaves."""
    path = root / name
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(json.dumps({"name": name, **recipe}))
    (path / "env.json").write_text(json.dumps(ENV))
    (path / "status.json").write_text(json.dumps({"state": state, "summary": summary, "seconds": seconds}))
    for file, lines in (("metrics.jsonl", rows), ("samples.jsonl", samples)):
        if lines:
            (path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pretrain_rows(rng: random.Random, steps: int = 420) -> list[dict[str, Any]]:
    """A plausible curve: fast fall, slow tail, noise, a mid-training stage and ever better balanced experts."""
    rows = []
    for step in range(1, steps + 1):
        share = step / steps
        loss = 3.05 + 4.4 * math.exp(-9 * share) + 0.5 * (1 - share) + rng.gauss(0, 0.05)
        skew = 0.9 * math.exp(-5 * share) + 0.08
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 8192,
            "loss": loss,
            "mtp_loss": loss + 0.9 - 0.35 * share + rng.gauss(0, 0.06),
            "balance_loss": 1.0,
            "lr": 4e-3 * min(1.0, share / 0.02) * (0.1 + 0.45 * (1 + math.cos(math.pi * share))),
            "grad_norm": 0.4 + 2.5 * math.exp(-8 * share) + abs(rng.gauss(0, 0.05)),
            "max_vio": skew * (1 + 0.2 * rng.random()),
            "tokens_per_second": 9000 + 200 * rng.random(),
            "stage": "base" if share < 0.8 else "long context",
        }
        if step % 10 == 1:
            row["expert_load"] = [[max(0.0, 1 + rng.gauss(0, skew)) / 8 for _ in range(8)] for _ in range(4)]
        if step % 60 == 0 or step == steps:
            row["validation_loss"] = loss + 0.05
        rows.append(row)
    return rows


def build_pipeline(root: Path) -> Path:
    """Run folders of a whole life, as `glmctl run demo` leaves them."""
    rng = random.Random(3)
    write_stage(root, "tokenizer", {"type": "tokenizer"}, {"vocab_size": 2048, "bytes_per_token": 2.91}, seconds=11.4)
    write_stage(
        root,
        "data",
        {"type": "data"},
        {"tokens_train": 8_412_331, "tokens_validation": 84_112, "documents": 2319, "unigram_entropy": 6.21},
        seconds=24.8,
    )
    write_stage(
        root, "arithmetic", {"type": "problems"}, {"train": 4000, "heldout": 200, "cold_start": 800}, seconds=1.2
    )
    write_stage(root, "tools", {"type": "problems"}, {"train": 2000, "heldout": 200, "cold_start": 800}, seconds=1.1)
    pretrain = pretrain_rows(rng)
    write_stage(
        root,
        "pretrain",
        {
            "type": "pretrain",
            "model": ModelConfig(vocab_size=2048, n_routed_experts=8, num_experts_per_tok=2).model_dump(),
        },
        {
            "validation_loss": 3.094,
            "unigram_entropy": 6.21,
            "validation_loss_below_unigram": 3.116,
            "tokens": 3_440_640,
            "steps": 420,
            "tokens_per_second": 9120.0,
            "mtp_loss": 3.61,
            "max_vio": 0.09,
        },
        seconds=361.0,
        rows=pretrain,
        samples=[
            {"when": "before", "prompt": "def fibonacci(n):", "text": "overs��rt@ lambda {{ the of\n\x07 <<"},
            {"when": "after", "prompt": "def fibonacci(n):", "text": '\n    """Return the first."""\n    return n\n'},
            {"when": "before", "prompt": "The hacker", "text": HOSTILE},
            {
                "when": "after",
                "prompt": "The hacker",
                "text": " is a program that is used to be a program, and the code",
            },
        ],
    )
    for name, floor in (("reasoning-sft", 0.05), ("tools-sft", 0.03)):
        rows = [
            {"step": s, "loss": floor + 2.5 * math.exp(-s / 12) + abs(rng.gauss(0, 0.01)), "mtp_loss": 0.2 + 2 / s}
            for s in range(1, 121)
        ]
        write_stage(root, name, {"type": "sft"}, {"loss": floor, "steps": 120}, seconds=43.0, rows=rows)
    rl_rows = [
        {
            "step": s,
            "reward_mean": min(1.0, 0.42 + 0.5 * (1 - math.exp(-s / 18)) + rng.gauss(0, 0.04)),
            "tokens_mean": 38 + rng.gauss(0, 2),
            "entropy": 0.5 * math.exp(-s / 30) + 0.05,
            **({"heldout": 0.41 + 0.45 * (1 - math.exp(-s / 18))} if s % 20 == 0 else {}),
        }
        for s in range(1, 61)
    ]
    think = "\n<think>17+25: 7+5=12, carry 1, 1+2+1=4, so 42.\n42-8=34.</think>\n34"
    call = (
        "\n<think>The price is needed.</think>\n<tool_call>get_price\n<arg_key>item</arg_key>\n"
        "<arg_value>lamp</arg_value>\n</tool_call>"
    )
    write_stage(
        root,
        "rl",
        {"type": "rl"},
        {
            "heldout_start": 0.41,
            "heldout_end": 0.83,
            "heldout_gain_points": 42.0,
            "reward_first": 0.43,
            "reward_last": 0.9,
            "steps": 60,
            "well_formed": 0.995,
        },
        seconds=128.0,
        rows=rl_rows,
        samples=[
            {"step": 0, "prompt": "Compute 17+25-8.", "reply": think.replace("34", "33"), "reward": 0.0},
            {"step": 20, "prompt": "Compute 17+25-8.", "reply": think.replace("34", "35"), "reward": 0.0},
            {"step": 60, "prompt": "Compute 17+25-8.", "reply": think, "reward": 1.0},
        ],
    )
    cell = {"thinking": 1.0, "direct": 0.0, "tokens": 31.4}
    accuracy = {"base": (0.02, 0.0), "reasoning": (0.83, 0.1), "tools": (0.0, 0.97), "hybrid": (0.8, 0.96)}
    distilled = write_stage(
        root,
        "distill",
        {"type": "distill"},
        {
            "comparison": {
                model: {d: {**cell, "accuracy": a} for d, a in zip(("reasoning", "tools"), pair, strict=True)}
                for model, pair in accuracy.items()
            },
            "cost": {
                "tools": {"samples": 520, "prompt_tokens": 90, "tokens": 5100, "seconds": 7.0, "tokens_per_second": 728}
            },
            "reasoning_expert": 0.83,
            "reasoning_hybrid": 0.8,
            "reasoning_ratio": 0.964,
            "tools_expert": 0.97,
            "tools_hybrid": 0.96,
            "tools_ratio": 0.99,
            "direct_obeyed": 1.0,
            "thinking_obeyed": 0.99,
            "kept": 1210,
            "rejected_wrong_answer": 188,
        },
        seconds=77.0,
        rows=[{"step": s, "loss": 0.04 + 2.2 * math.exp(-s / 15)} for s in range(1, 161)],
        samples=[
            {"when": "after", "prompt": "What does the lamp cost?", "reply": call, "reward": 1.0, "teacher": "tools"},
            {"when": "after", "prompt": "Compute 3+4./nothink", "reply": "7", "reward": 1.0, "teacher": "reasoning"},
        ],
    )
    example = {
        "problem_id": "p",
        "sample": 0,
        "stop_reason": "answered",
        "detail": "",
        "prompt": HOSTILE,
        "reply": call,
    }
    refused = {"terminal_state": {"count": 188, "example": example}}
    (distilled / "rejections-tools.json").write_text(json.dumps(refused))
    write_stage(
        root,
        "eval",
        {"type": "eval"},
        {
            "base/arithmetic": 0.0,
            "base/tool_use": 0.0,
            "base/glmctl_cloze": 0.61,
            "hybrid/arithmetic": 0.8,
            "hybrid/tool_use": 0.96,
            "hybrid/glmctl_cloze": 0.58,
            "hybrid/glmctl_nothink": 1.0,
            "hybrid/glmctl_perplexity": 41.2,
            "hybrid/mtp_acceptance": 0.71,
            "hybrid/mtp_identical": True,
        },
        seconds=31.0,
        samples=[
            {"model": name, "prompt": "Compute 3+4.", "reply": reply, "reward": reward}
            for name, reply, reward in (("base", "self.x = 3", 0.0), ("hybrid", "<think>3+4=7</think>\n7", 1.0))
        ],
    )
    write_stage(
        root,
        "serve",
        {"type": "serve"},
        {"reply": "19", "mtp_acceptance": 0.7},
        seconds=4.2,
        samples=[
            {"prompt": "Compute 12+7.", "thinking": True, "reasoning": "12+7=19", "reply": "19", "tool_calls": []},
            {"prompt": "Compute 12+7.", "thinking": False, "reasoning": "", "reply": "19", "tool_calls": []},
            {
                "prompt": "Price of 3 cup?",
                "thinking": True,
                "reasoning": "price",
                "reply": "",
                "tool_calls": [{"name": "price", "arguments": {"item": "cup", "count": 3}}],
            },
        ],
    )
    order = [
        *("tokenizer", "data", "arithmetic", "tools", "pretrain", "reasoning-sft", "rl", "tools-sft"),
        *("distill", "eval", "serve"),
    ]
    (root / "pipeline.json").write_text(json.dumps({"version": 1, "stages": {name: {} for name in order}}))
    (root / "summary.json").write_text(json.dumps({"name": "demo"}))
    return root


class Page(html.parser.HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> with nothing open"
        assert self.open.pop() == tag


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_page_is_well_formed_self_contained_and_shows_every_section(tmp_path: Path) -> None:
    path = report(build_pipeline(tmp_path / "demo"))
    text = path.read_text(encoding="utf-8")
    page = parsed(path)
    for tag, attributes in page.seen:
        assert tag not in ("script", "link", "img", "iframe", "object"), "nothing is loaded and nothing runs"
        assert not {"src", "href", "onerror", "onload"} & attributes.keys()
    assert not re.search(r"url\(|@import|https?://", text)
    for heading in (
        *("Every stage, measured", "Pretraining", "Supervised fine-tuning", "Reinforcement learning"),
        *("Distillation into one hybrid model", "Evaluation", "In its own words", "The served reply"),
    ):
        assert f"<h2>{heading}</h2>" in text
    for piece in (
        "unigram entropy 6.21",
        "long context",
        "Expert load at the end",
        "MTP drafts accepted",
        "Held-out accuracy by domain",
        '<td class="num"><b>83.0%</b><br><span class="kv"><i>100% thought, 31 tokens</i></span></td>',
        '<td>terminal state</td><td class="num">188</td>',
        "What sampling took",
        "active for a token",
        ">layer 1<",
        ">MTP<",
    ):
        assert piece in text
    rows = re.findall(r'<td class="name">.*?</span>([\w-]+)</td>', text)
    assert rows[:2] == ["tokenizer", "data"]
    assert rows[-1] == "serve", "the table is in pipeline order"
    assert "after step 60" in text
    assert "answered, told /nothink" in text
    assert "validation, long context" in text
    assert len(text) < 700_000


def test_what_a_model_wrote_is_escaped(tmp_path: Path) -> None:
    text = report(build_pipeline(tmp_path / "demo")).read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert" in text
    assert "&amp;amp;" in text
    assert "${title}" in text, "template marks in samples are text, not replaced"


def test_any_stage_may_be_missing(tmp_path: Path) -> None:
    full = build_pipeline(tmp_path / "full")
    stages = sorted(path.name for path in full.iterdir() if path.is_dir())
    for number, name in enumerate(stages):
        root = tmp_path / f"one-{number}"
        (full / name).rename(root / name) if root.mkdir() is None else None
        parsed(report(root))
        (root / name / "metrics.jsonl").unlink(missing_ok=True)
        (root / name / "samples.jsonl").unlink(missing_ok=True)
        parsed(report(root / name))
        if number + 1 < len(stages):
            parsed(report(full))


def test_a_single_run_has_a_page_too(tmp_path: Path) -> None:
    root = build_pipeline(tmp_path / "demo")
    text = report(root / "pretrain").read_text(encoding="utf-8")
    assert "<h1>pretrain</h1>" in text
    assert "Expert load at the end" in text


def test_half_written_last_lines_are_left_out_and_damage_is_named(tmp_path: Path) -> None:
    root = build_pipeline(tmp_path / "demo")
    samples = root / "rl" / "samples.jsonl"
    samples.write_text(samples.read_text() + '{"when": "aft')
    report(root)
    samples.write_text("{broken\n" + samples.read_text())
    with pytest.raises(DataError, match=r"samples\.jsonl:1"):
        report(root)


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished or started run"):
        report(tmp_path)


def test_reasoning_and_calls_are_marked_also_when_cut_off() -> None:
    assert marked("<think>a<b</think>\nc") == '<span class="think">&lt;think&gt;a&lt;b&lt;/think&gt;</span>\nc'
    assert marked("x<tool_call>f") == 'x<span class="call">&lt;tool_call&gt;f</span>'
    assert "nothing" in marked("  ")
    assert marked("a\x00b\tc") == "a\u2400b\tc"


def test_messages_are_shown_as_the_model_writes_them() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "reasoning_content": "r",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}],
        },
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "done"},
    ]
    assert row_prompt({"messages": messages}) == "q"
    reply = row_reply({"messages": messages})
    assert reply == '<think>r</think>\n<tool_call>f {"a": "é"}</tool_call>\n[tool] 5\ndone'
    assert message_text({"role": "assistant", "content": None}) == ""
