"""Rollouts: token alignment over turns, loss masks, named stop reasons, and what infrastructure failures do."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable

import pytest
import torch

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.engine.request import Event, Request
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.kernels.linear_cross_entropy import token_log_probs
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, CodeCallsTask, InstructionsTask, Sampling, ToolUseTask
from glmctl.rl import episode as episode_module
from glmctl.rl import tasks
from glmctl.rl.environment import InfrastructureFailure, Problem, StopReason, Transition, require_one_id_each
from glmctl.rl.episode import Trajectory
from glmctl.rl.rollout import rollout
from glmctl.rl.score import load_heldout
from glmctl.rl.tasks import arithmetic, demonstrate, tool_use


class ScriptedEngine:
    """Writes what a script says, one token a step for every request: an engine whose model knows its lines."""

    max_length = 4096

    def __init__(self, script: Callable[[Request], list[int]]) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.active: dict[str, list[int]] = {}
        self.aborted: list[str] = []

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.active[request.id] = self.script(request)[: request.params.max_tokens]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def step(self) -> list[Event]:
        events = []
        for name, tokens in list(self.active.items()):
            token = tokens.pop(0)
            reason = None
            if not tokens:
                del self.active[name]
                stops = next(r for r in self.requests if r.id == name).params.stop_token_ids
                reason = "stop" if token in stops else "length"
            events.append(Event(name, token, -0.5, reason, 7, None, None))
        return events


@pytest.fixture(scope="module")
def template(tiny_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer)


def performs(template: ChatTemplate, problems: list[Problem], *, thinking: bool = True) -> ScriptedEngine:
    """An engine that plays the scripted demonstrations: the next stretch of loss tokens after its prompt."""
    plays = []
    for problem in problems:
        conversation = demonstrate(problem)
        messages = conversation.messages
        if not thinking:
            messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        plays.append(template.encode_training(messages, conversation.tools, enable_thinking=thinking))

    def script(request: Request) -> list[int]:
        n = len(request.prompt)
        play = next(p for p in plays if p.tokens[:n] == request.prompt)
        stop = n + [*play.loss_mask[n:], 0].index(0)
        return play.tokens[n:stop]

    return ScriptedEngine(script)


def run(engine, template, problems, **changes) -> list[Trajectory]:
    settings = {"samples": 1, "sampling": Sampling(), "seed": 0, "max_turns": 4} | changes
    return rollout(engine, template, problems, **settings)


def shop(count: int) -> list[Problem]:
    return tool_use.generate(ToolUseTask(), count, random.Random(5))


@pytest.mark.parametrize("thinking", [True, False])
def test_tokens_of_canonical_turns_are_those_of_the_whole_conversation(template, thinking: bool) -> None:
    """Prompt + generated ids + observation, turn after turn, equals the template's encoding of all of it: the model
    trains on exactly what it saw, and the mask is on exactly what SFT would train on."""
    problems = shop(30) + arithmetic.generate(ArithmeticTask(), 10, random.Random(1))
    assert {p.state.get("kind") for p in problems} == {"stock", "price", "local", None}
    engine = performs(template, problems, thinking=thinking)
    for one in run(engine, template, problems, enable_thinking=thinking):
        whole = template.encode_training(one.messages, one.tools, enable_thinking=thinking)
        assert one.tokens == whole.tokens
        assert one.loss_mask == whole.loss_mask
        assert (one.reward, one.stop_reason, one.well_formed) == (1.0, StopReason.ANSWERED, True)
        assert [lp for lp, m in zip(one.logprobs, one.loss_mask, strict=True) if m] == [-0.5] * one.generated_tokens
        assert one.versions == [7] * len(one.assistant_turns)


def test_each_prompt_continues_the_tokens_before_it(template) -> None:
    problems = [next(p for p in shop(30) if p.state["kind"] == "local")]
    engine = performs(template, problems)
    (one,) = run(engine, template, problems)
    prompts = [request.prompt for request in engine.requests]
    assert len(prompts) == 3
    for prompt in prompts:
        assert one.tokens[: len(prompt)] == prompt


def test_a_trajectory_survives_json(template) -> None:
    problems = shop(3)
    for one in run(performs(template, problems), template, problems):
        assert Trajectory.from_row(json.loads(json.dumps(one.to_row()))) == one


def says(template: ChatTemplate, text: str) -> ScriptedEngine:
    return ScriptedEngine(lambda request: template.tokenizer.encode(text))


CALL = "<tool_call>shop\n<arg_key>owner</arg_key>\n<arg_value>23</arg_value>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "stop", "well_formed"),
    [
        ("\n<think>x</think>\n5<|user|>", StopReason.ANSWERED, True),
        ("\n<think>x</think>\n5<|endoftext|>", StopReason.ANSWERED, True),
        ("\n5<|user|>", StopReason.MALFORMED, False),
        ("\n<think>x\n5<|user|>", StopReason.MALFORMED, False),
        ("\n<think>x</think>\n5<|observation|>", StopReason.MALFORMED, False),
        (f"\n<think>x</think>\n{CALL}<|user|>", StopReason.MALFORMED, False),
        (f"\n<think>x</think>\n{CALL}<|endoftext|>", StopReason.MALFORMED, False),
        ("\n<think>x</think>\n<tool_call>shop\n<arg_key>owner<|observation|>", StopReason.MALFORMED, False),
        (f"\n<think>x</think>\n{CALL.replace('shop', 'hut')}<|observation|>", StopReason.MALFORMED, True),
        (f"\n<think>x</think>\n{CALL}<|observation|>", StopReason.TURNS_EXHAUSTED, True),
        ("\n<think>x</think>\n5", StopReason.TRUNCATED, False),
        ("<|user|>", StopReason.MALFORMED, False),
    ],
)
def test_every_end_has_a_name_and_only_answers_are_judged(template, text: str, stop, well_formed: bool) -> None:
    (one,) = run(says(template, text), template, shop(1), max_turns=2)
    assert (one.stop_reason, one.well_formed, one.reward) == (stop, well_formed, 0.0)


def test_reasoning_in_a_nothink_answer_is_malformed(template) -> None:
    (one,) = run(says(template, "\n<think>x</think>\n5<|user|>"), template, shop(1), enable_thinking=False)
    assert one.stop_reason is StopReason.MALFORMED


def test_a_model_with_another_chat_format_ends_its_answers_its_own_way(tiny_tokenizer: Tokenizer) -> None:
    """As SmolLM2's <|im_end|>: an answer may end with it, a tool call may not."""
    end = "<|end_of_box|>"
    own = ChatTemplate(Tokenizer(tiny_tokenizer._full, end=end))
    problem = Problem("x", "arithmetic", "Compute 2+3.", 5)
    for template, stop in ((own, StopReason.ANSWERED), (ChatTemplate(tiny_tokenizer), StopReason.TRUNCATED)):
        (one,) = run(says(template, f"5{end}"), template, [problem], enable_thinking=False)
        assert one.stop_reason is stop
    (one,) = run(says(own, f"{CALL}{end}"), own, shop(1), enable_thinking=False)
    assert (one.stop_reason, one.detail) == (StopReason.MALFORMED, f"closed by '{end}' instead of <|observation|>")


