"""Charts: every point lands where its value says, whatever the values are, and the picture is well-formed XML."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmctl.run.charts import (
    MAX_POINTS,
    Mark,
    Series,
    bar_chart,
    heat_map,
    line_chart,
    log_ticks,
    nice_ticks,
    short,
    smoothed,
    thin,
    timeline,
)

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


def paths(svg: str) -> list[list[tuple[float, float]]]:
    return [
        [tuple(map(float, step[1:].split())) for step in re.findall(r"[ML][\d.-]+ [\d.-]+", path)]  # type: ignore[misc]
        for path in re.findall(r' d="([^"]*)"', svg)
    ]


@settings(deadline=None)
@given(NUMBERS, st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_are_round_increasing_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    if not high > low:
        return
    ticks = nice_ticks(low, high, count)
    slack = (high - low) * 1e-6 + abs(high) * 1e-9
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 2 * count + 2


@settings(deadline=None)
@given(st.floats(1e-8, 1e6), st.floats(1.2, 1e6))
def test_logarithmic_ticks_are_inside_and_positive(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert all(0 < tick <= low * factor * 1.001 for tick in ticks)
    assert all(tick >= low * 0.999 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (1234, "1.23k"), (2e6, "2M"), (3.5e9, "3.5B"), (0.012, "0.012"), (2e-4, "2e-4"), (-5, "-5")],
)
def test_figures_are_short(value: float, text: str) -> None:
    assert short(value) == text


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), min_size=1, max_size=3000))
@settings(max_examples=30, deadline=None)
def test_thinning_keeps_the_extremes(points: list[tuple[int, float]]) -> None:
    series = [(float(x), y) for x, y in sorted(points)]
    kept = thin(series)
    assert len(kept) <= MAX_POINTS
    assert set(kept) <= set(series)
    assert min(y for _, y in kept) == min(y for _, y in series)
    assert max(y for _, y in kept) == max(y for _, y in series)


def test_smoothing_keeps_lines_and_ends() -> None:
    """A mean over as many neighbours before as after leaves a straight line where it is."""
    line = [(float(x), 3.0 * x + 1.0) for x in range(50)]
    for window in (2, 5, 9, 200):
        assert [x for x, _ in smoothed(line, window)] == [x for x, _ in line]
        assert [y for _, y in smoothed(line, window)] == pytest.approx([y for _, y in line])
    spike = [(float(x), float(x == 25)) for x in range(51)]
    assert max(y for _, y in smoothed(spike, 9)) == pytest.approx(1 / 9)


def test_points_lie_where_their_values_say() -> None:
    svg = line_chart([Series("a", [(0, 0), (5, 10), (10, 5)])], title="t")
    ((left, middle, right),) = paths(svg)
    assert left[0] < middle[0] < right[0]
    assert middle[0] == pytest.approx((left[0] + right[0]) / 2, abs=0.1)
    assert middle[1] < right[1] < left[1], "larger is higher"
    assert right[1] == pytest.approx((left[1] + middle[1]) / 2, abs=0.1)


def test_a_logarithmic_axis_spaces_ratios_equally() -> None:
    ((a, b, c),) = paths(line_chart([Series("a", [(0, 1), (1, 10), (2, 100)])], title="t", log_y=True))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)
    ((a, b),) = paths(line_chart([Series("a", [(0, 1), (1, 0), (2, -1), (3, 4)])], title="t", log_y=True))


def test_references_stretch_the_axis_and_borders_do_not() -> None:
    svg = line_chart(
        [Series("a", [(0, 1), (10, 2)])],
        title="t",
        references=[Mark(6.0, "unigram & co")],
        borders=[Mark(5.0, "mid"), Mark(99.0, "outside")],
    )
    assert "unigram &amp; co" in svg
    assert ">mid<" in svg
    assert "outside" not in svg
    reference = float(re.findall(r'class="reference"[^/]*y1="([\d.]+)"', svg)[0])
    assert 30 <= reference < min(y for _, y in paths(svg)[0]), "the reference is above the line and in the picture"


values = st.one_of(st.floats(), st.floats(-10, 10), st.just(0.0))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 100), values), max_size=20), max_size=4), st.booleans(), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_any_values_give_a_well_formed_picture_with_finite_places(
    lines: list[list[tuple[int, float]]], log_y: bool, zero: bool
) -> None:
    series = [
        Series(f"<{index}>&", sorted(points), smooth=3 * (index % 2), markers=index == 2)
        for index, points in enumerate(lines)
    ]
    svg = line_chart(series, title='a "b" <c>', log_y=log_y, zero=zero, references=[Mark(math.nan, "no")])
    ElementTree.fromstring(svg)
    assert not re.search(r'="[^"]*(nan|inf)', svg)


@pytest.mark.parametrize(
    "svg",
    [
        line_chart([], title="t"),
        line_chart([Series("a", [])], title="t"),
        line_chart([Series("a", [(0, math.nan)])], title="t"),
        bar_chart([], [], title="t"),
        bar_chart(["g"], [("s", [math.nan])], title="t"),
        heat_map([], title="t", row_names=[]),
    ],
)
def test_nothing_to_draw_is_said(svg: str) -> None:
    ElementTree.fromstring(svg)
    assert "no data" in svg


def test_bars_stand_on_zero_and_show_their_values() -> None:
    svg = bar_chart(["x", "y"], [("one", [0.5, 1.0]), ("two", [0.25, math.nan])], title="t", percent=True)
    ElementTree.fromstring(svg)
    heights = [
        float(h) for h in re.findall(r'<rect class="f\d" x="[^"]*" y="[^"]*" width="[^"]*" height="([\d.]+)"', svg)
    ]
    bars = heights[:3]
    assert bars[0] == pytest.approx(2 * bars[1], rel=0.01)
    assert bars[2] == pytest.approx(2 * bars[0], rel=0.01)
    assert ">50.0%<" in svg


def test_heat_shows_the_distance_from_an_even_share() -> None:
    svg = heat_map([[1.0, 0.0, 2.0], [1.5, 1.0, 0.5]], title="t", row_names=["a", "b"])
    ElementTree.fromstring(svg)
    found = re.findall(r'class="(hot|cold)"[^>]*fill-opacity="([\d.]+)"', svg)
    assert found == [
        ("hot", "0.00"),
        ("cold", "1.00"),
        ("hot", "1.00"),
        ("hot", "0.50"),
        ("hot", "0.00"),
        ("cold", "0.50"),
    ]


def test_the_timeline_is_divided_by_time() -> None:
    svg = timeline([("first", 10.0), ("second", 30.0)])
    ElementTree.fromstring(svg)
    first, second = (float(w) for w in re.findall(r'width="([\d.]+)" height="18"', svg))
    assert second == pytest.approx(3 * first, rel=0.02)
    assert timeline([("first", 0.0)]) == ""
