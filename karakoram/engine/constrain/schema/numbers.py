"""Numbers within bounds, as regular expressions over their decimal digits.

Bounds are exact fractions. A number is written without exponent where it is bounded, and with at most so many digits
that two numbers written differently never round to the same double (15 digits, DBL_DIG): else 0.9999999999999999999
would pass `exclusiveMaximum: 1` here and equal 1 where the text is read. Nothing is lost that a model would write.

A range of digit strings is split where its ends part ways: 17 to 342 is 1[7-9] | [2-9][0-9] | [1-2][0-9]{2} |
3[0-3][0-9] | 34[0-2]. A fraction is the same on digits after the point, where missing digits are zeros. The integers
between -5 and 5 include "-0", as they do for llguidance, which writes `multipleOf` itself where no suffix of the
decimal digits decides it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, lcm

from karakoram.engine.constrain.automaton import DEAD, Automaton, automaton, combined
from karakoram.engine.constrain.regex import (
    EMPTY,
    NOTHING,
    Chars,
    NothingMatches,
    PatternError,
    Regex,
    either,
    join,
    literal,
    read_full,
    rust,
    times,
)

# Unbounded integers stay below 10^19 (every 64-bit id fits; Python refuses to read more than 4,300 digits), unbounded
# sides of fractions below 10^15; exponents have two digits, so every number is finite as a double.
INTEGER_DIGITS = 19
MAX_DIGITS = 15
MAX_FRACTION_DIGITS = 10
# A fraction's multiples are written out as their last digits: 0.001 has 1,000 of them.
MAX_ENDINGS = 1000

_MINUS = literal("-")
_DIGIT = Chars(((48, 57),))
_INTEGER = read_full(rf"-?(?:0|[1-9][0-9]{{0,{INTEGER_DIGITS - 1}}})")
_NUMBER = read_full(rf"-?(?:0|[1-9][0-9]{{0,{INTEGER_DIGITS - 1}}})(?:\.[0-9]{{1,17}})?(?:[eE][+-]?[0-9]{{1,2}})?")


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds (None: unbounded), each of them part of it unless open."""

    low: Fraction | None = None
    high: Fraction | None = None
    low_open: bool = False
    high_open: bool = False

    def above(self, bound: Fraction, is_open: bool) -> Interval:
        """The part of it above `bound`."""
        if self.low is not None and (bound, is_open) <= (self.low, self.low_open):
            return self
        return Interval(bound, self.high, is_open, self.high_open)

    def below(self, bound: Fraction, is_open: bool) -> Interval:
        """The part of it below `bound`."""
        if self.high is not None and (-bound, is_open) <= (-self.high, self.high_open):
            return self
        return Interval(self.low, bound, self.low_open, is_open)

    def disjoint(self, other: Interval) -> bool:
        """Whether no number lies in both."""
        both = self
        if other.low is not None:
            both = both.above(other.low, other.low_open)
        if other.high is not None:
            both = both.below(other.high, other.high_open)
        return both.empty

    @property
    def unbounded(self) -> bool:
        """Every number lies in it."""
        return self.low is None and self.high is None

    @property
    def empty(self) -> bool:
        """No number lies in it."""
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))


@lru_cache(128)
def number_grammar(interval: Interval, integer: bool, multiples: tuple[Fraction, ...]) -> tuple[Automaton, str]:
    """The automaton of these numbers and llguidance's terminal for the same.

    PatternError where a `multipleOf` cannot be enforced; NothingMatches where there is no such number."""
    step = _common_multiple((*multiples, Fraction(1)) if integer else multiples)
    integer = integer or (step is not None and step.denominator == 1)
    regex = integers(interval) if integer else decimals(interval)
    if step is None or step == 1:
        return automaton(regex), f"/{rust(regex)}/"
    if step.denominator == 1:
        return _multiples(interval, regex, step.numerator)
    places = _places(step)
    regex = decimals(interval, places)
    if interval.unbounded:
        regex = read_full(rf"-?(?:0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(?:\.[0-9]{{1,{places}}})?")
    endings = _endings(step)
    return combined([automaton(regex), automaton(endings)]), f"/{rust(regex)}/ & /{rust(endings)}/"


