"""`k2 quantize` from the outside: what it writes, says and refuses, on a tiny checkpoint of random weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_help_has_an_example_and_says_the_same_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "quantize", "--help")
    assert (code, err) == (0, "")
    assert "k2 quantize ./my-checkpoint ./my-checkpoint-int4" in out
    assert main.load_command("quantize").help.split("\n")[0] == main.COMMANDS["quantize"][2]


@pytest.mark.parametrize("format", ["int4", "int4-all"])
def test_it_writes_reports_and_measures(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    from karakoram.model.load import load_model
    from karakoram.quantize.perplexity import perplexity, read_token_ids

    target, text, numbers = tmp_path / "q", tmp_path / "text.txt", tmp_path / "numbers.json"
    text.write_text("The mountain has a name. " * 60)
    files = ("--text", str(text), "--json", str(numbers))
    code, out, err = k2(capsys, "quantize", str(tiny_checkpoint), str(target), "--format", format, *files)
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(numbers.read_text())
    ids = read_token_ids(tiny_checkpoint, text)
    wanted = [perplexity(load_model(directory, dense=True), ids) for directory in (tiny_checkpoint, target)]
    assert [report["perplexity"][key] for key in ("before", "after")] == wanted
    assert report["perplexity"]["tokens"] == len(ids) - 1 > 512
    assert f"perplexity {wanted[0]:.4g} → {wanted[1]:.4g} (" in out
    assert f"{report['groups_exact']:,} exact, {report['groups_rounded']:,} rounded" in out
    assert f"{report['bytes_before']:,} bytes → {report['bytes_after']:,} bytes" in out
    assert f"worst: {report['worst'][0]['name']} {report['worst'][0]['relative_rms']:.2%}\n" in out
    assert re.search(r"^ *layer .*routed experts", out, re.M)
    for row in report["layers"]:
        assert f"{row['relative_rms']:.2%}" in out
    assert out.endswith(f"wrote {target} in {format}\n")
    assert report["format"] == format

    code, out, _ = k2(capsys, "inspect", str(target), "--json")
    inspected = json.loads(out)
    assert (code, inspected["problem"]) == (0, None)
    assert inspected["bytes"] == report["bytes_after"]
    kinds = {part["name"]: set(part["bytes"]) for part in inspected["components"] if part["bytes"]}
    quantized = set(kinds) - {"norms", "router"} if format == "int4-all" else {"routed experts"}
    assert {name for name, found in kinds.items() if "int4" in found} == quantized
    assert all(kinds[name] == {"int4"} for name in quantized)


def test_int4_again_changes_nothing(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    k2(capsys, "quantize", str(tiny_checkpoint), str(tmp_path / "one"))
    code, out, _ = k2(capsys, "quantize", str(tmp_path / "one"), str(tmp_path / "two"))
    assert code == 0
    assert re.search(r"groups of 32: ([\d,]+) exact \(\1 were int4 already\), 0 rounded; relative RMS error 0\n", out)
    assert "worst" not in out and "(100.0%)" in out
    code, out, _ = k2(capsys, "convert", str(tmp_path / "two"), str(tmp_path / "bf16"), "--format", "bf16")
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./no-such-model", "out"), "No model './no-such-model'"),
        (("k2", "out"), "'k2' is a preset"),
        (("MODEL", "out", "--format", "int8"), "'int8'"),
        (("MODEL", "full"), "exists and is not empty"),
        (("MODEL", "full", "--text", "text.txt"), "exists and is not empty"),
        (("MODEL", "MODEL"), "the source itself"),
        (("MODEL", "out", "--text", "no-such-text"), "Cannot read no-such-text"),
        (("MODEL", "out", "--text", "text.txt", "--device", "abacus"), "'abacus'"),
        (("MODEL", "out", "--json", "nowhere/x.json"), "no directory to write into"),
    ],
)
def test_mistakes(
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "text.txt").write_text("some words")
    code, out, err = k2(capsys, "quantize", *(str(tiny_checkpoint) if a == "MODEL" else a for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("k2: error: ") and words in err and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "text.txt"]


def test_ctrl_c(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import karakoram.quantize.quantize

    def interrupted(weight: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(karakoram.quantize.quantize, "_int4", interrupted)
    code, out, _ = k2(capsys, "quantize", str(tiny_checkpoint), str(tmp_path / "out"))
    assert (code, out) == (130, "")
    assert list(tmp_path.iterdir()) == []
