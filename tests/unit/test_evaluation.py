"""The lm-eval adapter and our offline tasks: what is scored, what is generated, and what the driver writes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.utils import make_table

from glmctl.data.chat import ChatTemplate
from glmctl.data.parsing import parse
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import Calls, styled
from glmctl.engine.engine import Engine
from glmctl.engine.request import SamplingParams
from glmctl.errors import EnvironmentProblem, GlmctlError, RecipeError
from glmctl.evaluation import cloze, speculative
from glmctl.evaluation.catalog import OWN_GROUPS, OWN_TASKS
from glmctl.evaluation.documents import shipped
from glmctl.evaluation.generation import Job, cut, generate_texts
from glmctl.evaluation.harness import Settings, run_tasks
from glmctl.evaluation.likelihood import score_continuations
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.questions import first_call_reward, single_turn_reward
from glmctl.evaluation.results import main_metric
from glmctl.evaluation.tasks import VERSION, TaskInputs, build_task
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, CodeTask, InstructionsTask, Sampling, ToolUseTask
from glmctl.rl.environment import InfrastructureFailure, Problem
from glmctl.rl.sandbox import boxes, execute
from glmctl.rl.tasks import arithmetic, code, demonstrate, instructions, tool_use
from glmctl.run.fingerprint import digest

BOXED = not boxes.missing("B")
"""whether this machine offers the sandbox that code is judged in"""
GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    return GlmMoe(tiny_config, seed=1).eval()


@pytest.fixture(scope="module")
def template(tiny_tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer)


@pytest.fixture(scope="module")
def lm(model: GlmMoe, template: ChatTemplate) -> GlmctlLM:
    return GlmctlLM(model, template=template, batch_tokens=256, max_gen_toks=12)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    rng = random.Random(0)
    sums = arithmetic.generate(ArithmeticTask(max_value=20), 3, rng)
    texts = [*code.generate(CodeTask(), 2, rng), *instructions.generate(InstructionsTask(), 2, rng)]
    return [*sums, *tool_use.generate(ToolUseTask(max_value=20), 3, rng), *texts]


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def by_hand(model: GlmMoe, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One pair, one forward, token by token."""
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([context + continuation])))[0].log_softmax(-1)
    total, greedy = 0.0, True
    for place, token in enumerate(continuation, len(context) - 1):
        total += float(logits[place, token])
        greedy &= int(logits[place].argmax()) == token
    return total, greedy


# ----------------------------------------------------------------------------- likelihood


