"""The learning rate over a run, and the size of its batches."""

import pytest

from karakoram.train.config import BatchConfig, ScheduleConfig
from karakoram.train.optim.schedule import batch_tokens, decay_share, rate_share


def test_rates_rise_stay_and_fall() -> None:
    schedule = ScheduleConfig(warmup_steps=10, decay_from=0.6)

    def share(step: int, progress: float) -> float:
        return rate_share(schedule, step, 0, progress)

    assert share(0, 0.0) == pytest.approx(0.1)
    assert share(4, 0.01) == pytest.approx(0.5)
    assert share(9, 0.02) == 1.0
    assert share(5000, 0.6) == 1.0
    assert share(5000, 0.7) == pytest.approx(0.8535534)  # (1 + cos 45°) / 2
    assert share(5000, 0.8) == pytest.approx(0.5)
    assert share(5000, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert share(5000, 1.5) == pytest.approx(0.0, abs=1e-12), "past the end stays at the end"


def test_a_floor_and_a_plain_cosine() -> None:
    """K2 ends its decay at a tenth of the peak."""
    schedule = ScheduleConfig(shape="cosine", warmup_steps=0, floor=0.1)
    assert decay_share(schedule, 0.0) == 1.0
    assert decay_share(schedule, 0.5) == pytest.approx(0.55)
    assert decay_share(schedule, 1.0) == pytest.approx(0.1)


def test_a_warmup_by_tokens() -> None:
    schedule = ScheduleConfig(warmup_steps=0, warmup_tokens=1000, decay_from=1.0)
    assert rate_share(schedule, 7, 250, 0.1) == pytest.approx(0.25)
    assert rate_share(schedule, 7, 1000, 0.1) == 1.0
    assert 0 < rate_share(schedule, 0, 0, 0.0) <= 1e-3, "the first step is not lost altogether"


def test_decay_from_the_very_beginning_or_never() -> None:
    assert decay_share(ScheduleConfig(decay_from=0.0), 0.5) == pytest.approx(0.5)
    assert decay_share(ScheduleConfig(decay_from=1.0), 1.0) == 1.0


def test_the_batch_grows_in_a_straight_line() -> None:
    batch = BatchConfig(tokens_per_step=8192, ramp_from_tokens=2048, ramp_tokens=1_000_000)
    assert [batch_tokens(batch, tokens) for tokens in (0, 500_000, 999_999, 1_000_000)] == [2048, 5120, 8192, 8192]
    assert batch_tokens(BatchConfig(), 0) == 8192


def test_a_decay_never_rises() -> None:
    schedule = ScheduleConfig(warmup_steps=10, decay_from=0.5)
    shares = [rate_share(schedule, 100, 0, progress / 100) for progress in range(101)]
    assert all(later <= earlier for earlier, later in zip(shares, shares[1:]))
