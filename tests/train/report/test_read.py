"""A run's files as they are found: torn, repeated, broken, foreign, absent."""

import json
import math
import os
from pathlib import Path

import pytest

from karakoram.errors import InputError
from karakoram.train.report import read
from karakoram.train.report.read import find_runs, read_run
from tests.train.report.made import write_run


def written(directory: Path, *lines: object, end: str = "\n") -> Path:
    directory.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (directory / "metrics.jsonl").write_text(text + end)
    return directory


def losses(directory: Path) -> list[tuple[int, float]]:
    column = read_run(directory).columns["loss"]
    return list(zip(column.steps, column.values))


def test_a_torn_last_line_is_no_mistake_and_a_broken_one_is_told(tmp_path: Path) -> None:
    torn = written(tmp_path, {"step": 1, "loss": 2.0}, '{"step": 2, "lo', end="")
    assert losses(torn) == [(1, 2.0)]
    assert not [note for note in read_run(torn).notes if "metrics" in note]
    broken = written(tmp_path, {"step": 1, "loss": 2.0}, '{"step": 2, "lo', [1], {"loss": 1}, {"step": 3, "loss": 1.0})
    assert losses(broken) == [(1, 2.0), (3, 1.0)]
    assert any("3 lines of metrics.jsonl cannot be read" in note for note in read_run(broken).notes)


def test_a_step_that_comes_again_undoes_what_followed_it(tmp_path: Path) -> None:
    first = [{"step": at, "loss": 10.0 + at, "loads": {"1": [at, 1]}, "skipped": at == 4} for at in range(1, 7)]
    again = [{"step": at, "loss": 20.0 + at} for at in range(4, 6)]
    run = read_run(written(tmp_path, *first, *again))
    column = run.columns["loss"]
    assert list(zip(column.steps, column.values)) == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25)]
    assert [step for step, _ in run.loads] == [1, 2, 3]
    assert (run.skipped_steps, run.last_step, run.repeated_steps) == ([], 5, 3)
    assert any("3 steps were gone over again" in note for note in run.notes)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    values = [float("nan"), "inf", -math.inf, 1e300, 10**400, None, True, "many", [1.0], {}]
    run = read_run(written(tmp_path, *({"step": at, "loss": value, "mfu": 0.5} for at, value in enumerate(values))))
    assert not run.columns["loss"].values
    assert list(run.columns["loss"].broken_steps) == [0, 1, 2, 3, 4]
    assert len(run.columns["mfu"].values) == len(values)
    assert any("Values at 5 steps (0, 1, 2, 3, 4) are no finite numbers" in note for note in run.notes)


@pytest.mark.parametrize(
    "loads", [[1], {"1": []}, {"1": [1, -1]}, {"x": [1]}, {"99999": [1]}, {"1": [math.nan]}, {"1": ["1"]}, {}]
)
def test_loads_that_are_none_are_left_out(tmp_path: Path, loads: object) -> None:
    assert read_run(written(tmp_path, {"step": 1, "loads": loads})).loads == []


def test_unknown_keys_and_steps_are_not_kept(tmp_path: Path) -> None:
    lines = [{"step": step, "secret": 1.0, "loss": 1.0} for step in (-1, 2**60, 1.5, "1", True, 7)]
    run = read_run(written(tmp_path, *lines))
    assert list(run.columns) == ["loss"]
    assert list(run.columns["loss"].steps) == [7]


def test_an_endless_line_is_one_unread_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MOST_LINE_BYTES", 64)
    run = read_run(written(tmp_path, {"step": 1, "loss": 1.0}, "[" * 1000, {"step": 2, "loss": 2.0}))
    assert list(run.columns["loss"].steps) == [1, 2]
    assert any(note.startswith("A line of metrics.jsonl cannot be read") for note in run.notes)


def test_many_windows_are_thinned_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_KEPT_LOADS", 8)
    run = read_run(written(tmp_path, *({"step": at, "loads": {"1": [at, 1]}} for at in range(100))))
    steps = [step for step, _ in run.loads]
    assert len(steps) <= 8
    assert (steps[0], steps[-1]) == (0, 99)
    assert steps == sorted(steps)


def test_settings_of_another_kind_are_told(tmp_path: Path) -> None:
    for text in ("", "[1]", "{", "[" * 100_000):
        (tmp_path / "run.json").write_text(text)
        run = read_run(tmp_path)
        assert run.settings == {}
        assert any("run.json cannot be read" in note for note in run.notes), text[:9]


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, {"step": 1, "max_logit_by_layer": {"10": 1.0, "2": 2.0, "0": 3.0}}))
    assert list(run.inner("max_logit_by_layer")) == ["0", "2", "10"]


def test_runs_are_a_directory_or_its_parts_the_newest_last(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        find_runs(tmp_path)
    with pytest.raises(InputError, match="is not a directory"):
        find_runs(tmp_path / "no")
    for name, time_s in (("a", 30), ("b", 10), ("c", 20)):
        os.utime(write_run(tmp_path / name, 3) / "metrics.jsonl", (time_s, time_s))
    (tmp_path / "tokens").mkdir()
    assert [path.name for path in find_runs(tmp_path)] == ["b", "c", "a"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
