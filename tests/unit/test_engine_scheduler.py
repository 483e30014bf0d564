"""Laws of scheduler and blocks: every block is accounted for, what is shared is the same, nobody is lost or starves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from glmctl.engine.blocks import BlockManager, chain
from glmctl.engine.request import Request, SamplingParams
from glmctl.engine.scheduler import SCORED_CHUNK, Scheduler, Work
from glmctl.engine.sequence import Sequence

SIZE, SLOTS, LENGTH, BUDGET, BLOCKS, DRAFTS = 4, 5, 40, 16, 16, 2


def scheduler_of(blocks: int = BLOCKS, **changes: int) -> Scheduler:
    settings = {"block_size": SIZE, "max_slots": SLOTS, "max_length": LENGTH, "prefill_tokens": BUDGET} | changes
    return Scheduler(BlockManager(blocks + 1), **settings)


def sequence_of(name: str, prompt: list[int], **params: int) -> Sequence:
    return Sequence(Request(name, prompt, SamplingParams(**{"max_tokens": 30, **params})), LENGTH)


def carry_out(scheduler: Scheduler, works: list[Work], token: int = 1) -> list[Sequence]:
    """What the engine does with a plan; every sequence gets `token`. Those that ended are removed."""
    ended = []
    for work in works:
        work.sequence.computed = work.start + work.count
        if work.newest and work.sequence.push(token, None, 0, None):
            ended.append(work.sequence)
    for sequence in ended:
        scheduler.remove(sequence)
    return ended


class Machine(RuleBasedStateMachine):
    """Random arrivals, steps, accepted drafts and departures; `content` is what a cache would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_of(lookahead=DRAFTS)
        self.count = 0
        self.inside: list[Sequence] = []
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}
        """(block, offset) -> all tokens up to that place, of whoever wrote it last"""

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH - 1),
        doubled=st.booleans(),
        limit=st.integers(1, 30),
    )
    def add(self, prompt: list[int], doubled: bool, limit: int) -> None:
        # two letters and repetitions: many prompts begin alike
        prompt = (prompt * 3)[: LENGTH - 1] if doubled else prompt
        sequence = sequence_of(str(self.count), prompt, max_tokens=limit)
        self.scheduler.add(sequence)
        self.inside.append(sequence)
        self.count += 1

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        assert bool(plan.works) == bool(self.inside), "somebody always gets on"
        assert len({id(work.sequence) for work in plan.works}) == len(plan.works)
        assert sum(work.count for work in plan.works if work.count > 1) <= BUDGET
        for work in plan.works:
            self.write(work)
        for work in plan.works:
            self.check_context(work)
            self.finish(work, data)

    def write(self, work: Work) -> None:
        """The places of the step, in order: a row may see what those before it wrote."""
        sequence = work.sequence
        assert work.start == sequence.computed
        known = [*sequence.tokens[: work.start + work.count], *work.drafts]
        for place in range(work.start, len(known)):
            block = sequence.blocks[place // SIZE]
            assert self.scheduler.blocks.users(block) == 1 or place // SIZE < len(sequence.chain)
            self.put(block, place, known)

    def put(self, block: int, place: int, known: list[int]) -> None:
        self.content[block, place % SIZE] = tuple(known[: place + 1])

    def check_context(self, work: Work) -> None:
        sequence = work.sequence
        known = [*sequence.tokens[: work.start + work.count], *work.drafts]
        for place in range(len(known)):
            held = self.content[sequence.blocks[place // SIZE], place % SIZE]
            assert held == tuple(known[: place + 1]), "a place does not hold the sequence's own past"

    def finish(self, work: Work, data: st.DataObject) -> None:
        sequence = work.sequence
        sequence.computed = work.start + work.count
        if not work.newest:
            return
        right = data.draw(st.integers(0, len(work.drafts)))
        sequence.computed += right
        for token in [*work.drafts[:right], data.draw(st.integers(0, 1))]:
            if sequence.push(token, None, 0, None):
                self.leave(sequence)
                return
        wanted = min(DRAFTS, sequence.limit - len(sequence.tokens) - 1)
        sequence.drafts = [data.draw(st.integers(0, 1)) for _ in range(wanted)]
        # what the MTP layer writes lies behind the newest token
        for place in range(len(sequence.tokens) - 1, len(sequence.tokens) + wanted - 1):
            assert self.scheduler.blocks.users(sequence.blocks[place // SIZE]) == 1

    def leave(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.inside.remove(sequence)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.inside))
        free = self.scheduler.blocks.free
        own = sum(self.scheduler.blocks.users(block) == 1 for block in sequence.blocks)
        self.leave(sequence)
        assert self.scheduler.blocks.free == free + own, "its blocks are free at once"

    @rule()
    def load_weights(self) -> None:
        self.scheduler.weights += 1

    @invariant()
    def accounts_balance(self) -> None:
        scheduler = self.scheduler
        assert {id(each) for each in (*scheduler.running, *scheduler.waiting)} == {id(each) for each in self.inside}
        held = Counter(block for sequence in scheduler.running for block in sequence.blocks)
        assert 0 not in held
        for block in range(1, BLOCKS + 1):
            assert scheduler.blocks.users(block) == held[block]
        assert scheduler.blocks.free == BLOCKS - len(held)
        assert len({sequence.slot for sequence in scheduler.running}) == len(scheduler.running) <= SLOTS
        for sequence in scheduler.running:
            row = scheduler.table_SM[sequence.slot]
            assert row[: len(sequence.blocks)].tolist() == sequence.blocks
            assert not row[len(sequence.blocks) :].any()
            assert len(set(sequence.blocks)) == len(sequence.blocks)
        for sequence in scheduler.waiting:
            assert not sequence.blocks
            assert sequence.slot < 0

    def teardown(self) -> None:
        for sequence in list(self.inside):
            self.leave(sequence)
        assert self.scheduler.blocks.free == BLOCKS


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_first_come_first_served() -> None:
    scheduler = scheduler_of(max_slots=2)
    for name in "abcd":
        scheduler.add(sequence_of(name, [ord(name)] * 4))
    carry_out(scheduler, scheduler.schedule().works)
    assert [seq.request.id for seq in scheduler.running] == ["a", "b"]
    scheduler.remove(scheduler.running[0])
    assert [seq.request.id for seq in scheduler.schedule().admitted] == ["c"]


def test_a_long_prompt_does_not_stop_the_others() -> None:
    scheduler = scheduler_of(prefill_tokens=8)
    scheduler.add(sequence_of("short", [1] * 4))
    carry_out(scheduler, scheduler.schedule().works)
    scheduler.add(sequence_of("long", [2] * 30))
    pieces = []
    while len(pieces) < 4:
        short, long = scheduler.schedule().works
        assert short.newest, "the short one decodes meanwhile"
        pieces.append((long.start, long.count, long.newest))
        carry_out(scheduler, [short, long])
    assert pieces == [(0, 8, False), (8, 8, False), (16, 8, False), (24, 6, True)]


def test_a_prefix_is_computed_once_also_within_one_step() -> None:
    scheduler = scheduler_of(prefill_tokens=40)
    prefix = list(range(8))
    for name in "abc":
        scheduler.add(sequence_of(name, [*prefix, ord(name)]))
    works = scheduler.schedule().works
    assert [(work.start, work.count) for work in works] == [(0, 9), (8, 1), (8, 1)]
    assert len({tuple(work.sequence.blocks[:2]) for work in works}) == 1
    assert scheduler.reused == 16


def test_a_later_turn_finds_what_the_earlier_one_generated() -> None:
    scheduler = scheduler_of()
    first = sequence_of("first", [5] * 6, max_tokens=7)
    scheduler.add(first)
    while not carry_out(scheduler, scheduler.schedule().works):
        pass
    scheduler.add(sequence_of("second", [*first.tokens, 8, 9]))
    (work,) = scheduler.schedule().works
    # the last of the 13 tokens was never fed
    assert (work.start, work.count) == (12, 3)


def test_weights_that_changed_share_nothing_with_those_before() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence_of("old", [5] * 9))
    carry_out(scheduler, scheduler.schedule().works)
    scheduler.weights += 1
    scheduler.add(sequence_of("new", [5] * 9))
    assert [work.start for work in scheduler.schedule().works] == [9, 0]
    for _ in range(4):
        # the old one goes on and fills blocks: they are old, too
        carry_out(scheduler, scheduler.schedule().works)
    old = next(seq for seq in scheduler.running if seq.request.id == "old")
    assert scheduler.blocks.find(old.chain[-1]) is not None
    new = next(seq for seq in scheduler.running if seq.request.id == "new")
    assert old.chain[0] != new.chain[0]


def test_the_youngest_makes_room_and_comes_back_first() -> None:
    scheduler = scheduler_of(blocks=10, max_slots=3)
    for name in "abc":
        scheduler.add(sequence_of(name, [ord(name)] * 8))
    order = []
    while scheduler.running or scheduler.waiting:
        before = scheduler.preemptions
        works = scheduler.schedule().works
        if scheduler.preemptions > before:
            assert scheduler.waiting[0].request.id in "bc"
            assert not works or works[-1].sequence.request.id != scheduler.waiting[0].request.id
        order += [seq.request.id for seq in carry_out(scheduler, works)]
    assert scheduler.preemptions > 0
    assert order == ["a", "b", "c"]


def test_free_blocks_are_handed_out_least_recently_used_first_and_nameless_before_named() -> None:
    blocks = BlockManager(5)
    a, b, c, d = blocks.take(4)
    blocks.publish(b, b"b")
    blocks.publish(c, b"c")
    blocks.release([c])
    blocks.release([b])
    blocks.release([a, d])
    assert blocks.find(b"b") == b
    blocks.share(b)
    assert blocks.take(2) == [a, d] or blocks.users(d) == 1
    assert blocks.take(1) == [c]
    assert blocks.find(b"c") is None
    assert blocks.find(b"b") == b
    assert blocks.free == 0


def test_equal_blocks_that_were_computed_twice_keep_one_name() -> None:
    blocks = BlockManager(3)
    a, b = blocks.take(2)
    blocks.publish(a, b"x")
    blocks.publish(b, b"x")
    assert blocks.find(b"x") == a
    blocks.release([a])
    blocks.take(1)
    assert blocks.find(b"x") is None
    blocks.forget()


def test_a_name_depends_on_every_token_before() -> None:
    names = {chain(chain(b"", first), second) for first in ([1, 2], [1, 3]) for second in ([4, 5], [4, 6], [5, 4])}
    assert len(names) == 6


@pytest.mark.parametrize("length", [SCORED_CHUNK, SCORED_CHUNK + 1])
def test_a_scored_prompt_goes_in_small_pieces_and_shares_nothing(length: int) -> None:
    scheduler = scheduler_of(blocks=300, max_length=1000, prefill_tokens=1000)
    for name in "ab":
        request = Request(name, [7] * length, SamplingParams(max_tokens=2, prompt_logprobs=0))
        scheduler.add(Sequence(request, 1000))
    assert [work.count for work in scheduler.schedule().works] == [SCORED_CHUNK] * 2
