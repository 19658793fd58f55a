"""A small pool of threads that reads experts into slots: several at once, the needed before the guessed.

A record is cut into pieces, and the threads take pieces, not records: one expert alone gets the disk's full depth. What
is needed now (`urgent`) comes first, whole: a guess begins, or goes on, only when no urgent piece waits. Small records
that lie side by side in the file and are wanted together are one read over several slots.

A read ends in one of three states, and from then on its slot is the caller's: no thread touches it again. `done` means
that the record is there and was verified (`ExpertSource.finish`, in the thread that read the last piece), `failed`
that `error` says why not, `cancelled` that nobody wanted it any more. Cancelling stops between pieces.

Why threads and `preadv`, why 4 of them and 4 MiB: docs/decisions/expert-reading.md.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from karakoram.checkpoint.experts.direct import PAGE, DirectFile, view_of
from karakoram.checkpoint.experts.source import (
    ExpertSource,
    Extent,
    check_slot,
    finish_or_reread,
    of_expert,
    read_extents,
)
from karakoram.errors import CheckpointError, InputError

State = Literal["waiting", "reading", "done", "failed", "cancelled"]
FINISHED: frozenset[State] = frozenset({"done", "failed", "cancelled"})
MOST_SLOTS = 256  # of one preadv; Linux takes 1,024 (IOV_MAX)


class _Piece(NamedTuple):
    """Part of an extent: where it lies, and where in the room it goes."""

    file: DirectFile
    offset: int
    length: int
    needed: int
    at: int


class Read:
    """One expert on its way into `slot`. The pool changes it; everyone else looks."""

    def __init__(self, layer: int, expert: int, slot: Tensor, urgent: bool, extents: Sequence[Extent]) -> None:
        self.layer, self.expert, self.slot, self.urgent = layer, expert, slot, urgent
        self.state: State = "waiting"
        self.error: Exception | None = None  # why it failed
        self.seconds = 0.0  # from its first piece to its end
        self._extents = extents
        self._pieces: deque[_Piece] = deque()
        self._running = 0  # pieces that threads are at, and the verification
        self._stopped = False  # cancelled or failed: no more pieces
        self._room: Tensor | None = None
        self._began_s = 0.0

    @property
    def finished(self) -> bool:
        """Whether its slot is the caller's again."""
        return self.state in FINISHED

    def __repr__(self) -> str:
        return f"Read(layer {self.layer}, expert {self.expert}, {self.state})"


class _Job(NamedTuple):
    """One preadv: a piece of one read, or all of several."""

    reads: list[Read]
    piece: _Piece