def _common_multiple(multiples: tuple[Fraction, ...]) -> Fraction | None:
    if not multiples:
        return None
    scale = lcm(*(multiple.denominator for multiple in multiples))
    return Fraction(lcm(*(int(multiple * scale) for multiple in multiples)), scale)


# ------------------------------------------------------------------------------------------------ integers


def integers(interval: Interval) -> Regex:
    """All integers in the interval, decimal, without leading zeros."""
    if interval.unbounded:
        return _INTEGER
    low, high = _whole_bounds(interval)
    if low > high:
        raise NothingMatches
    if high < 0:
        return join(_MINUS, _naturals(-high, -low))
    if low >= 0:
        return _naturals(low, high)
    return either(join(_MINUS, _naturals(0, -low)), _naturals(0, high))


def _whole_bounds(interval: Interval) -> tuple[int, int]:
    cap = 10**INTEGER_DIGITS - 1
    low = -cap if interval.low is None else floor(interval.low) + 1 if interval.low_open else ceil(interval.low)
    high = cap if interval.high is None else ceil(interval.high) - 1 if interval.high_open else floor(interval.high)
    if interval.high is None:
        high = max(high, low + cap)
    if interval.low is None:
        low = min(low, high - cap)
    return low, high


def _naturals(low: int, high: int) -> Regex:
    """The natural numbers `low` to `high`."""
    options: list[Regex] = []
    while low <= high:
        most = min(high, 10 ** len(str(low)) - 1)
        options.append(_digits(str(low), str(most)))
        low = most + 1
    return either(*options)


def _digits(low: str, high: str) -> Regex:
    """Digit strings of one length, `low` to `high`."""
    if not low:
        return EMPTY
    rest = len(low) - 1
    if low[1:] == "0" * rest and high[1:] == "9" * rest:
        return join(Chars(((ord(low[0]), ord(high[0])),)), times(_DIGIT, rest, rest))
    if low[0] == high[0]:
        return join(literal(low[0]), _digits(low[1:], high[1:]))
    first, last = ord(low[0]) + 1, ord(high[0]) - 1
    between = join(Chars(((first, last),)), times(_DIGIT, rest, rest)) if first <= last else NOTHING
    return either(
        join(literal(low[0]), _digits(low[1:], "9" * rest)),
        between,
        join(literal(high[0]), _digits("0" * rest, high[1:])),
    )


# ------------------------------------------------------------------------------------------------ fractions


def decimals(interval: Interval, places: int = 0) -> Regex:
    """Numbers in the interval with a fraction of limited length (of `places` digits at least) or none; unbounded ones
    also with an exponent."""
    if interval.unbounded:
        return _NUMBER
    bounds = [bound for bound in (interval.low, interval.high) if bound is not None]
    places = max(places, *(_places(bound) for bound in bounds))
    whole = max(len(str(int(abs(bound)))) for bound in bounds)
    places = max(places, min(MAX_FRACTION_DIGITS, MAX_DIGITS - whole))
    unit = 10**places
    cap = 10**MAX_DIGITS * unit
    low, high = (None if bound is None else bound * unit for bound in (interval.low, interval.high))
    least = -cap if low is None else floor(low) + 1 if interval.low_open else ceil(low)
    most = cap if high is None else ceil(high) - 1 if interval.high_open else floor(high)
    most = max(most, least + cap) if high is None else most
    least = min(least, most - cap) if low is None else least
    if least > most:
        raise NothingMatches
    options: list[Regex] = []
    if least < 0:
        options.append(join(_MINUS, _scaled(max(1, -most), -least, places)))
    if most >= 0:
        options.append(_scaled(max(0, least), most, places))
    return either(*options)


def _places(bound: Fraction) -> int:
    """Decimal places of a bound; JSON writes no number that has not finitely many."""
    places = 0
    while (bound * 10**places).denominator != 1:
        places += 1
    return places


