"""The page: whole, without a network, with what the run has and nothing that a file smuggles in."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from karakoram.errors import InputError
from karakoram.train.report import page, read_run, write_report
from karakoram.train.report.heat import DEAD, colors, maps_of
from karakoram.train.report.panels import panels_of
from tests.train.report import made

pytest.importorskip("matplotlib", reason="curves need the extra 'train'")

TITLES = [
    "Loss", "Learning rate", "Gradient norm", "Tokens per second", "MFU", "Largest attention logit by layer",
    "Clipped heads", "Update RMS", "MaxVio", "Entropy of the load by layer", "Dead experts",
]  # fmt: skip
VOID = {"meta", "input", "br"}


class Checker(HTMLParser):
    """Every tag closed in its turn, every id once, nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), value[:80]
            self.used += re.findall(r"(?:url\(|^)#([\w-]+)", value or "") if name != "style" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(text: str) -> str:
    """The visible text of a page that is in order."""
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.used) <= set(checker.ids), "a picture refers to what is not there"
    assert "@import" not in text
    assert len(text.encode()) < page.MOST_BYTES
    return " ".join(checker.texts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "nano"
    made.write_run(directory / "first", 600)
    made.write_run(directory / "second", 200, seed=1)
    return directory


def test_a_run_has_all_its_panels(whole: Path) -> None:
    path = write_report(whole / "first")
    assert path == whole / "first/report.html"
    text = checked(path.read_text())
    for title in [*TITLES, "Load of each expert", "Load over time", "Events", "Settings"]:
        assert title in text
    assert "6.972M parameters, 4.023M active" in text  # nano, as `k2 inspect nano` counts it
    assert "16 experts of 64, of which 4 and 1 shared work for a token" in text
    assert "2 cores, one thread" in text
    assert "2,457,600" in text  # tokens: 600 steps of 4096
    assert "τ = 100" in text
    assert "rolled back" in text
    assert "batch 17, reason loss is nan" in text
    assert "optimizer.learning_rate" in text


def test_parts_are_tabs_with_a_comparison(whole: Path, tmp_path: Path) -> None:
    path = write_report(whole, tmp_path / "below" / "page.html")
    text = path.read_text()
    seen = checked(text)
    assert "Loss of all runs" in seen
    assert re.findall(r"<label for=\"tab-\d\">([^<]+)</label>", text) == ["All runs", "first", "second"]
    assert text.count('<section class="run"') == 3
    assert not list(tmp_path.glob("**/.*.partial"))


@pytest.mark.parametrize("column", made.EVERY_COLUMN)
def test_a_column_alone_makes_its_panel_and_no_other(tmp_path: Path, column: str) -> None:
    lines = [made.line(step, 100) for step in range(1, 101)]
    kept = [{key: value for key, value in line.items() if key in ("step", column)} for line in lines]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    run = read_run(tmp_path)
    assert len(panels_of(run)) == (column not in ("loads", "clip_norm_share"))
    assert len(maps_of(run)) == 2 * (column == "loads")


def test_a_run_without_a_step_yet(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"steps": 5}))
    assert "No step is recorded yet" in checked(write_report(tmp_path).read_text())
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step is recorded yet" in checked(write_report(tmp_path).read_text())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n')
    assert "3.5" in checked(write_report(tmp_path).read_text())


def test_what_a_file_says_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><b onclick='x'>&\ud800 $\\frac{1}{2}$"
    directory = tmp_path / "<i>run"
    directory.mkdir()
    line = {"step": 1, "loss": 1.0, "update_rms": {evil: 0.2, "norm": 0.1}, "max_logit_by_layer": {evil: 1.0, "b": 2.0}}
    (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    event = {"step": 1, "event": evil, evil: evil, "deep": {evil: [evil]}}
    (directory / "events.jsonl").write_text(json.dumps(event) + "\n")
    settings = {evil: evil, "model": {evil: evil}, "machine": {evil: evil}, "recipe": [evil]}
    (directory / "run.json").write_text(json.dumps(settings))
    assert "<script>alert(1)</script>" in checked(write_report(tmp_path).read_text())
    assert "<script>alert(1)</script>" in checked(write_report(directory).read_text())


def test_absurd_numbers_break_no_picture(tmp_path: Path) -> None:
    absurd = [0, -1, 5e-324, 1e29, -1e29, 1e308, math.nan, "inf", 2**53 - 1, 1.0]
    names = made.line(50, 100).keys() - {"step", "loads", "update_rms", "max_logit_by_layer", "load_entropy"}
    lines = []
    for at, value in enumerate(absurd * 8):
        nested = {name: {"0": value, "1": -1.0} for name in ("update_rms", "max_logit_by_layer", "load_entropy")}
        lines.append({"step": at * 10**13, **dict.fromkeys(names, value), **nested, "loads": {"1": [0, 0, 0]}})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"optimizer": {"qk_clip_threshold": 1e300, "clip_norm": -1, "learning_rate": "fast"}}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    checked(write_report(tmp_path).read_text())


def test_a_spike_leaves_the_picture_and_is_told(tmp_path: Path) -> None:
    lines = [made.line(step, 400) for step in range(1, 401)]
    lines[199]["loss"] = 12345.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    loss = panels_of(run)[0]
    assert loss.spike == (200.0, 12345.0)
    smoothed = loss.lines[1].values_N
    assert smoothed.max() < 9  # the spike is in no mean
    assert "The peak of 1.234e+04 at step 200" in checked(write_report(tmp_path).read_text())


def test_a_model_of_k2_s_shape_stays_small(tmp_path: Path) -> None:
    made.write_run(tmp_path, 250, layers=61, experts=384)
    checked(write_report(tmp_path).read_text())


def test_more_points_than_a_page_can_hold_become_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [{"step": step, "loss": math.sin(step**2)} for step in range(4000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in losses))
    full = write_report(tmp_path).stat().st_size
    monkeypatch.setattr(page, "MOST_BYTES", full * 3 // 4)
    assert write_report(tmp_path).stat().st_size <= full * 3 // 4


def test_colours_of_loads() -> None:
    shares = np.array([[1.0, 4.0, 0.25, 0.0, np.nan, 100.0]])
    rgba = colors(shares)[0]
    assert rgba[0, 3] == 0  # even: the page's colour
    assert (rgba[1, 3], rgba[2, 3]) == (255, 255)
    assert tuple(rgba[3]) == (*DEAD, 255)
    assert rgba[4, 3] == 0
    assert (rgba[5] == rgba[1]).all()
    assert rgba[1, 0] > rgba[1, 2]
    assert rgba[2, 0] < rgba[2, 2]


def test_mistakes_say_what_to_do(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="k2 train wrote"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="Name a file"):
        write_report(whole, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'karakoram\[train\]'"):
        write_report(whole)


def test_a_report_needs_no_torch(whole: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from karakoram.cli.main import run\n"
        f"try: run(['report', {str(whole / 'second')!r}, '--out', {str(tmp_path / 'r.html')!r}])\n"
        "except SystemExit as left: print(left.code, sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == f"wrote {tmp_path / 'r.html'}\n0 []\n", done.stderr
