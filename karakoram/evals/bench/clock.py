"""How long a call takes: the median of several, after a warm-up, within a bounded time."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

CALLS = (5, 400)  # at least, at most
BUDGET_S = 2.0  # beyond the least number of calls, none begins after this
LIMIT_S = 120.0  # not even the least number is completed: a row of minutes is told with fewer calls


@dataclass(frozen=True)
class Timing:
    """The median of `calls` calls, the first of which had the number `first`: earlier ones were warm-up."""

    seconds: float
    calls: int
    first: int

    @property
    def numbers(self) -> range:
        """The numbers of the calls that were timed."""
        return range(self.first, self.first + self.calls)


def median_seconds(call: Callable[[int], object], budget_s: float = BUDGET_S, limit_s: float = LIMIT_S) -> Timing:
    """Time `call(0)`, `call(1)`, …; a call that takes its number can rotate its inputs.

    One call warms up, two where they are quick. `limit_s` bounds what was timed, except for the call in progress.
    """
    least, most = CALLS
    began = time.perf_counter()
    call(0)
    first = 1
    if time.perf_counter() - began < budget_s / least:
        call(1)
        first = 2
    times: list[float] = []
    spent = 0.0
    while len(times) < most and spent < (budget_s if len(times) >= least else limit_s):
        began = time.perf_counter()
        call(first + len(times))
        times.append(time.perf_counter() - began)
        spent += times[-1]
    return Timing(statistics.median(times), len(times), first)
