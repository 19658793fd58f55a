"""Unit conversion: the question names value and units, the tool knows the factors."""

from fractions import Fraction
from random import Random

from karakoram.tools.calculator import format_number
from karakoram.tools.units import TEMPERATURES, UNITS, convert
from karakoram.train.data.dialogs.arithmetic import json_number
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, person

CONVERT = Capability(
    "convert",
    Phrases(
        "convert.about",
        """Convert a value from one unit to another.
        Unit conversion.
        Converts between units of measure.
        Convert units such as km, kg or liters.
        Change a measure into another unit.
        Converts a quantity to a different unit.
        [Convert|Change|Changes|Turn|Turns|Express] [a value|a measure|an amount|a number] [from one unit into another|from unit to unit|into another unit|to another unit of measure|in other units].
        [Measure|Measurement|Units] converter.""",
        """Converts a quantity from one unit to another.
        Convert between units.
        Unit converter for a value.""",
    ),
    (
        Role(
            "value",
            "number",
            Phrases(
                "convert.value",
                """The value
                Value to convert
                How much
                Quantity
                The number to convert
                Amount in the first unit
                [The value|The amount|How much|A number|The quantity] [to change|that is converted|in the first unit|given|to be converted]""",
                "Quantity to convert\nThe number",
            ),
        ),
        Role(
            "from",
            "string",
            Phrases(
                "convert.source",
                """Unit of the value
                Unit to convert from
                From this unit
                The unit it is in
                First unit
                Source unit
                [Unit|The unit|Measure] [to start from|we have|that is given|before the change|it has now|of the amount|of the number]
                [Convert|Change|Comes] from
                From [which|what] unit""",
                "The unit of the value\nConvert from this unit",
            ),
        ),
        Role(
            "to",
            "string",
            Phrases(
                "convert.target",
                """Unit wanted
                Unit to convert to
                To this unit
                The unit it should be in
                Second unit
                Target unit
                [Unit|The unit|Measure] [to end with|we want|to get|after the change|of the result|it should have]
                [Convert|Change|Goes] [to|into]
                [Into|To] [which|what] unit
                Wanted unit""",
                "The unit wanted\nConvert to this unit",
            ),
        ),
    ),
    lambda values: format_number(convert(values["value"], values["from"], values["to"])),
)
_ASK = Phrases(
    "convert.ask",
    """Convert {v} {s} to {t}.
    How many {t} are {v} {s}?
    What is {v} {s} in {t}?
    {v} {s} in {t}?
    {v} {s} to {t}
    How much is {v} {s} in {t}?
    Change {v} {s} into {t}.
    I have {v} {s}. How much is that in {t}?
    Please convert {v} {s} into {t}.
    How many {t} is {v} {s}?
    Turn {v} {s} into {t}.
    {p} measured {v} {s}. What is that in {t}?
    Can you convert {v} {s} to {t}?
    Express {v} {s} in {t}.
    What do {v} {s} make in {t}?
    convert {v} {s} to {t}
    I need {v} {s} in {t}.
    The label says {v} {s}. How many {t} is that?
    We have {v} {s}, but I need to know it in {t}.""",
    """Tell me how many {t} {v} {s} are.
    {p} has {v} {s}. How many {t} is that?
    Please change {v} {s} to {t}.
    What is the value of {v} {s} in {t}?
    I want {v} {s} in {t}, please.""",
)


def units(rng: Random) -> tuple[str, str]:
    """Two spellings of different units of one kind."""
    if rng.random() < 0.12:
        first, second = rng.sample(sorted(TEMPERATURES), 2)
        names = [(scale, *(name for name in TEMPERATURES[scale] if "°" not in name)) for scale in (first, second)]
    else:
        kind = UNITS[rng.choice(tuple(UNITS))]
        first, second = rng.sample(tuple(kind), 2)
        names = [(unit, *kind[unit][1]) for unit in (first, second)]
    return rng.choice(names[0]), rng.choice(names[1])


def quantity(rng: Random) -> str:
    """A number as a person writes it: mostly whole, some with one decimal."""
    roll = rng.random()
    if roll < 0.7:
        return str(1 + int(rng.random() * (30 if roll < 0.3 else 500)))
    return f"{rng.random() * 50:.1f}" if roll < 0.9 else str(500 + int(rng.random() * 9500))


def conversion(rng: Random, split: Split) -> Task:
    """A value in one unit, wanted in another of the same kind."""
    source, target = units(rng)
    value = quantity(rng)
    result = format_number(convert(Fraction(value), source, target))
    if len(result) > 16:
        return conversion(rng, split)
    question = _ASK.pick(rng, split, v=value, s=source, t=target, p=person(rng, split))
    use = Use(
        CONVERT,
        {"value": json_number(value), "from": source, "to": target},
        f"Convert {value} from {source} to {target}.",
    )
    answer = ("{v} {s} is {r} {t}.", "That is {r} {t}.", "{v} {s} = {r} {t}.")[int(rng.random() * 3)]
    return Task("units", question, [[use]], answer.format(v=value, s=source, t=target, r=result), (result,))
