"""What does the evidence look like? Curves through measured cells, drawn as small deterministic SVGs.

`figures.toml` says which claims make which curves. Colours leave here as CSS variables with a
fallback: one drawing is readable on a light page, on a dark one and as a file of its own.
"""

from __future__ import annotations

import io
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from turboquant_reports import wording

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from turboquant_claims.results import Result

INK, GRID = "#010101", "#020202"
HUES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306")
THEME = {
    INK: "currentColor",
    GRID: "var(--grid, #8886)",
    **{
        hue: f"var(--c{i}, {plain})"
        for i, (hue, plain) in enumerate(
            zip(HUES, ("#3d8ccc", "#d2703a", "#3a9c74", "#9a70cc", "#a68a1c", "#808a94"), strict=True)
        )
    },
}
"""Stand-in colours that matplotlib draws with, and what each becomes in the SVG."""

MARKERS = "os^DvX"
WIDTH, HEIGHT = 4.8, 2.9
"""Inches of the drawing's width and its plotting area's height: small, so that a phone shrinks it little."""

LEFT, RIGHT, TOP, BOTTOM, ENTRY = 0.72, 0.1, 0.08, 0.52, 0.2
"""Inches of the margins around the plotting area, and of one line of the legend below it."""


class Strict(BaseModel):
    """A table of figures.toml; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(Strict):
    """One axis: its label, the cell parameter that it shows (x only) and its scale."""

    label: str
    parameter: str = ""
    log: Literal[0, 2, 10] = 0
    """0 for a linear scale, else the logarithm's base."""


class Curve(Strict):
    """Measured cells that belong together: one curve for each distinct name.

    `name` may hold a cell's parameters and its subject in braces. Values are drawn times `factor` and
    times the parameter that `times` names.
    """

    name: str
    claims: list[str]
    where: dict[str, float | int | str | bool] = {}
    subjects: list[str] = []
    times: str = ""
    factor: float = 1.0

    def takes(self, result: Result) -> bool:
        """Whether a result belongs to the curve; in `claims`, * stands for any text."""
        return (
            any(fnmatchcase(result.claim, pattern) for pattern in self.claims)
            and (not self.subjects or result.subject in self.subjects)
            and all(result.cell.get(name) == value for name, value in self.where.items())
        )


class Reference(Strict):
    """A line or points to compare with: `scale * base ** -x`, or the listed points."""

    name: str
    scale: float = 1.0
    base: float = 0.0
    points: list[tuple[float, float]] = []


class FigureSpec(Strict):
    """One entry of figures.toml; `panels` names parameters, each combination of which is a drawing."""

    id: str
    title: str
    caption: str
    x: Axis
    y: Axis
    curve: list[Curve]
    reference: list[Reference] = []
    panels: list[str] = []
    names: dict[str, str] = {}
    """What a curve that a note names is called in the legend."""

    note: str = ""
    """Where set, a cell's curves are read from this entry of its note, {name: {x: y}}, not from its value."""


class Specification(Strict):
    """The whole of figures.toml."""

    figure: list[FigureSpec] = Field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """One measured point with the ends of its interval."""

    x: float
    y: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Plot:
    """One drawing with its words and the numbers behind it; `missing` says why there is no drawing."""

    id: str
    title: str
    caption: str
    x_label: str
    svg: str
    rows: tuple[tuple[str, str, str], ...]
    missing: str = ""


def specification() -> Specification:
    """Read figures.toml."""
    text = resources.files("turboquant_reports").joinpath("figures.toml").read_text(encoding="utf-8")
    return Specification.model_validate(tomllib.loads(text))


def draw_all(results: Iterable[Result], specs: Sequence[FigureSpec] | None = None) -> list[Plot]:
    """Draw every figure that the results have evidence for; one without evidence says what it lacks."""
    ran = [result for result in results if result.execution == "ran"]
    plots: list[Plot] = []
    for spec in specification().figure if specs is None else specs:
        panels = _panels(spec, ran)
        names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
        plots.extend(_plot(spec, panel, curves, names) for panel, curves in panels.items())
        if not panels:
            wanted = sorted({claim for curve in spec.curve for claim in curve.claims} - {"*"})
            missing = (
                f"none of its claims ran ({', '.join(wanted)})"
                if wanted
                else f"no result has its {spec.note}"
            )
            plots.append(Plot(spec.id, spec.title, spec.caption, spec.x.label, "", (), missing))
    return plots


def _panels(spec: FigureSpec, ran: Sequence[Result]) -> dict[str, dict[str, list[Point]]]:
    """Sort the measured points into panels and curves, with one point for each x: the ledger's first."""
    panels: dict[str, dict[str, dict[float, Point]]] = {}
    for curve in spec.curve:
        for result in ran:
            if not curve.takes(result):
                continue
            panel = wording.parameters(result.cell, spec.panels) if spec.panels else ""
            for name, point in _points(spec, curve, result):
                panels.setdefault(panel, {}).setdefault(name, {}).setdefault(point.x, point)
    return {
        panel: {name: [points[x] for x in sorted(points)] for name, points in curves.items()}
        for panel, curves in panels.items()
    }


