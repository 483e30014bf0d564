"""Answers kept as they come: what is known is not asked again, and nothing stale or torn is believed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.engine.engine import Engine
from glmctl.errors import DataError, EnvironmentProblem
from glmctl.evaluation import episodes
from glmctl.evaluation import lm as lm_module
from glmctl.evaluation.episodes import score_episodes
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.responses import Responses, fingerprint
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, EvalRecipe, Sampling
from glmctl.rl.environment import Problem
from glmctl.rl.score import Score
from glmctl.rl.tasks import arithmetic
from glmctl.run import atomic


def test_what_was_put_is_there_when_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with Responses(path, "model") as one:
        key = one.key("generate", [1, 2], {"seed": 3})
        assert one.get(key) is None
        one.put([(key, "text"), ("other", [-0.5, True])])
    with Responses(path, "model") as again:
        assert again.get(again.key("generate", [1, 2], {"seed": 3})) == "text"
        assert again.get("other") == [-0.5, True]
        assert again.get(again.key("generate", [1, 2], {"seed": 4})) is None
    with Responses(path, "other weights") as other:
        assert other.get(other.key("generate", [1, 2], {"seed": 3})) is None


def test_half_a_line_is_cut_off_and_a_damaged_one_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Responses(path, "m") as one:
        one.put([("a", "1")])
    whole = path.read_bytes()
    path.write_bytes(whole + b'["b", "tw')
    with Responses(path, "m") as one:
        assert (one.get("a"), one.get("b")) == ("1", None)
        one.put([("c", "3")])
    assert path.read_bytes() == whole + b'["c", "3"]\n'
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(DataError, match=r"r\.jsonl:1: not an answer"):
        Responses(path, "m")


def test_a_file_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with Responses(tmp_path / "r.jsonl", "m"), pytest.raises(EnvironmentProblem, match="in use"):
        Responses(tmp_path / "r.jsonl", "m")
    with Responses(tmp_path / "r.jsonl", "m") as one:
        one.put([("a", 1)])
        one.delete()
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_of_contents_and_trusts_a_manifest_only_at_its_size(tmp_path: Path) -> None:
    with atomic.publish(tmp_path / "m") as folder:
        (folder / "config.json").write_text("{}")
    sealed = fingerprint(tmp_path / "m")
    (tmp_path / "m" / atomic.MANIFEST).rename(tmp_path / "manifest.json")
    assert fingerprint(tmp_path / "m") == sealed, "read or looked up, it is the same content"
    (tmp_path / "manifest.json").rename(tmp_path / "m" / atomic.MANIFEST)
    (tmp_path / "m" / "config.json").write_text("{ }")
    assert fingerprint(tmp_path / "m") != sealed


def requests() -> dict[str, list[Instance]]:
    texts = ["def add(a", "The quick", "Compute 3", "a", "b b", "1 2 3 4"]
    kwargs = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    return {
        "generate_until": [Instance("generate_until", {}, (text, kwargs), n) for n, text in enumerate(texts)],
        "loglikelihood": [Instance("loglikelihood", {}, (text, " fox"), n) for n, text in enumerate(texts)],
        "loglikelihood_rolling": [Instance("r", {}, (f"{text} jumps over",), n) for n, text in enumerate(texts)],
    }


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
def test_an_interrupted_evaluation_goes_on_with_what_is_missing(
    kind: str, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after two answers: the rest is computed, and the whole is that of a straight run."""
    model, template = GlmMoe(tiny_config, seed=1).eval(), ChatTemplate(tiny_tokenizer)
    # one request a step and a row a batch, so that answers come one by one
    small = {"template": template, "max_slots": 1, "batch_tokens": 1}
    straight = getattr(GlmctlLM(model, **small), kind)(requests()[kind])

    class Killed(BaseException):
        pass

    put = Responses.put
    calls = 0

    def dies(self: Responses, answers: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise Killed
        put(self, answers)

    with monkeypatch.context() as patched:
        patched.setattr(Responses, "put", dies)
        with Responses(tmp_path / "r.jsonl", "m") as kept, pytest.raises(Killed):
            getattr(GlmctlLM(model, **small, responses=kept), kind)(requests()[kind])

    computed: list[int] = []
    texts, scores = lm_module.generate_texts, lm_module.score_continuations

    def counted_texts(engine: Engine, tokenizer: Tokenizer, jobs: Any, done: Any) -> list[str]:
        computed.append(len(jobs))
        return texts(engine, tokenizer, jobs, done)

    def counted_scores(model: GlmMoe, pairs: Any, **options: Any) -> list[tuple[float, bool]]:
        computed.append(len(pairs))
        return scores(model, pairs, **options)

    monkeypatch.setattr(lm_module, "generate_texts", counted_texts)
    monkeypatch.setattr(lm_module, "score_continuations", counted_scores)
    with Responses(tmp_path / "r.jsonl", "m") as kept:
        assert getattr(GlmctlLM(model, **small, responses=kept), kind)(requests()[kind]) == straight
        assert computed == [4]
        assert getattr(GlmctlLM(model, **small, responses=kept), kind)(requests()[kind]) == straight
    assert sum(computed) == 4


def test_episodes_that_ended_are_not_played_again(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them known: the rest is played, and the score is that of a straight run."""
    model, template = GlmMoe(tiny_config, seed=1).eval(), ChatTemplate(tiny_tokenizer)
    problems = arithmetic.generate(ArithmeticTask(max_value=9), 4, random.Random(0))
    sampling = Sampling(temperature=1.0, max_tokens=6)
    recipe = EvalRecipe(name="e", models={"m": "m"}, sampling=sampling, samples_per_problem=2)
    played: list[int] = []
    play = episodes.play

    def counted(engine: Engine, template: ChatTemplate, asked: Any, **options: Any) -> None:
        played.append(len(asked))
        play(engine, template, asked, **options)

    monkeypatch.setattr(episodes, "play", counted)

    def score(some: list[Problem], kept: Responses) -> Score:
        moved: list[tuple[str, int, int]] = []
        found = score_episodes(Engine(model), template, some, recipe, kept, lambda *progress: moved.append(progress))
        assert moved[-1:] in ([], [("episodes", 2 * len(some), 2 * len(some))])
        return found

    with Responses(tmp_path / "straight.jsonl", "m") as kept:
        straight = score(problems, kept)
    with Responses(tmp_path / "r.jsonl", "m") as kept:
        score(problems[1:3], kept)
        assert score(problems, kept) == straight
        assert score(problems, kept) == straight
    assert played == [8, 4, 4, 0]
    rows = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(rows) == 8
