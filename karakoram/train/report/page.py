"""The page: what was trained, how it went, what happened, with which settings; several runs behind tabs.

Everything that comes from a file passes `html.escape`. There is no script: tabs are radio buttons, so the page works in
a mail, behind a content policy and on paper, where all runs follow one another.
"""

import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karakoram.config import ModelConfig
from karakoram.errors import ConfigError, InputError
from karakoram.model.cost import parameters
from karakoram.train.report import style
from karakoram.train.report.draw import POINTS, Panel, css_color, draw, require_matplotlib
from karakoram.train.report.heat import maps_of
from karakoram.train.report.panels import comparison, panels_of
from karakoram.train.report.read import Run, find_runs, read_run

MOST_BYTES = 2_000_000
_MOST_RUNS = 12
_SHOWN_EVENTS = 200
_SHOWN_SETTINGS = 400
_SHOWN_LETTERS = 300
_LEGEND = 9


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Write the page about the run or runs in `directory`, to DIR/report.html if not told otherwise; returns where.

    Raises InputError where there is no run, where `out` is a directory, or where matplotlib is absent.
    """
    require_matplotlib()
    places = find_runs(directory)
    out = out or directory / "report.html"
    if out.is_dir():
        raise InputError(f"--out {out} is a directory.", "Name a file, as report.html.")
    name = directory.resolve().name
    runs = [read_run(place, name if place == directory else place.name) for place in places[-_MOST_RUNS:]]
    text = render(runs, name, len(places) - len(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return out


def render(runs: Sequence[Run], title: str, left_out: int = 0) -> str:
    """The page's text, of at most `MOST_BYTES` where fewer points to a line can bring that about."""
    points = POINTS
    while True:
        text = _page(runs, title, left_out, points)
        if len(text.encode()) <= MOST_BYTES or points <= POINTS // 16:
            return text
        points //= 2


def _page(runs: Sequence[Run], title: str, left_out: int, points: int) -> str:
    compared = comparison(runs)
    sections = [_section(run, number, len(runs) > 1, points) for number, run in enumerate(runs)]
    names = [run.name for run in runs]
    if len(runs) > 1:
        sections.insert(0, _overview(runs, compared, points))
        names.insert(0, "All runs")
    parts = [f"<h1>{_e(title)}</h1>", _lead(runs, left_out)]
    if len(sections) > 1:
        parts += [
            f'<input class="choice" type="radio" name="run" id="tab-{n}"{" checked" if n == 0 else ""}>'
            for n in range(len(names))
        ]
        labels = "".join(f'<label for="tab-{n}">{_e(name)}</label>' for n, name in enumerate(names))
        parts.append(f'<nav class="tabs">{labels}</nav>')
    parts += [f'<section class="run" id="run-{n}">{text}</section>' for n, text in enumerate(sections)]
    rules = style.CSS + (style.tab_rules(len(sections)) if len(sections) > 1 else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)} · training</title>\n<style>{rules}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _lead(runs: Sequence[Run], left_out: int) -> str:
    told = [f"{len(runs)} runs." if len(runs) > 1 else ""]
    if left_out:
        told.append(f"{left_out} older ones are not shown.")
    return f'<p class="quiet">{" ".join(told)}</p>' if any(told) else ""


def _overview(runs: Sequence[Run], compared: Panel | None, points: int) -> str:
    heads = ("run", "steps", "tokens", "hours", "loss", "held out", "MaxVio", "dead experts", "events")
    rows = [
        [
            run.name, _count(run.last_step), _count(run.newest("tokens")), _hours(run), _number(_end_loss(run)),
            _number(run.newest("held_out_loss")), _number(run.newest("max_vio_global")),
            _number(run.newest("dead_experts")), str(len(run.events)),
        ]
        for run in runs
    ]  # fmt: skip
    picture = f'<div class="panels">{_figure(compared, _span(compared), points)}</div>' if compared else ""
    return f"<h2>All runs</h2>{_table(heads, rows)}<p>&nbsp;</p>{picture}"


