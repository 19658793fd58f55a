"""Which curves a run has: one function a panel, None where its columns are absent."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from karakoram.train.report.draw import Line, Panel
from karakoram.train.report.read import Run, number_of
from karakoram.train.report.series import Column, Numbers, limits, smooth

_SPAN_SHARE = 50  # a smoothed curve looks back over about this part of the points, at least 5 and at most 500
_MOST_MARKS = 200
_GROUPS = ("attention", "experts", "router", "dense", "embedding", "head", "norm")


def panels_of(run: Run) -> list[Panel]:
    """All that the run's columns allow, in the order of the page."""
    makers: tuple[Callable[[Run], Panel | None], ...] = (
        _loss, _rate, _gradient_norm, _tokens_per_s, _mfu, _max_logit, _clip_fraction, _update_rms, _max_vio,
        _load_entropy, _dead_experts,
    )  # fmt: skip
    return [panel for maker in makers if (panel := maker(run)) is not None]


def comparison(runs: Sequence[Run]) -> Panel | None:
    """The smoothed losses of several runs over tokens, or over steps where one of them does not count tokens."""
    having = [run for run in runs if "loss" in run.columns and run.columns["loss"].values]
    if len(having) < 2:
        return None
    by_tokens = all(_any(run.columns.get("tokens")) for run in having)
    lines = []
    for number, run in enumerate(having):
        steps_N, values_N = run.columns["loss"].points
        if by_tokens:
            steps_N = np.interp(steps_N, *run.columns["tokens"].points)
        ordinary_N = _ordinary(run, run.columns["loss"].points[0], values_N)
        smooth_N = smooth(values_N[ordinary_N], _span(len(values_N)))
        lines.append(Line(run.name, steps_N[ordinary_N], smooth_N, number))
    x_name = "tokens" if by_tokens else "steps"
    return Panel(
        "compare", "Loss of all runs", f"Smoothed, over {x_name}.", tuple(lines), cut=True, wide=True, x_name=x_name
    )


def _loss(run: Run) -> Panel | None:
    raw, held_out = run.columns.get("loss"), run.columns.get("held_out_loss")
    if not _any(raw, held_out):
        return None
    lines, told = [], []
    if raw is not None and raw.values:
        steps_N, values_N = raw.points
        span = _span(len(values_N))
        lines = [Line("each step", steps_N, values_N, 0, "faint")]
        ordinary_N = _ordinary(run, steps_N, values_N)
        smooth_N = smooth(values_N[ordinary_N], span)
        lines.append(Line(f"smoothed over {span} steps", steps_N[ordinary_N], smooth_N, 0))
        told.append(f"Newest {_n(smooth_N[-1])}.")
    if held_out is not None and held_out.values:
        lines.append(Line("held out", *held_out.points, 1, "dots"))
        least = min(zip(held_out.values, held_out.steps))
        told.append(f"Held out: newest {_n(held_out.newest)}, least {_n(least[0])} at step {least[1]:,}.")
    undone = _steps_of(run, "roll", "resum")
    skipped = tuple(sorted({*run.skipped_steps, *_steps_of(run, "skip")}))
    if skipped:
        told.append("Crosses: steps that were not taken.")
    if undone:
        told.append("Upright lines: resumed or rolled back.")
    upright, crosses = undone[-_MOST_MARKS:], skipped[-_MOST_MARKS:]
    return Panel("loss", "Loss", " ".join(told), tuple(lines), (), upright, crosses, cut=True, wide=True)


def _rate(run: Run) -> Panel | None:
    share = run.columns.get("rate_share")
    if _any(share):
        peak = number_of(run.setting("optimizer.learning_rate", "learning_rate"))
        told = f" Peak {peak:g}." if peak else ""
        return _simple(run, "rate_share", "Learning rate", f"As a share of its peak.{told}", from_zero=True)
    return _simple(run, "learning_rate", "Learning rate", "As it was used.", from_zero=True)


def _gradient_norm(run: Run) -> Panel | None:
    told = "Of the whole gradient, before clipping."
    clip = number_of(run.setting("optimizer.clip_norm", "clip_norm"))
    scale = run.columns.get("clip_norm_share")
    if scale is not None and scale.values:
        share = sum(value < 1 for value in scale.values) / len(scale.values)
        told += f" Clipped in {share:.0%} of the steps."
    levels = _level(clip, "clip", [run.newest("gradient_norm")])
    return _simple(run, "gradient_norm", "Gradient norm", told, log=True, levels=levels)


def _tokens_per_s(run: Run) -> Panel | None:
    column = run.columns.get("tokens_per_s")
    median = f"Median {np.median(column.points[1]):,.0f}." if column is not None and column.values else ""
    return _simple(run, "tokens_per_s", "Tokens per second", median, from_zero=True)


def _mfu(run: Run) -> Panel | None:
    column = run.columns.get("mfu")
    median = f" Median {np.median(column.points[1]):.1%}." if column is not None and column.values else ""
    told = f"Model FLOP/s as a share of what this machine was measured to multiply.{median}"
    return _simple(run, "mfu", "MFU", told, from_zero=True)