def test_a_full_context_is_truncation(template) -> None:
    problem = shop(1)
    prompt = len(template.encode_prompt(*tool_use.environment(problem[0]).reset()))
    engine = says(template, f"\n<think>x</think>\n{CALL}<|observation|>")
    turn = len(template.tokenizer.encode(f"\n<think>x</think>\n{CALL}<|observation|>"))
    engine.max_length = prompt + turn
    (one,) = run(engine, template, problem)
    assert (one.stop_reason, one.reward, len(engine.requests)) == (StopReason.TRUNCATED, 0.0, 1)


def test_a_prompt_that_does_not_fit_is_the_recipes_fault_not_the_models(template) -> None:
    engine = says(template, "\n<think>x</think>\n5<|user|>")
    engine.max_length = 50
    with pytest.raises(RecipeError, match="its prompt has"):
        run(engine, template, shop(1))


class Broken:
    """An environment that fails in one way."""

    def __init__(self, how: object) -> None:
        self.how = how

    def reset(self):
        return [{"role": "user", "content": "?"}], None

    def step(self, message):
        if isinstance(self.how, BaseException):
            raise self.how
        return Transition([], self.how, True, StopReason.ANSWERED)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "how", [InfrastructureFailure("down"), KeyError("bug"), float("nan"), float("inf"), "1.0", 1e9, -1e9, None]
)
def test_a_failing_judge_is_infrastructure_and_never_a_zero(template, monkeypatch, how) -> None:
    """Reliability R1: the run continues, the episode's reward is None."""
    broken = {"p0"}
    good = Problem("ok", "arithmetic", "Compute 2+3.", 5)
    monkeypatch.setattr(
        episode_module, "environment", lambda p: Broken(how) if p.id in broken else arithmetic.environment(p)
    )
    problems = [dataclasses.replace(good, id=f"p{i}") for i in range(5)]
    result = run(says(template, "\n<think>2+3=5</think>\n5<|user|>"), template, problems)
    assert [one.reward for one in result] == [None, 1.0, 1.0, 1.0, 1.0]
    assert result[0].stop_reason is StopReason.INFRASTRUCTURE
    assert result[0].detail
    broken.add("p1")
    with pytest.raises(EnvironmentProblem, match="2 of 5 rollouts failed"):
        run(says(template, "\n<think>2+3=5</think>\n5<|user|>"), template, problems)