def _scaled(low: int, high: int, places: int) -> Regex:
    """The numbers n / 10^places for natural n from `low` to `high`, with at most `places` decimals."""
    if not places:
        return _naturals(low, high)
    unit = 10**places
    (whole_low, part_low), (whole_high, part_high) = divmod(low, unit), divmod(high, unit)
    first, last = str(part_low).zfill(places), str(part_high).zfill(places)
    if whole_low == whole_high:
        return join(literal(str(whole_low)), _fraction(first, last))
    options = [join(literal(str(whole_low)), _fraction(first, "9" * places))]
    if whole_low + 1 < whole_high:
        between = either(EMPTY, join(literal("."), times(_DIGIT, 1, places)))
        options.append(join(_naturals(whole_low + 1, whole_high - 1), between))
    options.append(join(literal(str(whole_high)), _fraction("0" * places, last)))
    return either(*options)


def _fraction(low: str, high: str) -> Regex:
    """Point and decimals from `low` to `high` (of one length, here missing digits are zeros), or nothing if zero is."""
    tail = join(literal("."), _decimals(low, high))
    return either(EMPTY, tail) if not low.strip("0") else tail


def _decimals(low: str, high: str) -> Regex:
    """At least one digit, such that filled with zeros the string lies between `low` and `high`."""
    rest = len(low) - 1
    options: list[Regex] = []
    first, last = int(low[0]), int(high[0])
    for digit in (first, last) if first != last else (first,):
        least = low[1:] if digit == first else "0" * rest
        most = high[1:] if digit == last else "9" * rest
        if not least.strip("0") and not most.strip("9"):
            tail = times(_DIGIT, 0, rest)
        else:
            tail = _decimals(least, most)
            tail = tail if least.strip("0") else either(EMPTY, tail)
        options.append(join(literal(str(digit)), tail))
    if first + 1 <= last - 1:
        options.append(join(Chars(((48 + first + 1, 48 + last - 1),)), times(_DIGIT, 0, rest)))
    return either(*options)


# ------------------------------------------------------------------------------------------------ multiples


def _multiples(interval: Interval, regex: Regex, step: int) -> tuple[Automaton, str]:
    """The integers of the interval that `step` divides: remainders are states here, llguidance has its own way."""
    if step > MAX_ENDINGS:
        raise PatternError(f"a divisor above {MAX_ENDINGS} cannot be enforced")
    low, high = _whole_bounds(interval)
    if interval.unbounded:
        low, high = -(10 ** (INTEGER_DIGITS - 1)) + 1, 10 ** (INTEGER_DIGITS - 1) - 1
        regex = integers(Interval(Fraction(low), Fraction(high)))
    if max(abs(low), abs(high)) >= 2**53:
        low, high = max(low, -(2**53) + 1), min(high, 2**53 - 1)
        regex = integers(Interval(Fraction(low), Fraction(high)))
    digits = bytes(byte - 48 if 48 <= byte <= 57 else 10 if byte == 45 else 11 for byte in range(256))
    rows: list[tuple[int, ...]] = []
    for state in range(step + 1):
        remainder = state % step
        row = [(remainder * 10 + digit) % step or step for digit in range(10)]
        rows.append((*row, 0 if state == 0 else DEAD, DEAD))
    divides = Automaton(digits, rows, [False] * step + [True])
    schema = f'{{"type":"integer","minimum":{low},"maximum":{high},"multipleOf":{step}}}'
    return combined([automaton(regex), divides]), f"%json {schema}"


def _endings(step: Fraction) -> Regex:
    """Decimal numbers that a proper fraction divides which divides 1: the decimals decide."""
    count = 1 / step
    if count.denominator != 1 or count > MAX_ENDINGS:
        raise PatternError(f"multiples of {float(step):g} cannot be enforced; whole numbers and 1/n up to 0.001 can")
    places = _places(step)
    whole = read_full(rf"-?[0-9]{{1,{INTEGER_DIGITS}}}")
    endings: list[Regex] = []
    for number in range(int(count)):
        decimals_ = str(int(step * number * 10**places)).zfill(places)
        shortest = decimals_.rstrip("0")
        zeros = times(literal("0"), 0, places - len(shortest))
        endings.append(join(literal(shortest), zeros) if shortest else times(literal("0"), 1, places))
    return join(whole, either(EMPTY, join(literal("."), either(*endings))))
