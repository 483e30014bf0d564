"""Laws of repository contexts: every file once a round, never past the limit, cut where little is torn."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data import encode, passes, prepare, spool, stats, units
from glmctl.data.contexts import cut
from glmctl.data.shards import TokenShards
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.way import Ways
from glmctl.errors import DataError
from glmctl.recipe.curation import Exact
from glmctl.recipe.schema import DataRecipe

SPLITS = ("train", "validation")
SENTINELS = ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>")


# ------------------------------------------------------------------ where they end


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60),
    st.integers(0, 2),
)
def test_ranges_hold_every_item_once_within_the_limit(
    lengths: list[int], pairs: list[tuple[int, int]], between: int
) -> None:
    linked: list[list[int]] = [[] for _ in lengths]
    for one, two in pairs:
        if one != two and max(one, two) < len(lengths):
            linked[one].append(two)
            linked[two].append(one)
    found = list(cut(lengths, linked, 60, between))
    assert [at for first, stop in found for at in range(first, stop)] == list(range(len(lengths)))
    for first, stop in found:
        assert sum(lengths[first:stop]) + between * (stop - first - 1) <= 60
    for (first, stop), (_, after) in pairwise(found):  # three quarters full, but for an item that could not be taken in
        held, more = sum(lengths[first:stop]), sum(lengths[stop : min(after, stop + 1)])
        assert 4 * (held + between * (stop - first - 1)) >= 3 * 60 or held + more + between * (stop - first) > 60


def first_range(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    linked: list[list[int]] = [[] for _ in range(12)]
    for one, two in pairs:
        linked[one].append(two)
        linked[two].append(one)
    return next(cut([1] * 12, linked, 10))


def test_a_range_ends_where_the_fewest_links_are_torn() -> None:
    assert first_range([]) == (0, 10)
    assert first_range([(0, 1), (8, 9), (8, 10)]) == (0, 8)
    assert first_range([(0, 1), (7, 8), (8, 9), (8, 10)]) == (0, 10)  # one link either way: the fuller
    # nothing is torn at 6, but that would leave more than a quarter empty
    assert first_range([(6, 7), (6, 8), (7, 8), (8, 9), (9, 10), (9, 11)]) == (0, 9)


# ------------------------------------------------------------------ prepared


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Two repositories of twenty files each, every file with a number of its own, and some that a rule drops."""
    folder = tmp_path_factory.mktemp("contexts")
    tiny_tokenizer.save(folder / "tokenizer")
    for name in ("one", "two"):
        (folder / "tree" / name).mkdir(parents=True)
        for at in range(20):
            needs = f"import {name}.m{at + 1:02d}\n" if at % 4 < 3 else ""
            body = "".join(f"value_{name}_{at}_{line} = {line}\n" for line in range(2 + at))
            (folder / "tree" / name / f"m{at:02d}.py").write_text(needs + body)
    (folder / "tree/one/wide.py").write_text("x = '" + "y" * 1200 + "'\n" + "z = 1\n" * 40)
    (folder / "tree/one/long.py").write_text("".join(f"long_{line} = {line}\n" for line in range(300)))
    return folder


def recipe(home: Path, **fields: Any) -> DataRecipe:
    tree = {"type": "source_tree", "domain": "code", "root": str(home / "tree"), "context_tokens": 400}
    tree |= fields.pop("tree", {})
    body = {"name": "d", "tokenizer": str(home / "tokenizer"), "sources": [tree], "fim": {"rate": 0.0}}
    return DataRecipe.model_validate({**body, "validation_fraction": 0.1, **fields})


def run(made: DataRecipe, out: Path) -> Path:
    prepare.run(made, SimpleNamespace(export=out / "export"))  # type: ignore[arg-type]
    return out


def contexts(out: Path, split: str) -> list[list[int]]:
    shards = TokenShards.open(out, split)
    bounds = [*shards.document_starts.tolist(), shards.total_tokens]
    return [shards.tokens(a, b - a).tolist() for a, b in pairwise(bounds)]


