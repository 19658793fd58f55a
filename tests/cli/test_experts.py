"""`k2 experts` on the traces that the repository ships."""

import json
from pathlib import Path

import pytest

from karakoram.cli.main import run


@pytest.fixture
def trace(project_root: Path) -> str:
    return str(project_root / "benchmarks/traces/nano-prose.trace")


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run(list(arguments))
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_statistics(capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path) -> None:
    code, out, err = k2(capsys, "experts", "stats", trace, "--png", str(tmp_path / "map.png"))
    assert (code, err) == (0, "")
    assert "5 layers of 16 experts, 4 per token" in out
    assert all(column in out for column in ("entropy", "gini", "repeat", "foretold"))
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_as_json(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    found = json.loads(k2(capsys, "experts", "stats", trace, "--json")[1])
    assert found["layers"] == [1, 2, 3, 4, 5]
    assert sum(found["counts"][0]) == 4 * found["tokens"]
    assert 0.25 < found["repeat_mean"] < 1
    assert len(found["next_layer"]) == 4
    assert found["rank_scores"] is None


def test_the_map_in_a_terminal_with_colours(
    capsys: pytest.CaptureFixture[str], trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = k2(capsys, "experts", "stats", trace)[1]
    assert out.count("▀") == 3 * 16  # two layers to a line
    assert "▀" not in k2(capsys, "experts", "stats", trace, "--no-map")[1]


def test_simulation(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    code, out, err = k2(capsys, "experts", "simulate", trace)
    assert (code, err) == (0, "")
    assert all(name in out for name in ("lru", "lfu", "hybrid", "belady", "closed"))


def test_simulation_as_json(capsys: pytest.CaptureFixture[str], trace: str) -> None:
    out = k2(capsys, "experts", "simulate", trace, "--json", "--capacity", "30,50%", "--floor", "1")[1]
    results = json.loads(out)["results"]
    assert [(one["policy"], one["capacity"]) for one in results[3:5]] == [("belady", 30), ("lru", 40)]
    assert results[0]["gap_closed"] == 0
    assert results[3]["gap_closed"] == 1
    alone = json.loads(k2(capsys, "experts", "simulate", trace, "--json", "--policy", "hybrid")[1])["results"]
    assert [one["gap_closed"] for one in alone] == [None, None]  # 12 % and 25 % are both less than 1.5 × 4 per layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--policy", "fifo"), "no policy 'fifo'"),
        (("--capacity", "400%"), "'400%' is none"),
        (("--capacity", "10", "--floor", "3"), "cannot keep 3"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], trace: str, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = k2(capsys, "experts", "simulate", trace, *arguments)
    assert code == 2
    assert message in err


def test_files_that_are_no_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t").write_text("hello")
    assert "no trace" in k2(capsys, "experts", "stats", str(tmp_path / "t"))[2]
    assert k2(capsys, "experts", "simulate", str(tmp_path / "none"))[0] == 2
    assert "simulate" in k2(capsys, "experts", "--help")[1]
