"""Muon's operations against their twins: the same bits, whatever the sizes, threads and neighbours in a stack."""

import ctypes
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from karakoram.errors import InputError
from karakoram.kernels import muon, ops, reference
from karakoram.kernels.cpu.library import Library, describe
from karakoram.train.optim.newton_schulz import SETS, orthogonalize

JORDAN = SETS["jordan"].steps
# 1, 3 and 16 rows more or less than panels, sums of more than 512 products, matrices that are divided among threads
SHAPES = [
    (1, 1, 1), (2, 1, 8), (3, 3, 3), (2, 16, 16), (3, 17, 31), (1, 33, 77), (5, 48, 100), (2, 65, 129), (3, 128, 256),
    (1, 160, 513), (1, 100, 1000), (1, 300, 301), (2, 24, 1024), (1, 256, 128), (2, 77, 33), (1, 700, 20), (3, 8, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fast(lib: Library) -> Library:
    if muon.library() is None:
        pytest.skip(f"{lib.isa} has no Muon: torch's products serve")
    return lib


@pytest.fixture
def two_threads(fast: Library) -> Iterator[None]:
    """Of the pool and, since it is asked whether to use them, of torch."""
    before = torch.get_num_threads()
    try:
        with ops.using(threads=2):
            torch.set_num_threads(2)
            yield
    except InputError:
        pytest.skip("this process may use one core only")
    finally:
        torch.set_num_threads(before)


def unit(*shape: int) -> Tensor:
    stack = torch.randn(shape)
    return (stack / torch.linalg.matrix_norm(stack, keepdim=True)).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_twins_bit_for_bit(shape: tuple[int, int, int]) -> None:
    stack, norms = unit(*shape) * 3, torch.full((shape[0],), 3.02).bfloat16()
    found = muon.newton_schulz(stack, norms, JORDAN, implementation="cpu")
    assert torch.equal(found, reference.newton_schulz(stack, norms, JORDAN))


@pytest.mark.parametrize("name", list(SETS))
def test_every_set_of_coefficients(name: str) -> None:
    stack, norms = unit(3, 40, 72), torch.full((3,), SETS[name].shrink)
    found = muon.newton_schulz(stack, norms, SETS[name].steps)
    assert torch.equal(found, reference.newton_schulz(stack, norms, SETS[name].steps))


@pytest.mark.parametrize("shape", [(3, 128, 256), (1, 144, 200), (7, 24, 40), (1, 300, 130)], ids=str)
def test_with_one_thread_and_with_two(two_threads: None, shape: tuple[int, int, int]) -> None:
    stack, norms = unit(*shape), torch.ones(shape[0])
    with ops.using(threads=1):
        expected = muon.newton_schulz(stack, norms, JORDAN)
    for _ in range(3):
        assert torch.equal(muon.newton_schulz(stack, norms, JORDAN), expected)


def test_a_matrix_does_not_see_its_neighbours() -> None:
    """Zeros stay zeros, what is no number stays with its own matrix, and both end."""
    stack = unit(5, 40, 56)
    expected = muon.newton_schulz(stack, torch.ones(5), JORDAN)
    stack[1] = 0
    stack[2, 7, 9], stack[3, 0, 0] = float("nan"), float("inf")
    found = muon.newton_schulz(stack, torch.ones(5), JORDAN)
    assert torch.equal(found[[0, 4]], expected[[0, 4]])
    assert not found[1].any() and found[2].isnan().all() and not found[3].isfinite().any()
    assert not muon.newton_schulz(stack[1:2], torch.tensor([1e-38]), JORDAN).any()


def test_given_places_and_strides() -> None:
    stack, out = unit(3, 40, 24), torch.empty(5, 40, 24, dtype=torch.bfloat16).fill_(7)
    before = stack.clone()
    expected = muon.newton_schulz(stack, torch.ones(3), JORDAN)
    assert muon.newton_schulz(stack, torch.ones(3), JORDAN, out[1:4]).data_ptr() == out[1:4].data_ptr()
    assert torch.equal(out[1:4], expected) and bool((out[[0, 4]] == 7).all()) and torch.equal(stack, before)
    assert torch.equal(muon.newton_schulz(stack.mT, torch.ones(3), JORDAN), expected.mT)
    assert muon.newton_schulz(stack[:0], torch.ones(0), JORDAN).shape == (0, 40, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mu", "scale", "nesterov"), [(0.95, 1.0, True), (0.9, 0.37, True), (0.3, 2.0, False)])
def test_momentum_is_the_twins_bit_for_bit(dtype: torch.dtype, mu: float, scale: float, nesterov: bool) -> None:
    ours, theirs = torch.randn(3, 70, 111), torch.zeros(3, 70, 111)
    theirs.copy_(ours)
    for _ in range(3):
        gradient = torch.randn(3, 70, 111).to(dtype)
        found = muon.momentum(gradient, ours, mu, scale, nesterov, "cpu")
        assert torch.equal(found, reference.momentum(gradient, theirs, mu, scale, nesterov))
        assert torch.equal(ours, theirs)
    whole = muon.momentum(gradient.mT, ours.mT, mu, scale, nesterov)  # not as it lies in memory: the twin serves
    assert torch.equal(whole, reference.momentum(gradient, theirs, mu, scale, nesterov).mT)


def test_update_is_the_twins_bit_for_bit() -> None:
    ours, step = torch.randn(5, 70, 111), torch.randn(5, 70, 111).bfloat16()
    theirs = ours.clone()
    squares = muon.update(ours, step, 0.998, -0.037, "cpu")
    expected = reference.update(theirs, step, 0.998, -0.037)
    assert torch.equal(ours, theirs)
    assert torch.allclose(squares, expected, rtol=1e-5)  # sums of 39,000 squares in another order
    assert torch.equal(
        muon.update(ours.mT, step.mT, 0.998, -0.037), reference.update(theirs.mT, step.mT, 0.998, -0.037)
    )
    assert torch.equal(ours, theirs)


Weights = list[tuple[Tensor, Tensor, Tensor]]
# of one call: stacks, halves of a fused tensor, a large one that is divided, one row, one number, standing ones
TOGETHER = [(3, 24, 72), (2, 2, 40, 24), (200, 300), (1, 16), (1, 1), (72, 24), (5, 33, 47)]


def drawn(dtype: torch.dtype = torch.float32, size: float = 1.0) -> Weights:
    return [((torch.randn(s) * size).to(dtype), torch.randn(s) * size, torch.randn(s)) for s in TOGETHER]


def by_twins(
    weights: Weights, by: list[float], keep: float, name: str, rule: tuple[float, float, bool]
) -> list[tuple[Tensor, Tensor]]:
    """Momentum and weight after a step of the twins, operation by operation."""
    after = []
    for (gradient, buffer, weight), factor in zip(weights, by, strict=True):
        buffer, weight = buffer.clone(), weight.clone()
        direction = reference.momentum(gradient, buffer, rule[0], rule[1], rule[2])
        with ops.using("scalar"):
            made = orthogonalize(direction, name)
        reference.update(weight, made, keep, factor)
        after.append((buffer, weight))
    return after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "rule"),
    [("jordan", (0.95, 1.0, True)), ("polar_express_5", (0.9, 0.37, False)), ("you", (0.3, 2.0, True))],
)
def test_whole_steps_are_the_twins_bit_for_bit(dtype: torch.dtype, name: str, rule: tuple[float, float, bool]) -> None:
    weights, by = drawn(dtype), [-0.01 * (i + 1) for i in range(len(TOGETHER))]
    expected = by_twins(weights, by, 0.998, name, rule)
    squares = muon.step(weights, by, 0.998, SETS[name].steps, rule, SETS[name].shrink)
    for (_, buffer, weight), after in zip(weights, expected, strict=True):
        assert torch.equal(buffer, after[0]) and torch.equal(weight, after[1])
    # jordan's and the others' singular values end between 0.3 and 1.3: Σ O² is near the number of them
    sides = torch.tensor([float(min(s[-2:]) * math.prod(s[:-2])) for s in TOGETHER])
    assert bool(((squares > 0.1 * sides) & (squares < 1.5 * sides)).all())


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e14])
def test_whole_steps_of_numbers_whose_squares_vanish_or_overflow(size: float) -> None:
    weights, by = drawn(size=size), [-0.01] * len(TOGETHER)
    expected = by_twins(weights, by, 1.0, "jordan", (0.95, 1.0, True))
    muon.step(weights, by, 1.0, JORDAN, (0.95, 1.0, True))
    for (_, buffer, weight), after in zip(weights, expected, strict=True):
        assert torch.equal(buffer, after[0]) and torch.equal(weight, after[1])


