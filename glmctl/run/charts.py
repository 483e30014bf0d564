"""Small SVG charts for the report: lines, bars, a heat map and a stage timeline.

Every function returns one `<svg>` element as text. Colours are CSS classes and custom properties of the page
(`--s0`..`--s7` for series), so that one picture serves light and dark. All text that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise

from glmctl.console import duration

MAX_POINTS = 400
"""A series longer than this is thinned to the lowest and highest point of equal stretches: spikes stay visible."""

LARGEST = 1e150

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `smooth` > 1 draws the raw points faintly and the mean of that many neighbours on top."""

    name: str
    points: Sequence[Point]
    smooth: int = 0
    markers: bool = False
    color: int | None = None


@dataclass(frozen=True)
class Mark:
    """A reference: a horizontal line at a value, or a vertical one at an x, with a label."""

    at: float
    label: str


@dataclass(frozen=True)
class Frame:
    """The plotting area inside the picture, in user units."""

    width: float
    height: float
    left: float = 52.0
    right: float = 14.0
    top: float = 30.0
    bottom: float = 38.0

    @property
    def inner_width(self) -> float:
        return self.width - self.left - self.right

    @property
    def inner_height(self) -> float:
        return self.height - self.top - self.bottom


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or with their multiples by 2 and 5, or round values, whichever first gives three or more."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 2.0, 5.0)):
        ticks = [f * 10.0**p for p in powers for f in factors if low * (1 - 1e-9) <= f * 10.0**p <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks
    return [tick for tick in nice_ticks(low, high) if tick > 0]


def short(value: float) -> str:
    """A figure as short as it can be read: 1.2k, 3.4M, 0.012, 2e-4."""
    size = abs(value)
    if value == 0:
        return "0"
    for bound, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= bound:
            return f"{value / bound:.3g}{unit}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about `limit` points: of each of limit/2 equal stretches, the lowest and the highest."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    buckets = max(limit // 2, 1)
    for index in range(buckets):
        stretch = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        low = min(stretch, key=lambda p: p[1])
        high = max(stretch, key=lambda p: p[1])
        kept.extend(sorted({low, high}))
    return kept


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """Mean over the `window` nearest points, as many before as after: a steep start is not dragged along."""
    sums = [0.0, *accumulate(y for _, y in points)]
    out: list[Point] = []
    for index, (x, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        first, last = index - reach, index + reach + 1
        out.append((x, (sums[last] - sums[first]) / (last - first)))
    return out


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn: finite, and not so large that a difference of two overflows."""
    return [(float(x), float(y)) for x, y in points if abs(x) < LARGEST and abs(y) < LARGEST]


def _svg(frame: Frame, title: str, body: list[str], kind: str, *, unit: str = "") -> str:
    """The outer element: it scales with its column and carries the title for screen readers."""
    inner = "\n".join(part for part in body if part)
    named = f'<tspan class="unit" dx="8">{escape(unit)}</tspan>' if unit else ""
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}">\n'
        f'<text class="title" x="0" y="14">{escape(title)}{named}</text>\n{inner}\n</svg>'
    )


def _empty(frame: Frame, title: str) -> str:
    middle = f'<text class="none" x="{frame.width / 2:g}" y="{frame.height / 2:g}">no data</text>'
    return _svg(frame, title, [middle], "empty")


def _path(points: Sequence[Point], css: str) -> str:
    steps = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path class="{css}" d="{steps}"/>'


class _Axes:
    """Maps data to the picture and draws grid, ticks and labels."""

    def __init__(self, frame: Frame, xs: Sequence[float], ys: Sequence[float], *, log_y: bool, zero: bool) -> None:
        self.frame, self.log_y = frame, log_y
        self.x_low, self.x_high = min(xs), max(xs)
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        low, high = min(ys), max(ys)
        if log_y:
            low, high = low / 1.1, high * 1.1
        else:
            low = min(low, 0.0) if zero else low
            pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
            low, high = (low if zero and low >= 0 else low - pad), high + pad
        self.y_low, self.y_high = low, high

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return self.frame.left + share * self.frame.inner_width

    def y(self, value: float) -> float:
        if self.log_y:
            low, high = math.log(self.y_low), math.log(self.y_high)
            share = (math.log(max(value, self.y_low)) - low) / (high - low)
        else:
            share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.frame.top + (1.0 - share) * self.frame.inner_height

    def draw(self, x_label: str) -> list[str]:
        frame, parts = self.frame, []
        right, bottom = frame.width - frame.right, frame.height - frame.bottom
        ticks = log_ticks(self.y_low, self.y_high) if self.log_y else nice_ticks(self.y_low, self.y_high)
        for tick in ticks:
            at = self.y(tick)
            parts.append(f'<line class="grid" x1="{frame.left:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick y" x="{frame.left - 7:g}" y="{at + 3.5:.1f}">{short(tick)}</text>')
        for tick in nice_ticks(self.x_low, self.x_high, 6):
            at = self.x(tick)
            parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
            parts.append(f'<text class="tick x" x="{at:.1f}" y="{bottom + 16:g}">{short(tick)}</text>')
        parts.append(f'<line class="axis" x1="{frame.left:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
        parts.append(f'<text class="label x" x="{right:g}" y="{frame.height - 6:g}">{escape(x_label)}</text>')
        return parts


def _legend(frame: Frame, entries: Sequence[tuple[str, int]]) -> list[str]:
    """Names with their colour, right-aligned on the title line; widths are guessed at 6.2 units a letter.

    A line without a name is left out: it belongs to the one before it.
    """
    parts: list[str] = []
    x = frame.width - frame.right
    for name, color in reversed([entry for entry in entries if entry[0]]):
        x -= 6.2 * len(name)
        parts.append(f'<text class="legend" x="{x:.1f}" y="14">{escape(name)}</text>')
        x -= 16
        parts.append(f'<rect class="f{color % 8}" x="{x:.1f}" y="6" width="11" height="9" rx="2"/>')
        x -= 12
    return parts


def _draw_series(one: Series, points: list[Point], color: int, axes: _Axes) -> list[str]:
    to_picture = [(axes.x(x), axes.y(y)) for x, y in thin(points)]
    parts = []
    if one.smooth > 1 and len(points) > 3:
        parts.append(_path(to_picture, f"line raw c{color}"))
        mean = thin(smoothed(points, one.smooth))
        parts.append(_path([(axes.x(x), axes.y(y)) for x, y in mean], f"line c{color}"))
    else:
        parts.append(_path(to_picture, f"line c{color}"))
    if one.markers or len(points) == 1:
        for (x, y), (px, py) in zip(thin(points), to_picture, strict=True):
            tip = f"<title>{escape(one.name)}: {y:.6g} at {short(x)}</title>"
            parts.append(f'<circle class="dot f{color}" cx="{px:.1f}" cy="{py:.1f}" r="3">{tip}</circle>')
    return parts


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
    zero: bool = False,
    references: Sequence[Mark] = (),
    borders: Sequence[Mark] = (),
    width: float = 620,
    height: float = 270,
) -> str:
    """Lines over a common x. Non-finite points (and, with `log_y`, points at or below 0) are left out.

    `references` are dashed horizontals with a label, `borders` thin verticals (where a stage begins).
    """
    frame = Frame(width, height)
    drawn: list[tuple[Series, list[Point], int]] = []
    for index, one in enumerate(series):
        points = [p for p in finite(one.points) if not log_y or p[1] > 0]
        if points:
            drawn.append((one, points, (index if one.color is None else one.color) % 8))
    if not drawn:
        return _empty(frame, title)
    shown = [mark for mark in references if math.isfinite(mark.at) and (not log_y or mark.at > 0)]
    xs = [x for _, points, _ in drawn for x, _ in points]
    ys = [y for _, points, _ in drawn for _, y in points] + [mark.at for mark in shown]
    axes = _Axes(frame, xs, ys, log_y=log_y, zero=zero)
    parts = axes.draw(x_label)
    for mark in borders:
        if axes.x_low <= mark.at <= axes.x_high:
            parts.extend(_vertical(mark, axes))
    for mark in shown:
        parts.extend(_horizontal(mark, axes))
    for one, points, color in drawn:
        parts.extend(_draw_series(one, points, color, axes))
    parts.extend(_legend(frame, [(one.name, color) for one, _, color in drawn]))
    return _svg(frame, title, parts, "lines", unit=y_label)


def _vertical(mark: Mark, axes: _Axes) -> list[str]:
    x, frame = axes.x(mark.at), axes.frame
    bottom = frame.height - frame.bottom
    return [
        f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top:g}" y2="{bottom:g}"/>',
        f'<text class="note" x="{x + 4:.1f}" y="{bottom - 6:g}">{escape(mark.label)}</text>',
    ]


def _horizontal(mark: Mark, axes: _Axes) -> list[str]:
    y, frame = axes.y(mark.at), axes.frame
    right = frame.width - frame.right
    return [
        f'<line class="reference" x1="{frame.left:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>',
        f'<text class="note end" x="{right - 2:g}" y="{y - 5:.1f}">{escape(mark.label)}</text>',
    ]


def bar_chart(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float]]],
    *,
    title: str,
    percent: bool = False,
    width: float = 620,
    height: float = 270,
) -> str:
    """Groups of bars side by side, each with its value on top. `series` are (name, one value a group)."""
    frame = Frame(width, height)
    values = [v for _, row in series for v in row if math.isfinite(v)]
    if not groups or not values:
        return _empty(frame, title)
    axes = _Axes(frame, [0.0, float(len(groups))], [0.0, *values, *([1.0] if percent else [])], log_y=False, zero=True)
    bottom, parts = axes.y(0.0), []
    right = frame.width - frame.right
    for tick in nice_ticks(axes.y_low, axes.y_high):
        at = axes.y(tick)
        text = f"{tick:.0%}" if percent else short(tick)
        parts.append(f'<line class="grid" x1="{frame.left:g}" x2="{right:g}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick y" x="{frame.left - 7:g}" y="{at + 3.5:.1f}">{text}</text>')
    slot = frame.inner_width / len(groups)
    bar = min(slot * 0.72 / len(series), 64.0)
    for group_index, group in enumerate(groups):
        middle = frame.left + slot * (group_index + 0.5)
        for index, (name, row) in enumerate(series):
            value = row[group_index]
            if not math.isfinite(value):
                continue
            x, y = middle + (index - len(series) / 2) * bar, axes.y(value)
            text = f"{value:.1%}" if percent else short(value)
            tip = f"<title>{escape(group)}, {escape(name)}: {value:.6g}</title>"
            parts.append(
                f'<rect class="f{index % 8}" x="{x + 2:.1f}" y="{min(y, bottom):.1f}" width="{bar - 4:.1f}" '
                f'height="{abs(bottom - y):.1f}" rx="3">{tip}</rect>'
            )
            parts.append(f'<text class="value" x="{x + bar / 2:.1f}" y="{min(y, bottom) - 5:.1f}">{text}</text>')
        parts.append(f'<text class="tick x" x="{middle:.1f}" y="{frame.height - 18:g}">{escape(group)}</text>')
    parts.append(f'<line class="axis" x1="{frame.left:g}" x2="{right:g}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>')
    parts.extend(_legend(frame, [(name, index) for index, (name, _) in enumerate(series)]))
    return _svg(frame, title, parts, "bars")


def heat_map(
    values_LE: Sequence[Sequence[float]],
    *,
    title: str,
    row_names: Sequence[str],
    column_label: str = "expert",
    center: float = 1.0,
    width: float = 620,
) -> str:
    """Cells around `center`: one colour below, the other above, full strength at 0 and at 2 * center.

    With expert load as a multiple of the even share, `center` 1 is perfect balance.
    """
    columns = max((len(row) for row in values_LE), default=0)
    if not columns:
        return _empty(Frame(width, 90), title)
    cell = min((width - 74) / columns, 96.0)
    tall = max(min(cell, 30.0), 12.0)
    frame = Frame(width, 26 + tall * len(values_LE) + 34, left=60)
    parts = []
    for row_index, (name, row) in enumerate(zip(row_names, values_LE, strict=True)):
        y = 26 + row_index * tall
        parts.append(f'<text class="tick y" x="{frame.left - 7:g}" y="{y + tall / 2 + 3.5:.1f}">{escape(name)}</text>')
        for column, value in enumerate(row):
            strength = min(abs(value - center) / center, 1.0) if math.isfinite(value) else 0.0
            side = "hot" if value >= center else "cold"
            tip = f"<title>{escape(name)}, {escape(column_label)} {column}: {value:.3g}</title>"
            place = f'x="{frame.left + column * cell + 1:.1f}" y="{y + 1:.1f}"'
            size = f'width="{cell - 2:.1f}" height="{tall - 2:.1f}" rx="3"'
            parts.append(f'<rect class="cell" {place} {size}/>')
            parts.append(f'<rect class="{side}" {place} {size} fill-opacity="{strength:.2f}">{tip}</rect>')
            if cell >= 30 and tall >= 18:
                at = f'x="{frame.left + (column + 0.5) * cell:.1f}" y="{y + tall / 2 + 3.5:.1f}"'
                parts.append(f'<text class="cellvalue" {at}>{value:.2f}</text>')
    label = f"{column_label} 0 … {columns - 1}; 1.00 is an even share" if center == 1.0 else column_label
    parts.append(f'<text class="label" x="{frame.left:g}" y="{frame.height - 14:g}">{escape(label)}</text>')
    return _svg(frame, title, parts, "heat")


def timeline(stages: Sequence[tuple[str, float]], *, width: float = 1080) -> str:
    """Where the time went: one bar with a stretch for each (name, seconds), named where it is wide enough."""
    total = sum(seconds for _, seconds in stages)
    frame = Frame(width, 58, left=0, right=0)
    if total <= 0:
        return ""
    edges = [0.0]
    for _, seconds in stages:
        edges.append(edges[-1] + seconds / total * width)
    parts = []
    for index, ((name, seconds), (start, end)) in enumerate(zip(stages, pairwise(edges), strict=True)):
        tip = f"<title>{escape(name)}: {duration(seconds)} ({seconds / total:.0%})</title>"
        wide = max(end - start - 2, 1)
        parts.append(
            f'<rect class="f{index % 8}" x="{start:.1f}" y="22" width="{wide:.1f}" height="18" rx="3">{tip}</rect>'
        )
        if end - start > 7.0 * len(name):
            parts.append(f'<text class="legend" x="{start + 1:.1f}" y="14">{escape(name)}</text>')
            parts.append(f'<text class="tick" x="{start + 1:.1f}" y="54">{duration(seconds)}</text>')
    return (
        f'<svg class="chart timeline" viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" '
        f'aria-label="time per stage">{"".join(parts)}</svg>'
    )
