"""Benchmarks at tiny shapes: arithmetic that agrees with itself, and the two rules that make one fail. No speeds."""

import json
import weakref
from typing import Any

import pytest
import torch

from karakoram.errors import InputError
from karakoram.evals.bench import attention, clock, memory, moe, report, table, threads
from karakoram.evals.bench.moe_error import follow, relative_error
from karakoram.kernels import reference

ENVELOPE = {"machine", "isa", "threads", "memory_before", "memory_after", "memory", "rows", "notes", "problems"}
SHAPE = moe.Shape(hidden=128, intermediate=64, experts=4, top_k=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls, small buffers, and memory that reads 10 GB/s."""
    monkeypatch.setattr(clock, "CALLS", (3, 6))
    monkeypatch.setattr(memory, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(moe, "ROTATED_BYTES", 5 * SHAPE.experts * SHAPE.expert_bytes)
    monkeypatch.setattr(attention, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(attention, "DRAWN_TOKENS", 101)
    read(monkeypatch, 10.0)


def read(monkeypatch: pytest.MonkeyPatch, *gb_per_s: float) -> None:
    """Memory reads so fast, the last speed from then on."""
    speeds = iter(gb_per_s)
    found = {"now": 0.0}

    def measure(_: int, buffer: torch.Tensor) -> memory.ReadSpeed:
        found["now"] = next(speeds, found["now"])
        return memory.ReadSpeed({"k2_read": found["now"], "memcpy": 1.0}, buffer.numel())

    monkeypatch.setattr(report.memory, "measure", measure)


@pytest.fixture(params=[None, "reference"])
def isa(request: pytest.FixtureRequest) -> str | None:
    return request.param


def test_memory_is_read_by_several_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(memory, "PASSES_S", 0.0)
    before = torch.get_num_threads()
    speed = memory.measure(1, torch.full((1 << 20,), 0x3F, dtype=torch.uint8))
    assert {"memcpy", "torch_sum", "torch_dot"} <= speed.readers.keys()
    assert all(value > 0 for value in speed.readers.values())
    assert speed.gb_per_s == max(speed.readers.values())
    assert speed.buffer_bytes == 1 << 20
    assert torch.get_num_threads() == before


def test_every_byte_is_read() -> None:
    if (library := memory.ops.chosen()) is None:
        pytest.skip("the CPU kernels are not there")
    buffer = torch.full((3 << 20,), 1, dtype=torch.uint8)
    words = buffer.view(torch.int64)
    words.fill_(1)
    words[-1] = 5
    assert memory._sum_bytes(library, buffer) == words.numel() + 4


def test_the_memory_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    found = report.memory_bench(1, [(4, 64, 32)], said.append)
    assert found.keys() == ENVELOPE
    assert (found["memory_before"], found["memory_after"], found["problems"]) == (10.0, 10.0, [])
    assert [(row["m"], row["k"], row["n"]) for row in found["rows"]] == [(1024, 1024, 1024), (4, 64, 32)]
    row = found["rows"][1]
    assert row["tflops"] * row["ms_median"] * 1e9 == pytest.approx(2 * 4 * 64 * 32)
    assert said[0] == "memory, before"
    assert said[-1] == "memory, after"
    json.dumps(found)


@pytest.mark.parametrize(("after", "fails"), [(9.0, False), (8.9, True), (11.0, False), (11.2, True)])
def test_memory_that_changes_by_more_than_a_tenth_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, after: float, fails: bool
) -> None:
    read(monkeypatch, 10.0, after)
    found = report.bracketed(None, 1, lambda isa, notes: [])
    assert bool(found["problems"]) is fails
    assert not fails or "idle machine" in found["problems"][0]


def test_rows_run_without_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured under a budget of memory must not find two gigabytes of it taken."""
    made: list[weakref.ref[torch.Tensor]] = []
    real = memory.buffer_to_read

    def remembered() -> torch.Tensor:
        buffer = real()
        made.append(weakref.ref(buffer))
        return buffer

    def rows(isa: str, notes: list[str]) -> list[memory.Matmul]:
        assert [one() for one in made] == [None]
        return []

    monkeypatch.setattr(memory, "buffer_to_read", remembered)
    assert report.bracketed(None, 1, rows)["memory"]["buffer_bytes"] == 1 << 20
    assert len(made) == 2


def test_short_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def little(available: int) -> None:
        monkeypatch.setattr(memory.env, "memory", lambda: memory.env.Memory(8 << 30, available))

    monkeypatch.setattr(memory, "BUFFER_BYTES", 128 << 20)
    little(300 << 20)
    found = report.bracketed(None, 1, lambda isa, notes: [])
    assert found["memory"]["buffer_bytes"] == 75 << 20
    assert any("Memory is short" in note for note in found["notes"])
    little(100 << 20)
    with pytest.raises(InputError, match="available"):
        memory.buffer_to_read()
    with pytest.raises(InputError, match=r"--experts"):
        moe.build_sets(moe.Shape(7168, 2048, 24, 8), torch.Generator())


# ------------------------------------------------------------------------------------------------ experts


def moe_rows(isa: str | None = None, tokens: tuple[int, ...] = (1, 3)) -> dict[str, Any]:
    return moe.moe_bench(SHAPE, tokens, 1, isa, budget_s=0.01)


def test_rows_of_experts_agree_with_themselves(isa: str | None) -> None:
    found = moe_rows(isa)
    assert found.keys() == ENVELOPE
    assert found["isa"] == (isa or found["isa"])
    assert found["problems"] == []
    assert [row["tokens"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        seconds = row["ms_median"] / 1e3
        assert row["gb_per_s"] * seconds * 1e9 == pytest.approx(row["weight_bytes"])
        assert row["read_share"] == pytest.approx(row["gb_per_s"] / 10.0)
        assert row["tflops"] * seconds * 1e12 == pytest.approx(2 * 3 * 128 * 64 * row["tokens"] * 2)
        assert row["matmul_share"] == pytest.approx(row["tflops"] / row["matmul"]["tflops"])
        assert (row["matmul"]["k"], row["matmul"]["n"]) == (128, 128)
        assert 0 < row["max_rel_error"] <= 1.5 * row["torch_bf16_error"]
        assert row["calls"] >= 3
    assert found["rows"][0]["weight_bytes"] == 2 * SHAPE.expert_bytes
    json.dumps(found)


def test_more_tokens_than_are_followed() -> None:
    (row,) = moe_rows(tokens=(9,))["rows"]
    assert row["max_rel_error"] <= 1.5 * row["torch_bf16_error"]
    assert row["weight_bytes"] <= 4 * SHAPE.expert_bytes


def test_an_error_over_the_limit_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.ops.moe_int4
    monkeypatch.setattr(moe.ops, "moe_int4", lambda *a, **k: right(*a, **k) * 1.05)
    (problem,) = moe_rows(tokens=(1,))["problems"]
    assert problem.startswith("At 1 tokens the error is")


def test_sets_hold_different_experts_and_take_enough_bytes() -> None:
    draw = torch.Generator().manual_seed(3)
    sets = moe.build_sets(SHAPE, draw)
    assert len(sets) == 5
    assert sum(one.records.numel() for one in sets) >= moe.ROTATED_BYTES
    assert len({one.records.data_ptr() for one in sets}) == 5
    for part in range(3):
        dense = [sets[0].parts(expert)[part].dense() for expert in range(4)]
        assert len({tuple(d.flatten()[:300].tolist()) for d in dense}) == 4
        assert all(torch.equal(d.flatten().sort().values, dense[0].flatten().sort().values) for d in dense)
    assert torch.equal(sets[0].records, sets[4].records)


def test_one_token_walks_through_the_experts_and_nobody_takes_one_twice() -> None:
    draw = torch.Generator().manual_seed(3)
    walk = moe.routes(moe.Shape(64, 64, 24, 8), 1, draw)
    assert torch.cat(walk, 1).tolist() == [list(range(24))]
    for ids in moe.routes(moe.Shape(64, 64, 7, 3), 5, draw) + moe.routes(moe.Shape(64, 64, 7, 3), 1, draw):
        assert all(len(set(row)) == 3 and max(row) < 7 for row in ids.tolist())


def test_exact_results_are_those_of_the_reference() -> None:
    draw = torch.Generator().manual_seed(3)
    experts = moe.build_sets(SHAPE, draw)[0]
    ids = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
    weights = torch.rand(4, 2, generator=draw)
    gaussian, outliers = follow(experts, ids, weights, draw)
    assert (outliers.x_FD.float() / gaussian.x_FD.float()).round().unique().tolist() == [1.0, 50.0]
    for kind in (gaussian, outliers):
        found = reference.moe_int4(kind.x_FD, ids, weights, experts)
        assert relative_error(found, kind.exact_FD) < 2**-8  # the rounding of the result to bf16
        assert relative_error(found, kind.exact_FD) < relative_error(kind.torch_FD, kind.exact_FD) * 1.5


@pytest.mark.parametrize(
    ("shape", "tokens"), [((100, 64, 4, 2), [1]), ((64, 64, 4, 5), [1]), ((64, 64, 4, 2), []), ((64, 64, 4, 2), [0])]
)
def test_impossible_layers_are_refused(shape: tuple[int, int, int, int], tokens: list[int]) -> None:
    with pytest.raises(InputError):
        moe.moe_bench(moe.Shape(*shape), tokens, 1)


# ------------------------------------------------------------------------------------------------ attention


def test_rows_of_attention_agree_with_themselves(isa: str | None) -> None:
    found = attention.attention_bench(4, [3, 70], [1, 2], 1, isa, budget_s=0.01)
    assert found.keys() == ENVELOPE
    assert found["problems"] == []
    assert [(row["context"], row["batch"]) for row in found["rows"]] == [(3, 1), (70, 1), (3, 2), (70, 2)]
    for row in found["rows"]:
        seconds, tokens = row["ms_median"] / 1e3, row["context"] * row["batch"]
        assert row["gb_per_s"] * seconds * 1e9 == pytest.approx(tokens * 2 * 576)
        assert row["tflops"] * seconds * 1e12 == pytest.approx(2 * 4 * tokens * (576 + 512))
        assert row["read_share"] == pytest.approx(row["gb_per_s"] / 10.0)
        rate = row["tflops"] / row["matmul_share"]
        reading_s, multiplying_s = tokens * 2 * 576 / 10e9, 2 * 4 * tokens * (576 + 512) / (rate * 1e12)
        assert row["roofline_share"] == pytest.approx(max(reading_s, multiplying_s) / seconds)
        assert 0 < row["max_rel_error"] < 0.02
    json.dumps(found)


def test_caches_rotate_over_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    assert attention.build_pool(10, notes).shape == (911, 576)  # 1 MiB of 1,152 bytes
    assert attention.build_pool(2000, notes).shape == (2000, 576)
    assert notes == []
    monkeypatch.setattr(memory.env, "memory", lambda: memory.env.Memory(None, 500 * 1152))
    assert attention.build_pool(10, notes).shape == (400, 576)
    assert "Memory is short" in notes[0]
    with pytest.raises(InputError, match="--context"):
        attention.build_pool(401, notes)


# ------------------------------------------------------------------------------------------------ clock, threads, table


def test_the_clock_warms_up_counts_on_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    timing = clock.median_seconds(numbers.append, budget_s=60)
    assert numbers == list(range(8))  # two to warm up, the most that may be
    assert list(timing.numbers) == numbers[2:]
    now = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))  # every call takes a second
    assert clock.median_seconds(lambda number: None, budget_s=0.5) == clock.Timing(1.0, 3, 1)
    assert clock.median_seconds(lambda number: None, budget_s=0.5, limit_s=2.0) == clock.Timing(1.0, 2, 1)


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    with threads.running("reference", 1) as name:
        assert (name, torch.get_num_threads()) == ("reference", 1)
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="4096 threads"), threads.running(None, 4096):
        pass
    if threads.ops.chosen() is not None:
        with (
            pytest.raises(InputError, match=r"neon cannot be used here.*scalar, reference"),
            threads.running("neon", 1),
        ):
            pass


