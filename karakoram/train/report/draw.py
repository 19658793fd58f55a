"""A panel as SVG that takes its colours from the page, so that one picture serves light, dark and paper.

Matplotlib knows no CSS variables. It draws in marker colours, each of which no picture has otherwise, and they are
replaced by variables in what it wrote; ids get a prefix, as pictures of one page must not share them; style rules of
its own, which would hold for the whole page, go. Letters stay letters and take the page's font.
No word from a file is drawn: only numbers are, so that nothing in a file can become a formula or a tag.
"""

import importlib.util
import io
import re
from dataclasses import dataclass
from typing import Any, Literal

from karakoram.errors import InputError
from karakoram.train.report.series import LEAST, Numbers, limits, thin

POINTS = 2000  # of one line; a panel is about 700 pixels wide
PANEL_POINTS = 12_000  # of all lines of one panel, as K2's 61 layers would take 2 MB otherwise
SERIES = 8  # colours there are by number: --s0 … --s7
HEIGHT_IN, WIDE_IN, NARROW_IN = 2.5, 9.6, 4.7

_MARKERS = {"#010101": "var(--ink)", "#020202": "var(--grid)", "#030303": "var(--muted)", "#040404": "var(--alarm)"}
_INK, _GRID, _MUTED, _ALARM = _MARKERS
_FONT = re.compile(r"font: ([\d.]+px) [^;\"]*|font-family: [^;\"]*; ?")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")


@dataclass(frozen=True)
class Line:
    """steps and values [N] ascending. `color`: a number of `SERIES`, or a share 0.0 to 1.0 of the ramp of layers."""

    label: str
    steps_N: Numbers
    values_N: Numbers
    color: int | float = 0
    style: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Panel:
    """One picture: its lines over steps, and what belongs to all of them.

    levels  values that deserve a line across, with what they are called (numbers and symbols of ours only)
    marks   steps at which something happened: a line upwards, a cross at the bottom
    cut     a spike may leave the picture: see `series.limits`; the caption tells
    """

    key: str
    title: str
    caption: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...] = ()
    upright_marks: tuple[int, ...] = ()
    cross_marks: tuple[int, ...] = ()
    log: bool = False
    cut: bool = False
    wide: bool = False
    from_zero: bool = False
    x_name: str = "step"

    @property
    def spike(self) -> tuple[float, float] | None:
        """Step and value of the highest point where it lies above the picture; else None."""
        if not self.cut or self.log or limits([line.values_N for line in self.lines]) is None:
            return None
        line = max((line for line in self.lines if len(line.values_N)), key=lambda line: line.values_N.max())
        place = int(line.values_N.argmax())
        return float(line.steps_N[place]), float(line.values_N[place])


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is absent."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("Curves are drawn by matplotlib, which is not installed.", "pip install 'karakoram[train]'")


def css_color(color: int | float) -> str:
    """What a line's colour is called in the page."""
    if isinstance(color, int):
        return f"var(--s{color % SERIES})"
    return f"hsl({260 - 240 * min(1.0, max(0.0, color)):.0f} var(--ramp))"


