"""Collecting a batch: over-sampling until it is full, stopping the rest, and carrying what was stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.request import Event, Request
from glmctl.recipe.schema import ArithmeticTask, RlRecipe, Sampling, ToolUseTask
from glmctl.rl import tasks
from glmctl.rl.collect import Batch, Collector, Group
from glmctl.rl.environment import Problem, StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.invariants import StaleRollout, check_versions
from glmctl.rl.prompts import Prompts
from glmctl.rl.rollout import play
from glmctl.rl.tasks import arithmetic, tool_use

SIZE = 4


class Typist:
    """An engine that writes one token of each request's script at a step. The script is of (request, its sample)."""

    max_length = 4096

    def __init__(self, script: Callable[[Request, int], list[int]]) -> None:
        self.script, self.version, self.stats = script, 0, SimpleNamespace(tokens=0)
        self.requests: list[Request] = []
        self.active: dict[str, list[int]] = {}
        self.cut: set[str] = set()

    def add(self, request: Request) -> None:
        self.requests.append(request)
        sample = int(request.id.split(".")[1])
        script = self.script(request, sample)
        self.active[request.id] = script[: request.params.max_tokens]
        if len(script) > request.params.max_tokens:
            self.cut.add(request.id)

    def abort(self, request_id: str) -> None:
        self.active.pop(request_id, None)

    def step(self) -> list[Event]:
        events = []
        for name, tokens in list(self.active.items()):
            token, last = tokens.pop(0), not tokens
            if not tokens:
                del self.active[name]
                last = True
            self.stats.tokens += 1
            reason = None if not last else "length" if name in self.cut else "stop"
            events.append(Event(name, token, -0.5 - self.version, reason, self.version, None, None))
        return events


@pytest.fixture(scope="module")
def template(tiny_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer)


PROBLEMS = arithmetic.generate(ArithmeticTask(terms=(2, 2), max_value=9), 40, random.Random(2))


def recipe(**changes) -> RlRecipe:
    settings = {
        "name": "r", "model": "m", "problems": ["p"], "heldout": ["h"], "steps": 9, "prompts_per_step": 3,
        "group_size": SIZE, "oversample": 1.0, "rollouts": {"until_full": True, "unfinished": "carry"},
    }  # fmt: skip
    return RlRecipe.model_validate(settings | changes)


def typist(template: ChatTemplate, length: Callable[[Problem, int], int], right: Callable[[int], bool]) -> Typist:
    """Answers with `length(problem, sample)` characters of reasoning; rightly in the samples that `right` names."""
    by_prompt = {tuple(template.encode_prompt(*tasks.environment(p).reset())): p for p in PROBLEMS}
    whole: dict[tuple[str, int], list[int]] = {}

    def script(request: Request, sample: int) -> list[int]:
        prompt, problem = next((k, p) for k, p in by_prompt.items() if tuple(request.prompt[: len(k)]) == k)
        answer = problem.answer if right(sample) else "no"
        text = f"\n<think>{'7' * length(problem, sample)}</think>\n{answer}<|user|>"
        tokens = template.tokenizer.encode(text)
        done = len(request.prompt) - len(prompt)
        # a request that goes on continues the very answer that was stopped
        assert request.prompt[len(prompt) :] == tokens[:done]
        whole[problem.id, sample] = tokens
        return tokens[done:]

    return Typist(script)


def collect(collector: Collector, prompts: Prompts, step: int) -> Batch:
    return collector.collect(prompts, step, group_size=SIZE, sampling=Sampling(max_tokens=200))


def half(sample: int) -> bool:
    return sample % 2 == 0


def test_a_fixed_number_of_prompts_is_drawn_when_nothing_else_is_asked_for(template) -> None:
    engine = typist(template, lambda p, s: 3, half)
    collector = Collector(recipe(rollouts={}, oversample=1.5), engine, template)
    prompts = Prompts(PROBLEMS, 0)
    batch = collect(collector, prompts, 1)
    assert (batch.drawn, len(batch.groups), len(batch.ended), batch.stopped) == (5, 3, 20, 0)
    # the first useful ones in the order in which they were drawn
    assert [group[0].problem_id for group in batch.groups] == [p.id for p in Prompts(PROBLEMS, 0).take(3)]
    assert batch.tokens == engine.stats.tokens == sum(one.generated_tokens for one in batch.ended)


