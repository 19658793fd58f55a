"""What was measured is kept for the same machine, disk and shape, and for no other; disks are read past the cache."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karakoram import env
from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts import open_expert_source
from karakoram.config import ModelConfig
from karakoram.engine.expert_store.opening import StoreOptions, open_fed
from karakoram.env import bundled_model_dir
from karakoram.errors import InputError
from karakoram.evals.plan import disk, kernels, machine, workload
from karakoram.evals.plan.disk import TemporaryRecords
from karakoram.evals.plan.plan import plan_line, plan_of_checkpoint
from karakoram.kernels import ops
from tests.evals.described import Counted, at_once

pytestmark = pytest.mark.skipif(ops.chosen() is None, reason="the CPU kernels are not there")
NANO = workload.of_config("nano", ModelConfig.preset("nano"), "int4")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return at_once(monkeypatch)


def ask(folder: Path, load: workload.Workload = NANO, place: Path | None = None, again: bool = False) -> Any:
    kept = machine.Kept(folder / "kept")
    return machine.rates(kept, load, place or folder, None, again, lambda _: None)


def test_measured_once(measured: Counted, tmp_path: Path) -> None:
    first = ask(tmp_path)
    assert set(measured.values()) == {1} and len(measured) == 8
    assert ask(tmp_path) == first and set(measured.values()) == {1}
    assert first.expert.points == ((1.0, 1e-3), (4.0, 2e-3)) and first.fed_layer_s == machine.DEFAULT_LAYER_S[1]
    kept = machine.Kept(tmp_path / "kept")
    assert machine.kept_rates(kept, NANO, tmp_path) == first
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]  # the file that was read is gone


def test_measured_again_when_asked(measured: Counted, tmp_path: Path) -> None:
    ask(tmp_path)
    ask(tmp_path, again=True)
    assert set(measured.values()) == {2}


def test_another_shape_measures_only_what_differs(measured: Counted, tmp_path: Path) -> None:
    ask(tmp_path)
    moonlight = workload.of_config("m", ModelConfig.preset("moonlight-16b"), "int4")
    assert machine.kept_rates(machine.Kept(tmp_path / "kept"), moonlight, tmp_path) is None
    ask(tmp_path, moonlight)
    once = {"memory_rates", "layer_seconds"}
    assert {name: count for name, count in measured.items() if count == 1}.keys() == once


def test_another_disk_is_measured(measured: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(tmp_path)
    monkeypatch.setattr(machine, "disk_name", lambda _: "another")
    ask(tmp_path)
    assert measured["burst_seconds"] == 2 and measured["memory_rates"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: "{",
        lambda raw: "[]",
        lambda raw: "[" * 100_000,
        lambda raw: json.dumps({**raw, "version": 0}),
        lambda raw: json.dumps({**raw, "identity": {**raw["identity"], "cores": 99}}),
        lambda raw: json.dumps({**raw, "measured": 5}),
        lambda raw: json.dumps({**raw, "measured": {key: {"curve": [[1, -1]]} for key in raw["measured"]}}),
        lambda raw: json.dumps({**raw, "measured": {key: {"x": float("nan")} for key in raw["measured"]}}),
    ],
)
def test_a_damaged_file_or_another_machine_is_measured_again(
    damage: Callable[[dict[str, Any]], str], measured: Counted, tmp_path: Path
) -> None:
    first = ask(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    path.write_text(damage(json.loads(path.read_text())))
    assert ask(tmp_path) == first
    assert set(measured.values()) == {2}


def test_names_that_another_version_wrote_are_measured_again(measured: Counted, tmp_path: Path) -> None:
    first = ask(tmp_path)
    (path,) = (tmp_path / "kept").iterdir()
    raw = json.loads(path.read_text())
    raw["measured"] = {key: {"other": 1.0} for key in raw["measured"]}
    path.write_text(json.dumps(raw))
    assert machine.kept_rates(machine.Kept(tmp_path / "kept"), NANO, tmp_path) is None
    assert ask(tmp_path) == first


def test_what_cannot_be_kept_is_used_and_said(measured: Counted, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file where the folder should be")
    kept = machine.Kept(tmp_path / "kept")
    found = machine.rates(kept, NANO, tmp_path, None, False, lambda _: None)
    assert found.memory_bytes_per_s == 2e10 and kept.note is not None and "not kept" in kept.note


# ------------------------------------------------------------------------------------------------ disks


def test_a_full_disk_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "disk", lambda path: env.Disk(Path(path), 10, 1000))
    with pytest.raises(InputError, match="Free some space, or name another folder"), _records(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(InputError, match="No space left"), _records(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"), _records(tmp_path / "absent"):
        pass


def _records(folder: Path) -> Any:
    return disk.temporary_records(folder, 5000)


def test_temporary_records_are_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "FILE_BYTES", 1 << 20)
    with disk.temporary_records(tmp_path, 5000) as source:
        assert isinstance(source, TemporaryRecords) and source.slot_bytes == 8192 and source.experts == 128
        computed: list[int] = []
        points = disk.burst_seconds(source, lambda: computed.append(1), budget_s=0.0)
        assert len(computed) >= 2 * len(points)
        assert [n for n, _ in points] == list(disk.BURSTS) and all(seconds > 0 for _, seconds in points)
        assert all(rate > 0 for _, rate in disk.depth_bytes_per_s(source, budget_s=0.0))
    assert not list(tmp_path.iterdir())


def test_a_models_own_experts_are_read() -> None:
    checkpoint = open_checkpoint(bundled_model_dir())
    source = open_expert_source(checkpoint)
    try:
        load = workload.of_checkpoint(checkpoint, source)
        assert load.experts == len(source.layers) * source.experts and load.room_bytes == source.room_bytes
        assert disk.burst_seconds(source, budget_s=0.0)
    finally:
        source.close()


# ------------------------------------------------------------------------------------------------ kernels


def test_kernels_are_timed_at_a_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUDGET_S", 0.0)
    monkeypatch.setattr(kernels, "ROTATED_BYTES", 1 << 20)
    c = ModelConfig.preset("nano")
    for kind in ("int4", "bf16", "fp8"):
        points = kernels.expert_seconds(c, kind)
        assert [rows for rows, _ in points] == [1, *kernels.EXPERT_ROWS] and all(s > 0 for _, s in points)
        assert [rows for rows, _ in kernels.linear_seconds(256, kind)] == list(kernels.LINEAR_ROWS)
    assert min(kernels.attention_seconds(c)) > 0
    run = kernels.token_of_experts(c, "int4")
    assert run() is not None and run() is not None


# ------------------------------------------------------------------------------------------------ the line


def test_one_line_only_where_this_machine_is_known(
    measured: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "cache_dir", lambda: tmp_path)
    fed = open_fed(bundled_model_dir(), StoreOptions(expert_bytes=1_000_000))
    assert fed is not None
    try:
        assert plan_line(bundled_model_dir(), fed.store) is None and not measured
        plan_of_checkpoint(bundled_model_dir())
        before = measured.copy()
        line = plan_line(bundled_model_dir(), fed.store)
        assert line is not None and line.startswith("plan: ") and "tok/s" in line and "\n" not in line
        assert measured == before
        assert plan_line(tmp_path, fed.store) is None  # no checkpoint: who starts a model is not stopped
    finally:
        fed.store.close()
