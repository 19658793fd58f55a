"""What a benchmark runs on: so many threads, of torch and of the kernels, and one instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from karakoram import env
from karakoram.errors import InputError
from karakoram.kernels import ops

REFERENCE = "reference"  # in place of an instruction set: plain torch


def default_threads() -> int:
    """Those of the kernels, else one for each core that this process may use."""
    library = ops.chosen()
    return env.processor().cores if library is None else library.threads


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within it, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def running(isa: str | None, threads: int) -> Iterator[str]:
    """Within it, torch and the kernels run on `threads`, the kernels on `isa` (None: the one in use, or plain torch).

    Gives the name of the instruction set, `REFERENCE` for plain torch. Raises InputError for what is not there.
    """
    cores = env.processor().cores
    if not 1 <= threads <= cores:
        raise InputError(f"{threads} threads cannot be used here.", f"This process may use 1 to {cores}.")
    with torch_threads(threads):
        if isa == REFERENCE or (isa is None and ops.chosen() is None):
            yield REFERENCE
        else:
            _check_isa(isa)
            with ops.using(isa, threads) as name:
                yield name


def _check_isa(isa: str | None) -> None:
    library = ops.chosen("cpu")
    assert library is not None
    usable = library.isas()
    if isa is not None and isa not in usable:
        others = [name for name in usable if name != "amx_emulated"]  # that one is for tests
        raise InputError(
            f"The instruction set {isa} cannot be used here.", f"Choose one of {', '.join([*others, REFERENCE])}."
        )


def implementation_of(isa: str) -> str:
    """The `implementation` argument of the operations, for a name that `running` gave."""
    return REFERENCE if isa == REFERENCE else "cpu"
