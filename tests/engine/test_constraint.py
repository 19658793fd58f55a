"""The engine's side of a constraint: what is filled is obeyed, `left` counts down, each token is told once."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from karakoram.engine import masks
from karakoram.engine.engine import Engine
from karakoram.engine.request import Request, Sampling
from karakoram.model.transformer import Transformer
from tests.engine import models
from tests.engine.heard import Watched, all_blocks_back, gathered, greedy, run, run_all

PROMPT = models.prompt(40)


class Allows:
    """Allows a set for each place, the last one for all later places; keeps what it was asked and told."""

    def __init__(self, *sets: Sequence[int] | None, model_rows: int = 3) -> None:
        self.sets, self.words = sets, model_rows
        self.lefts: list[int] = []
        self.accepted: list[int] = []
        self.threads: set[str] = set()
        self._busy = threading.Lock()

    def fill(self, row: np.ndarray, left: int) -> bool:
        assert self._busy.acquire(blocking=False), "fill and accept at once"
        try:
            assert row.dtype == np.uint32 and row.shape == (self.words,)
            self.threads.add(threading.current_thread().name)
            self.lefts.append(left)
            allowed = self.sets[min(len(self.accepted), len(self.sets) - 1)]
            if allowed is None:
                return False
            row[:] = 0
            for token in allowed:
                row[token // 32] |= np.uint32(1 << token % 32)
            return True
        finally:
            self._busy.release()

    def accept(self, token: int) -> None:
        assert self._busy.acquire(blocking=False), "fill and accept at once"
        self.accepted.append(token)
        self._busy.release()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(seed=5), Sampling(seed=5, top_p=0.9)], ids=str)
def test_what_is_filled_is_obeyed(tiny: Transformer, sampling: Sampling) -> None:
    sets = [[5], [6, 7], [95, 0], None, [31, 32, 63, 64]]
    constraint = Allows(*sets)
    with Engine(tiny) as engine:
        result = run(engine, Request("a", PROMPT, 20, sampling, constraint=constraint))
    assert result.finish == "length" and len(result.tokens) == 20
    for place, token in enumerate(result.tokens):
        allowed = sets[min(place, 4)]
        assert allowed is None or token in allowed
    assert constraint.accepted == list(result.tokens)
    assert constraint.lefts == list(range(20, 0, -1))
    assert len(set(result.tokens[4:])) > 1 or sampling.temperature == 0


@pytest.mark.parametrize(("thread_s", "where"), [(0.0, "karakoram-masks"), (1e9, "karakoram-engine")])
def test_masks_are_filled_in_a_thread_beside_unless_that_costs_more(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch, thread_s: float, where: str
) -> None:
    monkeypatch.setattr(masks, "THREAD_S", thread_s)
    constraint = Allows([5, 6])
    with Engine(tiny) as engine:
        result = run(engine, greedy("a", PROMPT, 5, constraint=constraint))
    (name,) = constraint.threads
    assert name.startswith(where) and set(result.tokens) <= {5, 6}


def test_a_prompt_in_pieces_asks_once(tiny: Transformer) -> None:
    """Only the piece that ends the prompt draws a token; so where tokens run one by one (deterministic), too."""
    for deterministic in (False, True):
        constraint = Allows([5, 6])
        with Engine(tiny, most_batch_tokens=16, deterministic=deterministic) as engine:
            run(engine, greedy("a", models.prompt(100), 5, constraint=constraint))
        assert constraint.lefts == [5, 4, 3, 2, 1]


def test_neighbours_are_free(tiny: Transformer) -> None:
    """One constrained to a set, one to another, one not at all, in every pass together."""
    with Engine(tiny, speculate=False) as engine:
        alone = run(engine, greedy("free", PROMPT[:31], 12))
        requests = [
            greedy("even", PROMPT, 12, constraint=Allows(range(0, 96, 2))),
            greedy("free", PROMPT[:31], 12),
            greedy("odd", PROMPT, 12, constraint=Allows(range(1, 96, 2))),
        ]
        heard = gathered(Watched(engine), requests)
        even, free, odd = (heard.end(request.id) for request in requests)
        assert free.tokens == alone.tokens
        assert {token % 2 for token in even.tokens} == {0} and {token % 2 for token in odd.tokens} == {1}
        all_blocks_back(engine)


def test_it_may_end_by_a_stop_id(tiny: Transformer) -> None:
    constraint = Allows([5], [6], [1])
    with Engine(tiny) as engine:
        result = run(engine, greedy("a", PROMPT, 20, constraint=constraint, stop_ids=frozenset({1})))
    assert (result.tokens, result.finish) == ((5, 6, 1), "stop")
    assert constraint.accepted == [5, 6, 1] and constraint.lefts == [20, 19, 18]


def test_no_guesses_under_a_constraint(tiny: Transformer) -> None:
    """A mask depends on every token before it, and there is one a pass."""
    with Engine(tiny) as engine:
        watched = Watched(engine)
        run(engine, greedy("a", [5, 6] * 20, 20, constraint=Allows([5, 6])))
        assert not any(piece.guesses for seen in watched.passes for piece in seen)


def test_preempted_it_goes_on_where_it_was(tiny: Transformer) -> None:
    """It is not asked or told again for what was emitted before."""
    made = [Allows(range(i, 96, 4)) for i in range(4)]
    requests = [greedy(str(i), models.prompt(30 + i, i), 70, constraint=one) for i, one in enumerate(made)]
    with Engine(tiny) as engine:
        alone = [
            run(engine, greedy("x", models.prompt(30 + i, i), 70, constraint=Allows(range(i, 96, 4)))) for i in range(4)
        ]
    with Engine(tiny, context=112, cache_tokens=128) as engine:
        results = run_all(engine, requests)
        assert engine.stats()["preemptions"] > 0
    for result, one, expected in zip(results, made, alone):
        assert result.tokens == expected.tokens
        assert one.accepted == list(result.tokens) and one.lefts == list(range(70, 0, -1))


@pytest.mark.parametrize("new", [1, 2])
def test_the_last_token_knows_that_it_is(tiny: Transformer, new: int) -> None:
    constraint = Allows([5])
    with Engine(tiny) as engine:
        run(engine, greedy("a", PROMPT, new, constraint=constraint))
    assert constraint.lefts[-1] == 1 and len(constraint.lefts) == new


def test_a_vocabulary_beyond_whole_words(tiny: Transformer) -> None:
    """Masks have ⌈V / 32⌉ words; the last bits of the last word are nobody's, set or not."""
    model = models.tiny(vocab_size=90)

    class All(Allows):
        def fill(self, row: Any, left: int) -> bool:
            row[:] = 0xFFFFFFFF
            return True

    with Engine(model) as engine:
        free = run(engine, greedy("free", [5, 6, 7], 20))
        assert run(engine, greedy("all", [5, 6, 7], 20, constraint=All([]))).tokens == free.tokens
        assert set(run(engine, greedy("last", [5, 6, 7], 20, constraint=Allows([89]))).tokens) == {89}
