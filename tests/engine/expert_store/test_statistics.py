"""Statistics of traces whose numbers are known beforehand."""

import struct
import zlib

import numpy as np
import pytest

from karakoram.engine.expert_store.laboratory.statistics import heat, load_of, png, statistics_of
from karakoram.engine.expert_store.trace import Pass, Trace
from karakoram.errors import InputError
from tests.engine.expert_store.drawn import trace_of


def test_an_even_load_has_no_skew() -> None:
    load = load_of(np.full(32, 5))
    assert load.top == pytest.approx((1 / 32, 2 / 32, 4 / 32, 8 / 32))
    assert (load.entropy, load.gini, load.unused) == pytest.approx((1.0, 0.0, 0.0))


def test_a_load_on_one_expert_is_all_skew() -> None:
    load = load_of(np.array([0, 9, 0, 0]))
    assert load.top == (1.0,) * 4
    assert (load.entropy, load.gini, load.unused) == pytest.approx((0.0, 0.75, 0.75))


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    load_E = np.array([1.0, 2, 3, 10])
    differences = np.abs(load_E[:, None] - load_E).mean()
    assert load_of(load_E).gini == pytest.approx(differences / 2 / load_E.mean())


def test_repeats_are_those_of_the_same_sequence() -> None:
    ids_LTK = np.array([[[0, 1], [4, 5], [0, 2], [4, 5]]], np.uint16)
    two = Trace((0,), 8, 2, (Pass(ids_LTK, np.array([3, 7, 3, 7]), np.array([0, 0, 1, 1])),))
    assert statistics_of(two).repeat == (0.75,)
    one = Trace((0,), 8, 2, (Pass(ids_LTK, np.zeros(4, int), np.arange(4)),))
    assert statistics_of(one).repeat == (0.0,)


def test_a_single_token_repeats_nothing() -> None:
    found = statistics_of(trace_of(np.zeros((1, 2, 1), int), 4))
    assert found.repeat is found.repeat_mean is found.next_layer is found.popular is None


def test_a_layer_that_follows_another_is_foretold() -> None:
    random = np.random.default_rng(0)
    first_NK = np.stack([random.permutation(16)[:2] for _ in range(400)])
    unrelated_NK = np.stack([random.permutation(16)[:2] for _ in range(400)])
    found = statistics_of(trace_of(np.stack([first_NK, (first_NK + 3) % 16, unrelated_NK], axis=1), 16))
    assert found.next_layer is not None
    assert found.popular is not None
    assert found.next_layer[0] == 1.0
    assert found.next_layer[1] == pytest.approx(2 / 16, abs=0.06)  # 400 draws of 1/8: 3 standard deviations are 0.05
    assert found.popular[0] == pytest.approx(2 / 16, abs=0.06)


def test_guesses_and_scores() -> None:
    ids_LTK = np.array([[[0, 1], [1, 2]], [[3, 4], [3, 5]]], np.uint16)
    none, some = np.empty(0, np.uint16), np.array([3, 5, 7, 6], np.uint16)
    scores_LTK = np.array([[[3, 1], [1, 3]], [[3, 1], [0, 0]]], np.float16)
    trace = Trace((1, 2), 8, 2, (Pass(ids_LTK, np.zeros(2, int), np.arange(2), scores_LTK, (none, some)),))
    found = statistics_of(trace)
    assert (found.guess_recall, found.guess_precision) == pytest.approx((2 / 3, 2 / 4))
    assert found.rank_scores == pytest.approx((0.75 * 3 / 4, 0.25 * 3 / 4))  # a token without scores counts as zero


def test_a_trace_of_nothing() -> None:
    with pytest.raises(InputError, match="no complete pass"):
        statistics_of(Trace((1,), 8, 2, ()))


def test_the_picture_is_png() -> None:
    colours = heat(np.array([[0, 1, 2, 5], [0, 0, 0, 0]]))
    assert colours.shape == (2, 4, 3)
    assert colours[0].sum(-1).tolist() == sorted(colours[0].sum(-1).tolist())  # more load is brighter
    assert (colours[1] == colours[0, 0]).all()
    picture = png(colours, scale=3)
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", picture[16:24]) == (12, 6)
    at, content = 8, b""
    while at < len(picture):
        size, name = struct.unpack(">I4s", picture[at : at + 8])
        data, crc = picture[at + 8 : at + 8 + size], picture[at + 8 + size : at + 12 + size]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(name + data)
        content += data if name == b"IDAT" else b""
        at += size + 12
    rows = np.frombuffer(zlib.decompress(content), np.uint8).reshape(6, 1 + 36)
    assert not rows[:, 0].any()
    assert (rows[4, 1:].reshape(12, 3)[::3] == colours[1]).all()
