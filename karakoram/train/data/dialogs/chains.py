"""More than one call: the result of one goes into the next, or several calls at once."""

from datetime import timedelta
from fractions import Fraction
from random import Random

from karakoram.tools.calculator import evaluate, format_number
from karakoram.tools.dates import add_days, weekday
from karakoram.train.data.dialogs.arithmetic import CALCULATE, json_number, number
from karakoram.train.data.dialogs.calendar import DATE_ADD, DATE_DIFFERENCE, WEEKDAY, day
from karakoram.train.data.dialogs.measures import CONVERT, convert, quantity, units
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.records import lookup_capability, subject, value_of
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, plural, thing

_COST = Phrases(
    "chains.cost",
    """What do {n} {x} cost?
    How much are {n} {x}?
    I want {n} {x}. What is the total price?
    What is the price of {n} {x}?
    How much do I pay for {n} {x}?
    Find the price of {x} and compute the cost of {n}.
    We need {n} {x}. How much will that be?""",
    """Tell me the total price of {n} {x}.
    I buy {n} {x}. How much is that in total?""",
)
_LATER_WEEKDAY = Phrases(
    "chains.weekday",
    """Which weekday is {n} days after {d}?
    What day of the week is it {n} days after {d}?
    Today is {d}. Which day of the week is it in {n} days?
    On which weekday does a trip of {n} days that starts on {d} end?
    What weekday comes {n} days after {d}?""",
    """Tell me the day of the week {n} days after {d}.
    It is {d} today. Which weekday is it in {n} days?""",
)
_THEN_CONVERT = Phrases(
    "chains.convert",
    """What is {e} {s} in {t}?
    Compute {e} and convert it from {s} to {t}.
    Calculate {e}, then convert the result from {s} to {t}.
    How many {t} are {e} {s}?""",
    """Please compute {e} and change it from {s} to {t}.
    Work out {e}, then convert it from {s} to {t}.""",
)
_WEEKS = Phrases(
    "chains.weeks",
    """How many hours are there between {d} and {e}?
    How many hours from {d} to {e}?
    How many hours lie between {d} and {e}?""",
    """Tell me how many hours there are from {d} to {e}.""",
)
_SUM_OF = Phrases(
    "chains.sum",
    """What is the {k} of {x} plus {n}?
    Take the {k} of {x} and add {n}.
    Add {n} to the {k} of {x}.
    Find the {k} of {x} and add {n} to it.""",
    """Look up the {k} of {x}, then add {n}.
    Please add {n} to the {k} of {x}.""",
)


def chain(rng: Random, split: Split) -> Task:
    """Two steps; the second needs the result of the first."""
    return (_cost, _weekday_later, _convert_result, _hours, _plus)[int(rng.random() * 5)](rng, split)


def _calculate(text: str) -> tuple[Use, str]:
    return Use(CALCULATE, {"expression": text}, f"Now {text}."), format_number(evaluate(text))


def _cost(rng: Random, split: Split) -> Task:
    item, count, price = thing(rng, split), 2 + int(rng.random() * 29), value_of(rng, split, "price")
    said = plural(item)  # look-ups take the name as it is said
    first = Use(
        lookup_capability("price", "item", {item: price, plural(item): price}, rng, split),
        {"name": said},
        f"First the price of {said}.",
    )
    second, result = _calculate(f"{price}*{count}")
    question = _COST.pick(rng, split, n=count, x=said)
    return Task("chain", question, [[first], [second]], f"{count} {plural(item)} cost {result}.", (result,))


def _plus(rng: Random, split: Split) -> Task:
    kind, _, names = subject(rng, split)
    key = {"item": "weight", "person": "age", "city": "population"}[kind]
    value, more = value_of(rng, split, key), number(rng)
    first = Use(
        lookup_capability(key, kind, {names[0]: value}, rng, split),
        {"name": names[0]},
        f"First the {key} of {names[0]}.",
    )
    second, result = _calculate(f"{value}+{more}")
    return Task(
        "chain",
        _SUM_OF.pick(rng, split, k=key, x=names[0], n=more),
        [[first], [second]],
        f"The result is {result}.",
        (result,),
    )