def _section(run: Run, number: int, several: bool, points: int) -> str:
    parts = [f"<h2>{_e(run.name)}</h2>" if several else "", _header(run), _tiles(run)]
    parts += [f'<p class="note">{_e(note)}</p>' for note in run.notes]
    panels = panels_of(run)
    if panels:
        span = (min(_span(panel)[0] for panel in panels), float(run.last_step))
        figures = [_figure(panel, span, points, f"r{number}-") for panel in panels]
        parts.append(f'<h2>Curves, by step</h2><div class="panels">{"".join(figures)}</div>')
    else:
        parts.append('<p class="note">No step is recorded yet: there is nothing to draw.</p>')
    maps = maps_of(run)
    if maps:
        figures = [
            f'<figure class="wide"><figcaption><b>{_e(each.title)}</b> {_e(each.caption)}</figcaption>'
            f"{_SCALE_LEGEND}{_prefixed(each.svg, f'r{number}-')}</figure>"
            for each in maps
        ]
        parts.append(f'<h2>Experts</h2><div class="panels">{"".join(figures)}</div>')
    return "\n".join([*parts, _events(run), _settings(run)])


# -------------------------------------------------------------------------------------------- what was trained


def _header(run: Run) -> str:
    lines = []
    model = run.settings.get("model")
    if isinstance(model, dict):
        lines.append(f"<p>{_e(_model_words(model))}</p>")
    machine = run.settings.get("machine")
    if machine:
        words = ", ".join(f"{k} {v}" for k, v in machine.items()) if isinstance(machine, dict) else str(machine)
        lines.append(f'<p class="quiet">Machine: {_e(words[:_SHOWN_LETTERS])}</p>')
    return "".join(lines)


def _model_words(model: dict[str, Any]) -> str:
    try:
        config = ModelConfig.from_dict(model)
        count = parameters(config)
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"A model whose configuration cannot be read: {str(error)[:_SHOWN_LETTERS]}"
    words = [
        f"{_short(count.total)} parameters, {_short(count.active_with_head)} active a token (output head included)",
        f"{config.num_hidden_layers} layers of width {config.hidden_size}",
        f"{config.num_attention_heads} heads",
    ]
    if config.num_moe_layers:
        words.append(
            f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, of which"
            f" {config.num_experts_per_tok} and {config.n_shared_experts} shared work for a token"
        )
    return "; ".join([*words, f"vocabulary {config.vocab_size:,}"]) + "."


def _tiles(run: Run) -> str:
    speed = run.columns.get("tokens_per_s")
    rolled = sum("roll" in event["event"].lower() for event in run.events)
    tiles = {
        "loss, mean of the newest 50": _number(_end_loss(run)),
        "held-out loss": _number(run.newest("held_out_loss")),
        "steps": _count(run.last_step),
        "tokens": _count(run.newest("tokens")),
        "hours of training": _hours(run),
        "tokens a second, median": _count(float(np.median(speed.points[1]))) if speed and speed.values else "",
        "MFU": f"{run.newest('mfu'):.1%}" if math.isfinite(run.newest("mfu")) else "",
        "steps skipped": f"{len(run.skipped_steps):,}" if run.skipped_steps else "",
        "rollbacks": str(rolled) if rolled else "",
    }
    shown = [f'<div class="tile"><b>{_e(v)}</b><span>{_e(k)}</span></div>' for k, v in tiles.items() if v]
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def _end_loss(run: Run) -> float:
    column = run.columns.get("loss")
    return float(np.mean(column.values[-50:])) if column and column.values else math.nan


def _hours(run: Run) -> str:
    elapsed_s = run.newest("elapsed_s")
    return f"{elapsed_s / 3600:.2f}" if math.isfinite(elapsed_s) else ""


# -------------------------------------------------------------------------------------------- pictures