def test_batched_likelihoods_equal_those_of_single_forwards(model: GlmMoe) -> None:
    """Right padding, sorting and shared rows change no score."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(0, 512, (count,), generator=generator).tolist()  # noqa: E731
    pairs = [(draw(length), draw(extra)) for length, extra in ((3, 2), (40, 7), (1, 1), (9, 30), (25, 1))]
    pairs += [(pairs[4][0], [token]) for token in (5, 6)]
    for context, _ in list(pairs[:2]):
        best = Engine(model).generate([_request(context, 4)])[0].tokens
        pairs.append((context, best))
    found = score_continuations(model, pairs, max_length=512, batch_tokens=90)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = by_hand(model, context, continuation)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    assert [greedy for _, greedy in found[-2:]] == [True, True], "what the engine chose greedily is greedy"


def _request(prompt: list[int], count: int) -> Any:
    from glmctl.engine.request import Request

    return Request("r", prompt, SamplingParams(max_tokens=count, temperature=0.0))


def test_equal_inputs_are_computed_once(model: GlmMoe, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    forward = GlmMoe.forward

    def counted(self: GlmMoe, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, **kwargs)

    monkeypatch.setattr(GlmMoe, "forward", counted)
    score_continuations(model, [([1, 2, 3], [token]) for token in range(50)], max_length=64)
    assert shapes == [(1, 3)]


def test_what_is_too_long_is_cut_from_the_left_and_the_impossible_is_said(model: GlmMoe) -> None:
    long = list(range(100))
    (cut_short,) = score_continuations(model, [(long, [7, 8])], max_length=10)
    assert cut_short[0] == pytest.approx(by_hand(model, long[-9:], [7, 8])[0], abs=1e-4)
    with pytest.raises(GlmctlError, match="exceeds the context"):
        score_continuations(model, [([1], list(range(11)))], max_length=10)
    assert score_continuations(model, [([1], [])], max_length=10) == [(0.0, True)]


def test_rolling_likelihood_scores_every_token_once(model: GlmMoe, template: ChatTemplate) -> None:
    """With one window it is the likelihood of the whole text; with several, windows cover it without overlap."""
    text = "The quick brown fox jumps over the lazy dog. " * 4
    whole = GlmctlLM(model, template=template)
    tokens = whole.tok_encode(text)
    (total,) = whole.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert total == pytest.approx(by_hand(model, [whole.eot_token_id], tokens)[0], rel=1e-5)

    narrow = GlmctlLM(model, template=template, max_length=16)
    expected, start = 0.0, 0
    prefixed = [whole.eot_token_id, *tokens]
    while start < len(tokens):
        stop = min(start + 16, len(tokens))
        first = max(stop - 16, 0)
        expected += by_hand(model, prefixed[first : start + 1], prefixed[start + 1 : stop + 1])[0]
        start = stop
    assert narrow.loglikelihood_rolling(ask("r", (text,)))[0] == pytest.approx(expected, rel=1e-5)
    assert narrow.loglikelihood_rolling(ask("r", ("",), (text,)))[0] == 0.0


def test_an_empty_context_is_the_end_of_text_token(lm: GlmctlLM) -> None:
    ((logprob, _),) = lm.loglikelihood(ask("loglikelihood", ("", " world")))
    assert logprob == pytest.approx(by_hand(lm.model, [lm.eot_token_id], lm.tok_encode(" world"))[0], abs=1e-4)


def test_a_token_across_the_border_leaves_the_continuation_something(lm: GlmctlLM) -> None:
    """`):` and a newline are one token here: the whole has as many tokens as the context alone."""
    assert len(lm.tok_encode("(a, b):\n")) == len(lm.tok_encode("(a, b)"))
    ((logprob, _),) = lm.loglikelihood(ask("loglikelihood", ("(a, b)", ":\n")))
    assert logprob == pytest.approx(by_hand(lm.model, lm.tok_encode("(a, b)"), lm.tok_encode(":\n"))[0], abs=1e-4)


# ----------------------------------------------------------------------------- generation


def test_generation_stops_before_the_first_stop_string(lm: GlmctlLM) -> None:
    (free,) = lm.generate_until(ask("generate_until", ("def add(", {"until": [], "max_gen_toks": 24})))
    assert len(free) > 6
    for stop in (free[2:5], free[-3:], free[4]):
        kwargs = {"until": [stop, "never"], "max_gen_toks": 24}
        assert lm.generate_until(ask("generate_until", ("def add(", kwargs))) == [free[: free.index(stop)]]


def test_a_stop_string_ends_the_request_early(model: GlmMoe, template: ChatTemplate) -> None:
    tokenizer = template.tokenizer
    params = SamplingParams(max_tokens=60, temperature=0.0)
    prompt = tokenizer.encode("def add(")
    engine = Engine(model)
    (text,) = generate_texts(engine, tokenizer, [Job(prompt, params)])
    engine = Engine(model, token_bytes=lambda token: tokenizer.decode_bytes([token], skip_special=True))
    # bytes that are no text are shown as U+FFFD and cannot be asked for
    stop = next(text[at : at + 3] for at in range(3, len(text)) if "\ufffd" not in text[at : at + 3])
    assert generate_texts(engine, tokenizer, [Job(prompt, replace(params, stop=(stop,)))]) == [cut(text, (stop,))]
    assert engine.stats.tokens < 40
    assert not engine.has_work


def test_the_earliest_stop_string_counts() -> None:
    assert cut("a END b STOP", ("STOP", "END")) == "a "
    assert cut("abc", ()) == "abc"


def test_sampling_depends_on_seed_prompt_and_repeat_only(model: GlmMoe, template: ChatTemplate) -> None:
    kwargs = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    requests = ask("generate_until", ("a", kwargs), ("a", kwargs), ("b b b", kwargs))
    lm = GlmctlLM(model, template=template, seed=3)
    first = lm.generate_until(requests)
    assert first[0] != first[1], "every request has its own stream"
    assert GlmctlLM(model, template=template, seed=3, max_slots=1).generate_until(requests) == first
    assert lm.generate_until(requests[2:] + requests[:2]) == first[2:] + first[:2], "nor on what else is asked"
    other = [Instance("generate_until", {}, ("a", kwargs), 0, ("another task", 0, 1))]
    assert lm.generate_until(other + requests) == first[:1] + first, "in whatever task"
    assert GlmctlLM(model, template=template, seed=9).generate_until(requests) != first


def test_reasoning_is_taken_off_for_tasks_that_do_not_read_it(
    model: GlmMoe, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops: list[tuple[str, ...]] = []

    def texts(engine: Engine, tokenizer: Tokenizer, jobs: list[Job], done: Any) -> list[str]:
        stops.extend(job.params.stop for job in jobs)
        return ["\n<think>2 END 2</think>\n4 END of it"] * len(jobs)

    monkeypatch.setattr("glmctl.evaluation.lm.generate_texts", texts)
    lm = GlmctlLM(model, template=template, think_end_token="</think>")
    kwargs = {"until": ["END"], "max_gen_toks": 4}
    asked = [Instance("generate_until", {}, ("a", kwargs), 0, (name, 0, 1)) for name in ("gsm8k", "glmctl_think")]
    assert lm.generate_until(asked) == ["4 ", "\n<think>2 END 2</think>\n4 END of it"]
    assert stops == [(), ("END",)], "the reasoning may hold what ends an answer"


def test_unknown_or_impossible_generation_arguments_are_refused(lm: GlmctlLM) -> None:
    with pytest.raises(RecipeError, match="did you mean 'temperature'"):
        lm.generate_until(ask("generate_until", ("a", {"until": [], "temperatur": 1.0})))
    with pytest.raises(GlmctlError, match="leaves no room"):
        lm.generate_until(ask("generate_until", ("a", {"until": [], "max_gen_toks": 512})))


def test_chat_history_is_rendered_by_our_template(lm: GlmctlLM) -> None:
    history = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(history) == "[gMASK]<sop><|user|>\nhi<|assistant|>"
    prefilled = lm.apply_chat_template([*history, {"role": "assistant", "content": "So"}], add_generation_prompt=False)
    assert prefilled.endswith("So"), "the last message is left open"
    assert lm.chat_template(True) == lm.template.source
    assert lm.chat_template(False) is None


# ----------------------------------------------------------------------------- tasks


def test_the_shipped_cloze_set_is_what_its_generator_writes() -> None:
    rows = shipped("cloze.jsonl")
    assert rows == cloze.build()
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    assert all(len(set(row["choices"])) == 4 for row in rows)
    for row in rows:
        assert row["context"][-1].isalnum(), "the tokeniser cuts between context and choice"
        assert not any(choice[0].isalnum() for choice in row["choices"])


def test_every_own_task_runs_in_lm_eval(lm: GlmctlLM, template: ChatTemplate, problems: list[Problem]) -> None:
    inputs = TaskInputs(template, GREEDY, problems=problems, context=512)
    names = [name for name in OWN_TASKS if name != "glmctl_code" or BOXED]
    results = run_tasks(lm, names, inputs, Settings(limit=2))
    assert set(results["results"]) == set(names)
    for name, entry in ((name, OWN_TASKS[name]) for name in names):
        found = results["results"][name][f"{entry.metric},none"]
        assert math.isfinite(found)
        assert len(results["samples"][name]) == 2
        assert main_metric(name, [key.partition(",")[0] for key in results["results"][name]]) == entry.metric
    assert "glmctl_cloze" in make_table(results), "lm-eval can show it"
    words = results["results"]["glmctl_perplexity"]
    assert words["bits_per_byte,none"] == pytest.approx(math.log2(words["byte_perplexity,none"]))


@pytest.mark.parametrize("style", ["tags", "json"])
def test_a_perfect_model_scores_one(
    lm: GlmctlLM, tiny_tokenizer: Tokenizer, style: Calls, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies taken from the scripted demonstrations are all right, the same replies to other problems wrong."""
    shift = 0
    template = ChatTemplate(tiny_tokenizer, styled(style))

    def answer(self: GlmctlLM, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        replies = []
        for request in requests:
            problem = Problem.from_row(json.loads(request.doc["problem"]), "doc")
            same = [one for one in problems if one.task == problem.task]
            place = [one.id for one in same].index(problem.id)
            other = same[(place + shift) % len(same)]
            turn = demonstrate(other).messages[: 2 if other.task == "tool_use" else None]
            prompt = template.render(turn[:1], demonstrate(other).tools, add_generation_prompt=True)
            replies.append(template.render(turn, demonstrate(other).tools)[len(prompt) :])
        return replies

    monkeypatch.setattr(GlmctlLM, "generate_until", answer)
    inputs = TaskInputs(template, GREEDY, problems=problems)
    names = [name for name in OWN_GROUPS["glmctl_verified"] if name != "glmctl_code" or BOXED]
    names = names if style == "tags" else ["glmctl_tool_use"]
    right = run_tasks(lm, names, inputs)["results"]
    assert [right[name]["accuracy,none"] for name in names] == [1.0] * len(names)
    shift = 1
    wrong = run_tasks(lm, names, inputs)["results"]
    assert [wrong[name]["accuracy,none"] for name in names] == [0.0] * len(names)
    assert [wrong[name]["well_formed,none"] for name in names] == [1.0] * len(names)


def test_rewards_of_single_replies(problems: list[Problem]) -> None:
    number, shop = problems[0], next(p for p in problems if p.task == "tool_use")
    assert single_turn_reward(number, parse(f"\n<think>x</think>\n{number.answer}")) == 1.0
    assert single_turn_reward(number, parse(f"\n<think>x</think>\n{number.answer + 1}")) == 0.0
    call = tool_use.expected_calls(shop)[0]
    good = parse("", tools=tool_use.TOOLS)
    good.tool_calls.append(call)
    assert first_call_reward(shop, good) == 1.0
    assert single_turn_reward(shop, good) == 0.0, "one call does not end the episode"
    changed = {**call, "arguments": dict.fromkeys(call["arguments"], "x")}
    good.tool_calls[0] = changed
    assert first_call_reward(shop, good) == 0.0
    assert first_call_reward(shop, parse("\n<think></think>\n5")) == 0.0


@pytest.mark.parametrize(
    ("reply", "obeyed", "answered"),
    [("\n7", 1, 1), ("\n<think></think>\n7", 1, 1), ("\n<think>hm</think>\n7", 0, 1), ("</think>", 0, 1), ("\n", 1, 0)],
)
def test_nothink_is_obeyed_without_reasoning(template: ChatTemplate, reply: str, obeyed: int, answered: int) -> None:
    task = build_task("glmctl_nothink", TaskInputs(template, GREEDY))
    doc = task.test_docs()[0]
    assert doc["prompt"].endswith("/nothink<|assistant|>\n<think></think>")
    assert task.process_results(doc, [[reply]]) == {"obeyed": obeyed, "answered": answered}


@pytest.mark.parametrize(("reply", "obeyed"), [("\n<think>hm</think>\n7", 1), ("\n<think></think>\n7", 0), ("\n7", 0)])
def test_thinking_is_obeyed_with_reasoning(template: ChatTemplate, reply: str, obeyed: int) -> None:
    task = build_task("glmctl_think", TaskInputs(template, GREEDY))
    assert task.process_results(task.test_docs()[0], [[reply]])["obeyed"] == obeyed


def test_a_task_without_problem_files_asks_the_same_set_every_time(template: ChatTemplate) -> None:
    """A score is of a set of questions: change one of these digests and `tasks.VERSION` together."""
    digests = {
        name: digest([row["problem"] for row in build_task(name, TaskInputs(template, GREEDY)).test_docs()])[:8]
        for name in OWN_GROUPS["glmctl_verified"]
    }
    assert (digests, VERSION) == (
        {
            "glmctl_arithmetic": "0747ac4f",
            "glmctl_code": "5b37e600",
            "glmctl_tool_use": "ad1d0c64",
            "glmctl_instructions": "b679088a",
        },
        3.0,
    )


def test_several_samples_give_avg_and_pass_at_k_of_each_question(template: ChatTemplate) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=4)
    problem = Problem("p", "arithmetic", "Compute 1+2.", 3)
    task = build_task("glmctl_arithmetic", TaskInputs(template, sampling, problems=[problem], samples=4))
    replies = [f"\n<think>x</think>\n{value}" for value in (3, 4, 3, 5)]
    figures = task.process_results(task.test_docs()[0], [replies])
    assert figures == pytest.approx(
        {"accuracy": 0.5, "well_formed": 1.0, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1.0, "avg@4": 0.5}
    )
    assert set(figures) == set(task.aggregation())


