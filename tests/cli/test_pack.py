"""`k2 pack` from the outside: what it writes is a model that every command takes; what goes wrong is one line."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from karakoram.cli import main


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


def test_help_has_an_example_and_says_the_same_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "pack", "--help")
    assert (code, err) == (0, "")
    assert "k2 pack moonshotai/Kimi-K2-Thinking" in out
    assert main.load_command("pack").help.split("\n")[0] == main.COMMANDS["pack"][2]


def test_a_packed_checkpoint_is_taken_in_its_sources_place(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    code, out, err = k2(capsys, "pack", str(tiny_checkpoint), str(packed))
    assert (code, out, err) == (0, f"wrote {packed}\n", "")
    inspected = []
    for directory in (tiny_checkpoint, packed):
        code, out, _ = k2(capsys, "inspect", str(directory), "--json")
        assert code == 0
        report = json.loads(out)
        assert report["problem"] is None
        inspected.append({key: report[key] for key in ("bytes_by_format", "components", "read_bytes_per_token")})
    assert inspected[0] == inspected[1]
    models = (tiny_checkpoint, packed)
    said = [k2(capsys, "generate", str(model), "-p", "Peaks", "--max-tokens", "6")[:2] for model in models]
    assert said[0] == said[1] and said[0][0] == 0


def test_what_goes_wrong_is_one_line_with_what_to_do(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    scratch = tmp_path / ".packed.packing"
    scratch.mkdir()
    lock = os.open(scratch, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    code, out, err = k2(capsys, "pack", str(tiny_checkpoint), str(packed))
    assert (code, out) == (2, "")
    assert err == f"k2: error: {packed} is being packed by another process. Wait for it to end.\n"
    os.close(lock)
    (packed / "something").mkdir(parents=True)
    code, out, err = k2(capsys, "pack", str(tiny_checkpoint), str(packed))
    assert (code, out) == (2, "") and "not empty. Name another directory" in err and err.count("\n") == 1


def test_a_damaged_file_is_told_by_inspect(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert k2(capsys, "pack", str(tiny_checkpoint), str(packed))[0] == 0
    with open(packed / "experts.k2experts", "r+b") as file:
        file.seek(20)
        file.write(b"\x07")
    code, _, err = k2(capsys, "inspect", str(packed))
    assert code == 2 and "experts.k2experts is damaged. Pack it again: k2 pack SRC DST." in err