def test_whole_steps_of_zero_and_of_what_is_no_number_stay_with_their_matrix() -> None:
    gradient, buffer, weight = (torch.randn(4, 24, 40) for _ in range(3))
    gradient[0] = buffer[0] = 0
    gradient[1, 3, 5] = float("nan")
    gradient[2, 3, 5] = float("inf")
    expected = by_twins([(gradient[3:], buffer[3:], weight[3:])], [-0.1], 1.0, "jordan", (0.95, 1.0, True))[0]
    before = weight[0].clone()
    muon.step([(gradient, buffer, weight)], [-0.1], 1.0, JORDAN, (0.95, 1.0, True))
    assert torch.equal(weight[0], before) and weight[1].isnan().all() and not weight[2].isfinite().all()
    assert torch.equal(weight[3:], expected[1])


def test_whole_steps_with_one_thread_and_with_two(two_threads: None) -> None:
    weights, by = drawn(), [-0.01] * len(TOGETHER)
    alone = [(g, m.clone(), w.clone()) for g, m, w in weights]
    with ops.using(threads=1):
        squares = muon.step(alone, by, 0.9, JORDAN, (0.95, 1.0, True))
    assert torch.equal(muon.step(weights, by, 0.9, JORDAN, (0.95, 1.0, True)), squares)
    for (_, buffer, weight), (_, buffer_1, weight_1) in zip(weights, alone, strict=True):
        assert torch.equal(buffer, buffer_1) and torch.equal(weight, weight_1)