def test_prompts_are_drawn_until_enough_groups_teach_something(template) -> None:
    """Only every third problem has answers that differ; the rest is right throughout."""
    useful = {p.id for p in PROBLEMS[::3]}
    engine = typist(template, lambda p, s: 3, lambda s: True)
    real = engine.script

    def script(request: Request, sample: int) -> list[int]:
        tokens = real(request, sample)
        problem = next(p for p in PROBLEMS if p.prompt in template.tokenizer.decode(request.prompt))
        wrong = template.tokenizer.encode("\n<think>777</think>\nno<|user|>")
        return wrong if problem.id in useful and not half(sample) else tokens

    engine.script = script
    prompts = Prompts(PROBLEMS, 0)
    batch = collect(Collector(recipe(), engine, template), prompts, 1)
    assert {group[0].problem_id for group in batch.groups} <= useful
    assert len(batch.groups) == 3
    assert batch.drawn > 3
    # but never more than the recipe allows
    useful.clear()
    batch = collect(Collector(recipe(), engine, template), Prompts(PROBLEMS, 1), 1)
    assert (len(batch.groups), batch.drawn) == (0, 12)


def test_a_group_whose_only_difference_is_masked_teaches_nothing(template) -> None:
    """Sample 1 thinks until its tokens run out and scores 0, the others are right: with it masked all are equal."""
    engine = typist(template, lambda p, s: 60 if s == 1 else 2, lambda s: True)

    def useful(**objective) -> int:
        collector = Collector(recipe(rollouts={}, objective={"type": "grpo", **objective}), engine, template)
        batch = collector.collect(Prompts(PROBLEMS, 0), 1, group_size=SIZE, sampling=Sampling(max_tokens=40))
        assert {one.stop_reason for one in batch.ended} == {StopReason.ANSWERED, StopReason.TRUNCATED}
        return len(batch.groups)

    assert useful() == 3
    assert useful(mask_truncated=True) == 0


def slow(problem: Problem, sample: int) -> int:
    """One sample of every third problem thinks for longer."""
    return 7 if problem in PROBLEMS[::3] and sample == 1 else 2


def test_the_rest_is_stopped_when_the_batch_is_full(template) -> None:
    engine = typist(template, slow, half)
    batch = collect(
        Collector(recipe(oversample=3.0, rollouts={"until_full": True}), engine, template), Prompts(PROBLEMS, 0), 1
    )
    assert len(batch.groups) == 3
    assert batch.stopped > 0
    assert not batch.carried
    assert not engine.active
    assert all(one.reward is not None for group in batch.groups for one in group)


def test_what_was_stopped_goes_on_under_new_weights_token_for_token(template) -> None:
    engine = typist(template, slow, half)
    collector, prompts = Collector(recipe(oversample=1.5), engine, template), Prompts(PROBLEMS, 0)
    first = collect(collector, prompts, 1)
    partial = {(t.problem_id, t.sample): list(t.tokens) for g in first.carried for t in g.samples if not t.well_formed}
    assert first.stopped == len(partial) > 0
    saved = json.loads(json.dumps([group.to_row() for group in first.carried]))
    engine.version = 1
    drawn = prompts.drawn
    second = collect(collector, prompts, 2)
    carried = [t for t in second.ended if (t.problem_id, t.sample) in partial]
    assert carried
    for one in carried:
        before = partial[one.problem_id, one.sample]
        assert one.tokens[: len(before)] == before
        assert one.versions == [0, 1]
        assert (one.born, one.stop_reason, one.well_formed) == (1, StopReason.ANSWERED, True)
        # each token has the log-prob of the weights that made it
        made = [lp for lp, m in zip(one.logprobs, one.loss_mask, strict=True) if m]
        assert made == sorted(made, reverse=True)
        assert set(made) == {-0.5, -1.5}
    check_versions(second.ended, 1, max_staleness=1)
    with pytest.raises(StaleRollout):
        check_versions(second.ended, 1, max_staleness=0)
    # a checkpoint holds the groups, and from it the same step follows
    engine.version = 1
    again = Collector(recipe(oversample=1.5), engine, template)
    again.carried = [Group.from_row(row) for row in saved]
    repeated = collect(again, Prompts(PROBLEMS, 0, drawn=drawn), 2)
    assert [[t.to_row() for t in g] for g in repeated.groups] == [[t.to_row() for t in g] for g in second.groups]


def test_groups_that_grew_too_old_are_given_up(template) -> None:
    engine = typist(template, slow, half)
    collector, prompts = Collector(recipe(oversample=1.5), engine, template), Prompts(PROBLEMS, 0)
    old = {t.problem_id for g in collect(collector, prompts, 1).carried for t in g.samples}
    assert old
    engine.version = 2
    given_up = sum(len(group.samples) for group in collector.carried)
    batch = collect(collector, prompts, 3)
    assert batch.expired == given_up > 0
    assert not any(t.born == 1 for t in batch.ended)
    assert all(version == 2 for t in batch.ended for version in t.versions)