def draw(panel: Panel, span: tuple[float, float], points: int = POINTS) -> str:
    """The panel as an <svg> element; `span` is what the axis of steps reaches over."""
    with drawing():
        figure, axes = _figure(panel.wide)
        _draw_lines(axes, panel, max(200, min(points, PANEL_POINTS * points // POINTS // max(1, len(panel.lines)))))
        _draw_marks(axes, panel)
        first, last = span
        axes.set_xlim(first, max(last, first + 1))
        if panel.log and any((line.values_N > LEAST).any() for line in panel.lines):
            axes.set_yscale("log")
        elif panel.from_zero:
            nothing = all(line.values_N.max(initial=0) <= 0 for line in panel.lines)
            axes.set_ylim(0, 1 if nothing else None)
        cut = limits([line.values_N for line in panel.lines]) if panel.spike else None
        if cut:
            axes.set_ylim(0 if panel.from_zero else cut[0], cut[1])
        return to_svg(figure, panel.key, f"{panel.title}. {panel.caption}")


def _draw_lines(axes: Any, panel: Panel, points: int) -> None:
    for line in panel.lines:
        steps_N, values_N = line.steps_N, line.values_N
        if panel.log:
            steps_N, values_N = steps_N[values_N > LEAST], values_N[values_N > LEAST]
        steps_N, values_N = thin(steps_N, values_N, points)
        alone = len(values_N) == 1
        width = 1.3 if len(panel.lines) <= 12 else 0.7
        size = 3.0 if len(values_N) < 60 else 1.5
        axes.plot(
            steps_N, values_N, color=_marker_of(line.color), alpha=0.4 if line.style == "faint" else 1.0,
            linewidth=0.8 if line.style == "faint" else width,
            marker="o" if line.style == "dots" or alone else None, markersize=size,
        )  # fmt: skip


def _draw_marks(axes: Any, panel: Panel) -> None:
    for value, label in panel.levels:
        axes.axhline(value, color=_ALARM, linewidth=1.0, linestyle=(0, (5, 3)))
        axes.annotate(
            label, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-3, 2), textcoords="offset points",
            ha="right", va="bottom", color=_ALARM,
        )  # fmt: skip
    for step in panel.upright_marks:
        axes.axvline(step, color=_ALARM, linewidth=0.8, linestyle=(0, (2, 2)))
    if panel.cross_marks:
        axes.plot(
            panel.cross_marks, [0.03] * len(panel.cross_marks), "x", color=_ALARM, markersize=4,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    if panel.spike:
        axes.plot(
            [panel.spike[0]], [0.97], "^", color=_ALARM, markersize=4, transform=axes.get_xaxis_transform(),
        )  # fmt: skip


def _figure(wide: bool, height_in: float = HEIGHT_IN) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(WIDE_IN if wide else NARROW_IN, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(8 if wide else 5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def grid_figure(height_in: float, wide: bool) -> tuple[Any, Any]:
    """A figure and its axes without grid lines, for a map of values; use under `drawing`."""
    figure, axes = _figure(wide, height_in)
    axes.grid(False)
    return figure, axes


def drawing() -> Any:
    """The context under which figures are made and written."""
    from matplotlib import rc_context

    return rc_context(_settings())


def to_svg(figure: Any, key: str, description: str) -> str:
    """A figure as an <svg> element whose ids begin with `key` and whose colours are the page's."""
    from html import escape

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    used = {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)}
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = _FONT.sub(lambda m: f"font-size: {m[1]}; " if m[1] else "", text)
    text = re.sub(r"(?<=d=\")[^\"]*", lambda m: _NUMBER.sub(lambda n: f"{float(n[0]):.1f}", m[0]), text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda m: _variable(m[0]), text)
    text = re.sub(r"<text style=\"(?![^\"]*fill)", '<text style="fill: var(--muted); ', text)
    head = f'<svg role="img" aria-label="{escape(description)}"'
    return re.sub(r"\s*\n\s*", "\n", re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf"{head} \1", text, count=1))


def _marker_of(color: int | float) -> str:
    return (
        f"#0500{color % SERIES:02x}" if isinstance(color, int) else f"#0600{round(100 * min(1.0, max(0.0, color))):02x}"
    )


def _variable(marker: str) -> str:
    if marker.startswith("#0500"):
        return css_color(int(marker[5:], 16))
    if marker.startswith("#0600"):
        return css_color(int(marker[5:], 16) / 100)
    return _MARKERS.get(marker, marker)


def _settings() -> Any:
    return {
        "svg.fonttype": "none", "svg.hashsalt": "karakoram", "svg.image_inline": True, "path.simplify": True,
        "path.simplify_threshold": 0.1, "font.size": 8.5, "axes.grid": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "text.color": _MUTED,
        "xtick.color": _MUTED, "ytick.color": _MUTED, "grid.color": _GRID, "grid.linewidth": 0.6,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.minor.width": 0.4,
        "ytick.minor.width": 0.4, "axes.formatter.useoffset": False, "axes.axisbelow": True, "text.usetex": False,
    }  # fmt: skip
