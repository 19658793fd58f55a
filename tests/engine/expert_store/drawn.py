"""Small traces of hypothesis' and by chance, and policies written down naively."""

import numpy as np
from hypothesis import strategies as st

from karakoram.engine.expert_store.trace import Pass, Trace


def trace_of(ids_TLK: np.ndarray, experts: int, tokens_a_pass: int = 1) -> Trace:
    """One sequence."""
    count, layers, top_k = ids_TLK.shape
    passes = []
    for begin in range(0, count, tokens_a_pass):
        ids_LTK = ids_TLK[begin : begin + tokens_a_pass].transpose(1, 0, 2).astype(np.uint16)
        here = np.arange(begin, begin + ids_LTK.shape[1], dtype=np.int32)
        passes.append(Pass(ids_LTK, np.zeros_like(here), here))
    return Trace(tuple(range(1, layers + 1)), experts, top_k, tuple(passes))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Skewed ones: 1-4 layers, 2-9 experts, up to 60 tokens in passes of 1-3."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    top_k = draw(st.integers(1, min(3, experts)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity_LE = random.standard_normal((layers, experts)) * draw(st.sampled_from([0.0, 1.0, 3.0]))
    score_TLE = popularity_LE + random.gumbel(size=(draw(st.integers(1, 60)), layers, experts))
    ids_TLK = np.argsort(-score_TLE, axis=-1)[..., :top_k]
    return trace_of(ids_TLK, experts, draw(st.integers(1, 3)))


def largest_demand(trace: Trace) -> int:
    """Experts that one layer asks for in one pass, at most."""
    return max(len(np.unique(ids_TK)) for one in trace.passes for ids_TK in one.ids_LTK)
