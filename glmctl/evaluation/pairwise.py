"""Two models' answers before a judge: wins, ties and losses with intervals, every judgement kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from glmctl import console
from glmctl.data.parsing import parse
from glmctl.errors import DataError, RecipeError
from glmctl.evaluation.compare import read_samples, shared_tasks
from glmctl.evaluation.judge import Judge, verdict
from glmctl.evaluation.responses import Responses
from glmctl.evaluation.results import write_json, write_rows
from glmctl.evaluation.statistics import mcnemar, paired, wilson

CONCURRENCY = 8
MAX_UNREADABLE = 0.1
DEFAULT_TASK = "glmctl_chat"


@dataclass(frozen=True)
class Judged:
    """One question, judged in both orders. `outcome` is the second model's: 1 won, 0 tied, -1 lost, None unreadable."""

    question: str
    first: str
    second: str
    replies: tuple[str, str]
    """to (first as A, second as B) and to the swapped pair"""
    outcomes: tuple[int | None, int | None]

    @property
    def outcome(self) -> int | None:
        """What both orders say; a tie when they contradict each other or only one of them prefers anything."""
        there, back = self.outcomes
        if there is None or back is None:
            return None
        return there if there == back else 0

    @property
    def swayed(self) -> bool:
        """Whether the order of the answers decided what the judge preferred."""
        there, back = self.outcomes
        return there is not None and back is not None and there != back


