"""`k2 bench` through the door: what it prints, when it fails, and one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main

MOE = ("bench", "moe", "--hidden", "128", "--intermediate", "64", "--experts", "4", "--top-k", "2", "--tokens", "1,3")
ATTENTION = ("bench", "attention", "--heads", "4", "--context", "5,40", "--batch", "2")
MEMORY = ("bench", "memory", "--matmul", "4,64,32", "--matmul", "1,32,64")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls and small buffers; memory always reads 10 GB/s."""
    from karakoram.evals.bench import attention, clock, memory, moe

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(clock, "CALLS", (2, 3))
    monkeypatch.setattr(memory, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(memory, "measure", lambda threads, buffer: memory.ReadSpeed({"k2_read": 10.0}, 1 << 20))
    monkeypatch.setattr(moe, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(attention, "ROTATED_BYTES", 1 << 20)


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = k2(capsys, *arguments, "--threads", "1", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *MOE, "--isa", "reference")
    assert {"machine", "isa", "threads", "memory_before", "memory_after", "rows"} <= found.keys()
    assert (found["isa"], found["threads"], found["memory_before"]) == ("reference", 1, 10.0)
    keys = "tokens ms_median gb_per_s read_share tflops matmul_share max_rel_error torch_bf16_error".split()
    assert all(set(keys) <= row.keys() for row in found["rows"])
    assert {"model", "architecture", "cores", "features", "memory_bytes", "torch"} == found["machine"].keys()


def test_json_of_attention(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *ATTENTION)
    keys = "context batch ms_median gb_per_s read_share tflops matmul_share roofline_share max_rel_error".split()
    assert [(row["context"], row["batch"]) for row in found["rows"]] == [(5, 2), (40, 2)]
    assert all(set(keys) <= row.keys() for row in found["rows"])


def test_json_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *MEMORY)
    assert [(row["m"], row["k"], row["n"]) for row in found["rows"]] == [(1024,) * 3, (4, 64, 32), (1, 32, 64)]
    assert found["memory"]["before"] == {"k2_read": 10.0}


@pytest.mark.parametrize("arguments", [MOE, ATTENTION, MEMORY], ids=lambda words: words[1])
def test_a_table_for_people(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, *arguments, "--threads", "1")
    assert (code, err) == (0, "")
    assert "1 thread · torch" in out
    assert "memory read 10.0 GB/s before, 10.0 GB/s after" in out
    assert "TFLOPS" in out


def test_an_error_over_the_limit_exits_with_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from karakoram.evals.bench import moe

    monkeypatch.setattr(moe, "ERROR_LIMIT", 1e-6)
    code, out, err = k2(capsys, *MOE, "--threads", "1", "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 2
    assert err.splitlines()[0].startswith("k2: error: At 1 tokens the error is")


def test_memory_that_drifts_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from karakoram.evals.bench import memory

    speeds = iter([10.0, 8.0])
    monkeypatch.setattr(memory, "measure", lambda threads, buffer: memory.ReadSpeed({"memcpy": next(speeds)}, 1 << 20))
    code, out, err = k2(capsys, *MEMORY, "--threads", "1")
    assert code == 1
    assert "TFLOPS" in out
    assert err == (
        "k2: error: Memory read 10.0 GB/s before and 8.0 GB/s after, 20% apart: something else is running."
        " Measure again on an idle machine (at most 10%).\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*MOE[:-1], "1,x"), "--tokens '1,x' is no list of numbers"),
        ((*MOE[:-1], "0"), "numbers of 1 or more"),
        ((*MOE, "--threads", "4096"), "4096 threads cannot be used here"),
        ((*MOE, "--isa", "mmx"), "mmx"),
        ((*MOE, "--top-k", "5"), "5 of 4 experts cannot be chosen"),
        ((*MOE, "--hidden", "100"), "multiples of 32"),
        ((*ATTENTION, "--context", ""), "--context '' is no list"),
        (("bench", "memory", "--matmul", "1,2"), "--matmul '1,2' is no shape"),
        (("bench", "speed"), "speed"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("k2: error: ")
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["memory", "moe", "attention"])
def test_every_bench_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "bench", name, "--help")
    assert (code, err) == (0, "")
    assert f"k2 bench {name} --" in out
    assert "Example" in out


def test_bare_bench_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "bench")
    assert (code, err) == (0, "")
    assert all(f"\n  {name}" in out for name in ("memory", "moe", "attention"))


def test_json_of_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The door and the names in it; what they mean is tested in `tests/evals/test_bench_training.py`."""
    from karakoram.evals.bench.train import layer, process, step

    def alone(order: Any, *_: Any) -> process.Measured:
        row = {"seconds": [0.5], "backward_seconds": [0.4], "finite": True, "dtype": order.dtype, "peak_bytes": 1}
        return process.Measured(order, [row | {"matmul_flops_per_s": 1e12}])

    for module in (step, layer):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
        monkeypatch.setattr(module, "alone", alone)
    monkeypatch.setattr(step, "PAIR_BYTES", 1)
    found = as_json(capsys, "bench", "train", "--rounds", "1")
    keys = "tokens_per_s baseline_tokens_per_s ratio dtype optimizer_share matmul_share".split()
    assert set(keys) <= found.keys()
    assert found["baseline_tokens_per_s"] is None and "not installed" in found["baseline_reason"]
    found = as_json(capsys, "bench", "train", "--layer", "--steps", "1")
    assert [row["what"] for row in found["rows"]] == ["karakoram float32", "karakoram bfloat16"]
    code, out, _ = k2(capsys, "bench", "train", "--threads", "1")
    assert code == 0 and "tokens/s" in out and "No baseline" in out