def _max_logit(run: Run) -> Panel | None:
    lines = _by_layer(run, "max_logit_by_layer")
    if not lines and _any(column := run.columns.get("max_logit")):
        assert column is not None
        lines = (Line("all layers", *column.points),)
    if not lines:
        return None
    threshold = number_of(run.setting("optimizer.qk_clip_threshold", "qk_clip_threshold"))
    highest = max(float(line.values_N.max()) for line in lines)
    told, log = f"Peak {_n(highest)}.", False
    if levels := _level(threshold, "τ =", [highest]):
        assert threshold is not None
        told += f" QK-Clip scales heads above τ = {threshold:g} down."
        positive = min(float(line.values_N.min()) for line in lines) > 0
        log = positive and threshold > 4 * highest  # else the curves would lie flat at the bottom
    elif threshold == math.inf:
        told += " QK-Clip was off."
    return Panel("max-logit", "Largest attention logit by layer", told, lines, levels=levels, log=log, wide=True)


def _clip_fraction(run: Run) -> Panel | None:
    if _any(run.columns.get("clip_fraction")):
        told = "Share of heads that QK-Clip scaled down."
        return _simple(run, "clip_fraction", "Clipped heads", told, from_zero=True)
    return _simple(run, "clipped_heads", "Clipped heads", "That QK-Clip scaled down, a step.", from_zero=True)


def _update_rms(run: Run) -> Panel | None:
    groups = {name: column for name, column in run.inner("update_rms").items() if column.values}
    names = [name for name in _GROUPS if name in groups] + sorted(groups.keys() - set(_GROUPS))
    lines = tuple(Line(name, *groups[name].points, number) for number, name in enumerate(names))
    told = "Root mean square of the update, by group."
    return Panel("update-rms", "Update RMS", told, lines, log=True) if lines else None


def _max_vio(run: Run) -> Panel | None:
    batch, window = run.columns.get("max_vio"), run.columns.get("max_vio_global")
    lines = []
    if batch is not None and batch.values:
        lines.append(Line("a batch", *batch.points, 0, "faint"))
    if window is not None and window.values:
        lines.append(Line("over a window", *window.points, 0))
    told = "Largest load over mean load − 1, in the worst layer; 0 is even."
    if window is not None and window.values:
        told += f" Newest over a window: {_n(window.newest)}."
    return Panel("max-vio", "MaxVio", told, tuple(lines), cut=True, from_zero=True) if lines else None


def _load_entropy(run: Run) -> Panel | None:
    lines = _by_layer(run, "load_entropy")
    told = "As a share of log E: 1 is even, 0 one expert."
    return Panel("entropy", "Entropy of the load by layer", told, lines) if lines else None


def _dead_experts(run: Run) -> Panel | None:
    told = "Without a single token over a window, all layers together."
    return _simple(run, "dead_experts", "Dead experts", told, from_zero=True)


def _simple(
    run: Run, name: str, title: str, told: str, log: bool = False, from_zero: bool = False,
    levels: tuple[tuple[float, str], ...] = (),
) -> Panel | None:  # fmt: skip
    column = run.columns.get(name)
    if column is None or not column.values:
        return None
    steps_N, values_N = column.points
    span = _span(len(values_N))
    lines = (Line("each step", steps_N, values_N),)
    if len(values_N) > 50 and name in ("gradient_norm", "tokens_per_s", "mfu"):
        smooth_N = smooth(values_N, span)
        lines = (Line("each step", steps_N, values_N, 0, "faint"), Line(f"smoothed over {span}", steps_N, smooth_N, 0))
    cut = name in ("tokens_per_s", "mfu")
    key = name.replace("_", "-")
    return Panel(key, title, told, lines, log=log, from_zero=from_zero, levels=levels, cut=cut)


def _level(value: float | None, name: str, beside: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """A line across the picture, unless it would lie so far away that the curves vanish."""
    least, most = min(beside) / 1e4, max(beside) * 1e4
    return ((value, f"{name} {value:g}"),) if value is not None and least < value < most else ()


def _by_layer(run: Run, name: str) -> tuple[Line, ...]:
    columns = {layer: column for layer, column in run.inner(name).items() if column.values}
    most = max(1, len(columns) - 1)
    return tuple(
        Line(f"layer {layer}", *column.points, number / most) for number, (layer, column) in enumerate(columns.items())
    )


def _steps_of(run: Run, *words: str) -> tuple[int, ...]:
    return tuple(event["step"] for event in run.events if any(word in event["event"].lower() for word in words))


def _ordinary(run: Run, steps_N: Numbers, values_N: Numbers) -> NDArray[np.bool_]:
    """Which values a mean should be over: not those of steps that were not taken, nor spikes out of the picture."""
    cut = limits([values_N])
    taken_N = ~np.isin(steps_N, run.skipped_steps)
    ordinary_N = taken_N & (values_N <= cut[1]) if cut else taken_N
    return ordinary_N if ordinary_N.any() else np.ones_like(taken_N)


def _any(*columns: Column | None) -> bool:
    return any(column is not None and len(column.values) > 0 for column in columns)


def _span(points: int) -> int:
    return min(500, max(5, points // _SPAN_SHARE))


def _n(value: float) -> str:
    return f"{value:.4g}"
