"""Laws of sources: fixed order, exact weights and limits, bad rows counted and never silent."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from glmctl.data import units
from glmctl.data.reading import BadRows
from glmctl.data.sources import documents, split_long
from glmctl.data.units import plan
from glmctl.errors import DataError, RecipeError
from glmctl.recipe.schema import BundledText, ConversationsSource, JsonLinesSource, SourceTree, TextSource


def texts(*sources: Any, seed: int = 0, bad: BadRows | None = None) -> list[str]:
    return [document.text for document in documents(sources, seed, bad=bad)]


def json_lines(path: Path, rows: list[Any]) -> JsonLinesSource:
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return JsonLinesSource(domain="d", paths=[str(path)])


def test_files_come_by_list_then_by_name(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = TextSource(domain="d", paths=[str(tmp_path / "b"), str(tmp_path / "*.txt")])
    assert texts(source) == ["b/1.txt", "b/2.txt", "a.txt"]
    assert sum(unit.size for unit in plan([source])) == sum(map(len, texts(source)))


def test_json_lines_plain_and_packed_give_the_same(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "zwei ü"}]
    assert texts(json_lines(tmp_path / "a.jsonl", rows)) == ["one", "zwei ü"]
    assert texts(json_lines(tmp_path / "a.jsonl.gz", rows)) == ["one", "zwei ü"]


def test_a_missing_path_is_a_recipe_error(tmp_path: Path) -> None:
    for source in (
        TextSource(domain="d", paths=[str(tmp_path / "no")]),
        JsonLinesSource(domain="d", paths=[str(tmp_path / "no*.jsonl")]),
        SourceTree(domain="d", root=str(tmp_path / "no")),
    ):
        with pytest.raises(RecipeError, match="no such"):
            texts(source)


def test_bad_rows_are_counted_by_kind_and_place_and_good_ones_keep_their_order(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": f"good {i}"} for i in range(200)]
    bad_rows = {3: "{broken", 50: "[1]", 90: '{"txt": "x"}', 120: '{"text": 5}', 150: '{"text": " "}'}
    for at, row in bad_rows.items():
        rows[at] = row
    bad = BadRows(limit=0.05)
    found = texts(json_lines(tmp_path / "r.jsonl", rows), bad=bad)
    assert found == [f"good {i}" for i in range(200) if i not in bad_rows]
    assert bad.kinds == Counter(
        {"not JSON": 1, "not an object": 1, "no field 'text'": 1, "'text' is not text": 1, "empty": 1}
    )
    assert bad.places["not JSON"] == [f"{tmp_path / 'r.jsonl'}:4"]


def test_more_bad_rows_than_tolerated_is_a_data_error(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "r.jsonl", [{"text": "x"}] * 97 + ["{"] * 3)
    assert len(texts(source, bad=BadRows(limit=0.03))) == 97
    with pytest.raises(DataError, match=r"3 of 100 rows.*not JSON.*r\.jsonl:98"):
        texts(source, bad=BadRows(limit=0.029))


def test_weight_is_how_often_a_document_is_seen(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}"} for i in range(400)]
    source = json_lines(tmp_path / "w.jsonl", rows).model_copy(update={"weight": 2.25})
    counts = Counter(texts(source))
    assert set(counts.values()) == {2, 3}
    # three standard deviations of a binomial
    assert abs(sum(c == 3 for c in counts.values()) / 400 - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5
    assert texts(source) == texts(source)
    assert texts(source, seed=1) != texts(source)
    copies = [document.copy for document in documents([source], 0) if document.text == "document 0"]
    assert copies == list(range(len(copies)))


def test_max_bytes_is_not_passed(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "m.jsonl", [{"text": "ü" * 10}] * 10).model_copy(update={"max_bytes": 65})
    assert len(texts(source)) == 3


def test_long_texts_are_split_after_lines_and_lose_nothing() -> None:
    text = "".join(f"line {i}\n" for i in range(100)) + "x" * 70
    parts = list(split_long(text, 50))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 50
    assert all(part.endswith("\n") for part in parts[:-2])


# ------------------------------------------------------------------ source trees


def written(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_tree_gives_its_files_one_by_one_and_leaves_out_what_is_excluded(tmp_path: Path) -> None:
    files = {
        "pkg/__init__.py": "from .b import x",
        "pkg/b.py": "x = 1",
        "pkg/test/t.py": "no",
        "loose.py": "y = 2",
        "pkg/data.json": "{}",
        "empty.py": "",
    }
    source = SourceTree(domain="code", root=str(written(tmp_path, files)))
    found = {document.path: document for document in documents([source], 0)}
    assert {path: found[path].text for path in found} == {
        path: files[path] for path in ("loose.py", "pkg/__init__.py", "pkg/b.py")
    }
    assert all(document.header == f"# {path}\n" and document.is_code for path, document in found.items())
    assert {path: document.repository for path, document in found.items()} == {
        "loose.py": ".",
        "pkg/__init__.py": "pkg",
        "pkg/b.py": "pkg",
    }
    apart = list(documents([source.model_copy(update={"repo_level": False})], 0))
    assert {document.text for document in apart} == {document.text for document in found.values()}
    assert {document.repository for document in apart} == {None}


def test_what_a_repository_is(tmp_path: Path) -> None:
    written(tmp_path, {"a.py": "1", "one/b.py": "2", "one/deep/c.py": "3", "two/d.py": "4"})
    folders = {".": ["a.py"], "one": ["one/b.py", "one/deep/c.py"], "two": ["two/d.py"]}
    whole = {".": ["a.py", "one/b.py", "one/deep/c.py", "two/d.py"]}

    def found(kind: str) -> dict[str, list[str]]:
        source = SourceTree.model_validate({"domain": "d", "root": str(tmp_path), "repositories": kind})
        return units.repositories(source, tmp_path)

    assert found("auto") == found("folders") == folders
    assert found("root") == whole
    (tmp_path / "go.mod").touch()
    assert found("auto") == found("root") == whole
    assert found("folders") == folders


def test_a_huge_repository_is_cut_by_folders_from_sizes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"r/{folder}/{i}.py": "x" * 10 for folder in ("a", "b", "c/d", "c/e") for i in range(3)}
    written(tmp_path, {**files, "r/big.py": "x" * 70, "s/a.py": "x" * 10})
    source = SourceTree(domain="d", root=str(tmp_path))
    monkeypatch.setattr(units, "REPOSITORY_BYTES", 65)
    members = {span.path: list(span.members) for unit in plan([source]) for span in unit.spans}
    assert sorted(members) == ["r, part 1", "r, part 2", "r, part 3", "s"]
    assert members["r, part 1"] == ["r/big.py"]
    assert members["r, part 2"] == [f"r/{folder}/{i}.py" for folder in "ab" for i in range(3)]
    assert members["r, part 3"] == [f"r/c/{folder}/{i}.py" for folder in "de" for i in range(3)]


def test_a_link_that_leads_nowhere_is_skipped_and_counted(tmp_path: Path) -> None:
    written(tmp_path, {f"{i}.py": f"x = {i}" for i in range(9)})
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    source = SourceTree(domain="d", root=str(tmp_path))
    bad = BadRows(limit=0.2)
    assert len(texts(source, bad=bad)) == 9
    assert bad.places == {"link to nothing": [str(tmp_path / "gone.py")]}
    assert len(units.fingerprint([source])[0]) == 9


def test_the_standard_library_is_at_hand() -> None:
    source = SourceTree(domain="code", root="python:stdlib", max_bytes=200_000)
    found = list(documents([source], 0))
    assert 100_000 < sum(document.size for document in found) <= 200_000
    assert [document.path for document in found] == [document.path for document in documents([source], 0)]
    assert all(document.header.startswith("# ") for document in found)


# ------------------------------------------------------------------ bundled and conversations


@pytest.mark.parametrize(("name", "least"), [("jargon-file", 1_000_000), ("python-topics", 400_000)])
def test_bundled_prose_is_at_hand(name: Any, least: int) -> None:
    found = texts(BundledText(domain="prose", text=name))
    assert sum(map(len, found)) > least
    assert all(text.strip() for text in found)


def test_conversations_become_rendered_documents(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 7}
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(talk) + "\n" + json.dumps(talk | {"enable_thinking": False}) + "\n")
    source = ConversationsSource(domain="chat", paths=[str(path)])
    assert texts(source) == [
        "[gMASK]<sop><|user|>\nq<|assistant|>\n<think></think>\na<|user|>",
        "[gMASK]<sop><|user|>\nq/nothink<|assistant|>\n<think></think>\na<|user|>",
    ]
    path.write_text(json.dumps(talk) + "\n" + json.dumps({"messages": []}) + "\n")
    with pytest.raises(DataError, match=r"1 of 2 rows.*not a conversation.*c\.jsonl:2"):
        texts(source)


def test_what_is_installed_beside_glmctl_is_at_hand() -> None:
    """`python:packages` in a root, in a path and in a pattern; another word behind `python:` names the nearest."""
    tree = SourceTree(domain="code", root="python:packages/pydantic", max_bytes=100_000)
    assert all(document.path.endswith(".py") for document in documents([tree], 0))
    readme = TextSource(domain="docs", paths=["python:packages/pydantic-*.dist-info/METADATA"])
    (document,) = documents([readme], 0)
    assert "Name: pydantic" in document.text
    with pytest.raises(RecipeError, match=r"python:package/pydantic.*did you mean 'packages'"):
        list(documents([SourceTree(domain="code", root="python:package/pydantic")], 0))