def paths(text: str) -> list[str]:
    return re.findall(r"^# ((?:one|two)/\w+\.py)$", text, re.MULTILINE)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


RULES = [{"type": "code_rules"}]


def test_every_file_is_there_once_and_no_context_is_too_long(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    run(recipe(home, stages=RULES), tmp_path)
    seen: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    several = 0
    for split in SPLITS:
        for ids in contexts(tmp_path, split):
            assert len(ids) <= 400
            assert ids[-1] == tiny_tokenizer.pad_id
            assert ids.count(tiny_tokenizer.pad_id) == 1
            text = tiny_tokenizer.decode(ids[:-1])
            found = paths(text)
            several += len(found) > 1
            seen.update(found)
            lines.update(re.findall(r"^(?:value|long)_\w+ = \d+$", text, re.MULTILINE))
            assert len({path.split("/")[0] for path in found}) <= 1  # no context holds two repositories
    kept = {f"{name}/m{at:02d}.py" for name in ("one", "two") for at in range(20)} | {"one/long.py"}
    assert seen == Counter(kept)  # wide.py is dropped, and takes nobody with it
    assert several > 3
    assert set(lines.values()) == {1}
    assert len(lines) == 300 + 2 * sum(2 + at for at in range(20))  # whole lines, also of the file that is cut
    said = stats.read(tmp_path)
    assert said["rows"] == [42]
    assert said["stages"][0]["reasons"] == {"very long line": 1}
    counted = [said["repositories"][split]["code"] for split in SPLITS]
    assert sum(found["files"] for found in counted) == 41
    assert [found["contexts"] for found in counted] == [said["documents"][split] for split in SPLITS]
    stats.show(stats.summary(said))


def test_a_file_stands_behind_what_it_needs_within_a_context(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    run(recipe(home, tree={"context_tokens": 5000}, validation_fraction=0.02), tmp_path)
    orders = [paths(tiny_tokenizer.decode(ids)) for ids in contexts(tmp_path, "train")]
    order = max((found for found in orders if found[0].startswith("two")), key=len)
    for at in range(20):
        one, other = f"two/m{at:02d}.py", f"two/m{at + 1:02d}.py"
        if at % 4 < 3 and one in order and other in order:
            assert order.index(other) == order.index(one) - 1


def test_a_round_holds_the_files_that_are_shown_more_often(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    longest = {
        "type": "score",
        "name": "length",
        "scorer": {"type": "heuristic", "what": "length"},
        "cut_by": "quantile",
        "cuts": [0.5],
        "epochs": [1, 3],
    }
    made = recipe(home, stages=[*RULES, longest])
    run(made, tmp_path)
    seen: Counter[str] = Counter()
    for split in SPLITS:
        for ids in contexts(tmp_path, split):
            found = paths(tiny_tokenizer.decode(ids))
            assert len(found) == len(set(found))  # never twice in one context
            seen.update(found)
    ways = {way.path: way for way in Ways(made, tmp_path / "export").find(".py", 100)}
    assert seen == Counter({path: way.shown for path, way in ways.items() if way.shown})
    assert set(seen.values()) == {1, 3}


def test_fill_in_the_middle_rearranges_files_and_keeps_their_order(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    plain = run(recipe(home, stages=RULES, tree={"context_tokens": 8000}), tmp_path / "plain")
    turned = run(recipe(home, stages=RULES, tree={"context_tokens": 8000}, fim={"rate": 1.0}), tmp_path / "fim")
    one, two = ([tiny_tokenizer.decode(ids) for ids in contexts(out, "train")] for out in (plain, turned))
    assert [paths(text) for text in one] == [paths(text) for text in two]  # the headers are where they were
    for text in two:
        assert all(text.count(sentinel) == len(paths(text)) for sentinel in SENTINELS)
        assert all(text[match.end()] == "<" for match in re.finditer(r"^# \w+/\w+\.py\n", text, re.MULTILINE))
    assert contexts(plain, "validation") == contexts(turned, "validation")


def test_parts_of_a_file_longer_than_a_context_are_rearranged_each_on_its_own(
    home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    run(recipe(home, fim={"rate": 1.0}, tree={"context_tokens": 100}, validation_fraction=0.02), tmp_path)
    for ids in contexts(tmp_path, "train"):
        assert len(ids) <= 100
        text = tiny_tokenizer.decode(ids)
        assert len({text.count(sentinel) for sentinel in SENTINELS}) == 1
        assert "long_" not in text or text.count(SENTINELS[0]) > 0


def test_the_same_file_in_two_repositories_is_a_duplicate_and_on_one_side(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for at in range(30):
            (tmp_path / "tree" / name / f"m{at}.py").write_text(f"value_{at} = {at}\n" * 5)
    made = recipe(home, tree={"root": str(tmp_path / "tree")}, validation_fraction=0.3)
    with_copies = run(made, tmp_path / "copies")
    ways = list(Ways(made, with_copies / "export").find(".py", 100))
    for at in range(30):
        assert len({way.split for way in ways if way.path.endswith(f"/m{at}.py")}) == 1
    run(made.model_copy(update={"stages": [Exact()]}), tmp_path / "once")
    assert stats.read(tmp_path / "once")["stages"][0]["reasons"] == {"same text": 30}


def test_inspect_names_the_context_of_a_file(home: Path, tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    made = recipe(home, stages=RULES)
    run(made, tmp_path)
    ways = Ways(made, tmp_path / "export")
    for path in ("two/m05.py", "one/m19.py", "one/long.py"):
        (way,) = ways.find(path, 5)
        assert way.steps[-1].stage == "context"
        said = re.fullmatch(r"document (\d+) of (\w+), with (\d+) other files? of its repository", way.steps[-1].why)
        assert said is not None
        held = tiny_tokenizer.decode(contexts(tmp_path, said[2])[int(said[1])])
        assert path in paths(held)
        # a file cut before this context is counted where it begins
        assert int(said[3]) == len(paths(held)) - 1
    (dropped,) = ways.find("one/wide.py", 5)
    assert [step.stage for step in dropped.steps] == ["code_rules"]


@pytest.mark.parametrize("where", ["scan", "encode"])
def test_the_same_bytes_at_any_number_of_workers_and_after_a_kill(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    made = recipe(home, fim={"rate": 0.5}, stages=RULES)
    assert len(units.plan(made.sources)) == 2
    run(made, tmp_path / "straight")
    if where == "scan":
        monkeypatch.setenv(passes.WORKERS_VARIABLE, "2")
        run(made, tmp_path / "two")
        assert files(tmp_path / "straight/export") == files(tmp_path / "two/export")
        monkeypatch.delenv(passes.WORKERS_VARIABLE)
    module: Any = {"scan": spool, "encode": encode}[where]
    work: Callable[..., None] = getattr(module, where)
    calls = []

    def killed(folder: Path, *arguments: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        work(folder, *arguments)

    monkeypatch.setattr(module, where, killed)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "killed")
    run(made, tmp_path / "killed")
    assert len(calls) == 3
    assert files(tmp_path / "straight/export") == files(tmp_path / "killed/export")


def test_units_that_do_not_hold_what_was_counted_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = encode.encode

    def lossy(folder: Path, *arguments: Any) -> None:
        work(folder, *arguments)
        path = folder / "lengths-train.bin"
        path.write_bytes(path.read_bytes()[:-8])

    monkeypatch.setattr(encode, "encode", lossy)
    with pytest.raises(DataError, match=r"tokens-train\.bin: does not hold the \d+ documents"):
        run(recipe(home), tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_recipe_of_the_old_form_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="max_chars"):
        recipe(home, tree={"max_chars": 1000})
    assert json.loads(recipe(home).model_dump_json())["sources"][0]["repositories"] == "auto"
