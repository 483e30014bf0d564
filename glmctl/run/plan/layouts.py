"""Which layouts of N devices fit a stage, and what each costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from glmctl.run.plan.devices import DeviceKind
from glmctl.run.plan.memory import Layout, Moment, Work, moments, peak
from glmctl.run.plan.step_time import StepTime, step_time
from glmctl.run.plan.training import Job, Stage

SHORTEST_PART = 1024
"""fewest tokens of a sequence on one device of a context group: below that, attention is all communication"""


@dataclass(frozen=True)
class Option:
    """One way to run a stage."""

    layout: Layout
    work: Work
    memory: Moment
    """of the device at its fullest"""
    time: StepTime

    @property
    def recompute(self) -> bool:
        return self.work.recompute

    def stage_seconds(self, stage: Stage) -> float:
        """All steps; those of a batch ramp hold fewer tokens, but the same update."""
        update = self.time.seconds["optimizer"]
        return stage.steps * ((self.time.total - update) * stage.mean_batch_tokens / stage.batch_tokens + update)


@dataclass(frozen=True)
class Terms:
    """What a plan is made under."""

    device: DeviceKind
    devices: int
    runtime: float
    """bytes of each device that are gone before the first tensor: driver, libraries, allocator"""
    efficiency: float
    headroom: float
    """share of memory that must stay free"""

    @property
    def room(self) -> float:
        return self.device.memory * (1 - self.headroom)


def options(job: Job, stage: Stage, terms: Terms) -> list[Option]:
    """Every layout that fits, each with the largest micro-batch that does, the fastest first."""
    found = []
    for layout in layouts(job, stage, terms):
        mine = _sequences(stage, layout)
        for recompute in (False, True):
            option = _largest(job, stage, layout, mine, recompute, terms)
            if option is not None:
                found.append(option)
    return sorted(found, key=lambda option: option.time.total)


def _sequences(stage: Stage, layout: Layout) -> int:
    """Of one data rank in a step; the busiest counts."""
    return -(-max(1, stage.batch_tokens // stage.length) // layout.data_ranks)


def layouts(job: Job, stage: Stage, terms: Terms) -> Iterator[Layout]:
    """All divisions of the devices that the stage allows: every data rank has a sequence, every device an expert.

    Processes of one machine share its memory: there is nothing to divide.
    """
    devices = terms.devices
    if terms.device.name == "cpu":
        yield Layout(devices)
        return
    rows = stage.batch_tokens // stage.length
    for context in _divisors(devices):
        if stage.length % context or (context > 1 and stage.length // context < SHORTEST_PART):
            continue
        for shard in _divisors(devices // context):
            layout = Layout(devices // context // shard, shard, 1, context)
            if layout.data_ranks > max(1, rows):
                continue
            for expert in _divisors(layout.parts):
                if job.config.n_routed_experts % expert == 0:
                    yield layout._replace(expert=expert)


def _largest(job: Job, stage: Stage, layout: Layout, mine: int, recompute: bool, terms: Terms) -> Option | None:
    """The option with the largest micro-batch that fits; None when even one sequence does not."""
    most = mine if job.micro_tokens is None else min(mine, max(1, job.micro_tokens // stage.length))
    rows = most
    while rows >= 1:
        work = make_work(job, stage, layout, rows, mine, recompute, terms.device.name)
        memory = peak(moments(work, layout, runtime=terms.runtime))
        if memory.total <= terms.room:
            return Option(layout, work, memory, step_time(work, layout, terms.device, terms.efficiency))
        # larger than needed by this factor at the least: weights do not shrink with the micro-batch
        rows //= 2
    return None


def make_work(job: Job, stage: Stage, layout: Layout, rows: int, mine: int, recompute: bool, device: str) -> Work:
    """What a device does in a step of the stage: `mine` sequences of its data rank in micro-batches of `rows`."""
    return Work(
        config=job.config,
        optimizer=job.optimizer,
        rows=rows,
        length=stage.length,
        micro_batches=-(-mine // rows),
        sequences=mine,
        mtp=stage.mtp or layout.data > 1,
        balance=stage.balance,
        recompute=recompute,
        precision=job.precision,
        device=device,
        kv_tokens=stage.kv_tokens(mine),
    )


def other_memory(option: Option, terms: Terms) -> Moment:
    """The memory of the same layout and micro-batch with recomputation the other way round."""
    work = replace(option.work, recompute=not option.recompute)
    return peak(moments(work, option.layout, runtime=terms.runtime))


def smallest(job: Job, stage: Stage, terms: Terms) -> Option | None:
    """The layout that needs least memory, to show by how much a stage does not fit; None when there is none at all."""
    candidates = []
    for layout in layouts(job, stage, terms):
        mine = _sequences(stage, layout)
        work = make_work(job, stage, layout, 1, mine, True, terms.device.name)
        memory = peak(moments(work, layout, runtime=terms.runtime))
        candidates.append(Option(layout, work, memory, step_time(work, layout, terms.device, terms.efficiency)))
    return min(candidates, key=lambda option: option.memory.total, default=None)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
