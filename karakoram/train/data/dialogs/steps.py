"""Chains of two to five calls: look-ups and their total, a purchase in stages, running sums, dates, folders, references.

`chain_of(rng, split, calls)` makes a question that needs exactly so many. What is independent is asked for in one message;
what depends on a result comes after it, and the thought before it quotes that result, so the value is copied from two
tokens before. Where one step follows the other, the first thought lists them all (`Steps: 33, -2, *7.`): the question is
read once, and what comes next is found behind what was just done.
"""

from collections.abc import Callable
from datetime import date
from fractions import Fraction
from random import Random
from typing import Any

from karakoram.tools.calculator import evaluate, format_number
from karakoram.tools.dates import add_days, weekday
from karakoram.train.data.dialogs import step_phrases as say
from karakoram.train.data.dialogs.actions import ACTIONS
from karakoram.train.data.dialogs.arithmetic import CALCULATE, OPERATE, json_number, number
from karakoram.train.data.dialogs.calendar import DATE_ADD, WEEKDAY, day
from karakoram.train.data.dialogs.capability import Capability
from karakoram.train.data.dialogs.files import file_name, folder_name, listing_capability, reading_capability
from karakoram.train.data.dialogs.growing import PLAN, Chain, listed, names_of, planned, readable
from karakoram.train.data.dialogs.lists import AVERAGE, LARGEST, SMALLEST, SUM
from karakoram.train.data.dialogs.measures import CONVERT, convert, units
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.records import lookup_capability, value_of
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, person, place, plural, thing

CALLS = (2, 3, 4, 5)
REPORT_SHARE = 0.12  # of chains of three and more: the last call sends the result to somebody
MOST_LETTERS = 24  # of a result that is no number on the way
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


def totals(rng: Random, split: Split, calls: int) -> Task:
    """The same property of several things, looked up at once, and one number made of them."""
    kind, make, key = (
        ("item", thing, "price"), ("item", thing, "weight"), ("item", thing, "stock"),
        ("person", person, "age"), ("city", place, "population"),
    )[int(rng.random() * 5)]  # fmt: skip
    names = names_of(rng, split, make, calls - 1)
    table = {name: value_of(rng, split, key) for name in names}
    look_up = lookup_capability(key, kind, table, rng, split)
    chain = Chain(rng, split)
    chain.steps.append([Use(look_up, {"name": name}, f"Need the {key} of {name}.") for name in names])
    values = [str(value) for value in table.values()]
    which = ("sum", "sum", "sum", "average", "largest", "smallest")[int(rng.random() * 6)]
    chain.say(say.TOTALS[which], k=key, l=listed(names))
    tool = {"sum": SUM, "average": AVERAGE, "largest": LARGEST, "smallest": SMALLEST}[which]
    quoted = f"The values are {', '.join(values)}. Now "
    if which == "sum" and rng.random() < 0.6:
        text = "+".join(values)
        use = Use(CALCULATE, {"expression": text}, f"{quoted}{text}.")
    else:
        use = Use(tool, {"numbers": [json_number(value) for value in values]}, f"{quoted}the {which}.")
    chain.steps.append([use])
    chain.value = use.capability.compute(use.values)
    return chain.task(f"The {which} is {{r}}.")


def basket(rng: Random, split: Split, calls: int) -> Task:
    """Prices of several things at once, then what so many of each cost together."""
    names = names_of(rng, split, thing, calls - 1)
    counts = [2 + int(rng.random() * 11) for _ in names]
    said = [plural(name) for name in names]
    table = {name: value_of(rng, split, "price") for name in said}
    look_up = lookup_capability("price", "item", table, rng, split)
    chain = Chain(rng, split)
    chain.say(say.BASKET, l=listed([f"{count} {name}" for count, name in zip(counts, said, strict=True)]))
    chain.steps.append([Use(look_up, {"name": name}, f"Need the price of {name}.") for name in said])
    values = [str(value) for value in table.values()]
    text = "+".join(f"{count}*{value}" for count, value in zip(counts, values, strict=True))
    chain.steps.append([Use(CALCULATE, {"expression": text}, f"The values are {', '.join(values)}. Now {text}.")])
    chain.value = format_number(evaluate(text))
    return chain.task("That is {r} dollars.")


