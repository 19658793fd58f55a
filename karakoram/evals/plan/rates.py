"""Numbers of a machine, as the predictions take them: times by size, read off straight lines between measured points.

Every time is of the kernels and readers themselves, not of the hardware's promise: what a single row of int4 experts
takes is measured as such, not derived from gigabytes per second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karakoram.kernels.packed import Kind


@dataclass(frozen=True)
class Curve:
    """Seconds by size, both ascending and positive; a straight line between points and beyond the last two."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Curve":
        """From measurements: more never takes less time, so a slower smaller one counts for the larger too."""
        found: list[tuple[float, float]] = []
        for size, seconds in sorted(points):
            found.append((float(size), max(seconds, found[-1][1] if found else 0.0)))
        return cls(tuple(found))

    def at(self, size: float) -> float:
        """Seconds; 0 for nothing, and towards it in proportion below the first point."""
        first = self.points[0]
        if size <= first[0]:
            return first[1] * max(size, 0.0) / first[0]
        if len(self.points) == 1:
            return first[1] * size / first[0]
        pairs = list(zip(self.points, self.points[1:]))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)

    def faster(self, times: float) -> "Curve":
        """The same, so many times as fast."""
        return Curve(tuple((size, seconds / times) for size, seconds in self.points))


@dataclass(frozen=True)
class Card:
    """An accelerator: bytes/s of int4 experts that it multiplies with one row, and that come from the host."""

    read_bytes_per_s: float
    transfer_bytes_per_s: float
    call_s: float  # of one layer's experts there and back, whatever their number


@dataclass(frozen=True)
class Rates:
    """One machine, for one shape of experts and one size of records.

    expert      rows an expert gets -> seconds of the kernel for that expert, with all threads
    linear      rows -> seconds a weight of other matrices, by format
    reads       records asked for at once -> seconds until all are in memory and verified, by the store's own readers
    depths      readers at work -> bytes/s of a long burst, for people: predictions take `reads`
    decode_pair_s, prefill_pair_s    a head's attention to one token of the context: absorbed; expanded
    whole_layer_s, fed_layer_s       what a layer costs beside its weights: all in one call; fed by a store
    """

    expert: Curve
    linear: Mapping[Kind, Curve]
    reads: Curve
    decode_pair_s: float
    prefill_pair_s: float
    whole_layer_s: float
    fed_layer_s: float
    memory_bytes_per_s: float
    one_thread_bytes_per_s: float
    matmul_flops_per_s: float
    threads: int
    depths: tuple[tuple[float, float], ...] = ()
    card: Card | None = None

    def with_disk(self, times: float) -> "Rates":
        """A disk so many times as fast."""
        return replace(self, reads=self.reads.faster(times))

    def with_memory(self, times: float) -> "Rates":
        """Processor and memory so many times as fast: every kernel, but not what a layer costs beside them."""
        return replace(
            self,
            expert=self.expert.faster(times),
            linear={kind: curve.faster(times) for kind, curve in self.linear.items()},
            decode_pair_s=self.decode_pair_s / times,
            prefill_pair_s=self.prefill_pair_s / times,
        )

    def to_dict(self, record_bytes: int, expert_flops_per_row: int) -> dict[str, Any]:
        """JSON-ready, in the units that people compare machines by."""
        most, seconds = self.reads.points[-1]
        rows = self.expert.points[-1][0]
        return {
            "memory_gb_per_s": self.memory_bytes_per_s / 1e9,
            "memory_one_thread_gb_per_s": self.one_thread_bytes_per_s / 1e9,
            "threads": self.threads,
            "matmul_tflops": self.matmul_flops_per_s / 1e12,
            "expert_gb_per_s": record_bytes / self.expert.at(1) / 1e9,
            "expert_tflops": expert_flops_per_row * rows / self.expert.at(rows) / 1e12,
            "disk_gb_per_s": most * record_bytes / seconds / 1e9,
            "disk_gb_per_s_by_burst": {f"{n:g}": n * record_bytes / s / 1e9 for n, s in self.reads.points},
            "disk_gb_per_s_by_depth": {f"{depth:g}": rate / 1e9 for depth, rate in self.depths},
            "layer_us": 1e6 * self.fed_layer_s,
            "card": None
            if self.card is None
            else {
                "read_gb_per_s": self.card.read_bytes_per_s / 1e9,
                "transfer_gb_per_s": self.card.transfer_bytes_per_s / 1e9,
            },
        }
