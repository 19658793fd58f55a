"""Traces by chance, with the statistics of published ones, and the replay of policies over them.

    python benchmarks/drawn_routing.py [--tokens 1000] [--layers 58]

A token's score of an expert is popularity + a · preference + √(1 − a²) · chance, and it visits the K experts that score
best. Popularity is fixed for each layer; the preference is a sequence's own and changes slowly: after `memory` tokens,
1/e of it is left. The weight of popularity is set so that the top quarter of the experts takes 71 % of the load, `a` so
that 33 % of a token's experts repeat (docs/expert-traces.md says from where). What is published does not say how long
preferences last, so several are tried.

The oracle knows popularity and preference as they are, and so each expert's true chance at the next token and at later
ones; of these it makes an index, the most hits per pass that keeping an expert for 1, 2, 4 … visits promises. It stands
beside the policies for what a policy could reach that estimates chances perfectly from ids. It is no proven bound.

Legend: L layers, E experts, T tokens, K experts per token.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karakoram.engine.expert_store.laboratory.simulate import belady, gap_closed, replay
from karakoram.engine.expert_store.policy import lowest
from karakoram.engine.expert_store.residency import Residency
from karakoram.engine.expert_store.trace import Pass, Trace

TOP_QUARTER, REPEAT = 0.71, 0.33
# V4-Flash: shares of a layer's experts, most popular first, and of the load that they take
_CURVE = ((1 / 32, 0.356), (1 / 16, 0.465), (1 / 8, 0.585), (1 / 4, 0.712), (1.0, 1.0))
SEQUENCE_TOKENS = 250


@dataclass(frozen=True)
class Drawn:
    """A trace, what drew it, and the statistics that it reached."""

    trace: Trace
    fixed_LE: np.ndarray
    preference_TLE: np.ndarray  # as it was at each token, without its weight
    threshold_L: np.ndarray  # mean score of the last expert chosen
    a: float
    memory: float
    top_quarter: float
    repeat: float


def draw(layers: int, experts: int, top_k: int, tokens: int, memory: float, seed: int = 0) -> Drawn:
    """A trace by chance; calibrated on four layers of 600 tokens."""
    popularity_E = _popularity(experts, top_k)
    weight, a, low, high = 1.0, 0.5, 0.0, 1.0
    for _ in range(12):  # bisection
        a = (low + high) / 2
        ids_TLK = _draw(popularity_E * weight, a, memory, (4, experts), top_k, 600, seed + 1)[0]
        quarter, repeat = _reached(ids_TLK, experts)
        weight *= TOP_QUARTER / quarter
        low, high = (a, high) if repeat < REPEAT else (low, a)
    ids_TLK, fixed_LE, preference_TLE, threshold_L = _draw(
        popularity_E * weight, a, memory, (layers, experts), top_k, tokens, seed
    )
    reached = _reached(ids_TLK, experts)
    return Drawn(_trace(ids_TLK, experts), fixed_LE, preference_TLE, threshold_L, a, memory, *reached)


def _popularity(experts: int, top_k: int) -> np.ndarray:
    """Scores with which a fixed threshold would choose each expert as often as the curve says."""
    x, y = np.log(np.array(_CURVE)).T
    at = np.log(np.arange(1, experts + 1) / experts)
    first = (y[1] - y[0]) / (x[1] - x[0])
    sums = np.exp(np.where(at < x[0], y[0] + first * (at - x[0]), np.interp(at, x, y)))
    share_E = np.sort(np.diff(sums, prepend=0))[::-1] * top_k / sums[-1]
    return np.array([NormalDist().inv_cdf(float(share)) for share in np.clip(share_E, 1e-6, 0.6)])


def _draw(
    popularity_E: np.ndarray, a: float, memory: float, shape: tuple[int, int], top_k: int, tokens: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids [T, L, K], popularity [L, E], preferences [T, L, E], mean threshold [L]."""
    random = np.random.default_rng(seed)
    fixed_LE = np.stack([random.permutation(popularity_E) for _ in range(shape[0])]).astype(np.float32)
    stays = math.exp(-1 / memory)
    ids_TLK = np.empty((tokens, shape[0], top_k), np.uint16)
    preference_TLE = np.empty((tokens, *shape), np.float32)
    threshold_L = np.zeros(shape[0])
    preference_LE = np.zeros(shape, np.float32)
    for token in range(tokens):
        drawn_LE = random.standard_normal(shape, dtype=np.float32)
        begins = token % SEQUENCE_TOKENS == 0
        preference_LE = drawn_LE if begins else stays * preference_LE + math.sqrt(1 - stays**2) * drawn_LE
        chance_LE = random.standard_normal(shape, dtype=np.float32)
        score_LE = fixed_LE + a * preference_LE + math.sqrt(1 - a * a) * chance_LE
        best_LK = np.argpartition(-score_LE, top_k - 1, -1)[:, :top_k]
        ids_TLK[token], preference_TLE[token] = best_LK, preference_LE
        threshold_L += np.take_along_axis(score_LE, best_LK, -1).min(-1) / tokens
    return ids_TLK, fixed_LE, preference_TLE, threshold_L