def purchase(rng: Random, split: Split, calls: int) -> Task:
    """A price (or weight) is looked up, multiplied, and changed once per further sentence."""
    weighs = calls > 2 and rng.random() < 0.35
    key, unit = ("weight", "kg") if weighs else ("price", "dollars")
    item = plural(thing(rng, split))
    price, count = value_of(rng, split, key), 2 + int(rng.random() * 20)
    chain = Chain(rng, split)
    chain.say(say.WEIGHTS if weighs else say.BUY, n=count, x=item, p=person(rng, split))
    look_up = lookup_capability(key, "item", {item: price}, rng, split)
    chain.steps.append([Use(look_up, {"name": item}, f"First the {key} of {item}.")])
    chain.value = str(price)
    chain.plan += [f"{key} of {item}", f"*{count}"]
    chain.calculate(f"{price}*{count}")
    last = weighs and rng.random() < 0.6
    for _ in range(calls - 2 - last):
        _change(chain, say.WEIGHT_CHANGES if weighs else say.PRICE_CHANGES)
    if last:
        unit = _converted(chain)
    else:
        chain.say(say.WEIGHT_ASK if weighs else say.PRICE_ASK)
    return chain.task(f"That is {{r}} {unit}.")


def _change(chain: Chain, changes: Phrases) -> None:
    """One more sentence `words|expression` in which `{v}` is the value so far."""
    rng = chain.rng
    while True:
        slots = {"s": 2 + int(rng.random() * 28), "m": 2 + int(rng.random() * 8), "t": rng.choice((5, 10, 20, 25, 50))}
        words, change = changes.pick(rng, chain.split).split("|")
        text = change.format_map(slots | {"v": chain.value})
        if readable(text):
            break
    chain.sentences.append(words.format_map(slots))
    chain.plan.append(planned(change).format_map(slots))
    chain.calculate(text)


def _converted(chain: Chain) -> str:
    """The value in kg is wanted in another unit, which is returned."""
    target = chain.rng.choice(("g", "grams", "lb", "pounds", "oz", "ounces", "t"))
    chain.say(say.CONVERTED, t=target)
    chain.plan.append(f"to {target}")
    values = {"value": json_number(chain.value), "from": "kg", "to": target}
    chain.steps.append(
        [Use(CONVERT, values, f"The result is {chain.value}. Now convert {chain.value} from kg to {target}.")]
    )
    chain.value = format_number(convert(Fraction(chain.value), "kg", target))
    return target


def running(rng: Random, split: Split, calls: int) -> Task:
    """One number, changed step by step, by the calculator or by the tool for two numbers."""
    pairs = rng.random() < 0.55
    chain = Chain(rng, split, value=number(rng, 60))
    chain.plan.append(chain.value)
    chain.say(say.START, a=chain.value)
    for _ in range(calls):
        _operate(chain, pairs)
    chain.say(say.RUNNING_ASK)
    if not pairs:
        chain.say(say.ONE_BY_ONE)
    return chain.task("The result is {r}.")


def _operate(chain: Chain, pairs: bool) -> None:
    """One more operation on the value, through the tool for pairs or the calculator."""
    rng = chain.rng
    while True:
        operation = ("add", "subtract", "multiply", "divide", "add", "multiply")[int(rng.random() * 6)]
        operand = str(2 + int(rng.random() * (8 if operation in ("multiply", "divide") else 89)))
        text = f"{chain.value}{_SIGNS[operation]}{operand}"
        if readable(text):
            break
    chain.say(say.RUNNING[operation], b=operand)
    chain.plan.append(f"{_SIGNS[operation]}{operand}")
    if not pairs:
        chain.calculate(text)
        return
    values = {"first": json_number(chain.value), "second": json_number(operand), "operation": operation}
    chain.steps.append([Use(OPERATE, values, f"{chain.so_far()}{text}.")])
    chain.value = OPERATE.compute(values)


