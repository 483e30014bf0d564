"""Recipes resolve in one order: defaults < extended files, left to right < the file < overrides. Errors say where."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmctl.errors import RecipeError
from glmctl.recipe import names
from glmctl.recipe.build import build, run_name
from glmctl.recipe.document import Document
from glmctl.recipe.load import CLASSES, dump, list_recipes, load, resolve, schema_json
from glmctl.recipe.merge import merge
from glmctl.recipe.schema import AdamWSpec, PipelineRecipe, PretrainRecipe, RlRecipe, SftRecipe
from glmctl.run.pipeline import resolve as resolve_stages


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a file into an empty working directory and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    return write


def message(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(name, list(overrides))
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_bias_rate_for_a_router_without_bias_is_refused_when_somebody_set_it(write) -> None:
    """A softmax router has none; the resolved recipe says 0 rather than a default that does nothing."""
    name = write("soft.yaml", "extends: smoke/pretrain\nmodel: {scoring_func: softmax}\ntokenizer: t\n")
    plain = load(name)
    assert isinstance(plain, PretrainRecipe)
    assert plain.balance.bias_update_rate == 0.0
    write("again.yaml", dump(plain))
    assert load("again.yaml") == plain
    assert load(name, ["balance.bias_update_rate=0"]) == plain
    said = message(name, "balance.bias_update_rate=1e-3")
    assert "balance" in said
    assert "a softmax router has no selection bias: bias_update_rate must be 0 or left out" in said
    sigmoid = load("smoke/pretrain")
    assert isinstance(sigmoid, PretrainRecipe)
    assert sigmoid.balance.bias_update_rate == 1e-3


# ----------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("entry", list_recipes(), ids=lambda entry: entry.name)
def test_every_shipped_recipe_resolves_and_round_trips(entry, tmp_path: Path) -> None:
    recipe = load(entry.name)
    assert recipe.type == entry.type
    assert entry.description, "the first line of a shipped recipe says what it is"
    assert len(entry.description) <= 110
    (tmp_path / "again.yaml").write_text(dump(recipe))
    assert load(str(tmp_path / "again.yaml")) == recipe
    if isinstance(recipe, PipelineRecipe):
        resolve_stages(recipe, tmp_path, load)


def test_no_two_shipped_recipes_share_a_run_directory() -> None:
    shipped = [load(entry.name).name for entry in list_recipes()]
    assert len(shipped) == len(set(shipped))


def test_air_is_glm_4_5_on_its_own_shape() -> None:
    recipe = load("glm-4.5/pretrain")
    assert isinstance(recipe, PretrainRecipe)
    air = load("glm-4.5-air/pretrain")
    assert isinstance(air, PretrainRecipe)
    assert air.stages == recipe.stages
    assert air.model.n_routed_experts == 128
    assert not air.model.use_qk_norm, "a changed preset replaces the section, it does not mix two shapes"


# ----------------------------------------------------------------------------- names


def test_a_folder_means_the_recipe_that_is_expected() -> None:
    assert load("laptop", expect="pretrain") == load("laptop/pretrain")
    assert load("demo") == load("demo/pipeline")
    assert load("smoke", expect="sft").type == "sft"
    with pytest.raises(RecipeError, match="holds several recipes"):
        load("laptop")


def test_name_defaults_to_where_the_recipe_is(write) -> None:
    assert load("laptop/pretrain").name == "laptop-pretrain"
    assert load(write("mine.yaml", "extends: laptop/pretrain")).name == "mine"
    write("base.yaml", "extends: laptop/pretrain\nname: base-name\n")
    # a run directory is one recipe's: it is not inherited
    assert load(write("child.yaml", "extends: base.yaml")).name == "child"


def test_nearest_names_are_suggested(write) -> None:
    assert message("laptop/pretrian") == "unknown recipe 'laptop/pretrian'; did you mean 'laptop/pretrain'?"
    write("mine.yaml", "type: sft")
    assert message("mien.yaml") == "mien.yaml: no such recipe file; did you mean 'mine.yaml'?"
    assert message("../laptop/pretrain").startswith("unknown recipe")
    assert message(".") == ".: is a folder, not a recipe"


def test_completion_knows_shipped_names_and_files(write) -> None:
    write("mine.yaml", "")
    write("glm-notes/a.yaml", "")
    assert names.complete("glm-4.5/") == ["glm-4.5/data-general", "glm-4.5/pretrain"]
    assert names.complete("mi") == ["mine.yaml"]
    assert "glm-notes/" in names.complete("glm")
    assert {"demo", "mine.yaml"} <= set(names.complete(""))


def test_expected_type_names_the_right_command() -> None:
    with pytest.raises(RecipeError) as caught:
        load("laptop/pretrain", expect="sft")
    assert caught.value.message == "laptop/pretrain: is a 'pretrain' recipe, not 'sft'"
    assert caught.value.hint == "run it with `glmctl pretrain laptop/pretrain`"


# ----------------------------------------------------------------------------- layers


def test_layers_come_in_order(write) -> None:
    write("a.yaml", "extends: laptop/pretrain\nseed: 1\ngrad_clip: 2.0\nschedule: {peak_lr: 0.1}\n")
    write("sub/b.yaml", "type: pretrain\nseed: 2\nmtp: {weight: 0.5}\n")
    recipe = load(
        write("sub/c.yaml", "extends: [../a.yaml, b.yaml]\nmtp: {then_weight: 0.4}\n"), ["mtp.switch_tokens=7"]
    )
    assert isinstance(recipe, PretrainRecipe)
    assert recipe.seed == 2
    assert recipe.grad_clip == 2.0
    assert recipe.schedule.peak_lr == 0.1
    assert recipe.schedule.final_lr == load("laptop/pretrain").schedule.final_lr
    assert (recipe.mtp.weight, recipe.mtp.then_weight, recipe.mtp.switch_tokens) == (0.5, 0.4, 7)


def test_a_section_that_sets_one_key_keeps_that_fields_other_defaults() -> None:
    rl = load("demo/rl-reasoning", ["schedule.peak_lr=1e-3", "schedule.final_lr=1e-4"])
    assert isinstance(rl, RlRecipe)
    written = {"type": "rl", "name": "x", "model": "m", "problems": ["p"], "heldout": ["h"], "steps": 1}
    bare = resolve(Document({**written, "schedule": {"peak_lr": 1e-3}, "optimizer": {"eps": 1e-7}}))
    assert isinstance(bare, RlRecipe)
    default = RlRecipe.model_validate(written)
    assert bare.schedule == default.schedule.model_copy(update={"peak_lr": 1e-3})
    assert isinstance(default.optimizer, AdamWSpec)
    assert bare.optimizer == default.optimizer.model_copy(update={"eps": 1e-7})


def test_a_changed_type_replaces_its_section() -> None:
    assert merge({"o": {"type": "muon", "momentum": 1}}, {"o": {"type": "adamw"}}) == {"o": {"type": "adamw"}}
    assert merge({"o": {"type": "muon", "momentum": 1}}, {"o": {"eps": 2}}) == {
        "o": {"type": "muon", "momentum": 1, "eps": 2}
    }
    assert merge({"model": "nano"}, {"model": {"hidden_size": 8}}) == {"model": {"preset": "nano", "hidden_size": 8}}
    assert merge({"l": [1, 2]}, {"l": [3]}) == {"l": [3]}


def test_overrides_reach_lists_presets_and_tagged_sections() -> None:
    words = ["optimizer.weight_decay=0", "optimizer.type=adamw", "stages.0.tokens=100", "model.hidden_size=320"]
    recipe = load("laptop/pretrain", [*words, "schedule.peak_lr=1e-2"])
    assert isinstance(recipe, PretrainRecipe)
    # in any order: the tag is set first, or it would wipe out the decay
    assert recipe.optimizer == AdamWSpec(weight_decay=0.0)
    assert recipe.stages[0].tokens == 100
    assert recipe.model.hidden_size == 320
    assert recipe.model.moe_intermediate_size == 96
    assert recipe.schedule.peak_lr == 0.01
    same = load("laptop/pretrain", {"stages.0.tokens": 100, "sample_prompts": ["a=b"]})
    assert isinstance(same, PretrainRecipe)
    assert (same.stages[0].tokens, same.sample_prompts) == (100, ["a=b"])


# ----------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("schedule:\n  peak_lrr: 1e-3", "f.yaml:3: schedule.peak_lrr: unknown key; did you mean 'peak_lr'?"),
        ("stages:\n  - {name: a, data: d, tokns: 1}", "f.yaml:3: stages.0.tokns: unknown key; did you mean 'tokens'?"),
        ("seed: abc", "f.yaml:2: seed: expected an integer, got 'abc'"),
        ("grad_clip: [1]", "f.yaml:2: grad_clip: expected a number, got a list"),
        ("grad_clip: .inf", "f.yaml:2: grad_clip: expected a finite number, got inf"),
        ("sample_prompts: x", "f.yaml:2: sample_prompts: expected a list, got 'x'"),
        ("batch: 3", "f.yaml:2: batch: expected a section, got 3"),
        ("model: {use_qk_norm: maybe}", "f.yaml:2: model.use_qk_norm: expected true or false, got 'maybe'"),
        ("model: nanoo", "f.yaml:2: model: unknown preset 'nanoo'; did you mean 'nano'?"),
        (
            "model: {preset: tiny, hidden_sise: 8}",
            "f.yaml:2: model.hidden_sise: unknown key; did you mean 'hidden_size'?",
        ),
        ("model: {head_dim: 31}", "f.yaml:2: model: head_dim * partial_rotary_factor = 15 is odd"),
        ("optimizer: {type: moun}", "f.yaml:2: optimizer: unknown type 'moun'; did you mean 'muon'?"),
        ("optimizer: {momentun: 0.9}", "f.yaml:2: optimizer.momentun: unknown key; did you mean 'momentum'?"),
        ("optimizer: {type: adamw, momentum: 0.9}", "f.yaml:2: optimizer.momentum: unknown key; one of: type, "),
        ("precision: fp16", "f.yaml:2: precision: unknown value 'fp16'; did you mean 'bf16'?"),
        ("schedule:\n  peak_lr: 1e-9", "f.yaml:2: schedule: final_lr is above peak_lr"),
        ("stages: []", "f.yaml:2: stages: must have at least 1 item, got a list"),
        ("batch: {micro_tokens: -1}", "f.yaml:2: batch.micro_tokens: must be greater than 0, got -1"),
        ("name: a/b", "f.yaml:2: name: 'a/b' does not match "),
    ],
)
def test_messages_name_line_key_and_what_was_expected(write, body: str, expected: str) -> None:
    name = write("f.yaml", f"extends: laptop/pretrain\n{body}\n")
    assert message(name).startswith(expected)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("schedule.peak_lrr=1", "--set schedule.peak_lrr: unknown key; did you mean 'peak_lr'?"),
        ("schedule.peak_lr=1e-9", "--set schedule.peak_lr: final_lr is above peak_lr"),
        ("model.preset=nanoo", "--set model.preset: unknown preset 'nanoo'; did you mean 'nano'?"),
        ("optimizer.type=adam", "--set optimizer.type: unknown type 'adam'; did you mean 'adamw'?"),
        ("stages.9.tokens=1", "--set stages.9.tokens: index 9 is out of range: there are 5 entries, from 0"),
        ("stages.x.tokens=1", "--set stages.x.tokens: 'x' should be a number: an index from 0 to 4"),
        ("tokenizer.x=1", "--set tokenizer.x: 'x' is inside a plain value ('runs/laptop-tokenizer'), not a section"),
        ("type=sft", "--set type: the type of a recipe cannot be changed ('pretrain')"),
        ("seed=[1", "--set seed: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("a..b=1", "--set a..b: an empty key in the path"),
        ("seed", "--set seed: expected key=value, as in --set seed=1"),
    ],
)
def test_messages_about_overrides_name_the_option(word: str, expected: str) -> None:
    assert message("laptop/pretrain", word) == expected


def test_several_problems_are_counted_and_misspelt_keys_come_first(write) -> None:
    text = "type: sft\nmodle: m\ndata: [d]\nsteps: x\nseed: y\n"
    assert message(write("f.yaml", text)) == "f.yaml:2: modle: unknown key; did you mean 'model'? (and 2 more)"
    assert message(write("g.yaml", "type: sft\ndata: [d]\nsteps: 1\n")) == "g.yaml: model: this key is required"


def test_wrong_or_missing_type(write) -> None:
    assert message(write("a.yaml", "type: stf")) == "a.yaml:1: type: unknown recipe type 'stf'; did you mean 'sft'?"
    assert message(write("b.yaml", "typ: sft")) == "b.yaml:1: typ: unknown key; did you mean 'type'?"
    assert message(write("c.yaml", "steps: 3")).startswith("c.yaml: type: this key is required; one of: tokenizer, ")
    write("d.yaml", "type: sft\nextends: laptop/pretrain")
    assert message("d.yaml") == "d.yaml:2: extends: 'laptop/pretrain' is a 'pretrain' recipe, this is a 'sft' one"


def test_extends_says_where_it_went_wrong(write) -> None:
    assert message(write("a.yaml", "extends: laptop/pretrian")) == (
        "a.yaml:1: extends: unknown recipe 'laptop/pretrian'; did you mean 'laptop/pretrain'?"
    )
    write("b.yaml", "extends: c.yaml")
    assert "do they extend each other?" in message(write("c.yaml", "extends: b.yaml"))
    assert message(write("d.yaml", "extends: 3")) == "d.yaml:1: extends: expected a recipe or a list of recipes, got 3"
    # an error in the parent is shown where it is written
    write("e.yaml", "extends: laptop/pretrain\n\nsed: 1\n")
    assert message(write("f.yaml", "extends: e.yaml")) == "e.yaml:3: sed: unknown key; did you mean 'seed'?"


# ----------------------------------------------------------------------------- the rest


def test_options_are_checked_like_files() -> None:
    options = {"name": ("name", "x"), "model": ("MODEL", "m"), "port": ("--port", 99999), "host": ("--host", None)}
    with pytest.raises(RecipeError) as caught:
        build("serve", options)
    assert caught.value.message == "--port: must be less than or equal to 65535, got 99999"
    built = build("serve", {**options, "port": ("--port", 0)}, ["max_slots=3"])
    assert (built.type, built.name, built.port, built.max_slots) == ("serve", "x", 0, 3)


def test_run_names_tell_runs_apart() -> None:
    assert run_name("serve", "runs/demo/distill/export") == "serve-distill"
    assert run_name("eval", "a b/ü!", {"limit": 1}) != run_name("eval", "a b/ü!", {"limit": 2})
    assert run_name("eval", "/").startswith("eval-model")


def test_schema_is_json_schema_of_every_type() -> None:
    import json

    whole = json.loads(schema_json())
    assert set(whole["discriminator"]["mapping"]) == set(CLASSES) == set(names.COMMANDS)
    assert "peak_lr" in json.dumps(json.loads(schema_json("sft")))
    with pytest.raises(RecipeError, match="did you mean 'sft'"):
        schema_json("stf")


def test_loading_does_not_change_what_was_passed_in() -> None:
    overrides = {"steps": 3}
    first = load("demo/sft-agent", overrides)
    assert isinstance(first, SftRecipe)
    assert overrides == {"steps": 3}
    assert load("demo/sft-agent") != first