def _reached(ids_TLK: np.ndarray, experts: int) -> tuple[float, float]:
    used_TLE = np.zeros((*ids_TLK.shape[:2], experts), bool)
    np.put_along_axis(used_TLE, ids_TLK.astype(np.int64), True, -1)
    load_LE = np.sort(used_TLE.sum(0), -1)[:, ::-1]
    quarter = load_LE[:, : experts // 4].sum() / load_LE.sum()
    return float(quarter), float((used_TLE[1:] & used_TLE[:-1]).sum() / used_TLE[1:].sum())


def _trace(ids_TLK: np.ndarray, experts: int) -> Trace:
    _, layers, top_k = ids_TLK.shape
    passes = [
        Pass(ids_LK[:, None], np.array([token // SEQUENCE_TOKENS]), np.array([token % SEQUENCE_TOKENS]))
        for token, ids_LK in enumerate(ids_TLK)
    ]
    return Trace(tuple(range(layers)), experts, top_k, tuple(passes))


class Oracle:
    """The index of true chances: the best of (their sum over n visits) ÷ (passes that n visits take)."""

    VISITS = (1, 2, 4, 8, 16)

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn
        layers, self._experts = drawn.fixed_LE.shape
        self._layer = 0
        self._sums = np.zeros((len(self.VISITS), layers, self._experts), np.float32)
        ahead = (np.arange(layers)[None] - np.arange(layers)[:, None] - 1) % layers + 1
        self._passes = (ahead / layers).astype(np.float32)[..., None]  # until a layer's next visit

    def enter(self, layer: int) -> None:
        """See `Policy.enter`."""
        self._layer = layer

    def used(self, keys: np.ndarray, token: int) -> None:
        """See `Policy.used`."""
        layer, drawn = int(keys[0]) // self._experts, self._drawn
        total = np.zeros(self._experts)
        for visit in range(1, self.VISITS[-1] + 1):
            stays = drawn.a * math.exp(-visit / drawn.memory)
            mean_E = drawn.fixed_LE[layer] + stays * drawn.preference_TLE[token, layer]
            # Φ by a logistic curve, within 0.01
            total += 1 / (1 + np.exp(-1.702 * (mean_E - drawn.threshold_L[layer]) / math.sqrt(1 - stays * stays)))
            if visit in self.VISITS:
                self._sums[self.VISITS.index(visit), layer] = total

    def victim(self, evictable: np.ndarray) -> int:
        """See `Policy.victim`."""
        passes = self._passes[self._layer]
        index = self._sums[0] / passes
        for sums, visits in zip(self._sums[1:], self.VISITS[1:], strict=True):
            np.maximum(index, sums / (passes + visits - 1), out=index)
        return lowest(index.reshape(-1), evictable)

    def keeps(self, victim: int) -> bool:
        """See `Policy.keeps`."""
        return False


def oracle_hits(drawn: Drawn, capacity: int) -> int:
    """Hits of the oracle."""
    trace = drawn.trace
    memory = Residency(len(trace.layers), trace.experts, capacity, Oracle(drawn))
    for one in trace.passes:
        for layer, ids_TK in enumerate(one.ids_LTK):
            for key in memory.demand(layer, np.unique(ids_TK))[1]:
                memory.admit(key)
            memory.release(layer)
    return memory.hits


def main() -> None:
    """A table for each memory of preferences."""
    parser = argparse.ArgumentParser(description="Policies over traces by chance.")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=58)
    asked = parser.parse_args()
    for memory in (1.5, 16.0, 64.0):
        drawn = draw(asked.layers, 384, 8, asked.tokens, memory)
        print(f"memory {memory:g} tokens: top quarter {drawn.top_quarter:.1%}, repeat {drawn.repeat:.1%}", flush=True)
        for share in (0.12, 0.25, 0.5):
            capacity = round(share * asked.layers * 384)
            found = [replay(drawn.trace, name, capacity) for name in ("lru", "lfu", "hybrid")]
            best = belady(drawn.trace, capacity)
            demands = best.hits + best.misses
            knows = oracle_hits(drawn, capacity)
            cells = [f"{one.policy} {one.hit_rate:.1%}" for one in (*found, best)]
            closed = gap_closed(found[2], found[0], best)
            cells.append(f"oracle {knows / demands:.1%}")
            cells.append(
                f"closed: hybrid {closed:.0%}, oracle {(knows - found[0].hits) / (best.hits - found[0].hits):.0%}"
            )
            print(f"  {share:.0%}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
