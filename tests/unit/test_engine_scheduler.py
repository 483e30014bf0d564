"""Laws of the scheduler: rows stay compact, nobody is lost, prompts are prefilled once and completely."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmctl.engine.request import Request, Sequence
from glmctl.engine.scheduler import Scheduler

SLOTS, BUDGET = 5, 16


class Machine(RuleBasedStateMachine):
    """Random arrivals, steps and departures; `place` mirrors what a tensor owner would hold in each row."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, BUDGET)
        self.count = 0
        self.place: dict[int, str] = {}
        self.cached: dict[str, int] = {}

    @rule(length=st.integers(1, 50), same=st.booleans())
    def add(self, length: int, same: bool) -> None:
        prompt = [7] * length if same else [self.count + 100] * length
        self.scheduler.add(Sequence(Request(str(self.count), prompt), 1000))
        self.count += 1

    @rule()
    def admit(self) -> None:
        admission = self.scheduler.admit()
        computed = 0
        for group in admission.groups:
            for offset, (seq, end) in enumerate(zip(group.leaders, group.ends, strict=True)):
                name, row = seq.request.id, group.first_row + offset
                assert self.place.get(row) == (name if group.start else None), "a row in use was given away"
                assert self.cached.get(name, 0) == group.start, "a piece does not continue the one before"
                self.place[row], self.cached[name] = name, end
                computed += end - group.start
        assert computed <= BUDGET
        for source, target, seq in admission.copies:
            leader = self.scheduler.rows[source]
            assert leader.request.prompt == seq.request.prompt
            assert target not in self.place
            self.place[target] = seq.request.id
            self.cached[seq.request.id] = self.cached[leader.request.id]

    @precondition(lambda self: self.scheduler.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.scheduler.rows) - 1))
        del self.place[row]
        for source, target in self.scheduler.remove(row):
            assert target not in self.place, "a move overwrites a live row"
            self.place[target] = self.place.pop(source)

    @precondition(lambda self: self.scheduler.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(list(self.scheduler.waiting)))
        assert self.scheduler.drop_waiting(seq.request.id) is seq
        assert self.scheduler.drop_waiting(seq.request.id) is None

    @invariant()
    def compact_and_consistent(self) -> None:
        rows = self.scheduler.rows
        assert len(rows) <= SLOTS
        assert 0 <= len(rows) - self.scheduler.decoding <= 1
        assert self.place == {row: seq.request.id for row, seq in enumerate(rows)}
        for row, seq in enumerate(rows):
            whole = self.cached[seq.request.id] == len(seq.request.prompt)
            assert whole == (row < self.scheduler.decoding)


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_first_come_first_served() -> None:
    scheduler = Scheduler(2, 8)
    for name in "abcd":
        scheduler.add(Sequence(Request(name, [ord(name)] * 4), 100))
    scheduler.admit()
    assert sorted(seq.request.id for seq in scheduler.rows) == ["a", "b"]
    scheduler.remove(0)
    scheduler.admit()
    assert "c" in {seq.request.id for seq in scheduler.rows}


def test_a_long_prompt_does_not_stop_the_others() -> None:
    scheduler = Scheduler(4, 8)
    scheduler.add(Sequence(Request("short", [1] * 4), 100))
    scheduler.admit()
    scheduler.add(Sequence(Request("long", [2] * 30), 100))
    pieces = []
    while scheduler.decoding < 2:
        group = scheduler.admit().groups[0]
        pieces.append((group.start, group.ends[0]))
        assert scheduler.decoding >= 1, "the short one decodes meanwhile"
    assert pieces == [(0, 8), (8, 16), (16, 24), (24, 30)]
