"""`report.html`: a run or a whole pipeline as one self-contained page, charts and samples inline.

Works on whatever is there: a stage that has not run, or wrote no metrics or samples, is left out of its section.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from glmctl import __version__
from glmctl.console import duration, number
from glmctl.model.config import ModelConfig
from glmctl.run import atomic
from glmctl.run.charts import timeline
from glmctl.run.headline import figure, headline, words
from glmctl.run.report_charts import eval_section, pretrain_section, rl_section, sft_section
from glmctl.run.report_distill import distill_section
from glmctl.run.report_rollouts import rollout_section
from glmctl.run.report_samples import reply_section, sample_section
from glmctl.run.report_teaching import logit_section, on_policy_section, reward_section
from glmctl.run.view import StageView, collect, of_kind, read_json


def report(root: Path) -> Path:
    """Write `root/report.html` for a pipeline root or a single run directory and return its path.

    Raises DataError when there is no run below `root`.
    """
    stages = collect(root)
    name = _title(root, stages)
    body = [
        header(name, stages),
        tiles(stages),
        time_card(stages),
        summary_table(stages),
        *chart_sections(stages),
        rollout_section(stages),
        sample_section(stages),
        reply_section(stages),
        footer(root),
    ]
    page = Template(resources.files("glmctl.run").joinpath("report.html").read_text(encoding="utf-8"))
    path = root / "report.html"
    atomic.write_text(path, page.substitute(title=escape(f"{name} · glmctl"), body="\n".join(p for p in body if p)))
    return path


def chart_sections(stages: list[StageView]) -> list[str]:
    """One section for each kind of stage that left something to draw, in the order of a model's life."""
    return [
        *(pretrain_section(stage) for stage in of_kind(stages, "pretrain")),
        sft_section(of_kind(stages, "sft")),
        rl_section(of_kind(stages, "rl")),
        reward_section(of_kind(stages, "reward")),
        distill_section(of_kind(stages, "distill")),
        on_policy_section(of_kind(stages, "on_policy_distill")),
        logit_section(of_kind(stages, "logit_distill")),
        eval_section(of_kind(stages, "eval")),
    ]


# ----------------------------------------------------------------------------- head of the page


def _title(root: Path, stages: list[StageView]) -> str:
    summary = read_json(root / "summary.json")
    return str(summary.get("name") or (stages[0].recipe.get("name") if len(stages) == 1 else None) or root.name)


def header(name: str, stages: list[StageView]) -> str:
    """Name, one line of what this is, and the facts of the machine."""
    many = len(stages) > 1
    what = f"{len(stages)} stages in the life of one model" if many else f"One {stages[0].kind} run"
    items = "".join(f"<li><b>{escape(value)}</b> {escape(label)}</li>" for value, label in _facts(stages))
    return f'<header><h1>{escape(name)}</h1><p>{escape(what)}.</p><ul class="facts">{items}</ul></header>'


def _facts(stages: list[StageView]) -> Iterator[tuple[str, str]]:
    yield duration(sum(stage.seconds for stage in stages)), "of work"
    shape = next((stage.recipe["model"] for stage in of_kind(stages, "pretrain") if "model" in stage.recipe), None)
    if isinstance(shape, dict):
        counts = ModelConfig.model_validate(shape).parameter_counts()
        yield number(counts.total), "parameters"
        yield number(counts.active), "of them active for a token"
    env = next((stage.env for stage in reversed(stages) if stage.env), {})
    machine = " ".join(str(env[key]) for key in ("system", "machine") if env.get(key))
    if machine:
        yield machine, ""
    if env.get("cpus"):
        yield str(env["cpus"]), "CPU cores"
    packages = env.get("packages") or {}
    versions = {"Python": env.get("python"), "torch": packages.get("torch"), "glmctl": env.get("glmctl")}
    for name, version in versions.items():
        if version:
            yield name, str(version)