def journey(rng: Random, split: Split, calls: int) -> Task:
    """Days are added to a date that is given or looked up; at the end the weekday or the date is wanted."""
    chain = Chain(rng, split)
    when: date = day(rng)
    looked_up = calls > 2 and rng.random() < 0.5
    named = calls - looked_up == 1 or rng.random() < 0.7
    if calls == 2:
        named = False  # two calls that end in a weekday are a family of their own
    if looked_up:
        kind, key = (("course", "start"), ("person", "birthday"), ("shop", "opening"))[int(rng.random() * 3)]
        name = person(rng, split) if kind == "person" else place(rng, split)
        look_up = lookup_capability(key, kind, {name: when.isoformat()}, rng, split)
        chain.say(say.LOOKED_UP_DAY, k=key, x=name)
        chain.steps.append([Use(look_up, {"name": name}, f"First the {key} of {name}.")])
        chain.plan.append(f"{key} of {name}")
    else:
        chain.say(say.GIVEN_DAY, d=when.isoformat())
        chain.plan.append(when.isoformat())
    chain.value = when.isoformat()
    for _ in range(calls - looked_up - named):
        days = 2 + int(rng.random() * 120)
        chain.say(say.DAYS_LATER, n=days)
        chain.plan.append(f"+{days} days")
        values = {"date": chain.value, "days": days}
        chain.steps.append([Use(DATE_ADD, values, f"{chain.so_far()}{chain.value} plus {days} days.")])
        chain.value = add_days(chain.value, days)
    if not named:
        chain.say(say.WHICH_DATE)
        return chain.task("The date is {r}.")
    chain.say(say.WHICH_WEEKDAY)
    chain.plan.append("weekday")
    chain.steps.append([Use(WEEKDAY, {"date": chain.value}, f"{chain.so_far()}the weekday of {chain.value}.")])
    chain.value = weekday(chain.value)
    return chain.task("It is a {r}.")


def several(rng: Random, split: Split, calls: int) -> Task:
    """The same tool for several things in one message."""
    roll = rng.random()
    if roll < 0.35:
        said = [f"{number(rng)}{'+-*'[int(rng.random() * 3)]}{number(rng)}" for _ in range(calls)]
        uses = [Use(CALCULATE, {"expression": text}, f"Need {text}.") for text in said]
        question = say.SUMS.pick(rng, split, l=_sequence(said, rng, split))
    elif roll < 0.5:
        said = [day(rng).isoformat() for _ in range(calls)]
        uses = [Use(WEEKDAY, {"date": when}, f"Weekday of {when}.") for when in said]
        question = say.WEEKDAYS.pick(rng, split, l=listed(said))
    elif roll < 0.7:
        source, target = units(rng)
        numbers = names_of(rng, split, lambda rng, _: str(1 + int(rng.random() * 200)), calls)
        said = [f"{value} {source}" for value in numbers]
        uses = [
            Use(
                CONVERT,
                {"value": int(value), "from": source, "to": target},
                f"Convert {value} from {source} to {target}.",
            )
            for value in numbers
        ]
        question = say.CONVERSIONS.pick(rng, split, l=listed(said), t=target)
    else:
        kind, make, key = (("item", thing, "code"), ("person", person, "room"), ("city", place, "river"), ("item", thing, "color"))[int(rng.random() * 4)]  # fmt: skip
        said = names_of(rng, split, make, calls)
        look_up = lookup_capability(key, kind, {name: value_of(rng, split, key) for name in said}, rng, split)
        uses = [Use(look_up, {"name": name}, f"Need the {key} of {name}.") for name in said]
        question = say.PROPERTIES.pick(rng, split, k=key, l=listed(said))
    results = [use.capability.compute(use.values) for use in uses]
    if any(len(result) > 12 for result in results):
        return several(rng, split, calls)
    answer = listed([f"{text} is {result}" for text, result in zip(said, results, strict=True)])
    thought = f"The results are {listed(results)}."
    question = question[0].upper() + question[1:]
    return Task("steps", question, [uses], f"{answer}.", tuple(results), thought, company=1)


def _sequence(items: list[str], rng: Random, split: Split) -> str:
    """`a, b and c`, or `a, then b, then c`."""
    if rng.random() < 0.6:
        return listed(items)
    return ", ".join([items[0], *(say.THEN.pick(rng, split, e=item) for item in items[1:])])


def folder(rng: Random, split: Split, calls: int) -> Task:
    """A folder is listed, its files are read in one message, and their numbers are added."""
    where = folder_name(rng, split)
    files = names_of(rng, split, file_name, max(1, calls - 2))
    values = [number(rng, 400) for _ in files]
    paths = [f"{where}/{file}" for file in files]
    listing = listing_capability(where, ", ".join(files))
    reading = reading_capability(dict(zip(paths, values, strict=True)))
    chain = Chain(rng, split)
    chain.steps.append([Use(listing, {"path": where}, f"First list the folder {where}.")])
    chain.steps.append([Use(reading, {"path": path}, f"Read the file {path}.") for path in paths])
    if len(files) == 1:
        added = number(rng, 90)
        chain.say(say.ONE_NUMBER, f=where, n=added)
        values.append(added)
    else:
        chain.say(say.NUMBERS, f=where)
    text = "+".join(values)
    use = Use(CALCULATE, {"expression": text}, f"The values are {', '.join(values)}. Now {text}.")
    chain.steps.append([use])
    chain.value = format_number(evaluate(text))
    return chain.task("The result is {r}.")


