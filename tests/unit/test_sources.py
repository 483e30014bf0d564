"""Laws of sources: fixed order, exact weights and limits, dependency order, bad rows counted and never silent."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.reading import BadRows
from glmctl.data.repository import dependency_order, headed, imported_modules, join
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


def test_imports_are_found_absolute_and_relative() -> None:
    text = "import a.b, c\nfrom . import d\nfrom ..e import f\ndef g():\n  try:\n    from h import i\n  finally: pass"
    found = imported_modules(text, "pkg.sub.mod", is_package=False)
    assert found >= {"a.b", "c", "pkg.sub.d", "pkg.e", "pkg.e.f", "h", "h.i"}
    assert imported_modules("from .x import y", "pkg.sub", is_package=True) >= {"pkg.sub.x"}
    assert imported_modules("print 'python 2'", "m", is_package=False) == set()


def test_imported_files_come_first_and_circles_go_by_name() -> None:
    files = {
        "pkg/__init__.py": "from .z import main",
        "pkg/z.py": "from . import m\nimport pkg.a",
        "pkg/a.py": "",
        "pkg/m.py": "import pkg.a",
        "pkg/notes.txt": "",
        "pkg/c1.py": "from . import c2",
        "pkg/c2.py": "from . import c1",
    }
    order = dependency_order(files)
    assert sorted(order) == sorted(files)
    place = {path: at for at, path in enumerate(order)}
    assert place["pkg/a.py"] < place["pkg/m.py"] < place["pkg/z.py"] < place["pkg/__init__.py"]
    assert place["pkg/c1.py"] < place["pkg/c2.py"]
    assert order == dependency_order(dict(reversed(files.items())))


def written(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize("package", ["pkg", "outer/pkg"])
def test_a_root_that_is_a_package_has_its_name_in_imports(tmp_path: Path, package: str) -> None:
    name = package.replace("/", ".")
    files = {
        "a.py": f"import {name}.z",
        "z.py": f"from {name}.sub import m",
        "sub/m.py": "x = 1",
        "sub/__init__.py": "",
    }
    # the package's own file is no member where it is empty: the folder tells
    root = written(tmp_path / package, {**files, "__init__.py": ""})
    if root.parent != tmp_path:
        (root.parent / "__init__.py").touch()
    assert dependency_order(files, root) == ["sub/__init__.py", "sub/m.py", "z.py", "a.py"]
    source = SourceTree(domain="code", root=str(root))
    found = {document.path: document.text for document in documents([source], 0)}
    assert found["z.py"].index("# z.py") < found["z.py"].index("# a.py")


@pytest.mark.parametrize("above", ["src", "python/lib"])
def test_packages_below_a_source_folder_are_imported_without_it(tmp_path: Path, above: str) -> None:
    files = {
        f"{above}/pkg/a.py": "import pkg.b",
        f"{above}/pkg/b.py": "from pkg import c",
        f"{above}/pkg/c.py": "import json",
        f"{above}/pkg/json.py": "import pkg.a",  # another `json` than that of the standard library
    }
    root = written(tmp_path, {**files, f"{above}/pkg/__init__.py": ""})
    assert [path[-4] for path in dependency_order(files, root)] == ["c", "b", "a", "n"]
    whole = {**files, f"{above}/pkg/__init__.py": ""}
    assert [path[-4] for path in dependency_order(whole)[1:]] == ["c", "b", "a", "n"]


def test_scripts_import_what_lies_beside_them() -> None:
    files = {"one/a.py": "import z", "one/z.py": "", "two/a.py": "import z", "two/z.py": "", "a.py": "import z"}
    # two folders have a `z`: outside both, none is meant
    assert dependency_order(files) == ["a.py", "one/z.py", "one/a.py", "two/z.py", "two/a.py"]


def test_joined_files_are_headed_by_their_path_and_kept_whole() -> None:
    files = {"p/a.py": "A = 1\n" * 10, "p/b.py": "B = 1\n" * 10, "p/c.py": "C = 1\n" * 10}
    joined = list(join(files, limit=150))
    assert [path for path, _ in joined] == ["p/a.py", "p/c.py"]
    assert joined[0][1] == headed("p/a.py", files["p/a.py"]) + "\n" + headed("p/b.py", files["p/b.py"])
    assert joined[0][1].startswith("# p/a.py\nA = 1\n")
    assert headed("x.c", "int") == "// x.c\nint"


def test_a_tree_is_joined_by_package_and_leaves_out_what_is_excluded(tmp_path: Path) -> None:
    for path, text in {
        "pkg/__init__.py": "from .b import x",
        "pkg/b.py": "x = 1",
        "pkg/test/t.py": "no",
        "loose.py": "y = 2",
        "pkg/data.json": "{}",
        "empty.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    source = SourceTree(domain="code", root=str(tmp_path))
    found = {document.path: document for document in documents([source], 0)}
    assert set(found) == {"pkg/b.py", "loose.py"}
    assert found["pkg/b.py"].text == "# pkg/b.py\nx = 1\n# pkg/__init__.py\nfrom .b import x"
    assert all(document.is_code for document in found.values())
    short = SourceTree(domain="code", root=str(tmp_path), max_chars=30)
    assert sorted(texts(short)) == ["# loose.py\ny = 2", "# pkg/__init__.py\nfrom .b import x", "# pkg/b.py\nx = 1"]
    apart = SourceTree(domain="code", root=str(tmp_path), repo_level=False)
    assert sorted(texts(apart)) == ["# loose.py\ny = 2", "# pkg/__init__.py\nfrom .b import x", "# pkg/b.py\nx = 1"]


def test_the_standard_library_is_at_hand() -> None:
    source = SourceTree(domain="code", root="python:stdlib", max_bytes=200_000)
    found = list(documents([source], 0))
    assert 100_000 < sum(len(document.text) for document in found) <= 200_000
    assert [document.path for document in found] == [document.path for document in documents([source], 0)]
    assert all(document.text.startswith("# ") for document in found)


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
