"""Which rank was lost, when communication breaks.

A rank that dies takes its connections with it: gloo's peers fail at once, with the address of a socket and no rank.
So every rank counts up a number in the store where the ranks met, from a thread, twice a second; when communication
breaks, the one whose number stands still is lost. A rank that ends with an error of its own leaves it in the store
first. The first verdict counts: who leaves after it is not lost. NCCL does not notice a dead peer before its timeout:
there torchrun ends the others.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from karakoram.errors import TrainingError

BEAT_S = 0.5
STILL_S = 3.0  # six beats: a busy machine delays a thread, not for so long
LEADER_STILL_S = 60.0  # a thread of a process that tokenises waits for Python's lock, but not for so long
LEAVE_S = 1.0  # rank 0 may hold the store: the others read the verdict there


class Pulse:
    """This rank's sign of life, and a look at the others'."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = PrefixStore("pulse", store), rank, world

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat inside; a communication that breaks becomes a TrainingError that names who was lost."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat, args=(stop,), daemon=True, name="pulse")
        thread.start()
        try:
            yield
        except RuntimeError as error:
            if not is_communication(error):
                self._tell(error)
                raise
            what = self._verdict()
            raise TrainingError(
                f"{what} Rank {self.rank} cannot go on without it.",
                "Look into that rank's output, then start again with --resume.",
            ) from error
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            stop.set()
            thread.join()

    def follow(self, what: str, leads: bool) -> None:
        """Say that `what` is done, or wait until the leader says so: a barrier would give up after its timeout.

        Raises TrainingError where a rank failed meanwhile, or the leader gave no sign of life; call it while beating.
        """
        done = f"done/{what}"
        if leads:
            self.store.set(done, "1")
            return
        heard, since = self._beats(0), time.monotonic()
        while not self.store.check([done]):
            time.sleep(BEAT_S / 5)
            now = self._beats(0)
            heard, since = (heard, since) if now == heard else (now, time.monotonic())
            if self.store.check(["verdict"]):
                what_happened = self.store.get("verdict").decode()
            elif time.monotonic() - since > LEADER_STILL_S:
                what_happened = f"Rank 0 was lost: it gave no sign of life for {LEADER_STILL_S:.0f} s."
            else:
                continue
            raise TrainingError(
                f"{what_happened} Rank {self.rank} cannot go on without it.",
                "Look into that rank's output, then start again.",
            )

    def _beat(self, stop: threading.Event) -> None:
        beats = 0
        with suppress(RuntimeError):  # the store went away with the rank that kept it: the main thread hears of that
            while not stop.wait(BEAT_S if beats else 0):
                beats += 1
                self.store.set(f"beat/{self.rank}", str(beats))

    def _tell(self, error: BaseException) -> None:
        words = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500].rstrip(".")
        with suppress(RuntimeError):
            self.store.compare_set("verdict", "", f"Rank {self.rank} failed: {words}.")
            time.sleep(LEAVE_S if self.rank == 0 else 0)

    def _verdict(self) -> str:
        """Who was lost, in a sentence; waits until somebody's beats have stood still, or said what failed."""
        try:
            since = {rank: (self._beats(rank), time.monotonic()) for rank in range(self.world) if rank != self.rank}
            patience = time.monotonic() + 3 * STILL_S
            while not self.store.check(["verdict"]) and time.monotonic() < patience:
                time.sleep(BEAT_S / 5)
                now = {rank: self._beats(rank) for rank in since}
                since = {r: old if now[r] == old[0] else (now[r], time.monotonic()) for r, old in since.items()}
                still = [r for r, (_, at) in since.items() if time.monotonic() - at > STILL_S]
                if still:
                    self.store.compare_set("verdict", "", _names(still))
            if not self.store.check(["verdict"]):
                return "Communication broke although every rank is alive: a rank waits elsewhere, or the network fails."
            verdict = self.store.get("verdict").decode()
            time.sleep(LEAVE_S if self.rank == 0 else 0)
            return verdict
        except RuntimeError:
            return "Rank 0 was lost: it kept the store where the ranks met."

    def _beats(self, rank: int) -> bytes:
        return self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""


def is_communication(error: RuntimeError) -> bool:
    """Whether an error is of the connection to other ranks, not of what this rank computed.

    gloo's are plain RuntimeErrors that begin with the source file in brackets (torch 2.13).
    """
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _names(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"Rank {ranks[0]} was lost: it gave no sign of life for {STILL_S:.0f} s."
    return f"Ranks {', '.join(map(str, ranks))} were lost: they gave no sign of life for {STILL_S:.0f} s."
