"""lm-eval's own `hf` model on an exported folder, against ours: the same scores on the same tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.evaluation.harness import Settings, run_tasks
from glmctl.evaluation.lm import GlmctlLM
from glmctl.evaluation.results import Results
from glmctl.evaluation.tasks import TaskInputs
from glmctl.model.config import ModelConfig
from glmctl.model.folder import save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import ArithmeticTask, Needle, Sampling, ToolUseTask
from glmctl.rl.tasks import arithmetic, tool_use

# fp32 logits of the two implementations differ by up to 1e-5 each; these are sums over tens of tokens
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    """A random model whose weights are large enough that its greedy choices are clear, with our tokenizer."""
    home = tmp_path_factory.mktemp("lm_eval")
    specials = {"pad_token_id": tiny_tokenizer.pad_id, "eos_token_id": tiny_tokenizer.eos_ids}
    update = {"max_position_embeddings": 1024, "initializer_range": 0.15, **specials}
    model = GlmMoe(tiny_config.model_copy(update=update), seed=5)
    tiny_tokenizer.save(home / "tokenizer")
    (home / "model").mkdir()
    save_model(model, home / "model", tokenizer_folder=home / "tokenizer")
    return home / "model"


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[GlmctlLM, HFLM]:
    return GlmctlLM(folder, batch_tokens=600), HFLM(str(folder), device="cpu", dtype=torch.float32, batch_size=4)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> TaskInputs:
    rng = random.Random(1)
    problems = [*arithmetic.generate(ArithmeticTask(), 4, rng), *tool_use.generate(ToolUseTask(), 2, rng)]
    grid = {"needle": Needle(lengths=[128, 300], depths=3, samples=1), "context": 1024}
    return TaskInputs(ChatTemplate.load(folder), Sampling(temperature=0.0, max_tokens=16), problems=problems, **grid)


def printed(results: Results, task: str) -> str:
    """lm-eval's table. The perplexity of a model that knows nothing has more digits there than fp32: those are cut."""
    entry = results["results"][task]
    key = "byte_perplexity,none"
    if key in entry:
        entry[key] = float(f"{entry[key]:.5g}")
    return str(make_table(results))


@pytest.mark.parametrize(
    "task",
    [
        *("glmctl_cloze", "glmctl_needle", "glmctl_perplexity", "glmctl_perplexity_zh"),
        *("glmctl_arithmetic", "glmctl_instructions", "glmctl_tool_use", "glmctl_nothink", "glmctl_think"),
    ],
)
def test_scores_and_answers_are_those_of_the_hf_model(
    both: tuple[GlmctlLM, HFLM], inputs: TaskInputs, task: str
) -> None:
    """Loglikelihood, rolling loglikelihood and generation: what lm-eval prints, and answer by answer."""
    ours, theirs = (run_tasks(lm, [task], inputs, Settings(limit=6, bootstrap_iters=100)) for lm in both)
    assert printed(ours, task) == printed(theirs, task), "to the last digit reported, standard errors too"
    pairs = zip(ours["samples"][task], theirs["samples"][task], strict=True)
    answers = [(mine["resps"], other["resps"]) for mine, other in pairs]
    for mine, other in answers:
        for (my_answer,), (their_answer,) in zip(mine, other, strict=True):
            if isinstance(my_answer, str):
                assert my_answer == their_answer
            elif isinstance(my_answer, float):
                assert my_answer == pytest.approx(their_answer, abs=TOLERANCE)
            else:
                assert my_answer[0] == pytest.approx(their_answer[0], abs=TOLERANCE)
                assert my_answer[1] == their_answer[1], "the same continuations are greedy"
    assert len({str(mine) for mine, _ in answers}) > 1, "the model's answers are not all alike"


def test_stop_strings_cut_where_the_hf_model_cuts(both: tuple[GlmctlLM, HFLM]) -> None:
    from lm_eval.api.instance import Instance

    def generate(lm: GlmctlLM | HFLM, until: list[str]) -> list[str]:
        kwargs = {"until": list(until), "max_gen_toks": 24, "do_sample": False}
        contexts = ("def add(a", "The quick", "Compute 3+4")
        requests = [Instance("generate_until", {}, (text, kwargs), place) for place, text in enumerate(contexts)]
        found: list[str] = lm.generate_until(requests, disable_tqdm=True)
        return found

    ours, theirs = both
    free = generate(ours, [])
    assert free == generate(theirs, [])
    until = [free[0][5:7], free[1][3:5]]
    assert generate(ours, until) == generate(theirs, until) != free


def test_the_chat_template_is_rendered_as_transformers_does(both: tuple[GlmctlLM, HFLM]) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Compute 3+4."},
    ]
    assert both[0].apply_chat_template(history) == both[1].apply_chat_template(history)
    assert TaskManager(include_defaults=False).all_tasks == []


GENERATION = """
task: spelled
dataset_path: json
dataset_kwargs: {data_files: {train: ROWS, test: ROWS}}
output_type: generate_until
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Q:"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
task: chosen
dataset_path: json
dataset_kwargs: {data_files: {train: ROWS, test: ROWS}}
output_type: multiple_choice
training_split: train
test_split: test
fewshot_split: train
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
"""


@pytest.mark.parametrize("chat", [False, True])
def test_settings_mean_what_lm_eval_s_own_run_means_by_them(
    both: tuple[GlmctlLM, HFLM], inputs: TaskInputs, tmp_path: Path, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of a folder, with examples, chat template, system instruction and generation settings: `simple_evaluate`
    of the `hf` model builds the very same prompts and reports the same figures.
    """
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"{n}+{n}", "answer": str(2 * n), "choices": [str(n), str(2 * n)]} for n in range(2, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("a", GENERATION), ("b", CHOICE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("ROWS", str(tmp_path / "rows.jsonl")))
    shared = {"num_fewshot": 2, "system_instruction": "Add.", "gen_kwargs": {"max_gen_toks": 9}, "limit": 4}
    ours = run_tasks(
        both[0],
        ["spelled", "chosen"],
        inputs,
        Settings(**shared, include_path=str(tmp_path), apply_chat_template=chat, bootstrap_iters=100),
    )
    theirs = simple_evaluate(
        model=both[1],
        tasks=["spelled", "chosen"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=100,
        **shared,
    )
    assert make_table(ours) == make_table(theirs)
    for task in ("spelled", "chosen"):
        for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert mine["arguments"] == other["arguments"], "the same prompts and settings"
            assert mine["doc_hash"] == other["doc_hash"]
        assert ours["n-shot"][task] == theirs["n-shot"][task] == 2
    assert "Add." in ours["samples"]["spelled"][0]["arguments"][0][0]