@dataclass(frozen=True)
class Pairwise:
    """The second model against the first. Intervals are 95%: Wilson's for shares, bootstrap for the difference."""

    documents: int
    wins: int
    ties: int
    losses: int
    win_interval: tuple[float, float]
    tie_interval: tuple[float, float]
    loss_interval: tuple[float, float]
    net: float
    """(wins - losses) / documents"""
    net_interval: tuple[float, float]
    p_value: float
    """two-sided exact sign test over the questions that are no ties"""
    swayed: float
    """share of questions on which swapping the answers changed the verdict"""
    unreadable: int
    """questions that were left out because a reply gave no verdict"""

    def to_row(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def judge_folders(
    first: Path, second: Path, judge: Judge, folder: Path, tasks: Sequence[str] | None = None
) -> dict[str, Pairwise]:
    """Judge the answers of two evaluated models (`<run>/export/<model>`) to the same questions.

    `folder` gets `judgements_<task>.jsonl` (prompts, replies, outcomes) and `results.json`; what it already holds of an
    interrupted call is not asked again. RecipeError for a task that is not in both or has no text answers; DataError
    when over a tenth of the replies give no verdict; EnvironmentProblem when the endpoint does not answer.
    """
    found: dict[str, Pairwise] = {}
    with Responses(folder / "responses.jsonl", judge.url) as responses:
        for task in tasks or [DEFAULT_TASK]:
            answers = [_answers(path) for path in shared_tasks(first, second, task)]
            if answers[0].keys() != answers[1].keys():
                raise DataError(f"{second}: other questions of '{task}' than {first}; same --limit and problems?")
            pairs = [(question, answers[0][question], answers[1][question]) for question in answers[0]]
            judged = _judge(judge, pairs, responses)
            found[task] = summarize(judged)
            rows = [_row(judge, one) for one in judged]
            write_rows(folder / f"judgements_{task}.jsonl", rows)
    body = {
        "first": str(first),
        "second": str(second),
        "judge": {"url": judge.url, **judge.settings()},
        "tasks": {task: one.to_row() for task, one in found.items()},
    }
    write_json(folder / "results.json", body)
    return found


def summarize(judged: Sequence[Judged], seed: int = 0) -> Pairwise:
    """Counts and intervals of judgements. DataError when over a tenth are unreadable or nothing is left."""
    outcomes = [float(one.outcome) for one in judged if one.outcome is not None]
    unreadable = len(judged) - len(outcomes)
    if not outcomes or unreadable > MAX_UNREADABLE * len(judged):
        raise DataError(
            f"{unreadable} of {len(judged)} judgements give no verdict; the judge must end with 'Verdict: A|B|tie'"
        )
    n = len(outcomes)
    wins, losses = outcomes.count(1.0), outcomes.count(-1.0)
    ties = n - wins - losses
    net = paired([0.0] * n, outcomes, seed=seed)
    return Pairwise(
        documents=n,
        wins=wins,
        ties=ties,
        losses=losses,
        win_interval=wilson(wins, n),
        tie_interval=wilson(ties, n),
        loss_interval=wilson(losses, n),
        net=net.difference,
        net_interval=(net.low, net.high),
        p_value=mcnemar(wins, losses),
        swayed=sum(one.swayed for one in judged) / len(judged),
        unreadable=unreadable,
    )


def show(first: Path, second: Path, results: Mapping[str, Pairwise]) -> None:
    """The outcome as a table."""
    columns = ["task", "questions", "win", "tie", "loss", "net", "95%", "p", "swayed by order"]
    rows = [
        [
            task,
            str(one.documents),
            _share(one.wins, one.documents, one.win_interval),
            _share(one.ties, one.documents, one.tie_interval),
            _share(one.losses, one.documents, one.loss_interval),
            f"{one.net:+.1%}",
            f"{one.net_interval[0]:+.1%} .. {one.net_interval[1]:+.1%}",
            f"{one.p_value:.2g}",
            f"{one.swayed:.0%}",
        ]
        for task, one in results.items()
    ]
    console.table(f"{second.name} against {first.name}, as judged", columns, rows)


def _judge(judge: Judge, pairs: Sequence[tuple[str, str, str]], responses: Responses) -> list[Judged]:
    """Both orders of every pair, several at once; each reply is kept as it comes."""
    prompts = [
        judge.messages(question, *order)
        for question, first, second in pairs
        for order in ((first, second), (second, first))
    ]
    keys = [responses.key("judge", prompt, judge.settings()) for prompt in prompts]
    writing = Lock()

    def ask(prompt: list[dict[str, str]], key: str) -> None:
        """Keeps the reply itself, so that what is under way when another judgement fails is not lost."""
        reply = judge.ask(prompt)
        with writing:
            responses.put([(key, reply)])

    with (
        ThreadPoolExecutor(CONCURRENCY) as pool,
        console.progress("judging", len(prompts), unit="judgement") as progress,
    ):
        asked = [
            pool.submit(ask, prompt, key)
            for key, prompt in dict(zip(keys, prompts, strict=True)).items()
            if responses.get(key) is None
        ]
        progress.advance(len(prompts) - len(asked))
        try:
            for future in as_completed(asked):
                future.result()
                progress.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    replies = [str(responses.get(key)) for key in keys]
    judged = []
    for number, (question, first, second) in enumerate(pairs):
        there, back = replies[2 * number], replies[2 * number + 1]
        outcomes = (_outcome(there, second_is="B"), _outcome(back, second_is="A"))
        judged.append(Judged(question, first, second, (there, back), outcomes))
    return judged


def _outcome(reply: str, second_is: str) -> int | None:
    found = verdict(reply)
    if found is None:
        return None
    return 0 if found == "tie" else 1 if found == second_is else -1


def _answers(path: Path) -> dict[str, str]:
    """Question -> the content of its first answer, reasoning left out: a judge sees what a user would."""
    found: dict[str, str] = {}
    for number, row in read_samples(path):
        doc = row.get("doc")
        if isinstance(doc, dict) and isinstance(doc.get("question"), str) and row.get("resps"):
            question, reply = doc["question"], row["resps"][0][0]
        elif isinstance(row.get("prompt"), str) and isinstance(row.get("reply"), str):
            question, reply = row["prompt"], row["reply"]
        else:
            raise RecipeError(f"{path}:{number}: no question with a text answer, a judge cannot compare it")
        parsed = parse(str(reply), thinking="</think>" in str(reply))
        found.setdefault(question, parsed.content if parsed.well_formed else str(reply))
    return found


def _share(count: int, of: int, interval: tuple[float, float]) -> str:
    return f"{count / of:.1%} ({interval[0]:.0%} .. {interval[1]:.0%})"


def _row(judge: Judge, one: Judged) -> dict[str, Any]:
    orders = ((one.first, one.second), (one.second, one.first))
    return {
        **asdict(one),
        "outcome": one.outcome,
        "swayed": one.swayed,
        "prompts": [judge.messages(one.question, *order) for order in orders],
    }