def test_bad_problem_data_is_the_users_error_not_infrastructure(template) -> None:
    with pytest.raises(DataError):
        run(says(template, "x"), template, [Problem("x", "tool_use", "?", 0)])


def test_an_exception_leaves_no_request_in_the_engine(template, monkeypatch) -> None:
    engine = says(template, "\n<think>x</think>\n5<|user|>")
    monkeypatch.setattr(engine, "step", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(engine, template, shop(1), samples=3)
    assert sorted(engine.aborted) == sorted(engine.active)


# --------------------------------------------------------------------------- with the real engine


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    # the tools' JSON is long in a vocabulary of 512
    return GlmMoe(tiny_config.model_copy(update={"max_position_embeddings": 1024}), seed=0)


def test_a_trajectory_does_not_depend_on_its_batch(template, model) -> None:
    problems = shop(6)
    sampling = Sampling(max_tokens=12)
    together = run(Engine(model, max_slots=5), template, problems, samples=2, sampling=sampling)
    alone = [run(Engine(model), template, [p], samples=2, sampling=sampling) for p in problems]
    assert all(one.generated_tokens for one in together)
    assert [one.tokens for one in together] == [one.tokens for pair in alone for one in pair]
    assert len({tuple(one.tokens) for one in together}) == len(together)


def test_a_problem_drawn_twice_gets_fresh_samples(template, model) -> None:
    problem = shop(1)[0]
    result = run(Engine(model), template, [problem, problem], samples=2, sampling=Sampling(max_tokens=12))
    assert len({tuple(one.tokens) for one in result}) == 4
    assert [one.group for one in result] == [0, 0, 1, 1]


def test_behaviour_log_probs_are_the_trainers(template, model) -> None:
    """The ratio of the first update is 1: what the engine recorded is what the network says of the same tokens."""
    for one in run(Engine(model), template, shop(3), samples=2, sampling=Sampling(max_tokens=10, temperature=0.7)):
        hidden = model(torch.tensor([one.tokens]))[0]
        made = torch.tensor(one.loss_mask).nonzero().flatten()
        targets = torch.tensor(one.tokens)[made]
        logp = token_log_probs(hidden[made - 1], model.head_weight, targets, temperature=0.7)
        assert torch.allclose(logp, torch.tensor(one.logprobs)[made], atol=1e-4)


def test_one_id_names_one_problem(tmp_path) -> None:
    """Prompts are remembered, draws made and journals kept by id: two problems under one would be mixed up."""
    rows = [Problem("p/1", "arithmetic", f"Compute 1+{n}.", 1 + n).to_row() for n in (1, 2)]
    (tmp_path / "easy.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]) + "\n")
    (tmp_path / "hard.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert len(load_heldout([tmp_path / "easy.jsonl"], None)) == 2, "the same problem may occur twice"
    with pytest.raises(DataError, match=r"two problems have the id 'p/1': 'Compute 1\+1\.' and 'Compute 1\+2\.'"):
        load_heldout([tmp_path / "easy.jsonl", tmp_path / "hard.jsonl"], None)


@pytest.mark.parametrize("task", [InstructionsTask(constraints=1), CodeCallsTask(lines=(1, 2))])
def test_two_files_of_one_generator_can_be_read_together(task) -> None:
    made = [one for seed in (0, 1) for one in tasks.generate(task, 30, random.Random(seed))]
    require_one_id_each(made)
    assert len({one.id for one in made}) == len({one.prompt for one in made}) > 30
