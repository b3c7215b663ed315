"""Line charts and heat maps as SVG: no library, no script, colours from the page's style."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Point = tuple[float, float]

_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 436, 12, 200  # of the plot
_MOST_POINTS = 600  # of a curve; more cannot be told apart
_MOST_COLUMNS = 60  # of a heat map
COLOURS = 6  # classes c0 to c5 of the style

STYLE = """
:root { --c0: #1f5fbf; --c1: #c2571a; --c2: #2b8a3e; --c3: #8a3ab9; --c4: #b3261e; --c5: #00798c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --c0: #7fb2ff; --c1: #ffa05c; --c2: #74d388; --c3: #d39bf5; --c4: #ff8a80; --c5: #5fd3e3; }
}
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .grid { stroke: currentColor; opacity: .15; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } svg .faint { opacity: .35; stroke-width: 1; }
svg .dashed { stroke-dasharray: 5 4; stroke-width: 1.2; }
svg .cell { fill: var(--c0); stroke: none; } svg .cell.c1 { fill: var(--c1); }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `faint` and `dashed` curves have no entry in the legend."""

    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    dashed: bool = False
    marked: Point | None = None  # is drawn as a ring


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of a curve over about a twentieth of its points around each one."""
    around = len(points) // 40
    sums = [0.0, *accumulate(y for _, y in points)]
    found = []
    for i, (x, _) in enumerate(points):
        first, last = max(0, i - around), min(len(points), i + around + 1)
        found.append((x, (sums[last] - sums[first]) / (last - first)))
    return found


def line_chart(label: str, curves: Sequence[Curve], across_names: Mapping[float, str] | None = None) -> str:
    """An SVG of curves over the step; `label` says to screen readers what it shows. `across_names` has other ticks of
    the axis than whole numbers, and their names.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    across, up = _Axis.over(xs, _LEFT, _RIGHT), _Axis.over(ys, _BOTTOM, _TOP)
    parts = _frame(label, across, up, across_names)
    for curve in curves:
        kind = "faint" if curve.faint else "dashed" if curve.dashed else ""
        places = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in _thinned(curve.points)]
        parts.append(f"<path class='curve {kind} c{curve.colour % COLOURS}' d='M{'L'.join(places)}'/>")
        rings = [curve.marked] if curve.marked is not None else curve.points if len(curve.points) == 1 else []
        for x, y in rings:
            place = f"cx='{across.at(x):.1f}' cy='{up.at(y):.1f}' r='5'"
            parts.append(f"<circle class='curve c{curve.colour % COLOURS}' {place}/>")
    return "".join((*parts, "</svg>"))


def standalone(chart: str) -> str:
    """A chart as the content of an SVG file, light or dark as its reader asks for."""
    ink = "svg { color: #1a1a1a; } @media (prefers-color-scheme: dark) { svg { color: #e6e6e6; } }"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{_HEIGHT}'"
    return f"{head}{chart.removeprefix('<svg').replace('>', f'><style>{STYLE}{ink}</style>', 1)}\n"


def heat_map(label: str, columns: Sequence[tuple[int, Sequence[int]]], shown: range, colour: int) -> str:
    """An SVG of histograms over the step: a cell is the darker, the larger its share of its column.

    columns: (step, counts), the bins from -1 to 1. `shown`: the bins that are drawn.
    """
    every = -(-len(columns) // _MOST_COLUMNS)
    merged = [columns[i : i + every] for i in range(0, len(columns), every)]
    bins, width, height = len(columns[0][1]), (_RIGHT - _LEFT) / len(merged), (_BOTTOM - _TOP) / len(shown)
    across = _Axis.over([step for step, _ in columns], _LEFT + width / 2, _RIGHT - width / 2)
    up = _Axis.over([2 * shown.start / bins - 1, 2 * shown.stop / bins - 1], _BOTTOM, _TOP)
    parts = _frame(label, across, up)
    for place, group in enumerate(merged):
        counts = [sum(column[i] for _, column in group) for i in shown]
        for row, count in enumerate(counts):
            if count:
                at = f"x='{_LEFT + place * width:.1f}' y='{_BOTTOM - (row + 1) * height:.1f}'"
                size = f"width='{width + 0.2:.1f}' height='{height + 0.2:.1f}'"
                opacity = f"fill-opacity='{0.08 + 0.92 * count / max(counts):.2f}'"
                parts.append(f"<rect class='cell c{colour}' {at} {size} {opacity}/>")
    return "".join((*parts, "</svg>"))


def _frame(label: str, across: _Axis, up: _Axis, across_names: Mapping[float, str] | None = None) -> list[str]:
    """The beginning of an SVG: its label, its grid and the numbers at its axes, or these names."""
    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{html.escape(label, quote=True)}'>"]
    for value, name in up.ticks():
        y = up.at(value)
        parts.append(f"<path class='grid' d='M{_LEFT} {y:.1f}H{_RIGHT}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{name}</text>")
    whole = ((value, name) for value, name in across.ticks() if float(value).is_integer())  # there is no half step
    for value, name in whole if across_names is None else across_names.items():
        parts.append(f"<text x='{across.at(value):.1f}' y='{_BOTTOM + 18}' text-anchor='middle'>{name}</text>")
    return parts


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most about `_MOST_POINTS` of the points, the last one among them."""
    every = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:every], points[-1]]


@dataclass(frozen=True)
class _Axis:
    """Values from `least` to `most` on pixels from `first` to `last`."""

    least: float
    most: float
    first: float
    last: float

    @classmethod
    def over(cls, values: Sequence[float], first: float, last: float) -> _Axis:
        least, most = min(values), max(values)
        margin = 0.0 if most > least else abs(least) / 10 or 1.0  # a single value stands in the middle
        return cls(least - margin, most + margin, first, last)

    def at(self, value: float) -> float:
        return self.first + (value - self.least) / (self.most - self.least) * (self.last - self.first)

    def ticks(self) -> list[tuple[float, str]]:
        """Three to six round values on the axis, as they are written."""
        rough = (self.most - self.least) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.8)
        first, last = math.ceil(self.least / step), math.floor(self.most / step)
        digits = 1 + math.floor(math.log10(max(-self.least, self.most))) - math.floor(math.log10(step))
        whole = step >= 1 and self.most < 1e7
        return [
            (k * step, f"{k * step:,.0f}" if whole else f"{k * step:.{max(1, digits)}g}")
            for k in range(first, last + 1)
        ]