def test_a_table_has_a_line_for_every_row() -> None:
    found = moe_rows("reference")
    shown = table.table(found["rows"])
    assert shown.row_count == 2
    assert [column.header for column in shown.columns][:4] == ["tokens", "ms", "GB/s", "of reading"]
    assert "plain torch · 1 thread · torch" in table.heading(found)[0]
    assert "10.0 GB/s before" in table.heading(found)[1]


def test_a_whole_model_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """nano's shape: rates and bytes are consistent, and part of the layers stands for all."""
    from karakoram.evals.bench import memory, model

    monkeypatch.setattr(memory, "BUFFER_BYTES", 1 << 22)
    report = model.model_bench("nano", "int4-all", [8, 40], 4, layers=3)
    assert [row["phase"] for row in report["rows"]] == ["prefill", "prefill", "decode"]
    assert [row["prompt_tokens"] for row in report["rows"]] == [8, 40, 8]
    decode = report["rows"][-1]
    assert decode["gb_per_s"] == pytest.approx(decode["bytes_per_token"] * decode["tokens_per_s"] / 1e9)
    assert report["layers"] == 3 and report["estimate"]["decode_tokens_per_s"] > 0 and report["peak_memory_bytes"] > 0
    experts_only = model.bytes_per_token(model.build(model.ModelConfig.preset("nano"), "int4", 3), 10)
    assert experts_only > 2 * decode["bytes_per_token"]  # bf16 head and attention


@pytest.mark.parametrize(("weight_format", "layers"), [("int3", None), ("int4", 1), ("int4", 99)])
def test_a_model_that_cannot_be(weight_format: str, layers: int | None) -> None:
    from karakoram.evals.bench import model

    with pytest.raises(InputError):
        model.build(model.ModelConfig.preset("nano"), weight_format, layers)
