"""YAML in: safe, line-numbered, one meaning per spelling; whatever the bytes, an answer or one RecipeError."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.errors import RecipeError
from glmctl.recipe.document import MAX_BYTES, parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("2.5e+2", 250.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000_000", 1_000_000),
        ("0x1f", 31),
        ("007", 7),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2026-11-23", "2026-11-23"),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("-.inf", -math.inf),
        ("${sft}/export", "${sft}/export"),
        ("demo/pretrain", "demo/pretrain"),
        ("e4", "e4"),
        ("1.2.3", "1.2.3"),
        ("[1, {a: 2}]", [1, {"a": 2}]),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    found = parse(text, "x")
    assert found == value
    assert type(found) is type(value)


BILLION = "\n".join(
    [f"a0: &a0 [{', '.join('x' * 9)}]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: a: this key was already given"),
        ("a:\n  b: 1\n  b: 1", "f.yaml:3: a.b: this key was already given"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml:1: the tag '!!python/object/apply:os.system'"),
        ("a: !!python/name:os.system ''", "f.yaml:1: the tag '!!python/name:os.system' is not allowed"),
        ("a: !mine 3", "f.yaml:1: the tag '!mine' is not allowed"),
        ("a: !!set {b}", "f.yaml:1: the tag '!!set' is not allowed"),
        (BILLION, "values once aliases are written out"),
        ("a: &a [*a]", "f.yaml:1: an alias refers to the value it is part of"),
        ("[" * 3000, "f.yaml: nested too deeply"),
        ("a: [1\nb: 2", "f.yaml:2: not valid YAML"),
        ("a: *nothing", "f.yaml:1: not valid YAML: found undefined alias"),
        ("a: \x00", "f.yaml: not valid YAML: unacceptable character"),
        ("? [1]\n: 2", "f.yaml:1: a key must be a word"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "f.yaml:3: merge keys (<<) are not supported"),
        ("a: 1\n---\nb: 2", "f.yaml:2: not valid YAML"),
        ("9" * 5000, "f.yaml:1: not a number"),
        ("", "f.yaml: is empty; a recipe is a mapping"),
        ("- a", "f.yaml: holds a list; a recipe is a mapping"),
    ],
    ids=range(18),
)
def test_hostile_or_broken_files_are_one_line(tmp_path: Path, monkeypatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read(Path("f.yaml"))
    assert message in caught.value.message
    assert len(caught.value.message) < 300


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe\x00", "not UTF-8"), (b"#" * (MAX_BYTES + 1), "this is not a recipe")):
        path = tmp_path / "f.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read(path)
    with pytest.raises(RecipeError, match="No such file"):
        read(tmp_path / "absent.yaml")


def test_lines_are_kept_for_every_key(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("# first\na: 1\nb:\n  c: [1,\n    {d: 2}]\n")
    document = read(path)
    assert document.where(("a",)) == f"{path}:2"
    assert document.where(("b", "c", 1, "d")) == f"{path}:5"
    assert document.where(("b", "missing", "deeper")) == f"{path}:3"
    assert document.where(("missing",)) == str(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_what_yaml_dumps_is_read_back_equal(value: object) -> None:
    # PyYAML writes YAML 1.1, which quotes more than our dialect needs, never less
    assert parse(yaml.safe_dump(value), "x") == value


@given(st.text(max_size=200) | st.text(alphabet="ab:-[]{}&*!<'\"\n #|>%@,?1.e", max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_a_value_or_a_recipe_error(text: str) -> None:
    # anything but a RecipeError fails the test
    with contextlib.suppress(RecipeError):
        parse(text, "x")
