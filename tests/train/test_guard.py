"""The spike guard: what it refuses, what it lets pass, and that a refused batch leaves no trace in the weights."""

import json
import math

import pytest

from karakoram.train.config import GuardConfig
from karakoram.train.guard import Guard


def warm(**changes: int) -> Guard:
    guard = Guard(GuardConfig(**changes))
    for step in range(40):
        assert guard.judge(3.0 - 0.01 * step, 1.0 + 0.1 * (step % 3)) is None
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_from_the_first_step_on(bad: float) -> None:
    guard = Guard(GuardConfig())
    assert guard.judge(bad, 1.0) == f"loss is {bad}"
    assert guard.judge(1.0, bad) == f"gradient norm is {bad}"
    assert guard.skipped_in_a_row == 2
    assert guard.judge(1.0, 1.0) is None
    assert guard.skipped_in_a_row == 0


def test_spikes_are_measured_against_the_largest_of_the_window() -> None:
    guard = warm()
    assert guard.judge(5.9, 1.0) is None, "twice the largest loss of 3.0 is not exceeded"
    reason = guard.judge(3e4, 1.0)
    assert reason is not None and "loss is 3e+04" in reason and "5.9" in reason
    reason = guard.judge(3.0, 1e4)
    assert reason is not None and "gradient norm is 1e+04" in reason
    assert max(guard.losses) == 5.9, "what was refused is no measure for what follows"


def test_nothing_is_a_spike_in_the_first_steps() -> None:
    guard = Guard(GuardConfig(after_steps=3))
    for loss in (1.0, 100.0, 5.0):
        assert guard.judge(loss, loss) is None
    assert guard.judge(201.0, 1.0) is not None


def test_many_in_a_row_ask_for_a_rollback() -> None:
    guard = warm(skips_before_rollback=2)
    guard.judge(math.nan, 1.0)
    assert not guard.wants_rollback
    guard.judge(math.nan, 1.0)
    assert guard.wants_rollback
    guard.rolled_back()
    assert (guard.rollbacks, guard.skipped_in_a_row, len(guard.losses)) == (1, 0, 0)


def test_a_resumed_guard_judges_as_the_one_before() -> None:
    guard, again = warm(), Guard(GuardConfig())
    guard.judge(math.nan, 1.0)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert again.judge(6.1, 1.0) == guard.judge(6.1, 1.0) != None  # noqa: E711


def test_nothing_is_out_of_proportion_to_nothing() -> None:
    """Judging from the first step on still needs a step to judge by."""
    guard = Guard(GuardConfig(after_steps=0))
    assert guard.judge(9.0, 9.0) is None
    assert guard.judge(9.0, 1e3) is not None
