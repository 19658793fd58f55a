"""From logits to tokens: bias, penalties, mask, temperature, top-k, top-p, min-p, one draw; in this order.

A draw is the inverse of the cumulative distribution at one number in [0, 1) that depends on (seed, position) alone, not
on the batch or on what was drawn before: so a seeded request gives the same tokens alone, in a batch, after preemption
and under speculation, wherever its logits are the same. Log-probabilities are the model's own, from untouched logits.

top-p keeps the smallest set of most likely tokens with at least that much probability; it is looked for among the
CANDIDATES best first, because a full sort of K2's 163,840 logits costs more than its head in a small batch.

Legend: n rows (one for each position that is drawn), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from karakoram.engine.request import Sampling, TokenLogprob
from karakoram.engine.sequence import Sequence

CANDIDATES = 1024
_MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class Row:
    """One position to be drawn: whose, at which place in the sequence, and what may come (None: anything)."""

    sequence: Sequence
    position: int
    mask: np.ndarray | None = None  # uint32 [⌈V / 32⌉], bit t % 32 of word t // 32


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for a place in a seeded output: SplitMix64 (Steele et al., OOPSLA 2014) of both."""
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1B54A32D192ED03) & _MASK64
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return (z >> 11) / 2**53


def draw(logits_nV: Tensor, rows: Ids[Row]) -> list[int]:
    """The next token of each row; writes into `logits_nV` (float32)."""
    values_nV = logits_nV.numpy() if logits_nV.device.type == "cpu" else logits_nV.cpu().numpy()
    for number, row in enumerate(rows):
        _adjust(values_nV[number], row)
    tokens = values_nV.argmax(-1)
    warm = [n for n, row in enumerate(rows) if row.sequence.request.sampling.temperature > 0]
    whole = [n for n in warm if not _cut(rows[n].sequence.request.sampling)]
    if whole:
        temperatures = np.array([rows[n].sequence.request.sampling.temperature for n in whole])[:, None]
        p = _weights(values_nV[whole], values_nV[whole].max(-1, keepdims=True), temperatures)
        tokens[whole] = _inverse(p, np.array([_chance(rows[n]) for n in whole]))
    cut = [n for n in warm if _cut(rows[n].sequence.request.sampling)]
    if cut:
        best, ids = torch.from_numpy(values_nV[cut]).topk(min(CANDIDATES, values_nV.shape[1]), -1)
        for place, number in enumerate(cut):
            tokens[number] = _draw_from_best(values_nV[number], best[place].numpy(), ids[place].numpy(), rows[number])
    return tokens.tolist()


def _cut(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def _chance(row: Row) -> float:
    return uniform(row.sequence.seed, row.position)


def _adjust(values_V: np.ndarray, row: Row) -> None:
    """Bias, penalties, ban and mask, in place."""
    sequence, sampling = row.sequence, row.sequence.request.sampling
    for token, bias in sampling.logit_bias.items():
        values_V[token] += bias
    if sampling.repetition_penalty != 1:
        seen = np.unique(np.array(sequence.tokens[: row.position]))
        kept = values_V[seen]
        values_V[seen] = np.where(kept > 0, kept / sampling.repetition_penalty, kept * sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.counts:
        seen = np.fromiter(sequence.counts.keys(), np.int64, len(sequence.counts))
        often = np.fromiter(sequence.counts.values(), np.float32, len(sequence.counts))
        values_V[seen] -= sampling.presence_penalty + sampling.frequency_penalty * often
    for token in sequence.request.banned:
        values_V[token] = -np.inf
    if row.mask is not None:
        allowed = np.unpackbits(row.mask.view(np.uint8), count=len(values_V), bitorder="little")
        np.copyto(values_V, -np.inf, where=allowed == 0)


def _inverse(p_nV: np.ndarray, chance_n: np.ndarray) -> np.ndarray:
    """For each row the first token at which the cumulative weight exceeds its chance's share of the whole."""
    sums = p_nV.cumsum(-1)
    at = (sums > (chance_n * sums[:, -1])[:, None]).argmax(-1)
    return at


def _draw_from_best(values_V: np.ndarray, best: np.ndarray, ids: np.ndarray, row: Row) -> int:
    """One draw after top-k, top-p and min-p, from logits sorted downwards."""
    sampling = row.sequence.request.sampling
    p = _weights(best, best[0], sampling.temperature)
    if 0 < sampling.top_k <= len(p):
        p = p[: sampling.top_k]
    elif len(p) < len(values_V):
        whole = _weights(values_V, best[0], sampling.temperature).sum()
        enough = p.sum() >= sampling.top_p * whole or p[-1] < sampling.min_p * p[0]
        if enough and not sampling.top_k:
            if sampling.top_p < 1:  # the share is of the whole, not of the best
                p = p[: int((p.cumsum() < sampling.top_p * whole).sum()) + 1]
            return _from(p, ids, row, 1.0)
        ids = np.argsort(-values_V, kind="stable")
        p = _weights(values_V[ids], best[0], sampling.temperature)
        p = p[: sampling.top_k] if sampling.top_k else p
    return _from(p, ids, row, sampling.top_p)


def _weights(values: np.ndarray, best: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Probabilities up to a factor, 1 for the best: in this order a temperature near 0 makes no infinity of it."""
    with np.errstate(over="ignore"):  # the others' distance may become one
        return np.exp((values.astype(np.float64) - best) / temperature)


def _from(p: np.ndarray, ids: np.ndarray, row: Row, top_p: float) -> int:
    if top_p < 1:
        p = p[: int((p.cumsum() < top_p * p.sum()).sum()) + 1]
    least = row.sequence.request.sampling.min_p
    if least > 0:
        p = p[p >= least * p[0]]
    return int(ids[_inverse(p[None], np.array([_chance(row)]))[0]])


def logprobs(logits_nV: Tensor, tokens: Ids[int], alternatives: Ids[int]) -> list[TokenLogprob]:
    """The model's log-probability of each token, with its row's best `alternatives`."""
    logs_nV = logits_nV.log_softmax(-1)
    out: list[TokenLogprob] = []
    for row, token, count in zip(logs_nV, tokens, alternatives, strict=True):
        best, ids = row.topk(count) if count else (row[:0], row[:0])
        pairs = zip(ids.tolist(), best.tolist(), strict=True)
        out.append(TokenLogprob(token, float(row[token]), tuple((int(i), float(v)) for i, v in pairs)))
    return out
