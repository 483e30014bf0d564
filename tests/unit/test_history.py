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


def grouped(*rows: dict[str, Any], place: str = "r") -> list[list[str]]:
    found = [record_of({"title": "", **row}, f"{place}:{at}") for at, row in enumerate(rows)]
    return [[record.name for record in group] for group in groups(found)]


def issue(number: int, *links: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "issue", "number": number, "links": list(links), **fields}


def test_only_hashes_of_commits_may_be_shortened() -> None:
    assert grouped(issue(123456), issue(1234567), issue(1, 1234567)) == [["#123456"], ["#1234567", "#1"]]
    assert grouped(issue(123456), issue(1, 1234567)) == [["#123456"], ["#1"]]
    one, two = "abcdef0" + "1" * 33, "abcdef0" + "2" * 33
    commits = [{"type": "commit", "sha": sha} for sha in (one, two)]
    # a longer link must agree to its end, a shorter one must mean one commit alone
    assert grouped(*commits, issue(1, "abcdef0222")) == [[one], ["#1", two]]
    assert grouped(*commits, issue(1, "abcdef0333")) == [[one], [two], ["#1"]]
    assert grouped(*commits, issue(1, "abcdef0")) == [[one], [two], ["#1"]]
    assert grouped(*commits, issue(1, two.upper())) == [[one], ["#1", two]]
    assert grouped({"type": "commit", "sha": "abcdef02"}, issue(1, two)) == [["#1", "abcdef02"]]
    assert grouped({"type": "commit", "sha": "release-10"}, issue(1, "release-1")) == [["release-10"], ["#1"]]


def test_a_number_is_of_its_repository() -> None:
    rows = [issue(12), issue(7, 12)]
    found = [record_of(row, f"{file}:{at}") for file in ("a", "b") for at, row in enumerate(rows)]
    assert [{record.place for record in group} for group in groups(found)] == [{"a:0", "a:1"}, {"b:0", "b:1"}]
    # the field goes before the file: one repository in two files, two in one
    apart = [record_of(issue(12, repository="o/x"), "a:1"), record_of(issue(7, 12, repository="o/x"), "b:1")]
    assert len(groups(apart)) == 1
    assert grouped(issue(12, repository="o/x"), issue(7, 12, repository="o/y")) == [["#12"], ["#7"]]
    with pytest.raises(DataError, match="'repository' has the wrong type"):
        record_of(issue(1, repository=5), "r")


def test_a_busy_tracker_is_no_single_group() -> None:
    chain = [issue(i, i + 1) for i in range(50)]
    found = grouped(*chain)
    assert max(map(len, found)) <= 3
    assert sorted(name for group in found for name in group) == sorted(f"#{i}" for i in range(50))
    pulls = [{"type": "pull", "number": 100 + i, "links": [99 + i, i]} for i in range(20)]
    # pull requests that mention one another stay apart, each with the issue that it closes
    found = grouped(*pulls, *[issue(i) for i in range(20)])
    assert sorted(map(sorted, found)) == sorted(sorted([f"#{i}", f"#{100 + i}"]) for i in range(20))
    # an issue of a commit of a pull request comes along, and no further
    rows = [
        issue(1),
        issue(2, 1),
        {"type": "commit", "sha": "a" * 40, "body": "Fixes #1"},
        {"type": "pull", "number": 3, "links": ["a" * 40]},
    ]
    assert grouped(*rows) == [["#1", "#3", "a" * 40], ["#2"]]


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
