"""Generation: sampling, seeds, stops, and settings that cannot be."""

import math
from collections import Counter
from itertools import islice

import pytest
import torch

from karakoram import generate
from karakoram.errors import InputError
from karakoram.model.generate import end_ids, sample
from karakoram.model.transformer import Transformer
from tests.model import reference
from tests.model.reference import VOCABULARY

PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return reference.opened(reference.build(), tmp_path_factory.mktemp("model"))


def drawn(p: list[float], draws: int, temperature: float = 1.0, top_p: float = 1.0) -> dict[int, float]:
    """How often `sample` draws each id from logits with these probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.tensor(p).log()
    counts = Counter(sample(logits_V, temperature, top_p, generator) for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


# 4,000 draws: three standard errors of a frequency near one half are 0.024
DRAWS, ERROR = 4000, 0.024


def test_sampling_follows_the_probabilities() -> None:
    got = drawn([0.1, 0.5, 0.15, 0.25], DRAWS)
    assert got == pytest.approx({0: 0.1, 1: 0.5, 2: 0.15, 3: 0.25}, abs=ERROR)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.3, [1]), (0.5, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.8, [1, 3, 2]), (0.95, [1, 3, 2, 0]), (1e-9, [1])],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    """The binary fractions 1/2, 1/4, 1/8, 1/8 are exact, so that 0.5 is reached by the best id alone."""
    p = [0.125, 0.5, 0.125, 0.25]
    got = drawn(p, DRAWS, top_p=top_p)
    total = sum(p[token] for token in kept)
    expected = {token: p[token] / total for token in kept}
    if len(kept) == 3:  # ids 0 and 2 are equally likely: either may be the third
        got = {2 if token == 0 else token: share for token, share in got.items()}
    assert got == pytest.approx(expected, abs=ERROR)


def test_temperature_sharpens_and_flattens() -> None:
    p = [0.2, 0.8]
    for temperature in (0.5, 2.0):
        weights = [x ** (1 / temperature) for x in p]
        share = weights[1] / sum(weights)
        assert drawn(p, DRAWS, temperature)[1] == pytest.approx(share, abs=ERROR)


@pytest.mark.parametrize("temperature", [0, 1e-3, 1e-30, 1e-45, 1e-300, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert drawn([0.3, 0.4, 0.3], 20, temperature) == {1: 1.0}
    assert drawn([0.3, 0.4, 0.3], 20, temperature, 0.9) == {1: 1.0}


def test_the_same_seed_writes_the_same(model: Transformer) -> None:
    def write(seed: int | None) -> list[int]:
        return list(generate(model, PROMPT, 12, temperature=1.0, top_p=0.95, seed=seed, stop_ids=()))

    first = write(7)
    torch.rand(3)  # the global generator plays no part
    assert write(7) == first and len(first) == 12
    assert len({tuple(write(seed)) for seed in (7, 8, 9, None, None)}) == 5
    before = torch.get_rng_state()
    write(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_needs_no_seed(model: Transformer) -> None:
    written = list(generate(model, PROMPT, 8, stop_ids=()))
    assert written == list(generate(model, PROMPT, 8, seed=3, stop_ids=())) and len(written) == 8
    ids_BT = torch.tensor([PROMPT + written[:-1]])
    assert reference.logits(model, ids_BT)[0, len(PROMPT) - 1 :].argmax(-1).tolist() == written


def test_a_stop_id_is_the_last(model: Transformer) -> None:
    free = list(generate(model, PROMPT, 8, stop_ids=()))
    stop = free[3]
    until = free[: free.index(stop) + 1]
    assert list(generate(model, PROMPT, 8, stop_ids={stop})) == until
    assert list(generate(model, PROMPT, 8, stop_ids=[stop, VOCABULARY - 1])) == until
    assert list(generate(model, PROMPT, 8, stop_ids=[])) == free


def test_the_config_names_the_stops(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert end_ids(model.config) == {1}
    free = list(generate(model, PROMPT, 8, stop_ids=()))
    for ends in (free[2], (free[2], 3), [3, free[2]]):
        object.__setattr__(model.config, "eos_token_id", ends)  # frozen; the fixture is of this module alone
        try:
            assert list(generate(model, PROMPT, 8)) == free[: free.index(free[2]) + 1]
        finally:
            object.__setattr__(model.config, "eos_token_id", 1)


def test_tokens_come_one_by_one(model: Transformer) -> None:
    """An iterator that is left early has not computed the rest."""
    assert len(list(islice(generate(model, PROMPT, 250, stop_ids=()), 2))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token_ids": []}, "The prompt is empty"),
        ({"token_ids": torch.zeros(0, dtype=torch.long)}, "The prompt is empty"),
        ({"token_ids": [3, VOCABULARY]}, f"Token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        ({"token_ids": [-1]}, "Token id -1 is outside"),
        ({"token_ids": [2] * 4096}, "4,096 tokens, the context 4,096"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_p": 0}, "top_p 0 "),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_p": math.nan}, "top_p nan"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(model: Transformer, arguments: dict, words: str) -> None:
    """Before the first token is asked for: a server must know while it can still answer with an error."""
    with pytest.raises(InputError, match=words) as caught:
        generate(model, **{"token_ids": PROMPT, "max_new_tokens": 4, **arguments})
    assert caught.value.fix
