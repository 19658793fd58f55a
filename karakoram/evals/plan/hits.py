"""How many of the experts that a token wants are in memory, by how many fit there.

Of a recorded trace, replayed by the simulator with the store's own policy; or of typical routing: scores drawn with the
statistics of published traces, as `k2 synth` writes them into a router (`evals/synth/routing.py`): the most popular
quarter takes 71 % of the load and a token repeats a third of its experts. A part of each score is slow (it is what the
last tokens had in common), the rest is new with every token.

Legend: E experts, K experts per token, S tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from karakoram.engine.expert_store.laboratory.simulate import replay
from karakoram.engine.expert_store.opening import FLOOR_SHARE
from karakoram.engine.expert_store.trace import Pass, Trace

TYPICAL = "typical routing: a quarter of the experts takes 71 % of the load, a token repeats a third of its experts"
POLICY = "hybrid"  # the store's own, where nobody says another
SHARES = (0.03, 0.06, 0.12, 0.25, 0.37, 0.5, 0.75, 1.0)  # of all experts, at which traces are replayed
PROMPTS = (1, 4, 16, 64, 256, 512, 1024)  # tokens of a pass, for which distinct experts are counted
TYPICAL_TOKENS, TYPICAL_LAYERS = 1024, 4  # layers have nothing in common but the memory they share
FILLING_PASSES = 256  # a memory fills, before its hits are counted; no more than half of a trace
SLOW_TOKENS = 13.0  # over which the slow part of scores lasts: attention of synthetic models looks 6 and 24 back


@dataclass(frozen=True)
class Hits:
    """hit: (share of the experts in memory, share of demands found there), from (0, 0) to (1, 1), never falling.

    distinct: (tokens of a pass, share of a layer's experts that they visit together).
    """

    hit: tuple[tuple[float, float], ...]
    distinct: tuple[tuple[float, float], ...]
    source: str

    def rate(self, share: float) -> float:
        """Share of demands that `share` of the experts serve."""
        return _between(self.hit, min(max(share, 0.0), 1.0))

    def visited(self, tokens: int) -> float:
        """Share of a layer's experts that a pass of so many tokens visits."""
        return min(1.0, _between(self.distinct, min(tokens, self.distinct[-1][0])))


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def hits_of(trace: Trace, source: str) -> Hits:
    """Of a trace: what the store's policy would have found in memories of `SHARES`."""
    found, best = [(0.0, 0.0)], 0.0
    for share in SHARES[:-1]:
        best = max(best, hit_rate(trace, share))  # a policy's whim must not make memory harmful
        found.append((share, best))
    ids_SLK = torch.from_numpy(trace.ids_NLK().astype(np.int64))
    return Hits((*found, (1.0, 1.0)), tuple(distinct_shares(ids_SLK, trace.experts)), source)


def hit_rate(trace: Trace, share: float) -> float:
    """Share of demands that a memory of `share` of the experts serves once it has filled."""
    layers = len(trace.layers)
    capacity = max(1, int(share * layers * trace.experts))
    floor = int(FLOOR_SHARE * capacity / layers)
    filling = trace.passes[: min(FILLING_PASSES, len(trace.passes) // 2)]
    both, first = (replay(one, POLICY, capacity, floor) for one in (trace, replace(trace, passes=filling)))
    hits, misses = both.hits - first.hits, both.misses - first.misses
    return hits / (hits + misses)


def distinct_shares(ids_SLK: Tensor, experts: int) -> list[tuple[float, float]]:
    """Share of a layer's experts that passes of `PROMPTS` tokens visit, in the mean over layers and passes."""
    tokens, layers, _ = ids_SLK.shape
    found = []
    for size in (size for size in PROMPTS if size <= tokens):
        passes = tokens // size
        seen = torch.zeros(passes, layers, experts, dtype=torch.bool)
        grouped = ids_SLK[: passes * size].unflatten(0, (passes, size)).transpose(1, 2).flatten(2)
        found.append((float(size), float(seen.scatter_(-1, grouped, True).float().mean())))
    return found


def typical_hits(experts: int, chosen: int) -> Hits:
    """Of typical routing."""
    return hits_of(token_by_token(typical_ids(experts, chosen), experts), TYPICAL)


def token_by_token(ids_SLK: Tensor, experts: int) -> Trace:
    """A trace of passes of one token each."""
    none = np.zeros(1, np.int32)
    ids = ids_SLK.numpy().astype(np.uint16)
    passes = tuple(Pass(ids_LK[:, None], none, none) for ids_LK in ids)
    return Trace(tuple(range(ids.shape[1])), experts, ids.shape[2], passes)


def typical_ids(experts: int, chosen: int, tokens: int = TYPICAL_TOKENS, layers: int = TYPICAL_LAYERS) -> Tensor:
    """int64 [S, layers, K]: a trace of typical routing; always the same."""
    from karakoram.evals.synth.routing import solve

    routing = solve(experts, chosen)
    random = torch.Generator().manual_seed(1)
    fading = math.exp(-1 / SLOW_TOKENS)
    share = min(1.0, routing.token / fading)  # of the scores' variance that is slow
    bias_LE = torch.stack([routing.bias_E[torch.randperm(experts, generator=random)] for _ in range(layers)])
    slow_LE = torch.randn(layers, experts, generator=random)
    found = []
    for _ in range(tokens):
        slow_LE = fading * slow_LE + math.sqrt(1 - fading**2) * torch.randn(layers, experts, generator=random)
        new_LE = torch.randn(layers, experts, generator=random)
        scores_LE = torch.sigmoid(math.sqrt(share) * slow_LE + math.sqrt(1 - share) * new_LE) + bias_LE
        found.append(scores_LE.topk(chosen, -1).indices)
    return torch.stack(found)
