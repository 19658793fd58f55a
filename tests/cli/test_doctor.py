"""`k2 doctor`: every check answers on any machine, and a want comes with its remedy."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from karakoram import env
from karakoram.cli import doctor, main


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def test_all_checks_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "doctor")
    assert (code, err) == (0, "")
    for name in ("Python", "torch", "processor", "compiler", "memory", "accelerator", "hub cache", "terminal"):
        assert f" {name} " in out
    checks = json.loads(k2(capsys, "doctor", "--json")[1])
    assert {check["status"] for check in checks} <= {"ok", "note", "missing"}
    assert all(check["fix"] for check in checks if check["status"] == "missing")


def test_without_torch_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def no_torch(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    code, out, _ = k2(capsys, "doctor")
    assert code == 1
    assert "pip install 'torch" in out


def test_poor_machines_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "compiler", lambda: None)
    monkeypatch.setattr(env, "memory", lambda: env.Memory(2_000_000_000, 1_000_000_000))
    monkeypatch.setattr(env, "disk", lambda path: env.Disk(Path(path), 1_000_000, 10_000_000_000))
    monkeypatch.setattr(env, "processor", lambda: env.Processor("old", "x86_64", 1, frozenset()))
    monkeypatch.setattr(env, "bundled_model_dir", lambda: Path("/nowhere"))
    checks = {check.name: check for check in doctor.examine()}
    for name in ("compiler", "memory", "hub cache", "processor", "nano model"):
        assert checks[name].status != "ok" and checks[name].fix, name


def test_secrets_are_not_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_print_me")
    assert "hf_do_not_print_me" not in k2(capsys, "doctor")[1]