def _points(spec: FigureSpec, curve: Curve, result: Result) -> Iterable[tuple[str, Point]]:
    if spec.note:
        noted = (result.note or {}).get(spec.note, {})
        for method, values in noted.items() if isinstance(noted, Mapping) else ():
            for x, y in values.items():
                yield spec.names.get(str(method), str(method)), Point(float(x), float(y), float(y), float(y))
        return
    x = result.cell.get(spec.x.parameter)
    if result.value is None or not isinstance(x, int | float):
        return
    times = curve.factor * float(result.cell.get(curve.times) or 1)
    lo, hi = (
        end if end is not None else result.value for end in result.interval or (result.value, result.value)
    )
    name = curve.name.format_map({**result.cell, "subject": result.subject})
    low, high = sorted((lo * times, hi * times))
    yield name, Point(float(x), result.value * times, low, high)


def _plot(spec: FigureSpec, panel: str, curves: Mapping[str, Sequence[Point]], names: Sequence[str]) -> Plot:
    id_ = "-".join(part for part in (spec.id, wording.slug(panel)) if part)
    rows = [
        (name, wording.figure(p.x), wording.figure(p.y, decimals=wording.decimals_for(p.lo, p.hi)))
        for name, points in curves.items()
        for p in points
    ]
    rows += [(r.name, wording.figure(x), wording.figure(y)) for r in spec.reference for x, y in r.points]
    title = f"{spec.title}: {panel}" if panel else spec.title
    return Plot(id_, title, spec.caption, spec.x.label, _svg(spec, id_, curves, names), tuple(rows))


def _svg(spec: FigureSpec, id_: str, curves: Mapping[str, Sequence[Point]], names: Sequence[str]) -> str:
    """Draw one panel; a curve has the colour and marker of its place among the `names` of all panels."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": id_,
        "font.size": 11,
        "text.parse_math": False,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": INK,
        "ytick.color": INK,
        "path.simplify": True,
    }
    legend = ENTRY * (len(curves) + len(spec.reference)) + 0.1
    height = TOP + HEIGHT + BOTTOM + legend
    area = (LEFT / WIDTH, (BOTTOM + legend) / height, 1 - (LEFT + RIGHT) / WIDTH, HEIGHT / height)
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(area)
        for name, points in curves.items():
            place = names.index(name)
            _draw_curve(axes, name, points, HUES[place % len(HUES)], MARKERS[place % len(MARKERS)])
        span = [point.x for points in curves.values() for point in points]
        for i, reference in enumerate(spec.reference):
            _draw_reference(axes, reference, (min(span), max(span)), ("--", ":", "-.")[i % 3])
        _scale(axes, spec, sorted(set(span)))
        figure.legend(loc="lower left", frameon=False, fontsize=10.5, handlelength=2.6, borderaxespad=0)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _themed(text.getvalue(), id_)


def _draw_curve(axes: Axes, name: str, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y = [p.x for p in points], [p.y for p in points]
    axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.6, label=_shown(name))
    if any(p.hi > p.lo for p in points):
        axes.vlines(x, [p.lo for p in points], [p.hi for p in points], color=colour, linewidth=1.2)


def _shown(name: str) -> str:
    """A name that the legend does not drop: matplotlib hides those that begin with an underscore."""
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name


def _draw_reference(axes: Axes, reference: Reference, span: tuple[float, float], line: str) -> None:
    if reference.points:
        x, y = zip(*reference.points, strict=True)
        axes.plot(
            x,
            y,
            color=INK,
            linestyle="none",
            marker="_",
            markersize=13,
            markeredgewidth=1.6,
            label=_shown(reference.name),
        )
        return
    start, stop = span
    xs = [start + (stop - start) * i / 24 for i in range(25)] if stop > start else [start - 0.5, start + 0.5]
    ys = [reference.scale * reference.base**-x if reference.base else reference.scale for x in xs]
    axes.plot(xs, ys, color=INK, linestyle=line, linewidth=1.1, label=_shown(reference.name))


def _scale(axes: Axes, spec: FigureSpec, xs: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: wording.figure(float(f"{value:.6g}")))
    axes.set_xlabel(spec.x.label)
    axes.set_ylabel(spec.y.label)
    if spec.x.log:
        axes.set_xscale("log", base=spec.x.log)
    if spec.y.log:
        axes.set_yscale("log", base=spec.y.log)
    axes.xaxis.set_major_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(NullLocator())
    if len(xs) <= 9:
        axes.xaxis.set_major_locator(FixedLocator(list(xs)))
    axes.set_ymargin(0.08)
    axes.tick_params(which="both", length=3)
    axes.yaxis.set_label_coords(-LEFT / (WIDTH - LEFT - RIGHT), 0.5)
    axes.yaxis.label.set_verticalalignment("top")


def _themed(svg: str, id_: str) -> str:
    """Keep the drawing alone: no prologue or metadata, ids of its own, colours and fonts left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{id_}-", svg)
    svg = re.sub(r"font-family:[^;\"]*;? ?", "", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), svg)
    for stand_in, colour in THEME.items():
        svg = svg.replace(stand_in, colour)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head = f'<svg {names} {view.group() if view else ""} role="img" aria-labelledby="{id_}-title"'
    return re.sub(r"\s*\n\s*", "\n", f"{head}>{rest}").strip()
