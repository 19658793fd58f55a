"""What ranks do together while a checkpoint is written or read: one's failure is everybody's, and nobody waits for it.

The group is gloo's and belongs to the checkpoints alone: a save in the background must not mix its messages with those
of the training. Without torch.distributed there is one rank, and everything here is a plain call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from karakoram.errors import KarakoramError, TrainingError

T = TypeVar("T")


class Ranks:
    """This process among those that save or load together; every rank makes one at the same time.

    alone: one rank that asks nobody, whatever others do
    """

    def __init__(self, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo") if together else None
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1

    def each(self, do: Callable[[], T]) -> list[T]:
        """What `do` gives on each rank. Where one fails all raise: that one its error, the others TrainingError."""
        value, failure = None, "an error that it reports itself"
        try:
            value, failure = do(), None
        except (OSError, SafetensorError, KarakoramError) as error:
            failure = reason_of(error)
            raise
        finally:  # the others wait for an answer, whatever happened here
            answers = self._exchange((value, failure))
        for rank, (_, failure) in enumerate(answers):
            if failure is not None:
                raise TrainingError(f"Rank {rank} failed: {failure}.", "")
        return [value for value, _ in answers]

    def first(self, do: Callable[[], T]) -> T:
        """What `do` gives on rank 0, on all ranks; where it fails, it raises on all."""
        return self.each(lambda: do() if self.rank == 0 else None)[0]  # pyright: ignore[reportReturnType]

    def _exchange(self, own: Any) -> list[Any]:
        if self.group is None:
            return [own]
        answers: list[Any] = [None] * self.world
        with self.talking():
            dist.all_gather_object(answers, own, group=self.group)
        return answers

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Whatever talks to other ranks: raises TrainingError where one of them is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            # gloo's: a connection that closed, or its timeout
            raise TrainingError(
                f"Another rank is gone: {str(error).splitlines()[0]}", "Start all ranks again with --resume"
            ) from error

    def close(self) -> None:
        """Give the group back."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None


def reason_of(error: BaseException) -> str:
    """An error in a few words, without the full stop."""
    if isinstance(error, KarakoramError):
        return error.what.rstrip(".")
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
