"""Sizes that no memory has, through the C ABI: an error status, no exception, no crash, no endless loop.

Two kinds: every size and stride of every argument replaced by something absurd, one after another; and sizes that fit
each other, so that it is products of them that would overflow, or memory that would have to be found.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from karakoram.kernels import ops, reference
from karakoram.kernels.cpu.library import Library, describe, describe_packed
from karakoram.kernels.packed import PackedMatrix
from tests.kernels import drawn

ABSURD = [1 << 62, (1 << 63) - 1, -(1 << 63), -(1 << 62), -1, (1 << 61) + 1, 1 << 57, 1 << 48]
LAYOUT = struct.Struct("=Qii4q4q")  # k2_tensor: data, dtype, ndim, shape, strides
SHAPE = 3  # the fields of a descriptor where these begin
STRIDES = 7
K2_OK, K2_NO_MEMORY = 0, 7


@pytest.fixture(autouse=True)
def works_afterwards(lib: Library) -> Iterator[None]:
    yield
    x, weight = drawn.rows(20, 64), drawn.matrix("int4", 24, 64)
    assert drawn.near(ops.linear(x, weight), reference.linear(x, weight))


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def packed(matrix: PackedMatrix) -> bytes:
    return describe_packed(matrix.data, matrix.kind, matrix.outputs, matrix.inputs)


def with_sizes(descriptor: bytes, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> bytes:
    """The same place with other sizes; the same row again and again if nothing else is said."""
    fields = list(LAYOUT.unpack(descriptor))
    fields[SHAPE : SHAPE + len(shape)] = shape
    fields[STRIDES : STRIDES + len(shape)] = strides or (*[0] * (len(shape) - 1), 1)
    return LAYOUT.pack(*fields)


def changed(descriptor: bytes) -> Iterator[bytes]:
    """Each size, and each stride that means anything, made absurd."""
    fields = LAYOUT.unpack(descriptor)
    ndim, is_packed = fields[2], fields[1] >= 16
    places = [SHAPE + i for i in range(ndim)]
    if not is_packed:
        places += [STRIDES + i for i in range(ndim) if fields[SHAPE + i] > 1]
    for place in places:
        for value in ABSURD:
            yield LAYOUT.pack(*fields[:place], value, *fields[place + 1 :])


def numbers(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def status(lib: Library, name: str, arguments: list[object]) -> int:
    """That of a call whose integers are int64 and floats float32."""
    converted = [
        numbers(a) if isinstance(a, int) else ctypes.c_float(a) if isinstance(a, float) else a for a in arguments
    ]
    return getattr(lib.c, name)(*converted)


def moe_arguments() -> tuple[list[object], Tensor]:
    experts, (ids, weights) = drawn.experts(3, 64, 32), drawn.routing(4, 3, 2)
    records = (ctypes.c_void_p * 3)(*experts.addresses)
    kept = [bf16(4, 64), ids, weights, bf16(4, 64), experts.records]
    calls = [describe(kept[0]), describe(ids), describe(weights), records, 3, 32, 16, None, describe(kept[3])]
    return calls, kept  # type: ignore[return-value]


def calls() -> dict[str, tuple[list[object], object]]:
    """Arguments that every function accepts, and what must stay alive for them."""
    x, y, tall = bf16(3, 64), bf16(3, 32), bf16(3, 2, 64)
    weight, heads = drawn.matrix("int4", 32, 64), drawn.matrix("bf16", 96, 64)
    parts = drawn.feed_forward("fp8", 64, 96)
    codes, scale = drawn.int4_parts(20, 64)
    fp8, fp8_scale = drawn.fp8_parts(20, 64)
    q, cache, lengths, pool = bf16(2, 3, 48), bf16(2, 40, 48), torch.tensor([40, 7]), bf16(4, 16, 48)
    blocks = torch.tensor([[0, 1, 2], [3, -1, -1]], dtype=torch.int32)
    weight_1, fp8_codes = bf16(64), fp8.view(torch.uint8)
    logits, bias, ids, weights = torch.zeros(3, 8), torch.zeros(8), torch.zeros(3, 2).long(), torch.zeros(3, 2)
    kv, norm, q_rope, cos = bf16(2, 48), bf16(32), bf16(2, 3, 16), torch.zeros(2, 8)
    moe, kept = moe_arguments()
    room = {k: drawn.matrix(k, 20, 64) for k in drawn.KINDS}
    tall_x, places = bf16(20, 64), torch.tensor([7, 7])
    d = describe
    out_y, out_tall, out_x, mixed = y, bf16(3, 2, 16), bf16(3, 64), bf16(2, 3, 32)
    found: dict[str, list[object]] = {
        "k2_linear": [d(x), packed(weight), d(out_y)],
        "k2_linear_by_head": [d(tall), packed(heads), 16, d(out_tall)],
        "k2_mlp": [d(x), *map(packed, parts), d(out_x)],
        "k2_rms_norm": [d(x), d(weight_1), 1e-6, d(out_x)],
        "k2_moe_at_once": moe,
        "k2_mla_decode": [d(q), d(cache), None, d(lengths), 32, 0.1, d(mixed)],
        "k2_mla_decode in blocks": [d(q), d(pool), d(blocks), d(lengths), 32, 0.1, d(mixed)],
        "k2_latent_append": [
            d(kv), d(norm), 1e-6, d(q_rope), d(cos), d(cos), d(places), 1, d(cache), d(q)
        ],
        "k2_route": [d(logits), d(bias), 4, 2, 1, 2.5, d(ids), d(weights)],
        "k2_pack_int4": [d(codes), d(scale), packed(room["int4"])],
        "k2_unpack_int4": [packed(room["int4"]), d(codes), d(scale)],
        "k2_pack_bf16": [d(tall_x), packed(room["bf16"])],
        "k2_pack_fp8": [d(fp8_codes), d(fp8_scale), packed(room["fp8"])],
    }  # fmt: skip
    alive = dict(locals())
    return {name: (arguments, alive) for name, arguments in found.items()}


NAMES = [
    "k2_linear", "k2_linear_by_head", "k2_mlp", "k2_rms_norm", "k2_moe_at_once", "k2_mla_decode",
    "k2_mla_decode in blocks", "k2_latent_append", "k2_route", "k2_pack_int4", "k2_unpack_int4", "k2_pack_bf16",
    "k2_pack_fp8",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_one_size_at_a_time(lib: Library, name: str) -> None:
    arguments, _alive = calls()[name]
    function = name.split()[0]
    assert status(lib, function, arguments) == K2_OK, lib.c.k2_last_error()
    for place, argument in enumerate(arguments):
        if isinstance(argument, bytes):
            others: Iterator[object] = changed(argument)
        elif isinstance(argument, int) and (name, place) != ("k2_route", 4):  # an int32: yes or no
            others = iter(ABSURD)
        else:
            continue
        for other in others:
            found = status(lib, function, [*arguments[:place], other, *arguments[place + 1 :]])
            assert found != K2_OK, f"argument {place} as {other if isinstance(other, int) else LAYOUT.unpack(other)}"


LARGE = [1 << 62, 1 << 57, 1 << 48, 1 << 44, 1 << 42]


@pytest.mark.parametrize("rows", LARGE)
def test_so_many_rows_that_fit_each_other(lib: Library, rows: int) -> None:
    """One row again and again, in x and in the result: up to the last, their products or their copies are too large."""
    one, two, three, four, five = bf16(1, 64), bf16(1, 32), bf16(1, 64), bf16(1, 2, 64), bf16(1, 2, 16)
    x, y, wide = map(describe, (one, two, three))
    weight, parts = drawn.matrix("int4", 32, 64), drawn.feed_forward("bf16", 64, 96)
    heads = drawn.matrix("bf16", 96, 64)
    moe, kept = moe_arguments()
    assert lib.c.k2_linear(with_sizes(x, (rows, 64)), packed(weight), with_sizes(y, (rows, 32)))
    assert lib.c.k2_mlp(with_sizes(x, (rows, 64)), *map(packed, parts), with_sizes(wide, (rows, 64)))
    by_head = describe(four), packed(heads), numbers(0), describe(five)
    assert lib.c.k2_linear_by_head(
        with_sizes(by_head[0], (rows, 2, 64), (0, 64, 1)), *by_head[1:3], with_sizes(by_head[3], (rows, 2, 16))
    )
    for place, columns in ((0, 64), (1, 2), (2, 2), (8, 64)):
        moe[place] = with_sizes(moe[place], (rows, columns))  # type: ignore[arg-type]
    assert status(lib, "k2_moe_at_once", moe), kept


def test_experts_beyond_all_memory(lib: Library) -> None:
    moe, kept = moe_arguments()
    for experts in (1 << 44, 1 << 58, 1 << 62):  # the first would be 128 TB of counters
        moe[4] = experts
        assert status(lib, "k2_moe_at_once", moe) in (2, K2_NO_MEMORY), kept
    moe[4] = 3
    for width in (1 << 44, 1 << 60, (1 << 63) - 1):
        moe[5] = width
        assert status(lib, "k2_moe_at_once", moe)
    handle = ctypes.c_void_p()
    assert lib.c.k2_moe_begin(*moe[:3], numbers(1 << 44), numbers(32), 16, ctypes.byref(handle)) == K2_NO_MEMORY
    assert not handle


def test_steps_with_nonsense(lib: Library) -> None:
    moe, kept = moe_arguments()
    handle = ctypes.c_void_p()
    assert not lib.c.k2_moe_begin(*moe[:3], numbers(3), numbers(32), 16, ctypes.byref(handle))
    ids, records = (ctypes.c_int64 * 1)(0), moe[3]
    for count, numbers_of, places in ((-1, ids, records), (1, None, records), (1, ids, None)):
        assert lib.c.k2_moe_experts(handle, numbers_of, places, numbers(count)), kept
    assert lib.c.k2_moe_experts(None, ids, records, numbers(1))
    lib.c.k2_moe_drop(handle)


def test_contexts_beyond_all_memory(lib: Library) -> None:
    """A cache that repeats one row, so that every length up to its own would be right."""
    q, out, row = bf16(1, 64, 48), bf16(1, 64, 32), bf16(1, 1, 48)
    for tokens in (1 << 62, 1 << 48, 1 << 42):
        cache = with_sizes(describe(row), (1, tokens, 48))
        length = torch.tensor([tokens])
        assert lib.c.k2_mla_decode(
            describe(q), cache, None, describe(length), numbers(32), ctypes.c_float(0.1), describe(out)
        )
    table = torch.zeros(1, 8, dtype=torch.int32)
    for size in (1 << 62, 1 << 48, 1 << 42):
        cache, length = (
            with_sizes(describe(row), (1, size, 48)),
            torch.tensor([8 * size if size < 1 << 59 else 1 << 62]),
        )
        assert lib.c.k2_mla_decode(
            describe(q), cache, describe(table), describe(length), numbers(32), ctypes.c_float(0.1), describe(out)
        )


@pytest.mark.parametrize("kind", [16, 17, 18])
def test_bytes_of_matrices_that_cannot_be(lib: Library, kind: int) -> None:
    size: Callable[[int, int], int] = lambda outputs, inputs: lib.c.k2_packed_bytes(  # noqa: E731
        kind, numbers(outputs), numbers(inputs)
    )
    assert size(16, 64) > 0 and size(163840, 7168) > 0
    for outputs, inputs in (
        (1 << 62, 64),
        (16, 1 << 62),
        (1 << 40, 1 << 40),
        (-1, 64),
        ((1 << 63) - 1, 1),
        (1 << 32,) * 2,
    ):
        assert size(outputs, inputs) == -1