def test_no_rollout_is_trained_twice_and_none_of_a_carried_group_is_lost(template) -> None:
    engine = typist(template, slow, half)
    collector, prompts = Collector(recipe(oversample=2.0), engine, template), Prompts(PROBLEMS, 0)
    seen: list[tuple[str, int, int]] = []
    for step in range(1, 9):
        engine.version = step - 1
        batch = collect(collector, prompts, step)
        assert all(len(group) == SIZE for group in batch.groups)
        check_versions([one for group in batch.groups for one in group], step - 1, max_staleness=1)
        seen += [(one.problem_id, one.sample, one.born) for group in batch.groups for one in group]
    assert len(seen) == len(set(seen)) == 8 * 3 * SIZE


def test_a_tool_conversation_goes_on_in_the_middle_of_its_second_turn(template) -> None:
    """The environment is brought to where it was by the messages so far; the rest is as if nothing had happened."""
    problem = next(p for p in tool_use.generate(ToolUseTask(), 30, random.Random(5)) if p.state["kind"] == "local")
    conversation = tasks.demonstrate(problem)
    whole = template.encode_training(conversation.messages, conversation.tools)

    def script(request: Request, sample: int) -> list[int]:
        n = len(request.prompt)
        assert whole.tokens[:n] == request.prompt
        return whole.tokens[n : n + [*whole.loss_mask[n:], 0].index(0)]

    for cut in (3, 40, 80, 120):
        engine = Typist(script)
        samples = [Trajectory(problem.id, problem.task, 0, i, born=1) for i in range(2)]
        steps = iter(range(cut))
        play(
            engine,
            template,
            [(problem, one) for one in samples],
            sampling=Sampling(max_tokens=200),
            seed=0,
            max_turns=4,
            stopped=lambda steps=steps: next(steps, None) is None,
        )
        assert 0 < samples[0].generated_tokens < sum(whole.loss_mask)
        collector = Collector(recipe(prompts_per_step=1, group_size=2, dynamic_sampling=False), engine, template)
        collector.carried = [Group.from_row(json.loads(json.dumps(Group(problem, samples).to_row())))]
        engine.version = 1
        batch = collector.collect(Prompts([problem], 0), 2, group_size=2, sampling=Sampling(max_tokens=200))
        assert len(batch.ended) == 2
        for ended in batch.ended:
            assert ended.tokens == whole.tokens
            assert ended.loss_mask == whole.loss_mask
            assert (ended.reward, ended.stop_reason) == (1.0, StopReason.ANSWERED)


def test_a_failing_judge_in_a_carried_group_is_masked(template, monkeypatch) -> None:
    engine = typist(template, slow, half)
    collector, prompts = Collector(recipe(oversample=1.5), engine, template), Prompts(PROBLEMS, 0)
    first = collect(collector, prompts, 1)
    broken = first.carried[0].problem.id
    real = tasks.environment

    def environment(problem: Problem):
        if problem.id == broken:
            raise RuntimeError("down")
        return real(problem)

    monkeypatch.setattr("glmctl.rl.episode.environment", environment)
    engine.version = 1
    batch = collect(collector, prompts, 2)
    failed = [one for one in batch.ended if one.reward is None]
    assert {one.problem_id for one in failed} == {broken}
    assert all(one.stop_reason is StopReason.INFRASTRUCTURE for one in failed)
    assert failed[0].detail == "RuntimeError: down"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=7, max_size=7),
    staleness=st.integers(1, 3),
    oversample=st.floats(1.0, 3.0),
    cut=st.integers(1, 5),
)
def test_staleness_is_bounded_and_every_rollout_trained_at_most_once(
    template, lengths: list[int], staleness: int, oversample: float, cut: int
) -> None:
    """Reliability R5 for the synchronous buffer, whatever the lengths; a resume in between changes neither."""
    engine = typist(template, lambda p, s: lengths[(PROBLEMS.index(p) + 3 * s) % 7], half)
    one = recipe(
        oversample=oversample, rollouts={"until_full": True, "unfinished": "carry", "max_staleness": staleness}
    )
    collector, prompts, seen = Collector(one, engine, template), Prompts(PROBLEMS, 0), set[tuple[str, int, int]]()
    for step in range(1, 8):
        engine.version = step - 1
        if step == cut:
            saved = json.loads(json.dumps([group.to_row() for group in collector.carried]))
            collector, prompts = Collector(one, engine, template), Prompts(PROBLEMS, 0, drawn=prompts.drawn)
            collector.carried = [Group.from_row(row) for row in saved]
        batch = collect(collector, prompts, step)
        trained = [t for group in batch.groups for t in group]
        check_versions(trained, step - 1, max_staleness=staleness)
        names = {(t.problem_id, t.sample, t.born) for t in trained}
        assert len(names) == len(trained)
        assert not names & seen
        seen |= names
