"""Thinning keeps peaks, a mean keeps its place, and an axis survives a spike."""

import numpy as np

from karakoram.train.report import series
from karakoram.train.report.series import Column, limits, smooth, thin


def test_thinning_keeps_every_bucket_s_extremes_and_the_ends() -> None:
    draw = np.random.default_rng(1)
    steps, values = np.arange(50_000.0), draw.normal(size=50_000)
    values[[0, 12_345, 33_333, 49_999]] = 7.0, 1e4, -1e4, 8.0
    thin_steps, thin_values = thin(steps, values, 2000)
    assert len(thin_values) <= 2000
    assert (np.diff(thin_steps) > 0).all()
    assert {0.0, 12_345.0, 33_333.0, 49_999.0} <= set(thin_steps.tolist())
    assert (values[thin_steps.astype(int)] == thin_values).all()
    few = thin(steps[:2000], values[:2000], 2000)
    assert len(few[0]) == 2000


def test_a_column_of_millions_stays_small_and_keeps_its_peak() -> None:
    column = Column()
    for step in range(300_000):
        column.add(step, 1e6 if step == 777 else float(step % 7))
    assert len(column.values) <= series.KEPT_POINTS
    steps, values = column.points
    assert steps[values.argmax()] == 777
    column.back_to(1000)
    assert column.points[0][-1] < 1000


def test_a_smoothed_line_stays_a_line_where_it_is() -> None:
    """Symmetric weights leave an affine function unchanged away from the ends, and a constant everywhere."""
    values = np.linspace(3.0, 9.0, 1001)
    middle = slice(400, 600)
    np.testing.assert_allclose(smooth(values, 20)[middle], values[middle], rtol=1e-6)  # tails of (1 - 1/20)^400: 1e-9
    np.testing.assert_allclose(smooth(np.full(100, 5.0), 20), 5.0, rtol=1e-12)  # float64 sums of 100
    assert smooth(np.array([4.0]), 50).tolist() == [4.0]


def test_an_axis_is_cut_for_a_spike_and_not_for_a_beginning() -> None:
    steps = np.arange(1000.0)
    loss = 1.6 + 6.5 * np.exp(-12 * steps / 1000)
    assert limits([loss]) is None
    spiked = loss.copy()
    spiked[500] = 1e4
    cut = limits([spiked])
    assert cut is not None
    assert loss.min() > cut[0]
    assert cut[1] < 20
    assert limits([]) is None
    assert limits([spiked[:40]]) is None  # few values: nothing to tell a spike by
    assert limits([np.full(1000, 2.0)]) is None