def test_what_a_whole_step_takes() -> None:
    gradient, buffer, weight = (torch.zeros(2, 16, 24) for _ in range(3))
    assert muon.takes(gradient, buffer, weight) and muon.takes(gradient.bfloat16(), buffer, weight)
    assert not muon.takes(gradient, buffer, weight.bfloat16()) and not muon.takes(gradient.double(), buffer, weight)
    assert not muon.takes(gradient.mT, buffer.mT, weight.mT)
    halves = torch.zeros(2, 32, 24).unflatten(1, (2, 16))[:, 0]
    assert muon.takes(halves, buffer, weight)  # each matrix is in one piece, the stack is not
    large = torch.zeros(1, 1025)
    assert not muon.takes(large, large, large)
    assert muon.step([], [], 1.0, JORDAN, (0.95, 1.0, True)).shape == (0,)
    for words, tensors in (
        ("not of one shape", (gradient[:1], buffer, weight)),
        ("not contiguous", (gradient, buffer, torch.zeros(2, 16, 32)[..., :24])),
        ("buffer is bfloat16", (gradient, buffer.bfloat16(), weight)),
        ("has 1 dimensions", (gradient[0, 0], buffer[0, 0], weight[0, 0])),
    ):
        with pytest.raises(InputError, match=words):
            muon.step([tensors], [-0.1], 1.0, JORDAN, (0.95, 1.0, True))


def test_passes_with_one_thread_and_with_two(two_threads: None) -> None:
    buffer, gradient = torch.randn(3, 333, 77), torch.randn(3, 333, 77)
    with ops.using(threads=1):
        alone = buffer.clone()
        step = muon.momentum(gradient, alone, 0.95)
        squares = muon.update(alone, step, 0.99, -0.01)
    assert torch.equal(muon.momentum(gradient, buffer, 0.95), step)
    assert torch.equal(muon.update(buffer, step, 0.99, -0.01), squares) and torch.equal(alone, buffer)


def test_instruction_sets_without_muon_use_the_twin() -> None:
    stack, norms = unit(2, 16, 24), torch.ones(2)
    with ops.using("scalar"):
        assert muon.library() is None
        assert torch.equal(muon.newton_schulz(stack, norms, JORDAN), reference.newton_schulz(stack, norms, JORDAN))
        with pytest.raises(InputError, match="scalar has no Muon"):
            muon.newton_schulz(stack, norms, JORDAN, implementation="cpu")


def test_what_does_not_fit_is_refused(fast: Library) -> None:
    stack, norms, steps, out = unit(2, 16, 24), torch.ones(2), torch.tensor(JORDAN), unit(2, 16, 24)
    buffer, number = torch.zeros(5), ctypes.c_float

    def newton(x: Tensor, n: Tensor, s: Tensor, o: Tensor) -> Callable[[], None]:
        return lambda: fast.call("k2_newton_schulz", describe(x), describe(n), describe(s), 1, describe(o))

    def update(w: Tensor, u: Tensor, place: object) -> Callable[[], None]:
        return lambda: fast.call("k2_muon_update", describe(w), describe(u), number(1), number(1), 1, place)

    sums = ctypes.byref(number())
    for words, call in (
        ("x is float32", newton(stack.float(), norms, steps, out)),
        ("x, norms and out do not fit", newton(stack, norms[:1], steps, out)),
        ("x, norms and out do not fit", newton(stack, norms, steps, out[:, :15])),
        ("steps are not", newton(stack, norms, steps[:0], out)),
        ("steps are not", newton(stack, norms, torch.ones(5, 2), out)),
        ("must be contiguous", newton(unit(2, 16, 32)[..., :24], norms, steps, out)),
        ("must be contiguous", newton(stack, norms, torch.ones(5, 4)[:, :3], out)),
        ("do not have the same size", update(buffer, torch.zeros(4).bfloat16(), sums)),
        ("has no place", update(buffer, torch.zeros(5).bfloat16(), None)),
    ):
        with pytest.raises(InputError, match=words):
            call()
    with pytest.raises(InputError, match="do not have the same size"):
        fast.call(
            "k2_muon_momentum", describe(buffer), describe(buffer[:4]), number(0.9), number(0.1), number(1), 1, 1,
            describe(torch.zeros(5).bfloat16()),
        )  # fmt: skip