def reference(rng: Random, split: Split, calls: int) -> Task:
    """The city of a person, its mayor, the mayor's age, and arithmetic with it: each look-up needs the one before."""
    who, town = person(rng, split), place(rng, split)
    mayor = names_of(rng, split, person, 1)[0]
    while mayor == who:
        mayor = person(rng, split)
    chain = Chain(rng, split)
    city = lookup_capability("city", "person", {who: town}, rng, split)
    chain.steps.append([Use(city, {"name": who}, f"First the city of {who}.")])
    chain.plan.append(f"city of {who}")
    chain.value = town
    if calls == 2:
        key = rng.choice(("population", "mayor", "river", "country"))
        chain.say(say.OF_THE_CITY, k=key, p=who)
        _look_up(chain, key, "city", town)
        return chain.task(f"The {key} is {{r}}.")
    _look_up(chain, "mayor", "city", town, mayor)
    key = "age" if calls > 3 else rng.choice(("phone", "age", "room", "email", "job"))
    chain.say(say.OF_THE_MAYOR, k=key, p=who)
    _look_up(chain, key, "person", mayor)
    for _ in range(calls - 3):
        _operate(chain, pairs=False)
    return chain.task(f"The {key} is {{r}}." if calls == 3 else "The result is {r}.")


def _look_up(chain: Chain, key: str, kind: str, name: str, value: Any = None) -> None:
    value = value_of(chain.rng, chain.split, key) if value is None else value
    look_up = lookup_capability(key, kind, {name: value}, chain.rng, chain.split)
    chain.steps.append([Use(look_up, {"name": name}, f"{chain.so_far()}the {key} of {name}.")])
    chain.plan.append(key)
    chain.value = str(value)


_Maker = Callable[[Random, Split, int], Task]
# share, maker, fewest and most calls
KINDS: tuple[tuple[float, _Maker, int, int], ...] = (
    (0.18, totals, 3, 5),
    (0.12, basket, 3, 5),
    (0.18, purchase, 2, 5),
    (0.17, running, 2, 5),
    (0.11, journey, 2, 5),
    (0.10, several, 2, 5),
    (0.07, folder, 3, 5),
    (0.07, reference, 2, 5),
)


def _message() -> Capability:
    action = next(action for action in ACTIONS if action.key == "message")
    return Capability(action.key, action.about, action.roles, lambda values: "sent", plain=False)


def chain_of(rng: Random, split: Split, calls: int) -> Task:
    """A question that takes exactly `calls` calls, 2 to 5."""
    reports = calls > 2 and rng.random() < REPORT_SHARE
    wanted = calls - reports
    kinds = [kind for kind in KINDS if kind[2] <= wanted <= kind[3] and not (reports and kind[1] is several)]
    [(_, make, *_)] = rng.choices(kinds, [kind[0] for kind in kinds])
    task = make(rng, split, wanted)
    while any(len(text) > MOST_LETTERS for text in task.expected):
        task = make(rng, split, wanted)
    if reports:
        _report(task, rng, split)
    return task


def _report(task: Task, rng: Random, split: Split) -> None:
    """The last call sends the result to a person."""
    who, result = person(rng, split), task.expected[-1]
    task.question += " " + say.REPORT.pick(rng, split, p=who)
    first = task.steps[0][0]
    if first.thought.startswith(PLAN):
        first.thought = first.thought.replace(". First ", ", send. First ", 1)
    task.steps.append([Use(_message(), {"p": who, "m": result}, f"The result is {result}. Send it to {who}.")])
    task.answer, task.expected = f"I sent {result} to {who}.", (result, who)
    task.thought = f"Sent {result} to {who}."


def steps(rng: Random, split: Split) -> Task:
    """A chain of two to five calls, the middle lengths somewhat more often."""
    return chain_of(rng, split, (2, 2, 3, 3, 3, 4, 4, 4, 5, 5)[int(rng.random() * 10)])


def short_steps(rng: Random, split: Split) -> Task:
    """Two calls or three: what the first stage of training sees."""
    return chain_of(rng, split, 2 + (rng.random() < 0.5))
