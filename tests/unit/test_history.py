"""Laws of repository history: what links belongs together, diffs stay diffs, nothing outside the checkout is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.history import contexts, groups, record_of
from glmctl.data.reading import BadRows
from glmctl.data.sources import documents
from glmctl.errors import DataError
from glmctl.recipe.schema import RepositoryHistory

DIFF = "--- a/pkg/m.py\n+++ b/pkg/m.py\n@@ -1 +1 @@\n-x = 1\n+x = 2\n"
ROWS: list[dict[str, Any]] = [
    {"type": "issue", "number": 3, "title": "x is wrong", "body": "It should be 2.", "comments": ["Yes.", "See #9."]},
    {"type": "commit", "sha": "abcdef0123456789", "title": "Fix x", "body": "Closes #3", "diff": DIFF, "date": "2"},
    {"type": "pull", "number": 5, "title": "Set x to 2", "body": "", "links": ["abcdef0"], "date": "1"},
    {"type": "issue", "number": 7, "title": "Unrelated", "body": "Another matter."},
]


def records() -> list[Any]:
    return [record_of(row, f"r:{at}") for at, row in enumerate(ROWS)]


def test_linked_records_share_a_context_and_others_do_not() -> None:
    assert [[record.name for record in group] for group in groups(records())] == [
        ["#3", "#5", "abcdef0123456789"],
        ["#7"],
    ]


def test_a_context_has_the_touched_file_the_talk_and_the_commit_as_a_diff(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/m.py").write_text("x = 1\n")
    (_, text), (_, other) = contexts(records(), tmp_path, 10_000)
    parts = [
        "# pkg/m.py\nx = 1",
        "Issue #3: x is wrong",
        "> Yes.",
        "Pull request #5",
        "commit abcdef",
        "Closes #3",
        "+x = 2",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert DIFF.rstrip() in text
    assert "x is wrong" not in other


def test_a_diff_cannot_name_a_file_outside_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "link").symlink_to(tmp_path / "secret.txt")
    for path in ("../secret.txt", "link", str(tmp_path / "secret.txt")):
        row = {"type": "commit", "sha": "abc", "diff": f"+++ b/{path}\n+secret?\n"}
        ((_, text),) = contexts([record_of(row, "r")], tmp_path / "repo", 1000)
        assert text.count("secret") == 1 + path.count("secret")


def test_a_context_keeps_to_its_limit_and_loses_no_record() -> None:
    rows = [{"type": "issue", "number": i, "title": f"T{i}", "body": "b" * 50 + " #0"} for i in range(20)]
    found = list(contexts([record_of(row, "r") for row in rows], None, 300))
    assert len(found) > 4
    assert all(len(text) <= 300 + 20 for _, text in found)
    assert all(sum(f": T{i}\n" in text for _, text in found) == 1 for i in range(20))


@pytest.mark.parametrize("row", [{}, {"type": "tag"}, {"type": "issue"}, {"type": "commit", "sha": "a", "diff": 5}])
def test_what_is_no_record_is_said(row: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        record_of(row, "r")


def test_a_history_is_a_source(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, {"type": "tag"}]))
    bad = BadRows(limit=1.0)
    found = list(documents([RepositoryHistory(domain="repo", paths=[str(path)])], 0, bad=bad))
    assert len(found) == 2
    assert bad.total == 1
    assert found[0].path == f"{path}:1"
