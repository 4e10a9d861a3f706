"""Identity against prompt: all methods in one plot, and each by itself before the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datencoder_jax.benchmark.report.colours import FAINT, PAPER, RULE, Style
from datencoder_jax.benchmark.report.drawing import (
    SMALL,
    TEXT,
    as_svg,
    canvas,
    name_at_the_side,
    pad,
    small_canvases,
    wrapped,
    write_beside,
)
from datencoder_jax.benchmark.report.results import Results, Row, Score, capital
from datencoder_jax.benchmark.report.series import Plot, bar, line, means, references

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = SMALL - 1.5
_PANELS = 5  # side by side


class _Plane(NamedTuple):
    """The two scores, and of every method the rows that have both."""

    right: Score
    up: Score
    lines: dict[str, list[Row]]

    def points(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        return means(self.lines[label], self.right), means(self.lines[label], self.up)


def pareto(results: Results, look: dict[str, Style]) -> Plot | None:
    """A line per method through its numbers of steps; None if no method has both scores."""
    plane = _plane(results)
    if plane is None:
        return None
    right, up, lines = plane
    figure, axes = canvas(9.0, 6.6, [row.label for row in results.references])
    names, marks = [], []
    for label, rows in lines.items():
        xs, ys = plane.points(label)
        _draw(axes, plane, label, look[label])
        marks += _steps(rows, xs, ys, look[label]) if len(results.steps) > 1 else []
        names.append((xs[-1], ys[-1], label, look[label].colour, TEXT))
    ends = references(axes, results, up)
    axes.set_xlabel(f"{right.title} →" if right.higher else f"← {right.title}")
    axes.set_ylabel(f"{up.title} →" if up.higher else f"← {up.title}")
    pad(axes)
    _face(axes, plane)
    name_at_the_side(axes, ends)
    for reference in results.references:
        _diamond(axes, reference, right, up)
    write_beside(axes, names + marks, _samples(axes, plane, list(lines)))
    caption = (
        f"{capital(up.label)} against {right.label}: one line per method through its numbers of steps, which stand "
        "beside its points; crosses are 95 % intervals over subjects, dashed lines the references. "
        "Up and to the right is better."
    )
    return Plot(as_svg(figure, "pareto"), caption)


def panels(results: Results, look: dict[str, Style]) -> Plot | None:
    """The same plane once for each method, before the lines of the others; None where that shows nothing more."""
    plane = _plane(results)
    if plane is None or len(plane.lines) < 2 or all(len(rows) < 2 for rows in plane.lines.values()):
        return None
    figure, all_axes = small_canvases(len(plane.lines), _PANELS)
    for k, (label, axes) in enumerate(zip(plane.lines, all_axes, strict=True)):
        for other in plane.lines:
            if other != label:
                axes.plot(*plane.points(other), color=RULE, linewidth=1.2, marker=".", markersize=3, zorder=2)
        _draw(axes, plane, label, look[label])
        pad(axes)
        axes.set_title(wrapped(label), color=look[label].colour, fontsize=TEXT, fontweight="bold", loc="left", pad=5)
        axes.tick_params(labelleft=k % _PANELS == 0, labelbottom=k + _PANELS >= len(plane.lines))
    limits = np.array([[axes.get_xlim(), axes.get_ylim()] for axes in all_axes])
    (left, bottom), (right, top) = limits[..., 0].min(axis=0), limits[..., 1].max(axis=0)
    for label, axes in zip(plane.lines, all_axes, strict=True):
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        _face(axes, plane)
        marks = _steps(plane.lines[label], *plane.points(label), look[label])
        write_beside(axes, marks, _samples(axes, plane, [label]))
    caption = (
        f"Each method by itself: {plane.up.label} (up) against {plane.right.label} (right), with the others in grey."
    )
    return Plot(as_svg(figure, "pareto-methods"), caption)


def _plane(results: Results) -> _Plane | None:
    up, right = (results.scores.get(results.axes.get(axis, "")) for axis in ("identity", "prompt"))
    if up is None or right is None:
        return None
    lines: dict[str, list[Row]] = {}
    for row in results.methods:
        if row.interval(up.name) and row.interval(right.name):
            lines.setdefault(row.label, []).append(row)
    return _Plane(right, up, lines) if lines else None


def _draw(axes: Axes, plane: _Plane, label: str, style: Style) -> None:
    """A method's line, points and crosses."""
    xs, ys = plane.points(label)
    line(axes, label, xs, ys, style)
    for row, x, y in zip(plane.lines[label], xs, ys, strict=True):
        bar(axes, x, y, row, plane.up, style, vertical=True)
        bar(axes, x, y, row, plane.right, style, vertical=False)


def _steps(rows: Sequence[Row], xs: np.ndarray, ys: np.ndarray, style: Style) -> list:
    """What is written beside the points."""
    points = zip(rows, xs, ys, strict=True)
    return [(x, y, _told(row), style.colour, _STEPS) for row, x, y in points if row.steps is not None]


def _told(row: Row) -> str:
    """A point's steps, and whether it will move as more of its units are made."""
    return f"{row.steps}{' (unfinished)' if row.unfinished else ''}"


def _face(axes: Axes, plane: _Plane) -> None:
    """Turns the axes so that better is up and right."""
    if not plane.right.higher:
        axes.invert_xaxis()
    if not plane.up.higher:
        axes.invert_yaxis()


def _diamond(axes: Axes, row: Row, right: Score, up: Score) -> None:
    """A reference's own point, where the methods' range shows it."""
    x, y = row.interval(right.name), row.interval(up.name)
    if x is None or y is None:
        return
    low, high = sorted(axes.get_xlim())
    if low <= right.scale * x.mean <= high:
        point = [right.scale * x.mean], [up.scale * y.mean]
        axes.plot(*point, "d", markerfacecolor=PAPER, markeredgecolor=FAINT, markersize=6, zorder=2.5, clip_on=False)


def _samples(axes: Axes, plane: _Plane, labels: Sequence[str]) -> np.ndarray:
    """Spots in pixels that the lines run through, which labels should leave free."""
    spots = []
    for label in labels:
        ends = axes.transData.transform(np.stack(plane.points(label), axis=1))
        spots += [*ends, *ends]
        for start, end in pairwise(ends):
            count = max(2, int(np.hypot(*(end - start)) / 6))
            spots += list(start + (end - start) * np.linspace(0, 1, count)[:, None])
    return np.array(spots)
