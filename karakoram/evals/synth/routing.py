"""What the router shall do, as numbers: biases of the experts, and correlations of scores between tokens and layers.

The score of an expert is sigmoid(z) + bias with z close to a standard normal number over tokens. Then everything that
is published follows from three things, each found by bisection on simulated scores:
  spread        of the biases              -> how much of the load the most popular quarter takes
  token         correlation of z with the token before's  -> how many of its experts a token repeats
  layer         correlation of z with what the same router makes of the hidden state one layer earlier -> recall

The form of the curve of popularity is V4-Flash's: the top 1/32, 1/16, 1/8, 1/4 of the experts take 35.6, 46.5, 58.5
and 71.2 % of the load; between the points it is a line in logarithms. An expert's share of the tokens is cut off at
`MOST_OFTEN`: with few experts and many of them per token (Moonlight: 6 of 64) the curve would ask for more than all
tokens, and favourites alone would repeat more than a third.

Legend: E experts, K experts per token, S simulated tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Shares of 1. Of published traces (`TARGET`), or measured."""

    top_quarter_load: float  # of all selections, those of the most popular quarter of a layer's experts
    repeat: float  # of a token's experts, those of the token before
    next_layer_recall: float  # of a token's experts, those that their router chose one layer early


# What issue and traces say: 25 % of the experts take 71 % of the load (V4-Flash), 29 to 38 % repeat, the next router's
# recall is 59 to 77 % (K3, GLM).
TARGET = Statistics(top_quarter_load=0.71, repeat=0.33, next_layer_recall=0.65)

CURVE = ((1 / 32, 0.356), (1 / 16, 0.465), (1 / 8, 0.585), (1 / 4, 0.712), (1.0, 1.0))  # V4-Flash
MOST_OFTEN = 0.4
_SIMULATED_SCORES = 1 << 19
_STEPS = 12  # of bisection: 2^-12 of the range


@dataclass(frozen=True)
class Routing:
    """The solution for E experts of which K are chosen."""

    bias_E: Tensor  # float32, most popular first, mean 0
    token: float
    layer: float


@lru_cache(maxsize=8)
def solve(experts: int, chosen: int, target: Statistics = TARGET, seed: int = 0) -> Routing:
    """Biases and correlations that reach `target`, or come as near as they can: where a token chooses a large part of
    few experts (nano: 4 of 16), popularity alone repeats more than a third."""
    random = torch.Generator().manual_seed(seed)
    count = max(_SIMULATED_SCORES // experts, 1)
    z_SE, other_SE = (torch.randn(count, experts, generator=random) for _ in range(2))
    form_E = _biases(experts, chosen)

    def top_quarter(spread: float) -> float:
        load_E = _choose(z_SE, form_E * spread, chosen).sum(0)
        return float(load_E.sort(descending=True).values[: max(1, experts // 4)].sum() / load_E.sum())

    bias_E = form_E * _bisect(top_quarter, target.top_quarter_load, 0.0, 4.0)
    first_SE = _choose(z_SE, bias_E, chosen)

    def overlap(correlation: float) -> float:
        mixed_SE = correlation * z_SE + math.sqrt(1 - correlation**2) * other_SE
        return float((first_SE & _choose(mixed_SE, bias_E, chosen)).sum() / first_SE.sum())

    token = _bisect(overlap, target.repeat, 0.0, 1.0)
    return Routing(bias_E, token, _bisect(overlap, target.next_layer_recall, 0.0, 1.0))


def _biases(experts: int, chosen: int) -> Tensor:
    """Biases with which each expert is chosen as often as the curve says, were the threshold fixed: float32 [E]."""
    share_E = chosen * _load(experts)
    quarter = max(1, experts // 4)
    for part in (share_E[:quarter], share_E[quarter:]):  # what is cut off goes to the others of the same part
        total = part.sum()
        for _ in range(32):
            part.clamp_(max=MOST_OFTEN)
            free = part < MOST_OFTEN
            part[free] *= ((total - part[~free].sum()) / part[free].sum()).clamp(min=1.0) if free.any() else 1.0
    z_E = math.sqrt(2) * torch.erfinv(2 * share_E.clamp(1e-6, 1 - 1e-6) - 1)  # Φ⁻¹
    bias_E = torch.sigmoid(z_E)
    return (bias_E - bias_E.mean()).float()


def _load(experts: int) -> Tensor:
    """Each expert's share of the load by `CURVE`, most popular first: float64 [E], summing to 1."""
    points = [(math.log(x), math.log(y)) for x, y in CURVE]
    sums = [0.0]
    for rank in range(1, experts + 1):
        x = math.log(rank / experts)
        (x0, y0), (x1, y1) = next(
            ((a, b) for a, b in zip(points, points[1:]) if x <= b[0] + 1e-12), (points[-2], points[-1])
        )
        sums.append(math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
    load_E = torch.tensor(sums, dtype=torch.float64).diff()
    return load_E.sort(descending=True).values / load_E.sum()


def _choose(z_SE: Tensor, bias_E: Tensor, chosen: int) -> Tensor:
    """Which experts win: bool [S, E]."""
    best_SK = (torch.sigmoid(z_SE) + bias_E).topk(chosen, dim=-1, sorted=False).indices
    return torch.zeros(z_SE.shape, dtype=torch.bool).scatter_(-1, best_SK, True)


def _bisect(rising: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where `rising` reaches `wanted`, or the end that is nearest to it."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
