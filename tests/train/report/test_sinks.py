"""Sinks get every number, and none of them can end a run."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from karakoram.errors import InputError
from karakoram.train.record import sinks
from karakoram.train.record.metrics import Metrics
from karakoram.train.record.sinks import Guarded, open_sinks

KEY = "0123456789abcdef0123456789abcdef01234567"


class Account(ModuleType):
    """wandb, as far as it is used; `fails` names the call that raises."""

    def __init__(self, fails: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.asked, self.logged, self.finished = fails, [], [], 0

    def init(self, **how: Any) -> Any:
        self._fail("init")
        self.asked.append(how)
        return SimpleNamespace(log=self._log, finish=self._finish, define_metric=lambda *_, **__: None)

    def _log(self, scalars: dict[str, float]) -> None:
        self._fail("log")
        self.logged.append(scalars)

    def _finish(self) -> None:
        self._fail("finish")
        self.finished += 1

    def _fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError(f"POST https://api:{KEY}@example.org/graphql failed")


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Account:
    stub = Account()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_tensorboard_has_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'sinks'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

    for first, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):  # a run, and the same resumed from step 2
        opened = open_sinks(["tensorboard"], tmp_path, step=first)
        for step in steps:
            opened[0].log(step, {"loss": 10.0 * first + step, "update_rms/experts": 0.25})
        opened[0].close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "update_rms/experts"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24), (5, 25)]


def test_nested_numbers_arrive_by_slashes(tmp_path: Path) -> None:
    heard: list[tuple[int, dict[str, float]]] = []
    sink = Guarded("stub", SimpleNamespace(log=lambda step, scalars: heard.append((step, scalars)), close=lambda: None))
    line = {
        "step": 7, "loss": 1.5, "tokens_per_s": 10.0, "update_rms": {"experts": 0.2}, "loads": {"1": [1, 2]},
        "max_logit_by_layer": {0: 3.0}, "skipped": True,
    }  # fmt: skip
    with Metrics(tmp_path, 0.0, quiet=True, sinks=[sink]) as metrics:
        metrics.step(0.5, line)
    step, scalars = heard[0]
    assert step == 7
    assert scalars.items() >= {"loss": 1.5, "update_rms/experts": 0.2, "max_logit_by_layer/0": 3.0}.items()
    assert not {name for name in scalars if name.startswith(("loads", "skipped"))}


def test_wandb_run_goes_on_after_a_resume(tmp_path: Path, account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    out = tmp_path / "nano"
    out.mkdir()
    for _ in range(2):
        (sink,) = open_sinks(["wandb"], out, {"steps": 5, "optimizer": {"name": "muonclip"}})
        sink.log(3, {"loss": 1.0, "mfu": math.nan})
        sink.close()
        with pytest.warns(RuntimeWarning, match="it was closed before them"):
            sink.log(4, {"loss": 1.0})
        sink.log(5, {"loss": 1.0})  # said once
    assert account.logged == [{"loss": 1.0, "step": 3}] * 2
    assert account.finished == 2
    first, second = account.asked
    assert first == second
    assert first["resume"] == "allow"
    assert (first["name"], first["config"]) == ("nano", {"steps": 5, "optimizer": {"name": "muonclip"}})
    assert "mode" not in first  # WANDB_MODE decides
    assert KEY not in json.dumps(first)
    (out / "wandb.json").write_text('{"id": "../../elsewhere"}')
    open_sinks(["wandb"], out)
    assert account.asked[-1]["id"] not in ("../../elsewhere", first["id"])


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_sink_that_fails_warns_once_and_tells_no_key(tmp_path: Path, account: Account, call: str) -> None:
    account.fails = call

    def run() -> None:
        (sink,) = open_sinks(["wandb"], tmp_path)
        for step in range(5):
            sink.log(step, {"loss": 1.0})
        sink.close()
        sink.close()

    with pytest.warns(RuntimeWarning, match="wandb gets no more numbers of this run, which goes on") as caught:
        run()
    assert len(caught) == 1
    assert "ConnectionError" in str(caught[0].message)
    assert KEY not in str(caught[0].message)


def test_one_sink_s_failure_is_not_another_s(tmp_path: Path, account: Account) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    broken = Guarded("tensorboard", SimpleNamespace(log=fail, close=fail))
    (working,) = open_sinks(["wandb", "wandb"], tmp_path)

    def run() -> None:
        with Metrics(tmp_path, 0.0, True, sinks=[broken, working]) as metrics:
            for step in (1, 2):
                metrics.step(0.1, {"step": step, "loss": 1.0, "tokens_per_s": 1.0})

    with pytest.warns(RuntimeWarning, match="tensorboard"):
        run()
    assert [line["step"] for line in account.logged] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_mistakes_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="Sinks: tensorboard, wandb"):
        open_sinks(["mlflow"], tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'karakoram\[sinks\]'"):
        open_sinks(["wandb"], tmp_path)
    assert open_sinks([], tmp_path) == []


def test_what_looks_like_a_key_is_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "my-own key")
    told = sinks.without_key(f"bad my-own key, {KEY} and wandb_v1_abcdefghijklmnopqrstuvwxyz")
    assert told == "bad …, … and …"


def test_nothing_is_imported_until_it_is_asked_for() -> None:
    program = (
        "import sys, karakoram.train.record.sinks as sinks, pathlib; sinks.open_sinks([], pathlib.Path('.'))\n"
        "print(sorted({'wandb', 'tensorboard', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_the_real_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account and no network: it writes below OUT/wandb and says nothing."""
    pytest.importorskip("wandb", reason="needs the extra 'sinks'")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_API_KEY", "")):
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (sink,) = open_sinks(["wandb"], tmp_path)
        sink.log(1, {"loss": 1.0})
        sink.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