def _weekday_later(rng: Random, split: Split) -> Task:
    when, days = day(rng), 2 + int(rng.random() * 200)
    later = add_days(when.isoformat(), days)
    steps = [
        [Use(DATE_ADD, {"date": when.isoformat(), "days": days}, f"First the date: {when} plus {days} days.")],
        [Use(WEEKDAY, {"date": later}, f"Now the weekday of {later}.")],
    ]
    result = weekday(later)
    return Task(
        "chain", _LATER_WEEKDAY.pick(rng, split, n=days, d=when.isoformat()), steps, f"It is a {result}.", (result,)
    )


def _convert_result(rng: Random, split: Split) -> Task:
    source, target = units(rng)
    text = f"{quantity(rng)}{'+*'[rng.random() < 0.5]}{2 + int(rng.random() * 40)}"
    value = format_number(evaluate(text))
    result = format_number(convert(Fraction(value), source, target))
    if len(result) > 16 or len(value) > 9:
        return _convert_result(rng, split)
    first = Use(CALCULATE, {"expression": text}, f"First {text}.")
    second = Use(
        CONVERT,
        {"value": json_number(value), "from": source, "to": target},
        f"Now convert {value} from {source} to {target}.",
    )
    question = _THEN_CONVERT.pick(rng, split, e=text, s=source, t=target)
    return Task("chain", question, [[first], [second]], f"That is {result} {target}.", (result,))


def _hours(rng: Random, split: Split) -> Task:
    start = day(rng)
    days = 1 + int(rng.random() * 90)
    end = start + timedelta(days=days)
    first = Use(
        DATE_DIFFERENCE, {"from": start.isoformat(), "to": end.isoformat()}, f"First the days from {start} to {end}."
    )
    second, result = _calculate(f"{days}*24")
    return Task(
        "chain", _WEEKS.pick(rng, split, d=start, e=end), [[first], [second]], f"There are {result} hours.", (result,)
    )


_TWO_SUMS = Phrases(
    "parallel.sums",
    """What is {e} and what is {f}?
    Compute {e} and {f}.
    What are {e} and {f}?
    Calculate {e} and also {f}.
    {e} and {f}?""",
    """Tell me {e} and also {f}.
    Work out {e}, then {f}.""",
)
_TWO_DAYS = Phrases(
    "parallel.weekdays",
    """Which weekdays are {d} and {e}?
    What day of the week is {d}, and {e}?
    Tell me the weekdays of {d} and {e}.""",
    """On which weekdays are {d} and {e}?""",
)
_TWO_NAMES = Phrases(
    "parallel.lookups",
    """What is the {k} of {x} and of {y}?
    Tell me the {k} of {x} and the {k} of {y}.
    Compare the {k} of {x} and {y}.
    Look up the {k} for {x} and for {y}.""",
    """Find the {k} of {x} and the {k} of {y}.
    I want to know the {k} of {x} and of {y}.""",
)


def parallel(rng: Random, split: Split) -> Task:
    """Two calls of the same tool in one message."""
    roll = rng.random()
    if roll < 0.4:
        texts = [f"{number(rng)}{'+-*'[int(rng.random() * 3)]}{number(rng)}" for _ in range(2)]
        uses = [Use(CALCULATE, {"expression": text}, f"Need {text}.") for text in texts]
        results = [format_number(evaluate(text)) for text in texts]
        question = _TWO_SUMS.pick(rng, split, e=texts[0], f=texts[1])
        answer = f"{texts[0]} is {results[0]} and {texts[1]} is {results[1]}."
    elif roll < 0.6:
        days = [day(rng).isoformat() for _ in range(2)]
        uses = [Use(WEEKDAY, {"date": when}, f"Weekday of {when}.") for when in days]
        results = [weekday(when) for when in days]
        question = _TWO_DAYS.pick(rng, split, d=days[0], e=days[1])
        answer = f"{days[0]} is a {results[0]} and {days[1]} is a {results[1]}."
    else:
        kind, properties, names = subject(rng, split)
        key = rng.choice(properties)
        table = {name: value_of(rng, split, key) for name in names[:2]}
        capability = lookup_capability(key, kind, table, rng, split)
        uses = [Use(capability, {"name": name}, f"Need the {key} of {name}.") for name in table]
        results = [str(value) for value in table.values()]
        question = _TWO_NAMES.pick(rng, split, k=key, x=names[0], y=names[1])
        answer = f"The {key} of {names[0]} is {results[0]} and of {names[1]} is {results[1]}."
    return Task("parallel", question, [uses], answer, tuple(results))
