"""What the disk gives when it is asked as the store asks: whole records past the page cache, so many at once."""

import time

import numpy as np

from karakoram.checkpoint.experts import ExpertSource, aligned_bytes
from karakoram.engine.expert_store.readers import Readers
from karakoram.errors import KarakoramError

SECONDS = 0.7


def records_gb_per_s(source: ExpertSource, together: int, seconds: float = SECONDS, seed: int = 0) -> float:
    """GB/s while records are read, `together` at random places, the next ones when all are there and verified."""
    draw = np.random.default_rng(seed)
    slots = aligned_bytes(together, source.slot_bytes)
    everything = len(source.layers) * source.experts
    readers = Readers(source)
    try:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            places = [divmod(int(key), source.experts) for key in draw.choice(everything, together, replace=False)]
            wanted = [(source.layers[at], expert, slot) for (at, expert), slot in zip(places, slots, strict=True)]
            reads = left = readers.submit(wanted, urgent=True)
            while left:
                readers.wait(left)
                left = [read for read in left if not read.finished]
            if failed := next((read.error for read in reads if read.error is not None), None):
                raise KarakoramError(f"A record could not be read: {failed}") from failed
        return readers.bytes_read / readers.seconds_busy / 1e9
    finally:
        readers.close()
