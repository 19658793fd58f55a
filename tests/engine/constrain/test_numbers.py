"""Number grammars against arithmetic: what is written lies in the interval, and every number in it can be written."""

import json
from fractions import Fraction
from random import Random

import pytest

from karakoram.engine.constrain.regex import NothingMatches, PatternError
from karakoram.engine.constrain.schema.numbers import Interval, number_grammar
from tests.engine.constrain.test_regex import _member

MULTIPLES = [(), (), (3,), (5,), (Fraction(1, 100),), (Fraction(1, 2),), (7, 2), (12,), (Fraction(1, 20),)]


def _interval(random: Random) -> Interval:
    def bound() -> Fraction | None:
        kind = random.random()
        if kind < 0.3:
            return None
        if kind < 0.6:
            return Fraction(random.randint(-1000, 1000))
        if kind < 0.8:
            return Fraction(random.randint(-(10**6), 10**6), 1000)
        return Fraction(random.choice(["0", "0.1", "-0.25", "1e-7", "123456789.5", "99999", "100", "-1", "1e18"]))

    return Interval(bound(), bound(), random.random() < 0.3, random.random() < 0.3)


def _inside(interval: Interval, number: Fraction) -> bool:
    low, high = interval.low, interval.high
    above = low is None or number > low or (number == low and not interval.low_open)
    return above and (high is None or number < high or (number == high and not interval.high_open))


@pytest.mark.parametrize("seed", range(120))
def test_numbers_in_intervals(seed: int) -> None:
    random = Random(seed)
    interval, integer = _interval(random), random.random() < 0.5
    multiples = tuple(map(Fraction, random.choice(MULTIPLES)))

    def wanted(number: Fraction) -> bool:
        whole = all((number / multiple).denominator == 1 for multiple in multiples)
        return _inside(interval, number) and whole and (not integer or number.denominator == 1)

    probes = [Fraction(number) for number in range(-1100, 1100, 3)]
    try:
        machine, _ = number_grammar(interval, integer, multiples)
    except NothingMatches:
        assert not any(map(wanted, probes))
        return
    for text in [machine.shortest(0), *(_member(machine, random) for _ in range(30))]:
        assert wanted(Fraction(text.decode())), text
        value = json.loads(text)
        assert interval.high is None or not interval.high_open or value < float(interval.high)
        assert interval.low is None or not interval.low_open or value > float(interval.low)
    for number in probes:
        assert machine.matches(str(number).encode()) == wanted(number)
    for _ in range(0 if integer or multiples else 60):
        number = Fraction(random.randint(-(10**6), 10**6), 1000)
        text = f"{float(number):.3f}"
        if not text.startswith("-0.000"):
            assert machine.matches(text.encode()) == wanted(number), text


@pytest.mark.parametrize("step", ["0.3", "2.5", "1001", "0.0001"])
def test_multiples_that_no_digits_decide_are_refused(step: str) -> None:
    with pytest.raises(PatternError):
        number_grammar(Interval(), False, (Fraction(step),))


def test_intervals() -> None:
    ten = Interval().above(Fraction(1), False).below(Fraction(10), True)
    assert ten.above(Fraction(0), True) == ten and ten.above(Fraction(1), True).low_open
    assert not ten.empty and ten.below(Fraction(1), True).empty and not ten.below(Fraction(1), False).empty
    assert ten.disjoint(Interval(Fraction(10))) and not ten.disjoint(Interval(Fraction(9)))
    assert Interval().unbounded and not ten.unbounded