def test_code_is_judged_in_the_sandbox_and_its_failure_is_no_score(
    template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = code.generate(CodeTask(), 1, random.Random(0))
    task = build_task("glmctl_code", TaskInputs(template, GREEDY, problems=[problem]))
    doc = task.test_docs()[0]
    asked: list[str] = []

    def tested(source: str, entry: str, cases: Any) -> execute.Tested:
        asked.append(source)
        return execute.Tested(len(cases), len(cases), 0.1)

    monkeypatch.setattr(code, "run_tests", tested)
    reply = "\n<think>x</think>\n```python\ndef f(x):\n    return x\n```"
    assert task.process_results(doc, [[reply]])["accuracy"] == 1.0
    assert asked == ["def f(x):\n    return x\n"]

    def broken(source: str, entry: str, cases: Any) -> execute.Tested:
        raise InfrastructureFailure("no box")

    monkeypatch.setattr(code, "run_tests", broken)
    with pytest.raises(EnvironmentProblem, match="could not be judged: no box"):
        task.process_results(doc, [[reply.replace("return x", "return 1")]])


def test_tasks_that_do_not_exist_are_named(lm: GlmctlLM, template: ChatTemplate) -> None:
    with pytest.raises(RecipeError, match="did you mean 'glmctl_cloze'"):
        build_task("glmctl_clozes", TaskInputs(template, GREEDY))


# ----------------------------------------------------------------------------- MTP


def test_drafts_change_no_token_and_are_counted(model: GlmMoe) -> None:
    prompts = [[1, 2, 3], [9, 8, 7, 6], [5]]
    found = speculative.check(model, prompts, max_tokens=16, stop_ids=())
    assert found.identical
    assert found.tokens == 48
    assert found.drafted > 0
    assert found.acceptance == found.accepted / found.drafted
