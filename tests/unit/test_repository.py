"""Laws of repositories: links are read as the languages mean them, and a file stands behind what it needs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.data.repository import dependency_order, headed, imported_modules, ordered


def written(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_imports_are_found_absolute_and_relative() -> None:
    text = "import a.b, c\nfrom . import d\nfrom ..e import f\nclass g:\n  try:\n    from h import i\n  finally: pass"
    found, _ = imported_modules(text, "pkg.sub.mod", is_package=False)
    assert found >= {"a.b", "c", "pkg.sub.d", "pkg.e", "pkg.e.f", "h", "h.i"}
    assert imported_modules("from .x import y", "pkg.sub", is_package=True)[0] >= {"pkg.sub.x"}
    assert imported_modules("print 'python 2'", "m", is_package=False) == (set(), set())


def test_what_loading_does_not_import_is_only_mentioned() -> None:
    text = (
        "import a\nif TYPE_CHECKING:\n  import b\nelse:\n  import c\nif typing.TYPE_CHECKING:\n  import d\n"
        "def f():\n  import e\n  import a\nclass g:\n  async def h(self):\n    with x:\n      import i\n  import j"
    )
    assert imported_modules(text, "m", is_package=False) == ({"a", "c", "j"}, {"b", "d", "e", "i"})


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


def test_who_needs_a_circle_stands_behind_it() -> None:
    files = {"a.py": "import z1", "z1.py": "import z2", "z2.py": "import z1"}
    assert dependency_order(files) == ["z1.py", "z2.py", "a.py"]


def test_what_is_only_mentioned_makes_no_circle() -> None:
    later = "def f():\n    import a"
    files = {"a.py": "import b", "b.py": later}
    assert dependency_order(files) == ["b.py", "a.py"]
    checked = {"a.py": "import b", "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a"}
    assert dependency_order(checked) == ["b.py", "a.py"]
    # where it closes no circle, it says which of two comes first
    assert dependency_order({"c.py": "", "a.py": "def f():\n    import c"}) == ["c.py", "a.py"]


def test_a_file_stands_right_behind_what_it_needs() -> None:
    files = {"a.py": "import y", "b.py": "import z", "y.py": "", "z.py": "", "c.py": ""}
    assert dependency_order(files) == ["y.py", "a.py", "z.py", "b.py", "c.py"]


def test_a_chain_longer_than_the_stack_is_no_trouble() -> None:
    paths = [f"{at:05d}" for at in range(5000)]
    chain = {one: {other} for one, other in pairwise(paths)} | {paths[-1]: set()}
    assert ordered(chain, chain) == paths[::-1]
    circle = chain | {paths[-1]: {paths[0]}}
    assert sorted(ordered(circle, circle)) == paths


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=30))
def test_every_file_once_and_needs_before_users_unless_in_a_circle(edges: list[tuple[int, int, bool]]) -> None:
    paths = [str(at) for at in range(10)]
    every: dict[str, set[str]] = {path: set() for path in paths}
    needs: dict[str, set[str]] = {path: set() for path in paths}
    for one, other, hard in edges:
        if one != other:
            every[str(one)].add(str(other))
            if hard:
                needs[str(one)].add(str(other))
    order = ordered(needs, every)
    assert sorted(order) == paths
    reach = {path: set(others) for path, others in needs.items()}
    for _ in paths:
        reach = {path: found.union(*(reach[other] for other in found)) for path, found in reach.items()}
    for user, others in needs.items():
        for need in others:
            assert order.index(need) < order.index(user) or user in reach[need]


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
    order = [path for path in dependency_order(whole) if not path.endswith("__init__.py")]
    assert [path[-4] for path in order] == ["c", "b", "a", "n"]


def test_scripts_import_what_lies_beside_them() -> None:
    files = {"one/a.py": "import z", "one/z.py": "", "two/a.py": "import z", "two/z.py": "", "a.py": "import z"}
    # two folders have a `z`: outside both, none is meant
    assert dependency_order(files) == ["a.py", "one/z.py", "one/a.py", "two/z.py", "two/a.py"]


def test_includes_are_found_from_any_folder_and_the_systems_are_not() -> None:
    files = {
        "src/a.c": '#include "util.h"\n#include <string.h>\n#  include "../inc/lib/z.h"',
        "src/util.h": "#include <lib/y.h>",
        "inc/lib/y.h": '#include "z.h"',
        "inc/lib/z.h": "",
        "compat/string.h": '#include "a.c"',
    }
    assert dependency_order(files) == ["inc/lib/z.h", "inc/lib/y.h", "src/util.h", "src/a.c", "compat/string.h"]


def test_relative_imports_of_javascript_are_links() -> None:
    files = {
        "src/app.ts": "import x from './lib';\nexport * from \"./z.js\";\nimport React from 'react';",
        "src/lib/index.ts": "const y = require('../y')",
        "src/y.js": "const later = () => import('./app')",
        "src/z.ts": "",
    }
    assert dependency_order(files) == ["src/z.ts", "src/y.js", "src/lib/index.ts", "src/app.ts"]


def test_a_file_is_headed_by_its_path() -> None:
    assert headed("p/a.py", "A = 1\n") == "# p/a.py\nA = 1\n"
    assert headed("x.c", "int") == "// x.c\nint"
