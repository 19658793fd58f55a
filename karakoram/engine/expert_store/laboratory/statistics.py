"""What a trace tells about routing: load, skew, how much repeats, and how well one layer foretells the next.

A share is of 1. Held-out figures are learned on the first half of a trace and measured on the second, so that a table
that has merely memorised a short trace shows no skill.

Legend: L layers with experts, E experts, N tokens, K experts per token.
"""

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from karakoram.engine.expert_store.trace import Trace
from karakoram.errors import InputError

TOP_SHARES = (0.03, 0.06, 0.125, 0.25)  # of a layer's experts, most popular first


@dataclass(frozen=True)
class Load:
    """How unevenly experts are used, of one layer or as the mean of layers.

    top        share of the load that the most popular of `TOP_SHARES` take
    entropy    of the load, as a share of that of an even one: 1 is even
    gini       0 is even, 1 is all on one expert
    unused     share of the experts that were never used
    """

    top: tuple[float, ...]
    entropy: float
    gini: float
    unused: float


@dataclass(frozen=True)
class Statistics:
    """Of one trace; None where the trace does not say.

    loads, load            per layer, and their mean
    repeat, repeat_mean    share of a token's experts that the token before it in its sequence used; by chance K/E
    next_layer             for each layer but the first: share of its experts among the K that layer before foretells by
                           co-occurrence, held out
    popular                the same for the K most popular experts, held out: what a fixed list would find
    guess_recall           share of a token's experts that had been guessed, over layers that had guesses
    guess_precision        share of the guesses that came true
    rank_scores            mean share of a token's scores of its best, second best, … expert
    """

    tokens: int
    passes: int
    load_LE: np.ndarray
    loads: tuple[Load, ...]
    load: Load
    repeat: tuple[float, ...] | None
    repeat_mean: float | None
    next_layer: tuple[float, ...] | None
    popular: tuple[float, ...] | None
    guess_recall: float | None
    guess_precision: float | None
    rank_scores: tuple[float, ...] | None


def statistics_of(trace: Trace) -> Statistics:
    """Everything at once. Raises InputError for a trace without a token."""
    ids_NLK = trace.ids_NLK().astype(np.int64)
    if not len(ids_NLK):
        raise InputError("The trace has no complete pass.", "Record a longer one.")
    load_LE = np.stack([np.bincount(ids.ravel(), minlength=trace.experts) for ids in ids_NLK.transpose(1, 0, 2)])
    loads = tuple(load_of(load_E) for load_E in load_LE)
    repeat = _repeat(trace, ids_NLK)
    next_layer, popular = _foretold(ids_NLK, trace.experts)
    recall, precision = _guesses(trace)
    return Statistics(
        tokens=len(ids_NLK),
        passes=len(trace.passes),
        load_LE=load_LE,
        loads=loads,
        load=Load(
            tuple(np.mean([load.top for load in loads], axis=0).tolist()),
            *(float(np.mean([getattr(load, name) for load in loads])) for name in ("entropy", "gini", "unused")),
        ),
        repeat=repeat,
        repeat_mean=None if repeat is None else float(np.mean(repeat)),
        next_layer=next_layer,
        popular=popular,
        guess_recall=recall,
        guess_precision=precision,
        rank_scores=_rank_scores(trace),
    )


def load_of(load_E: np.ndarray) -> Load:
    """Of one layer's counts, at least one of them positive."""
    experts, total = len(load_E), load_E.sum()
    down_E = np.sort(load_E)[::-1] / total
    top = tuple(float(down_E[: max(1, round(share * experts))].sum()) for share in TOP_SHARES)
    used = down_E[down_E > 0]
    entropy = float(-(used * np.log(used)).sum() / math.log(experts)) if experts > 1 else 1.0
    gini = float(1 - 2 * (down_E[::-1].cumsum().mean() - 0.5 / experts))  # twice the area over Lorenz's curve
    return Load(top, entropy, max(0.0, gini), float((load_E == 0).mean()))


