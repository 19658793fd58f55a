"""Two bits of four: the twin, the round trip, and how far it is from the truth."""

import pytest
import torch

from karakoram.errors import FormatError, InputError
from karakoram.formats import int4_group
from karakoram.kernels import ops, packed
from tests.kernels import drawn


@pytest.fixture
def matrix() -> packed.PackedMatrix:
    return drawn.feed_forward("int4", 96, 64)[0]


def test_the_library_makes_what_the_twin_makes(matrix: packed.PackedMatrix) -> None:
    shadow = ops.shadow_make(matrix.data)
    assert torch.equal(shadow, packed.shadow_make(matrix.data))
    assert shadow.numel() * 9 == matrix.data.numel() * 5
    out = torch.empty_like(matrix.data)
    ops.shadow_expand(shadow, out)
    assert torch.equal(out, packed.shadow_expand(shadow))


def test_a_shadow_of_a_shadow_is_itself(matrix: packed.PackedMatrix) -> None:
    out = torch.empty_like(matrix.data)
    shadow = ops.shadow_make(matrix.data)
    ops.shadow_expand(shadow, out)
    assert torch.equal(ops.shadow_make(out), shadow)


def test_codes_are_off_by_two_at_most_and_scales_by_nothing(matrix: packed.PackedMatrix) -> None:
    out = torch.empty_like(matrix.data)
    ops.shadow_expand(ops.shadow_make(matrix.data), out)
    (codes, scale), (near, same) = (
        packed.unpack_int4(packed.PackedMatrix(data, "int4", matrix.outputs, matrix.inputs))
        for data in (matrix.data, out)
    )
    assert torch.equal(scale, same)
    off = int4_group.unpack(codes, matrix.inputs).int() - int4_group.unpack(near, matrix.inputs).int()
    assert int(off.abs().max()) == 2
    assert abs(float(off.float().mean())) < 0.1  # no sign of its own: 6,144 codes of deviation 1.1 leave 0.014


def test_bytes_that_are_no_panels_are_refused(matrix: packed.PackedMatrix) -> None:
    with pytest.raises(FormatError, match="no int4 panels"):
        ops.shadow_make(matrix.data[:-1])
    with pytest.raises(FormatError, match="no int4 panels"):
        ops.shadow_make(matrix.data.view(torch.int8))
    if ops.chosen() is not None:
        with pytest.raises(InputError, match="shadow"):
            ops.shadow_expand(ops.shadow_make(matrix.data), torch.empty(5, dtype=torch.uint8))
