"""The library, and every instruction set that it has here: what is missing is skipped with the reason."""

from collections.abc import Iterator

import pytest

from karakoram.kernels import ops
from karakoram.kernels.cpu.library import ISA_FLAGS, Library

_ISAS = ["scalar", *(pytest.param(name, marks=[pytest.mark.amx] if name == "amx" else []) for name in ISA_FLAGS)]


@pytest.fixture(scope="session")
def lib() -> Library:
    """The C++ library; skips where it cannot be built or is switched off."""
    found = ops.chosen()
    if found is None:
        pytest.skip("the C++ kernels are not there: no compiler, or KARAKORAM_ISA=reference")
    return found


@pytest.fixture(autouse=True)
def _as_at_first() -> Iterator[None]:
    """A row's bits may depend on the batch, whatever tests of engines have chosen for the process."""
    before = ops.deterministic(False)
    yield
    ops.deterministic(before)


@pytest.fixture(params=_ISAS)
def isa(request: pytest.FixtureRequest, lib: Library) -> Iterator[str]:
    """Each instruction set in turn, in use while the test runs."""
    if request.param not in lib.isas():
        pytest.skip(f"{request.param} is not built in, or not usable on this CPU")
    with ops.using(request.param):
        yield request.param
