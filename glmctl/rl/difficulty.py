"""How hard problems are for a policy, by pass@k, and which of them a curriculum's stage keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from glmctl.recipe.schema import HardStage, ModerateStage
from glmctl.rl.environment import Problem

Attempt = Callable[[Sequence[Problem], int, int], list[list[float | None]]]
"""(problems, first sample, number of samples) -> the rewards of each problem's samples; None where a judge failed"""

SOLVED = 1.0
"""the reward of a right answer"""

BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""upper ends of the histogram's buckets of pass rates; the first holds what was never solved"""


@dataclass(frozen=True)
class Pool:
    """What a stage draws from. `kept`: places in the run's list of training problems. `statistics`: for the log."""

    kept: list[int]
    statistics: dict[str, Any]


def moderate_pool(problems: Sequence[Problem], spec: ModerateStage, attempt: Attempt) -> Pool:
    """Problems with verified answers whose pass rate over `spec.samples` samples is within [low, high]."""
    places, statistics = _verified(problems, spec.measure)
    rates = [_rate(rewards) for rewards in attempt([problems[i] for i in places], 0, spec.samples)]
    kept = [i for i, rate in zip(places, rates, strict=True) if rate is not None and spec.low <= rate <= spec.high]
    known = [rate for rate in rates if rate is not None]
    statistics |= {
        "samples": spec.samples * len(places),
        "too_hard": sum(rate < spec.low for rate in known),
        "too_easy": sum(rate > spec.high for rate in known),
        "not_judged": len(rates) - len(known),
        "kept": len(kept),
        "pass_rates": histogram(known),
    }
    return Pool(kept, statistics)


def hard_pool(problems: Sequence[Problem], spec: HardStage, attempt: Attempt) -> Pool:
    """Problems with verified answers with pass@failed = 0 and pass@solved > 0.

    The first `failed` samples all being wrong and one of `solved` being right is what these mean for drawn samples.
    After the first `failed`, the number drawn doubles at each round and a problem leaves when it is solved, so that
    few of them need all of `solved`. A problem whose judge failed on one of the first samples is left out.
    """
    places, statistics = _verified(problems, spec.measure)
    first = attempt([problems[i] for i in places], 0, spec.failed)
    never = [
        i
        for i, rewards in zip(places, first, strict=True)
        if all(reward is not None and reward < SOLVED for reward in rewards)
    ]
    statistics |= {f"pass@{spec.failed}_above_0": len(places) - len(never)}
    done, samples, kept = spec.failed, spec.failed * len(places), list[int]()
    waiting = never
    while waiting and done < spec.solved:
        more = min(done, spec.solved - done)
        rewards = attempt([problems[i] for i in waiting], done, more)
        samples, done = samples + more * len(waiting), done + more
        right = [any(r is not None and r >= SOLVED for r in row) for row in rewards]
        kept += [i for i, solved in zip(waiting, right, strict=True) if solved]
        waiting = [i for i, solved in zip(waiting, right, strict=True) if not solved]
    statistics |= {"samples": samples, f"pass@{spec.solved}_is_0": len(waiting), "kept": len(kept)}
    return Pool(sorted(kept), statistics)


def histogram(rates: Sequence[float]) -> dict[str, int]:
    """How many pass rates are 0, in (0, 0.2], ... (0.8, 1)], and 1 itself among the last."""
    counts = Counter(next(end for end in BUCKETS if rate <= end + 1e-9) for rate in rates)
    return {f"<= {end:g}" if end else "0": counts[end] for end in BUCKETS}


def _verified(problems: Sequence[Problem], most: int | None) -> tuple[list[int], dict[str, Any]]:
    """Places of the problems to measure, and how many are left out for want of a verified answer."""
    places = [i for i, problem in enumerate(problems) if problem.verified]
    statistics = {"problems": len(problems), "unverified": len(problems) - len(places)}
    return places[:most], statistics | {"measured": len(places[:most])}


def _rate(rewards: Sequence[float | None]) -> float | None:
    judged = [reward for reward in rewards if reward is not None]
    return sum(reward >= SOLVED for reward in judged) / len(judged) if judged else None