def tiles(stages: list[StageView]) -> str:
    """The handful of figures the run is about, large."""
    cards = "".join(
        f'<div class="card tile"><em>{escape(title)}</em><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for title, value, note in _tile_values(stages)
    )
    return f'<div class="tiles">{cards}</div>' if cards else ""


def _tile_values(stages: list[StageView]) -> Iterator[tuple[str, str, str]]:
    for stage in stages:
        s = stage.summary
        if stage.kind == "pretrain" and "validation_loss" in s:
            gap = s.get("validation_loss_below_unigram")
            below = "" if gap is None else f", {float(gap):.2f} below unigram entropy"
            yield "Pretraining loss", f"{float(s['validation_loss']):.3f}", f"nats per token, held out{below}"
        elif stage.kind == "rl" and "heldout_end" in s:
            start, end = s.get("heldout_start"), float(s["heldout_end"])
            note = "held-out accuracy" if start is None else f"held-out accuracy, from {float(start):.0%} before"
            title = f"RL ({stage.name})" if len(of_kind(stages, "rl")) > 1 else "Reinforcement learning"
            yield title, f"{end:.0%}", note
        elif stage.kind == "distill":
            ratios = [float(v) for k, v in s.items() if k.endswith("_ratio")]
            if ratios:
                yield "Hybrid model", f"{min(ratios):.0%}", "of its experts' scores, the lowest of them"
            if "direct_obeyed" in s:
                share = f"{float(s['direct_obeyed']):.0%}"
                yield "Told not to think", share, "of /nothink answers come without reasoning"
    acceptance = _first(stages, "mtp_acceptance")
    if acceptance is not None:
        same = _first(stages, "mtp_identical")
        note = "of drafted tokens kept" + ("; output identical to plain decoding" if same is True else "")
        yield "MTP drafts accepted", f"{float(acceptance):.0%}", note


def _first(stages: list[StageView], key: str) -> Any:
    """The value of `key`, under that name or as `<model>/key`, of the last evaluation, else of the last stage."""
    for stage in [*reversed(of_kind(stages, "eval")), *reversed(stages)]:
        for name, value in reversed(stage.summary.items()):
            if (name == key or name.endswith(f"/{key}")) and value is not None:
                return value
    return None


def time_card(stages: list[StageView]) -> str:
    """Where the time went."""
    picture = timeline([(stage.name, stage.seconds) for stage in stages]) if len(stages) > 1 else ""
    return f'<div class="card">{picture}</div>' if picture else ""


def summary_table(stages: list[StageView]) -> str:
    """One row a stage: state, time and its main figures."""
    rows = []
    for index, stage in enumerate(stages):
        figures = "".join(
            f'<span class="kv"><i>{escape(words(key))}</i>{escape(figure(key, value))}</span>'
            for key, value in headline(stage.kind, stage.summary, 12).items()
        )
        state = f'<span class="state{"" if stage.state == "finished" else " not"}">{escape(stage.state)}</span>'
        rows.append(
            f'<tr><td class="name"><span class="dot f{index % 8}"></span>{escape(stage.name)}</td>'
            f"<td>{escape(stage.kind)}</td><td>{state}</td>"
            f'<td class="num">{escape(duration(stage.seconds))}</td><td>{figures}</td></tr>'
        )
    head = '<tr><th>Stage</th><th>Kind</th><th>State</th><th class="num">Time</th><th>Measured</th></tr>'
    return (
        "<h2>Every stage, measured</h2><p>Losses are in nats per token. Scores are on held-out data.</p>"
        f'<div class="card scroll"><table>{head}{"".join(rows)}</table></div>'
    )


def footer(root: Path) -> str:
    """How the page was made."""
    return (
        f"<footer>Written by glmctl {escape(__version__)} from <code>{escape(root.name)}/</code>: metrics.jsonl, "
        "samples.jsonl and status.json of each stage.</footer>"
    )