def _repeat(trace: Trace, ids_NLK: np.ndarray) -> tuple[float, ...] | None:
    """Per layer; tokens of unknown sequence are taken for one stream."""
    sequences_N = np.concatenate([one.sequences_T for one in trace.passes])
    order = np.argsort(sequences_N, kind="stable")
    same = sequences_N[order][1:] == sequences_N[order][:-1]
    if not same.any():
        return None
    now, before = order[1:][same], order[:-1][same]
    rates = []
    for layer in range(ids_NLK.shape[1]):
        used_NE = _one_hot(ids_NLK[:, layer], trace.experts)
        rates.append(float((used_NE[now] & used_NE[before]).sum() / used_NE[now].sum()))
    return tuple(rates)


def _one_hot(ids_NK: np.ndarray, experts: int) -> np.ndarray:
    used_NE = np.zeros((len(ids_NK), experts), bool)
    np.put_along_axis(used_NE, ids_NK, True, axis=-1)
    return used_NE


def _foretold(ids_NLK: np.ndarray, experts: int) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Recall of K experts by co-occurrence with the layer before, and by popularity; learned on the first half."""
    count, layers, top_k = ids_NLK.shape
    half = count // 2
    if layers < 2 or not half:
        return None, None
    by_layer, by_popularity = [], []
    before = _one_hot(ids_NLK[:, 0], experts).astype(np.float32)
    for layer in range(1, layers):
        here = _one_hot(ids_NLK[:, layer], experts).astype(np.float32)
        popularity_E = here[:half].mean(0)
        uses_E = before[:half].sum(0)
        # P(j here | i before), with one visit of popularity so that what was never seen says nothing
        given_EE = (before[:half].T @ here[:half] + popularity_E) / (uses_E[:, None] + 1)
        foretold_NE = before[half:] @ given_EE
        best_NK = np.argpartition(-foretold_NE, top_k - 1, axis=-1)[:, :top_k]
        by_layer.append(float(np.take_along_axis(here[half:], best_NK, -1).sum() / here[half:].sum()))
        often_K = np.argsort(-popularity_E, kind="stable")[:top_k]
        by_popularity.append(float(here[half:][:, often_K].sum() / here[half:].sum()))
        before = here
    return tuple(by_layer), tuple(by_popularity)


def _guesses(trace: Trace) -> tuple[float | None, float | None]:
    wanted = guessed = right = 0
    for one in trace.passes:
        for ids_TK, guess_G in zip(one.ids_LTK, one.guesses or (), strict=False):
            if len(guess_G):
                union = np.unique(ids_TK)
                wanted += len(union)
                guessed += len(guess_G)
                right += int(np.isin(guess_G, union).sum())
    return (right / wanted, right / guessed) if guessed else (None, None)


def _rank_scores(trace: Trace) -> tuple[float, ...] | None:
    total, count = np.zeros(trace.top_k), 0
    for one in trace.passes:
        if one.scores_LTK is not None:
            scores = np.sort(one.scores_LTK.astype(np.float64), axis=-1)[..., ::-1]
            sums = scores.sum(-1, keepdims=True)
            shares = np.divide(scores, sums, out=np.zeros_like(scores), where=sums > 0)
            total += shares.reshape(-1, trace.top_k).sum(0)
            count += shares[..., 0].size
    return tuple((total / count).tolist()) if count else None


# ------------------------------------------------------------------------------------------------- the heat map

# Dark to bright, and as bright in grey: a few colours of matplotlib's inferno (public domain), straight lines between
_COLOURS = np.array([[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]])


def heat(load_LE: np.ndarray) -> np.ndarray:
    """Counts -> uint8 colours [L, E, 3]: dark is none, the brightest is four times a layer's mean load or more."""
    mean_L1 = np.maximum(load_LE.mean(-1, keepdims=True), 1e-12)
    at_LE = np.clip(load_LE / mean_L1 / 4, 0, 1) ** 0.5 * (len(_COLOURS) - 1)
    below_LE = np.minimum(at_LE.astype(int), len(_COLOURS) - 2)
    part_LE1 = (at_LE - below_LE)[..., None]
    return np.rint(_COLOURS[below_LE] * (1 - part_LE1) + _COLOURS[below_LE + 1] * part_LE1).astype(np.uint8)


def png(colours_HWC: np.ndarray, scale: int = 1) -> bytes:
    """An RGB picture [height, width, 3] as PNG (ISO 15948), each pixel `scale` pixels wide and high."""
    big = colours_HWC.repeat(scale, 0).repeat(scale, 1)
    height, width = big.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = big.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body
