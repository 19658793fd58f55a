"""Which form of latent attention takes less time, by rates measured on this machine.

Both are the same mathematics (`attention.py`). For T new tokens of a sequence of S, together seeing P = T·S - T(T-1)/2:

  absorbed   P · H(2L + R) products, and T · H·L(N + V) to fold `kv_b_proj` into queries and results
  expanded   P · H(N + R + V) products, and S · H·L(N + V) to multiply out every token's keys and values once

Counting products, they meet near 150 new tokens at K2's sizes. A product's time differs between these four by a factor
of up to three, by the number of heads, the machine and what computes it; so four costs are measured (`measure`), when a
piece of a prompt comes for the first time that is long enough to ask, in some tenths of a second. They are kept in the
user's cache folder, for this processor, kind of implementation and shape: the choice is the same from run to run.

Legend: T new tokens, S tokens, H heads, L latent, N nope, R rope, V value.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from karakoram import env

FILE = "attention-forms.json"
REPEATS = 3  # the best counts: what else runs only takes away
SHORT, LONG = (16, 64), (16, 1024)  # T, S of two absorbed calls: their difference is pairs
FEW, MANY = (32, 512), (256, 512)  # of two expanded ones, every query seeing all S: likewise
LEAST_S = 1e-12  # where noise has made a difference negative


class Costs(NamedTuple):
    """Seconds, of one layer."""

    absorbed_pair: float  # a query and a token that it sees
    absorbed_query: float
    expanded_pair: float
    expanded_token: float

    def absorbs(self, queries: int, tokens: int) -> bool:
        """Whether so many new tokens of a sequence of `tokens`, themselves included, take less time absorbed."""
        pairs = queries * tokens - queries * (queries - 1) // 2
        absorbed = pairs * self.absorbed_pair + queries * self.absorbed_query
        return absorbed <= pairs * self.expanded_pair + tokens * self.expanded_token


Probe = Callable[[int, int], object]  # T, S -> one call, every query seeing all S


def measure(absorbed: Probe, expanded: Probe) -> Costs:
    """From two calls of each form."""
    short, long = _seconds(absorbed, *SHORT), _seconds(absorbed, *LONG)
    few, many = _seconds(expanded, *FEW), _seconds(expanded, *MANY)
    absorbed_pair = max(LEAST_S, (long - short) / (LONG[0] * LONG[1] - SHORT[0] * SHORT[1]))
    expanded_pair = max(LEAST_S, (many - few) / (MANY[0] * MANY[1] - FEW[0] * FEW[1]))
    return Costs(
        absorbed_pair,
        max(LEAST_S, short / SHORT[0] - SHORT[1] * absorbed_pair),
        expanded_pair,
        max(LEAST_S, few / FEW[1] - FEW[0] * expanded_pair),
    )


def _seconds(probe: Probe, queries: int, tokens: int) -> float:
    probe(queries, tokens)
    times: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        probe(queries, tokens)
        times.append(time.perf_counter() - began)
    return min(times)


_known: dict[str, Costs] = {}


def costs(what: str, absorbed: Probe, expanded: Probe) -> Costs:
    """Those of `what` (the implementation and the shape), measured now if they never were on this processor."""
    found = _known.get(what)
    if found is None:
        key = f"{_processor()}, {what}"
        found = _known[what] = _kept().get(key) or _keep(key, measure(absorbed, expanded))
    return found


@cache
def _processor() -> str:
    processor = env.processor()
    return f"{processor.model}, {processor.cores} cores"


def _kept() -> dict[str, Costs]:
    """What the file holds; nothing where there is none, or one that is damaged."""
    try:
        content = json.loads((env.cache_dir() / FILE).read_text())
        return {key: Costs(*map(float, values)) for key, values in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _keep(key: str, found: Costs) -> Costs:
    """Into the file, whole or not at all; where it cannot be written, for this process only."""
    folder = env.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump({**_kept(), key: found}, file, indent=1)
        os.replace(file.name, folder / FILE)
    except OSError:
        pass
    return found