def _span(panel: Panel) -> tuple[float, float]:
    filled = [line.steps_N for line in panel.lines if len(line.steps_N)]
    return min(float(steps_N[0]) for steps_N in filled), max(float(steps_N[-1]) for steps_N in filled)


def _figure(panel: Panel, span: tuple[float, float], points: int, prefix: str = "") -> str:
    caption = panel.caption
    if panel.spike:
        caption += (
            f" The peak of {_number(panel.spike[1])} at {panel.x_name} {panel.spike[0]:,.0f} is above the picture (▲)."
        )
    kind = ' class="wide"' if panel.wide else ""
    return (
        f"<figure{kind}><figcaption><b>{_e(panel.title)}</b> {_e(caption)}</figcaption>"
        f"{_legend(panel)}{_prefixed(draw(panel, span, points), prefix)}</figure>"
    )


def _prefixed(svg: str, prefix: str) -> str:
    """Ids of one run's pictures apart from those of another's."""
    svg = svg.replace(' id="', f' id="{prefix}').replace("url(#", f"url(#{prefix}")
    return svg.replace('href="#', f'href="#{prefix}')


def _legend(panel: Panel) -> str:
    lines = panel.lines
    if len(lines) < 2:
        return ""
    if len(lines) > _LEGEND:  # the ramp explains the layers between
        places = np.linspace(0, len(lines) - 1, _LEGEND).round().astype(int)
        lines = tuple(lines[place] for place in places)
    entries = [
        f'<span><i style="background: {css_color(line.color)};'
        f'{" opacity: 0.45" if line.style == "faint" else ""}"></i>{_e(line.label)}</span>'
        for line in lines
    ]
    return f'<div class="legend">{"".join(entries)}</div>'


_SCALE_LEGEND = (
    '<div class="legend"><span>¼ <i class="scale"></i> 4 times the mean; the page\'s colour: as the mean</span>'
    '<span><i class="dead"></i>not a single token</span></div>'
)


# -------------------------------------------------------------------------------------------- tables


def _events(run: Run) -> str:
    if not run.events:
        return ""
    kinds = Counter(event["event"] for event in run.events)
    told = ", ".join(f"{kind[:60]}: {count:,}" for kind, count in kinds.most_common(12))
    shown = run.events[-_SHOWN_EVENTS:]
    if len(shown) < len(run.events):
        told += f"; the newest {len(shown)} are shown"
    rows = [
        [f"{event['step']:,}", event["event"][:_SHOWN_LETTERS], ", ".join(_details(event))[:_SHOWN_LETTERS]]
        for event in reversed(shown)
    ]
    return f'<h2>Events</h2><p class="quiet">{_e(told)}.</p>{_table(("step", "event", ""), rows)}'


def _details(event: dict[str, Any]) -> list[str]:
    return [f"{name} {_value(value)}" for name, value in event.items() if name not in ("step", "event")]


def _settings(run: Run) -> str:
    if not run.settings:
        return ""
    rows = list(_flat(run.settings))
    more = (
        f'<p class="quiet">{len(rows) - _SHOWN_SETTINGS} more are not shown.</p>' if len(rows) > _SHOWN_SETTINGS else ""
    )
    lines = "".join(f"<div><span>{_e(k)}</span><code>{_e(v)}</code></div>" for k, v in rows[:_SHOWN_SETTINGS])
    return f'<h2>Settings</h2><div class="settings">{lines}</div>{more}'


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict) and value and prefix.count(".") < 8:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}"[:_SHOWN_LETTERS], _value(value)))
    return rows


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]} …"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if _NUMERIC.fullmatch(cell) else ''}>{_e(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_NUMERIC = re.compile(r"[-−\d.,]+[KMBT]?")


def _e(text: str) -> str:
    return html.escape(text.encode("utf-8", "replace").decode())  # JSON may hold halves of characters


def _number(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else ""


def _count(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) < 1e7 else _short(value)


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.0f}"
