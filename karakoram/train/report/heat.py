"""Who got the work: a map of experts' loads, each as a multiple of its layer's mean.

The middle of the scale, an even load, is transparent: it is the page's colour, light or dark. Below it blue, above it
orange, four times and a quarter at the ends; an expert without a single token stands out in a colour of its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from karakoram.train.report.draw import drawing, grid_figure, to_svg
from karakoram.train.report.read import Loads, Run

_ENDS_LOG2 = 2.0
BELOW, ABOVE, DEAD = (38, 110, 220), (226, 110, 20), (190, 20, 120)  # RGB
_MOST_COLUMNS = 2048  # pixels of a map across


@dataclass(frozen=True)
class Map:
    """A picture and its words."""

    title: str
    caption: str
    svg: str


def maps_of(run: Run) -> list[Map]:
    """Layers by experts in the newest window, and the least even layer over time; none without loads."""
    if not run.loads:
        return []
    step, newest = run.loads[-1]
    told = f"Tokens of each expert as a multiple of its layer's mean, in the window that ends with step {step:,}."
    maps = [Map("Load of each expert", told, _picture("loads", told, _table(newest), list(newest), "expert", "layer"))]
    layer = max(newest, key=lambda at: _violation(newest[at]))
    times = [(at, loads[layer]) for at, loads in run.loads if len(loads.get(layer, ())) == len(newest[layer])]
    if len(times) > 1:
        told = f"Layer {layer}, the least even one now, from step {times[0][0]:,} to step {times[-1][0]:,}."
        table = _evenly_spaced(times)
        labels = list(range(len(table)))
        svg = _picture("loads-time", told, table, labels, "step", "expert", (times[0][0], times[-1][0]))
        maps.append(Map("Load over time", told, svg))
    return maps


def _violation(loads: list[float]) -> float:
    mean = sum(loads) / len(loads)
    return max(loads) / mean if mean else 0.0


def _table(loads: Loads) -> NDArray[np.float64]:
    """Layers by experts; NaN where a layer has fewer experts."""
    most = max(len(counts) for counts in loads.values())
    table = np.full((len(loads), most), np.nan)
    for row, counts in enumerate(loads.values()):
        table[row, : len(counts)] = _shares([counts])[0]
    return table


def _shares(rows: list[list[float]]) -> NDArray[np.float64]:
    table = np.array(rows, dtype=np.float64)
    mean = table.mean(axis=1, keepdims=True)
    return np.where(mean > 0, table / np.maximum(mean, 1e-300), np.nan)


def _evenly_spaced(times: list[tuple[int, list[float]]]) -> NDArray[np.float64]:
    """Experts by columns of equal numbers of steps: each shows the window that was the newest then."""
    steps_N = np.array([at for at, _ in times], dtype=np.float64)
    columns = np.linspace(steps_N[0], steps_N[-1], len(times))
    return _shares([loads for _, loads in times])[np.searchsorted(steps_N, columns, side="right") - 1].T


def colors(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Shares of the mean -> RGBA bytes; NaN is transparent."""
    with np.errstate(divide="ignore", invalid="ignore"):
        height = np.clip(np.log2(shares) / _ENDS_LOG2, -1, 1)
    rgba = np.zeros((*shares.shape, 4), dtype=np.uint8)
    rgba[..., :3] = np.where((height > 0)[..., None], ABOVE, BELOW)
    rgba[..., 3] = np.nan_to_num(np.abs(height) * 255).astype(np.uint8)
    rgba[shares == 0] = (*DEAD, 255)
    return rgba


def _picture(
    key: str, told: str, table: NDArray[np.float64], labels: list[int], x_name: str, y_name: str,
    steps: tuple[int, int] | None = None,
) -> str:  # fmt: skip
    every = math.ceil(table.shape[1] / _MOST_COLUMNS)
    rows = len(table)
    with drawing():
        figure, axes = grid_figure(min(7.0, max(1.6, 0.7 + 0.14 * rows)), wide=True)
        _show(axes, colors(table[:, ::every]), steps or (0, table.shape[1]))
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        shown = range(0, rows, max(1, math.ceil(rows / 16)))
        axes.set_yticks([place + 0.5 for place in shown], [str(labels[place]) for place in shown])
        return to_svg(figure, key, told)


def _show(axes: Any, rgba: NDArray[np.uint8], span: tuple[float, float]) -> None:
    # with interpolation "none" the bytes go into the SVG as they are, a pixel an expert, and the viewer enlarges them
    axes.imshow(rgba, extent=(*span, len(rgba), 0), aspect="auto", interpolation="none")
