"""Attention that looks at the last tokens, by rotary positions alone.

Every token has the same constant in the same dimensions, so a projection of it gives every token the same query and
the same key, and their score depends on the distance Δ only: Σ_p a_p cos(ω_p Δ) over the rotary pairs. With a_p equal
for all pairs slower than 1/`window` and 0 for the others, the score is flat within the window and falls by
`STEEPNESS` · log Δ behind it: attention is a mean over the recent past. Heads take turns with short and long windows.

The slowest pairs, which hardly turn, take the score of the nearest tokens back to 0. A query's and a key's size follow
1 / rms of the hidden state, which differs from token to token by some per cent; of a score of 30 that would be noise
enough to single tokens out, and what is written would grow from layer to layer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.model.rope import inverse_frequencies, rotation_scale, softmax_scale

WINDOWS = (6, 24)  # tokens: what changes from word to word, and what a sentence is about
STEEPNESS = 4.0  # weights fall as Δ^-4: what lies a thousand tokens back has no share
CONTENT_SCORE = 0.3  # standard deviation of the part of the scores that depends on what the tokens are
_SLOWEST = 1e-4  # angle per token; slower pairs would score the whole context alike
_SEEN = 4096  # tokens over which the mean is summed up


@dataclass(frozen=True)
class Recency:
    """One head's attention over the past."""

    query_P: Tensor  # float32: the query in each pair, where every key is 1; the softmax scale is divided out
    tokens: float  # how many tokens' mean it is like: 1 / Σ w²
    correlation: float  # of the means of neighbouring tokens


def recencies(config: ModelConfig) -> list[Recency]:
    """One for each of `WINDOWS`; head h has number h modulo their count."""
    frequency_P = inverse_frequencies(config).double()
    scale = softmax_scale(config) * rotation_scale(config) ** 2
    return [_recency(frequency_P, window, scale) for window in WINDOWS]


def _recency(frequency_P: Tensor, window: float, scale: float) -> Recency:
    back = max(1, len(frequency_P) // 8)
    taken_P = (frequency_P <= 1 / window) & (frequency_P > _SLOWEST)
    taken_P[-back:] = False
    step = math.log(frequency_P[0] / frequency_P[1])  # so many pairs a unit of log ω, each a step of the score
    amplitude_P = taken_P.double() * STEEPNESS * step
    amplitude_P[-back:] = -amplitude_P.sum() / back
    distance = torch.arange(_SEEN, dtype=torch.float64)
    share = torch.softmax(torch.cos(distance[:, None] * frequency_P) @ amplitude_P, 0)
    power = float(share.square().sum())
    correlation = float((share[1:] * share[:-1]).sum()) / power
    content = math.exp(CONTENT_SCORE**2)  # uneven weights: E[w²] grows by so much, E[w w'] of two queries does not
    return Recency((amplitude_P / scale).float(), 1 / (power * content), correlation / content)
