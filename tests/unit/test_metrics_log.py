"""metrics.jsonl: exact floats, whole rows only, cut back for a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.errors import DataError
from glmctl.run import metrics
from glmctl.run.metrics import MetricsLog


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_floats_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    log = MetricsLog(tmp_path_factory.mktemp("log") / "m.jsonl")
    log.append({"values": values})
    assert [v.hex() for v in log.rows()[0]["values"]] == [v.hex() for v in values]


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf}})
    assert log.rows() == [{"a": None, "b": [None, 1.0], "c": {"d": None}}]


def test_a_torn_last_line_is_dropped_and_never_continued(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    log = MetricsLog(path)
    assert log.rows() == [{"step": 1}]
    log.append({"step": 2})
    assert log.rows() == [{"step": 1}, {"step": 2}]


def test_truncate_drops_later_rows_and_keeps_those_without_the_key(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    for row in ({"step": 1}, {"note": "x"}, {"step": 2}, {"step": 3}):
        log.append(row)
    log.truncate("step", 2)
    assert log.rows() == [{"step": 1}, {"note": "x"}, {"step": 2}]
    log.truncate("step", -1)
    assert log.rows() == [{"note": "x"}]


@pytest.mark.parametrize("line", ["{", "[1]", "nonsense"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        MetricsLog(path).rows()


def test_only_the_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    MetricsLog(path, writable=False).append({"step": 1})
    assert not path.exists()
    MetricsLog(path).append({"step": 1})
    MetricsLog(path, writable=False).truncate("step", 0)
    assert MetricsLog(path, writable=False).rows() == [{"step": 1}]


def test_the_last_row_is_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows' lengths are beside the part that is read first."""
    monkeypatch.setattr(metrics, "_TAIL", 16)
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    assert log.last() is None
    for text in ("", '{"step": 1', "x" * 40):
        path.write_text(text)
        assert log.last() is None
    for rows in ([1], [1, 100], [100, 1], [7] * 5, [2000, 2000]):
        lines = [json.dumps({"step": step, "text": "x" * size}) + "\n" for step, size in enumerate(rows)]
        for torn in ("", '{"step": 9', "y" * 50):
            path.write_text("".join(lines) + torn)
            assert log.last() == log.rows()[-1]
    path.write_text('{"step": 1}\n{"st\n')
    with pytest.raises(DataError, match=r"m\.jsonl: last line: not JSON"):
        log.last()
