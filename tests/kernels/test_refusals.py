"""What cannot be computed is refused at the door, in words that name the argument, and the library works on.

Most cases go through `ops`; those that its functions make impossible (a result of the wrong shape, a null pointer) hand
the library descriptors of their own.
"""

import ctypes
import struct
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from karakoram.errors import FormatError, InputError
from karakoram.kernels import ops, reference
from karakoram.kernels.cpu.library import Library, describe, describe_packed
from karakoram.kernels.ops import MoeSteps
from karakoram.kernels.packed import PackedMatrix, packed_bytes
from tests.kernels import drawn

REFUSED = (InputError, FormatError)


@pytest.fixture(autouse=True)
def works_afterwards(lib: Library) -> Iterator[None]:
    yield
    x, weight = drawn.rows(20, 64), drawn.matrix("int4", 24, 64)
    assert drawn.near(ops.linear(x, weight), reference.linear(x, weight))


def bf16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def misaligned(tensor: Tensor) -> Tensor:
    """The same, one byte further on than its elements may lie."""
    size = tensor.numel() * tensor.element_size()
    room = bytearray(size + 1)
    return torch.frombuffer(room, dtype=tensor.dtype, count=tensor.numel(), offset=1).view(tensor.shape)


def moved(matrix: PackedMatrix) -> PackedMatrix:
    """The same bytes, 16 further on than a cache line."""
    room = torch.zeros(matrix.data.numel() + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 16
    room[start : start + matrix.data.numel()] = matrix.data
    return PackedMatrix(room[start : start + matrix.data.numel()], matrix.kind, matrix.outputs, matrix.inputs)


class Described(bytes):
    """A descriptor that keeps its tensor alive."""

    owner: object


def described(tensor: Tensor, **changes: object) -> Described:
    """Of a tensor, perhaps with other fields than it has."""
    return _kept(describe(tensor), tensor, changes)


def packed_of(matrix: PackedMatrix, **changes: object) -> Described:
    """Of a packed matrix, likewise."""
    return _kept(describe_packed(matrix.data, matrix.kind, matrix.outputs, matrix.inputs), matrix, changes)


def _kept(descriptor: bytes, owner: object, changes: dict[str, object]) -> Described:
    layout = struct.Struct("=Qii4q4q")  # k2_tensor
    data, dtype, ndim, *rest = layout.unpack(descriptor)
    fields = {"data": data, "dtype": dtype, "ndim": ndim, "shape": rest[:4]} | changes
    shape = [*fields["shape"], 0, 0, 0, 0][:4]
    kept = Described(layout.pack(fields["data"], fields["dtype"], fields["ndim"], *shape, *rest[4:]))
    kept.owner = owner
    return kept


def check(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(REFUSED, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def check_all(cases: list[tuple[str, Callable[[], object]]]) -> None:
    for words, call in cases:
        check(words, call)


def test_tensors_that_are_no_tensors(lib: Library) -> None:
    weight, y = packed_of(drawn.matrix("int4", 32, 64)), described(bf16(3, 32))

    def linear(x: Described | None) -> Callable[[], None]:
        return lambda: lib.call("k2_linear", x, weight, y)

    check_all(
        [
            ("x is missing", linear(None)),
            ("x is float32, expected bfloat16", linear(described(torch.zeros(3, 64)))),
            ("x is int64, expected", linear(described(torch.zeros(3, 64, dtype=torch.int64)))),
            ("x is an unknown dtype", linear(described(bf16(3, 64), dtype=99))),
            ("x has 1 dimensions, expected 2", linear(described(bf16(64)))),
            ("x has 3 dimensions", linear(described(bf16(1, 3, 64)))),
            ("x has a negative size", linear(described(bf16(3, 64), shape=(-3, 64)))),
            ("x points nowhere", linear(described(bf16(3, 64), data=0))),
            ("x is not aligned to its elements", linear(described(misaligned(bf16(3, 64))))),
            ("last dimension of x is not contiguous", linear(described(bf16(64, 3).T))),
            ("last dimension of x is not contiguous", linear(described(bf16(3, 1).expand(3, 64)))),
        ]
    )


def test_tensors_that_no_call_takes() -> None:
    weight = drawn.matrix("bf16", 16, 64)
    check_all(
        [
            ("float64 tensor of 2 dimensions on cpu", lambda: ops.linear(torch.zeros(3, 64).double(), weight)),
            ("5 dimensions", lambda: ops.rms_norm(bf16(1, 1, 1, 3, 64), bf16(64), 1e-6)),
            ("on meta", lambda: ops.linear(bf16(3, 64).to("meta"), weight)),
        ]
    )


def test_matrices_that_are_none(lib: Library) -> None:
    x, y, matrix = described(bf16(3, 64)), described(bf16(3, 32)), drawn.matrix("int4", 32, 64)

    def linear(**changes: object) -> Callable[[], None]:
        weight = packed_of(matrix, **changes)
        return lambda: lib.call("k2_linear", x, weight, y)

    check_all(
        [
            ("weight is missing", lambda: lib.call("k2_linear", x, None, y)),
            ("weight is bfloat16, expected packed panels", linear(dtype=1)),
            ("weight is no matrix", linear(ndim=3)),
            ("weight is no matrix", linear(shape=(32, 0))),
            ("weight points nowhere", linear(data=0)),
            ("weight is not aligned to 64 bytes", lambda: ops.linear(bf16(3, 64), moved(matrix))),
        ]
    )


def test_linear(lib: Library) -> None:
    x, weight = bf16(3, 64), drawn.matrix("fp8", 40, 64)
    check_all(
        [
            ("x has 65 columns, the weight 64 inputs", lambda: ops.linear(bf16(3, 65), weight)),
            ("y is int32, expected float32 or bfloat16", lambda: ops.linear(x, weight, torch.int32)),
            (
                r"y is \[3, 41\], expected \[3, 40\]",
                lambda: lib.call("k2_linear", described(x), packed_of(weight), described(bf16(3, 41))),
            ),
            ("y is missing", lambda: lib.call("k2_linear", described(x), packed_of(weight), None)),
        ]
    )


def test_linear_by_head() -> None:
    weight = drawn.matrix("bf16", 96, 64)  # two heads of 48 rows
    check_all(
        [
            ("x has 2 dimensions", lambda: ops.linear_by_head(bf16(3, 64), weight, 16)),
            ("do not fit each other head by head", lambda: ops.linear_by_head(bf16(3, 2, 32), weight, 16)),
            ("do not fit each other head by head", lambda: ops.linear_by_head(bf16(3, 5, 64), weight, 16)),
            ("do not fit each other head by head", lambda: ops.linear_by_head(bf16(3, 0, 64), weight, 16)),
            ("rows from 0 on, 8 of them, of a head of 48", lambda: ops.linear_by_head(bf16(3, 2, 64), weight, 8)),
            ("rows from 8 on, 16 of them, of", lambda: ops.linear_by_head(bf16(3, 2, 64), weight, 16, 8)),
            ("rows from 32 on, 32 of them, of", lambda: ops.linear_by_head(bf16(3, 2, 64), weight, 32, 32)),
            ("rows from -16 on, 32 of them, of", lambda: ops.linear_by_head(bf16(3, 2, 64), weight, 32, -16)),
            ("rows from 0 on, 0 of them, of", lambda: ops.linear_by_head(bf16(3, 2, 64), weight, 0)),
            ("a head of 12 are no whole panels", lambda: ops.linear_by_head(bf16(3, 8, 64), weight, 16)),
        ]
    )


def test_mlp() -> None:
    x, (gate, up, down) = bf16(3, 64), drawn.feed_forward("int4", 64, 96)
    other = drawn.feed_forward("bf16", 64, 96)
    misfit = "gate, up and down do not fit each other or x"
    check_all(
        [
            (misfit, lambda: ops.mlp(bf16(3, 96), gate, up, down)),
            (misfit, lambda: ops.mlp(x, gate, drawn.matrix("int4", 64, 64), down)),
            (misfit, lambda: ops.mlp(x, gate, drawn.matrix("int4", 96, 32), down)),
            (misfit, lambda: ops.mlp(x, gate, up, drawn.matrix("int4", 64, 64))),
            (misfit, lambda: ops.mlp(x, gate, other[1], down)),
            ("up is not aligned to 64 bytes", lambda: ops.mlp(x, gate, moved(up), down)),
            ("x is float32", lambda: ops.mlp(x.float(), gate, up, down)),
        ]
    )


def test_rms_norm() -> None:
    check_all(
        [
            ("x, weight and y do not fit each other", lambda: ops.rms_norm(bf16(3, 64), bf16(63), 1e-6)),
            ("weight is float32", lambda: ops.rms_norm(bf16(3, 64), torch.zeros(64), 1e-6)),
            ("x has 3 dimensions", lambda: ops.rms_norm(bf16(1, 3, 64), bf16(64), 1e-6)),
        ]
    )


def test_packing_int4() -> None:
    codes, scale = drawn.int4_parts(20, 64)
    small = torch.zeros(64, dtype=torch.uint8)
    check_all(
        [
            ("a scale covers four words of codes", lambda: ops.pack_int4(codes[:, :-1].contiguous(), scale)),
            ("a scale covers four words of codes", lambda: ops.pack_int4(codes[:-1], scale)),
            ("codes is int64, expected int32", lambda: ops.pack_int4(codes.long(), scale)),
            ("codes has 1 dimensions", lambda: ops.pack_int4(codes.flatten(), scale)),
            ("last dimension of codes is not contiguous", lambda: ops.pack_int4(codes.T.contiguous().T, scale)),
            (r"weight_scale is torch.float32 \[20, 2\]", lambda: ops.pack_int4(codes, scale.float())),
            (r"weight_scale is torch.bfloat16 \[40\]", lambda: ops.pack_int4(codes, scale.flatten())),
            ("no matrix with outputs", lambda: ops.pack_int4(codes[:0], scale[:0])),
            ("64 bytes are no packed int4 matrix", lambda: ops.pack_int4(codes, scale, out=small)),
        ]
    )
    assert not small.any(), "refused before anything is written"


def test_packing_bf16_and_fp8() -> None:
    weight, scale = drawn.fp8_parts(130, 64)
    room = torch.zeros(packed_bytes("bf16", 16, 64) + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 8
    off = room[start : start + packed_bytes("bf16", 16, 64)]
    check_all(
        [
            (r"weight is torch.float32 \[16, 64\]", lambda: ops.pack_bf16(torch.zeros(16, 64))),
            (r"weight is torch.bfloat16 \[64\]", lambda: ops.pack_bf16(bf16(64))),
            ("last dimension of weight is not contiguous", lambda: ops.pack_bf16(bf16(64, 16).T)),
            ("packed is not aligned to 64 bytes", lambda: ops.pack_bf16(bf16(16, 64), out=off)),
            ("no packed bf16 matrix", lambda: ops.pack_bf16(bf16(16, 64), out=room)),
            (r"scale is \[1, 1\], expected \[2, 1\]", lambda: ops.pack_fp8(weight, scale[:1])),
            ("scale is bfloat16, expected float32", lambda: ops.pack_fp8(weight, scale.to(torch.bfloat16))),
            ("weight is torch.float8_e5m2", lambda: ops.pack_fp8(weight.view(torch.float8_e5m2), scale)),
        ]
    )


def test_packing_into_a_matrix_of_another_shape(lib: Library) -> None:
    codes, scale = drawn.int4_parts(20, 64)
    weight, fp8_scale = drawn.fp8_parts(20, 64)
    wrong = packed_of(drawn.matrix("int4", 20, 96))
    expected = r"packed is int4 panels \[20, 96\], expected {} panels \[20, 64\]"
    nan = torch.full_like(scale, float("nan"))
    mine = packed_of(drawn.matrix("int4", 20, 64))
    check_all(
        [
            (expected.format("int4"), lambda: lib.call("k2_pack_int4", described(codes), described(scale), wrong)),
            (expected.format("int4"), lambda: lib.call("k2_unpack_int4", wrong, described(codes), described(scale))),
            (expected.format("bf16"), lambda: lib.call("k2_pack_bf16", described(bf16(20, 64)), wrong)),
            (
                expected.format("fp8"),
                lambda: lib.call("k2_pack_fp8", described(weight.view(torch.uint8)), described(fp8_scale), wrong),
            ),
            ("infinite or not a number", lambda: lib.call("k2_pack_int4", described(codes), described(nan), mine)),
            ("a scale covers four", lambda: lib.call("k2_unpack_int4", mine, described(codes), described(scale[:5]))),
        ]
    )


def test_routing() -> None:
    x, experts, (ids, weights) = bf16(4, 64), drawn.experts(3, 64, 32), drawn.routing(4, 3, 2)

    def moe(x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> Callable[[], Tensor]:
        return lambda: ops.moe_int4(x, ids, weights, experts)

    def with_id(value: int, dtype: torch.dtype = torch.int64) -> Tensor:
        changed = ids.clone().to(dtype)
        changed[2, 1] = value
        return changed

    check_all(
        [
            ("x is float32", moe(x=x.float())),
            (r"x is \[4, 96\], the experts have 64 inputs", moe(x=bf16(4, 96))),
            (r"x is \[64\]", moe(x=bf16(64))),
            ("ids is float32, expected int64 or int32", moe(ids=ids.float())),
            ("ids has 1 dimensions", moe(ids=ids[0])),
            ("weights is bfloat16, expected float32", moe(weights=weights.to(torch.bfloat16))),
            ("of 4, 3 and 4 tokens", moe(ids=ids[:3])),
            ("of 4, 4 and 3 tokens", moe(weights=weights[:3])),
            ("2 and 1 slots", moe(weights=weights[:, :1].contiguous())),
            ("no hidden size, no expert or no slot", moe(ids=ids[:, :0], weights=weights[:, :0])),
            ("last dimension of ids is not contiguous", moe(ids=ids.T.contiguous().T)),
            ("token 2 chooses expert 3 of 3", moe(ids=with_id(3))),
            ("token 2 chooses expert -1 of 3", moe(ids=with_id(-1))),
            ("token 2 chooses expert 2147483647 of 3", moe(ids=with_id(2**31 - 1, torch.int32))),
            (
                "These experts are bf16",
                lambda: ops.moe_int4(bf16(4, 64), ids, weights, drawn.experts(3, 64, 32, "bf16")),
            ),
            ("no hidden size, no expert or no slot", lambda: MoeSteps(x, ids, weights, 0, 32)),
            ("experts of width 0", lambda: MoeSteps(x, ids, weights, 3, 0)),
        ]
    )


def test_experts_that_arrive() -> None:
    x, experts, (ids, weights) = drawn.rows(4, 64), drawn.experts(3, 64, 32), drawn.routing(4, 3, 2)
    ids[:, 0] = torch.tensor([0, 1, 2, 0])
    step = MoeSteps(x, ids, weights, 3, 32)
    size = experts.records.shape[1]
    room = torch.zeros(size + 128, dtype=torch.uint8)
    off = -room.data_ptr() % 64 + 4
    null = torch.empty(0, dtype=torch.uint8)
    check_all(
        [
            ("expert 3 of 3", lambda: step.experts([3], [experts.records[0]])),
            ("expert -1 of 3", lambda: step.experts([0, -1], [experts.records[0], experts.records[1]])),
            ("expert 1 has tokens but no record", lambda: step.experts([0, 1], [experts.records[0], null])),
            ("record of expert 2 is not aligned", lambda: step.experts([2], [room[off : off + size]])),
            ("record of expert 2 is torch.uint8", lambda: step.experts([2], [room])),
            ("record of expert 2 is torch.int8", lambda: step.experts([2], [experts.records[2].view(torch.int8)])),
            ("2 experts have 1 records", lambda: step.experts([1, 2], [experts.records[1]])),
        ]
    )
    step.experts([2, 1, 0], [experts.records[e] for e in (2, 1, 0)])  # what was refused has left nothing behind
    assert torch.equal(step.finish(), ops.moe_int4(x, ids, weights, experts))
    check_all(
        [
            ("summed already", step.finish),
            ("summed already", lambda: step.experts([0], [experts.records[0]])),
        ]
    )


def test_finishing_too_early() -> None:
    x, experts = drawn.rows(4, 64), drawn.experts(3, 64, 32)
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 2]])
    step = MoeSteps(x, ids, torch.rand(4, 2), 3, 32)
    step.experts([0, 1], [experts.records[0], experts.records[1]])
    check_all([("expert 2 has 4 tokens and was never given", step.finish), ("summed already", step.finish)])


def test_finishing_into_the_wrong_place(lib: Library) -> None:
    x, (ids, weights) = bf16(0, 64), drawn.routing(0, 3, 2)

    def finish(y: Described | None) -> Callable[[], None]:
        handle = ctypes.c_void_p()
        lib.call(
            "k2_moe_begin", described(x), described(ids), described(weights), ctypes.c_int64(3), ctypes.c_int64(32),
            ctypes.c_int32(16),
            ctypes.byref(handle),
        )  # fmt: skip
        return lambda: lib.call("k2_moe_finish", handle, None, y)

    check_all(
        [
            ("y is missing", finish(None)),
            ("y is int32, expected float32 or bfloat16", finish(described(torch.zeros(0, 64, dtype=torch.int32)))),
            (r"y is \[1, 64\], expected \[0, 64\]", finish(described(bf16(1, 64)))),
        ]
    )


def test_shared_experts_that_do_not_fit() -> None:
    x, experts, (ids, weights) = drawn.rows(4, 64), drawn.experts(3, 64, 32), drawn.routing(4, 3, 2)
    gate, up, down = drawn.feed_forward("bf16", 64, 48)
    misfit = "shared experts' gate, up and down do not fit"
    check_all(
        [
            (misfit, lambda: ops.moe_int4(x, ids, weights, experts, (gate, up, up))),
            (misfit, lambda: ops.moe_int4(x, ids, weights, experts, drawn.feed_forward("bf16", 96, 48))),
            (misfit, lambda: ops.moe_int4(x, ids, weights, experts, (gate, up, drawn.matrix("bf16", 65, 48)))),
            ("the shared up is not aligned", lambda: ops.moe_int4(x, ids, weights, experts, (gate, moved(up), down))),
            ("2 shared matrices", lambda: ops.moe_int4(x, ids, weights, experts, (gate, up))),  # type: ignore[arg-type]
        ]
    )


def test_attention(lib: Library) -> None:
    q, cache, lengths = bf16(2, 3, 48), bf16(2, 20, 48), torch.tensor([20, 5])
    out = described(torch.zeros(2, 3, 32, dtype=torch.int32))

    def attend(
        q: Tensor = q, cache: Tensor = cache, lengths: Tensor = lengths, latent: int = 32
    ) -> Callable[[], Tensor]:
        return lambda: ops.mla_decode(q, cache, lengths, latent, 0.1)

    misfit = "q, cache, blocks, lengths and out do not fit each other"
    check_all(
        [
            ("q is float32", attend(q=q.float())),
            ("q has 2 dimensions", attend(q=q[0])),
            ("cache is float32", attend(cache=cache.float())),
            ("last dimension of cache is not contiguous", attend(cache=cache.transpose(1, 2).contiguous().mT)),
            ("lengths is int32, expected int64", attend(lengths=lengths.int())),
            (misfit, attend(cache=bf16(2, 20, 40))),
            (misfit, attend(cache=bf16(3, 20, 48))),
            (misfit, attend(lengths=lengths[:1])),
            (misfit, attend(q=bf16(2, 0, 48))),
            (misfit, attend(latent=49)),
            (misfit, attend(latent=0)),
            ("sequence 1 is 0 tokens long, the cache holds 1 to 20", attend(lengths=torch.tensor([20, 0]))),
            ("sequence 0 is 21 tokens long", attend(lengths=torch.tensor([21, 5]))),
            ("sequence 0 is -1 tokens long", attend(lengths=torch.tensor([-1, 5]))),
            (
                "out is int32, expected float32 or bfloat16",
                lambda: lib.call(
                    "k2_mla_decode", described(q), described(cache), None, described(lengths), ctypes.c_int64(32),
                    ctypes.c_float(0.1), out,
                ),
            ),
        ]
    )  # fmt: skip


def test_attention_in_blocks() -> None:
    q, pool, lengths = bf16(2, 3, 48), bf16(4, 16, 48), torch.tensor([20, 5])

    def attend(*table: list[int], lengths: Tensor = lengths, pool: Tensor = pool) -> Callable[[], Tensor]:
        return lambda: ops.mla_decode(q, pool, lengths, 32, 0.1, torch.tensor(table, dtype=torch.int32))

    check_all(
        [
            ("block 4 of sequence 0 is none of 4", attend([0, 4], [2, -1])),
            ("block -1 of sequence 0 is none of 4", attend([0, -1], [2, -1])),
            ("block -2 of sequence 1 is none of 4", attend([0, 1], [-2, -1])),
            (
                "blocks has 1 dimensions",
                lambda: ops.mla_decode(q, pool, lengths, 32, 0.1, torch.zeros(2, dtype=torch.int32)),
            ),
            ("do not fit each other", attend([0, 1])),
            ("sequence 0 is 33 tokens long, the cache holds 1 to 32", attend([0, 1], [2, 3], lengths=lengths + 13)),
            ("the cache holds 1 to 0", attend([0, 1], [2, 3], pool=pool[:, :0])),
            (
                "blocks is int64, expected int32",
                lambda: ops.mla_decode(q, pool, lengths, 32, 0.1, torch.tensor([[0, 1], [2, 3]])),
            ),
        ]
    )


def test_choices(lib: Library) -> None:
    before = lib.isa, lib.threads
    check_all(
        [
            ("instruction set nonsense is not built in, or not usable", lambda: lib.choose_isa("nonsense")),
            ("0 threads cannot be used: 1 to", lambda: lib.choose_threads(0)),
            ("100000 threads cannot be used", lambda: lib.choose_threads(100000)),
            ("no implementation 'gpu'", lambda: ops.chosen("gpu")),
        ]
    )
    assert (lib.isa, lib.threads) == before


def test_reading(lib: Library) -> None:
    room, total = torch.arange(64, dtype=torch.uint8), ctypes.c_uint64()
    lib.call("k2_read", described(room[8:24]), ctypes.byref(total))
    assert total.value == int(room[8:24].view(torch.int64).sum())
    check_all(
        [
            ("not aligned to 8 bytes", lambda: lib.call("k2_read", described(room[1:]), ctypes.byref(total))),
            ("buffer is int32", lambda: lib.call("k2_read", described(room.view(torch.int32)), ctypes.byref(total))),
        ]
    )