class Readers:
    """The pool. Its methods may be called from several threads; none but `wait` and `close` blocks."""

    def __init__(self, source: ExpertSource, threads: int = 4, piece_bytes: int = 4 << 20) -> None:
        if threads < 1 or piece_bytes < PAGE or piece_bytes % PAGE:
            raise InputError(
                f"{threads} threads cannot read in pieces of {piece_bytes} bytes.",
                f"Take at least one, and a multiple of {PAGE}.",
            )
        self.source, self.piece_bytes = source, piece_bytes
        self.bytes_read = 0  # all that came, of cancelled reads too
        self.done = self.failed = self.cancelled = self.reread = self.joined = 0  # reads
        self._busy_s, self._busy_since, self._in_flight = 0.0, 0.0, 0
        self._lock = threading.RLock()  # re-entrant: a signal's handler may close while its thread is in here
        self._work = threading.Condition(self._lock)
        self._ended = threading.Condition(self._lock)
        self._closed = False
        self._waiting: dict[bool, dict[Read, None]] = {True: {}, False: {}}  # not begun, by urgency, in order
        self._open: dict[bool, deque[Read]] = {True: deque(), False: deque()}  # begun, with pieces left
        self._under_way: set[Read] = set()  # begun, not finished
        self._starts: dict[tuple[DirectFile, int], Read] = {}  # waiting and small, by where they begin
        self._urgent_left = 0  # neither done, failed nor cancelled
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a daemon's read must not end in memory that the interpreter has let go

    # ------------------------------------------------------------------------------------------ for the caller

    def submit(self, wanted: Sequence[tuple[int, int, Tensor]], urgent: bool) -> list[Read]:
        """Begin to read (layer, expert, slot) each, in this order. InputError, and none begins, for what cannot be."""
        reads = []
        for layer, expert, slot in wanted:
            check_slot(self.source, slot)
            reads.append(Read(layer, expert, slot, urgent, self.source.extents(layer, expert)))
        with self._lock:
            if self._closed:
                raise InputError("These readers are closed.", "Make new ones.")
            for read in reads:
                self._waiting[urgent][read] = None
                if self._is_small(read):
                    self._starts[_start(read)] = read
            self._urgent_left += len(reads) if urgent else 0
            self._work.notify_all()
        return reads

    def promote(self, reads: Iterable[Read]) -> None:
        """Guesses that are needed now."""
        with self._lock:
            for read in reads:
                if read.urgent or read.finished:
                    continue
                if read in self._waiting[False]:
                    del self._waiting[False][read]
                    self._waiting[True][read] = None
                elif read in self._open[False]:
                    self._open[False].remove(read)
                    self._open[True].append(read)
                read.urgent = True
                self._urgent_left += 1

    def cancel(self, reads: Iterable[Read]) -> None:
        """Those that have not begun never begin; those under way stop between pieces: wait for them.

        One whose last piece is there is still verified, and done.
        """
        with self._lock:
            for read in reads:
                if not read.finished:
                    self._stop(read)
                    if not read._running:
                        self._end(read, "cancelled")

    def wait(self, reads: Sequence[Read], timeout_s: float | None = None) -> list[Read]:
        """Block until at least one of them is finished, or for so long; all that are. None of none."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            while reads:
                if found := [read for read in reads if read.finished]:
                    return found
                left_s = None if until is None else until - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self._ended.wait(left_s)
        return []

    def idle(self) -> bool:
        """Nothing urgent waits or is under way."""
        with self._lock:
            return self._urgent_left == 0

    @property
    def seconds_busy(self) -> float:
        """Wall time in which at least one piece was being read."""
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._busy_since if self._in_flight else 0.0)

    def close(self) -> None:
        """Cancel everything and let the threads end, after the pieces they are at. Again does nothing."""
        with self._lock:
            self._closed = True
            self.cancel([*self._waiting[True], *self._waiting[False], *self._under_way])
            self._work.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        atexit.unregister(self.close)

    # ------------------------------------------------------------------------------------------ in the threads

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._carry_out(job)
            except Exception as error:  # noqa: BLE001  whatever it is, who waits must hear of it, and the pool goes on
                for read in job.reads:
                    self._fail(read, error)

    def _next(self) -> _Job | None:
        """The next piece to read; None when the pool is closed."""
        with self._lock:
            while not self._closed:
                if (job := self._take()) is not None:
                    self._in_flight += 1
                    if self._in_flight == 1:
                        self._busy_since = time.perf_counter()
                    return job
                self._work.wait()
        return None

    def _take(self) -> _Job | None:
        """What is needed before what is guessed, begun before waiting."""
        for urgent in (True, False):
            if not self._open[urgent] and self._waiting[urgent]:
                read = next(iter(self._waiting[urgent]))
                if len(together := self._neighbours(read)) > 1:
                    return self._joined(together)
                self._begin(read)
                self._open[urgent].append(read)
            if self._open[urgent]:
                read = self._open[urgent][0]
                piece = read._pieces.popleft()
                if not read._pieces:
                    self._open[urgent].popleft()
                read._running += 1
                return _Job([read], piece)
        return None

    def _begin(self, read: Read) -> None:
        self._forget(read)
        read.state, read._began_s = "reading", time.perf_counter()
        self._under_way.add(read)
        read._pieces.extend(piece for extent in read._extents for piece in _cut(extent, self.piece_bytes))

    def _is_small(self, read: Read) -> bool:
        """Whether it can be read together with neighbours: its bytes are one extent that goes straight to the slot."""
        alone = len(read._extents) == 1 and self.source.room_bytes == 0
        return alone and 2 * read._extents[0].length <= self.piece_bytes

    def _neighbours(self, read: Read) -> list[Read]:
        """The read and those that wait, as urgent as it, and follow it in the file, up to a piece."""
        found = [read]
        if not self._is_small(read):
            return found
        length = step = read._extents[0].length
        file, offset = _start(read)
        while length + step <= self.piece_bytes and len(found) < MOST_SLOTS:
            following = self._starts.get((file, offset + length))
            if following is None or following.urgent != read.urgent:
                break
            found.append(following)
            length += step
        return found

    def _joined(self, reads: list[Read]) -> _Job:
        for read in reads:
            self._begin(read)
            read._pieces.clear()
            read._running = 1
        self.joined += len(reads)
        file, offset = _start(reads[0])
        length = sum(read._extents[0].length for read in reads)
        return _Job(reads, _Piece(file, offset, length, length, 0))

    def _carry_out(self, job: _Job) -> None:
        piece, error, came = job.piece, None, 0
        try:
            if len(job.reads) == 1:
                views = [view_of(self._room_of(job.reads[0]))[piece.at : piece.at + piece.length]]
            else:
                views = [view_of(self._room_of(read)) for read in job.reads]
            piece.file.read(views, piece.offset, piece.needed)
            came = piece.needed
        except CheckpointError as found:
            error = found
        finally:
            self._count(came)
        for read in job.reads:
            if error is not None and len(job.reads) > 1:  # one bad place must not take its neighbours along
                self._read_alone(read)
            elif error is not None:
                self._fail(read, of_expert(error, read.layer, read.expert))
            else:
                self._after_piece(read)

    def _room_of(self, read: Read) -> Tensor:
        with self._lock:
            if read._room is None:
                read._room = self.source.room(read.slot)
            return read._room

    def _count(self, bytes_read: int) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self._in_flight -= 1
            if not self._in_flight:
                self._busy_s += time.perf_counter() - self._busy_since

    def _read_alone(self, read: Read) -> None:
        try:
            read_extents(read._extents, self._room_of(read), read.layer, read.expert)
        except CheckpointError as error:
            self._fail(read, error)
        else:
            self._after_piece(read)

    def _after_piece(self, read: Read) -> None:
        """The last one's thread verifies."""
        with self._lock:
            if read._running > 1 or read._pieces:
                read._running -= 1
                return
            if read._stopped:
                read._running = 0
                self._end(read, "failed" if read.error else "cancelled")
                return
        try:
            room = self._room_of(read)
            reread = finish_or_reread(self.source, read._extents, read.layer, read.expert, room, read.slot)
        except CheckpointError as error:
            self._fail(read, error)
            return
        with self._lock:
            read._running = 0
            self.reread += reread
            self._end(read, "done")

    # ------------------------------------------------------------------------------------------ with the lock held

    def _fail(self, read: Read, error: Exception) -> None:
        """A piece of it, or its verification, ended in an error."""
        with self._lock:
            if read.finished:
                return
            read.error = read.error or error
            self._stop(read)
            read._running -= 1
            if read._running <= 0:
                self._end(read, "failed")

    def _stop(self, read: Read) -> None:
        """No more pieces of it."""
        read._stopped = True
        self._forget(read)
        if read._pieces:
            read._pieces.clear()
            self._open[read.urgent].remove(read)

    def _forget(self, read: Read) -> None:
        """It does not wait any more."""
        self._waiting[read.urgent].pop(read, None)
        if self._starts.get(_start(read)) is read:
            del self._starts[_start(read)]

    def _end(self, read: Read, state: State) -> None:
        self._under_way.discard(read)
        if read._room is not None:
            self.source.release(read._room)
            read._room = None
        read.seconds = time.perf_counter() - read._began_s if read._began_s else 0.0
        read.state = state
        self._urgent_left -= read.urgent
        self.done += state == "done"
        self.failed += state == "failed"
        self.cancelled += state == "cancelled"
        self._ended.notify_all()


def _start(read: Read) -> tuple[DirectFile, int]:
    return read._extents[0].file, read._extents[0].offset


def _cut(extent: Extent, piece_bytes: int) -> Iterator[_Piece]:
    """An extent in pieces; what lies behind `needed` belongs to the last one."""
    for at in range(0, extent.length, piece_bytes):
        length = min(piece_bytes, extent.length - at)
        yield _Piece(extent.file, extent.offset + at, length, min(length, extent.needed - at), extent.at + at)
