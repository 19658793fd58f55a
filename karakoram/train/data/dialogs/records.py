"""Look-ups: a tool that returns a property of a named thing, or records that stand in the prompt and need no tool."""

import json
from random import Random
from typing import Any

from karakoram.tools import ToolError
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, english, person, place, split_of, syllables, thing

# property -> (what has it, unit behind the value)
THING_PROPERTIES = ("price", "weight", "color", "stock", "code", "size")
PERSON_PROPERTIES = ("phone", "city", "age", "email", "job", "room")
PLACE_PROPERTIES = ("population", "mayor", "temperature", "river", "country", "height")
_COLORS = "red blue green yellow black white brown gray pink purple orange".split()
_JOBS = "baker teacher doctor farmer painter singer pilot nurse driver writer cook miner".split()

_ABOUT = Phrases(
    "records.about",
    """Look up the {k} of a {w}.
    Returns the {k} of a {w}.
    Get the {k} for a {w}.
    Find the {k} of a {w}.
    Gives the {k} of a {w}.
    {w} {k} look-up.
    [Tell|Tells|Read|Show|Shows|Search] [the {k} of|which {k} has|the {k} for] [one {w}|a given {w}|any {w}|a {w} by name].
    [Finds|Fetches|Reads] [the {k}|a {k}] by the name of [a|the] {w}.""",
    """Look up a {w} and return the {k}.
    The {k} of a {w}.""",
)
_ALL = Phrases(
    "records.all",
    """Look up the data of a {w}.
    Returns the record of a {w}.
    Get all details of a {w}.
    Find a {w} in the list.
    [All data|Everything|What is known|Details] [about|on|for] a {w}.
    [Reads|Shows|Finds|Fetches] the [record|data|entry] of [a|one|some] {w}.""",
    """Returns all data of a {w}.
    The record of one {w}.""",
)
_NAME = Phrases(
    "records.name",
    "Name of the {w}\nThe {w}\nWhich {w}\n{w} name\nName\n[What|Which] {w} to [look for|look up|find]\n[Its|The|A] name\nThe {w} [by name|to read|to find]",
    "The name of the {w}\nFull {w} name",
)
_ASK = Phrases(
    "records.ask",
    """What is the {k} of {x}?
    What's the {k} of {x}?
    Tell me the {k} of {x}.
    Find the {k} of {x}.
    I need the {k} of {x}.
    Look up the {k} of {x}.
    Can you find the {k} of {x}?
    {k} of {x}?
    Which {k} does {x} have?
    Do you know the {k} of {x}?
    Please give me the {k} of {x}.
    Get me the {k} for {x}.
    What {k} does {x} have?
    What {k} is listed for {x}?""",
    """Please look up which {k} {x} has.
    I want to know the {k} of {x}.
    Could you tell me the {k} of {x}?
    Find out the {k} for {x}.""",
)
_TABLE = Phrases(
    "records.table",
    """Here are the records: {t}. {q}
    {t}. {q}
    Given this data: {t}. {q}
    This is my list: {t}. {q}
    {q} The data: {t}
    Use this table: {t}. {q}""",
    """I have this data: {t}. {q}
    {q} Here is my list: {t}""",
)
_TABLE_SYSTEM = Phrases(
    "records.system",
    """You answer from this data: {t}
    Data: {t}
    You are an assistant. Use these records: {t}
    Known facts: {t}""",
    """Answer with these records: {t}
    These are the facts: {t}""",
)


_QUOTE = Phrases(
    "records.quote",
    """[Show|Give|Tell|Read] me [the record|the data|the entry|all data] of {x}.
    What is the [record|entry|data] of {x}?
    [Copy|Repeat|Quote] the [record|entry] of {x}.
    Which record is that of {x}?
    What does the list say about {x}?""",
    """Please quote what the data say of {x}.
    Everything about {x}, please.""",
)


def value_of(rng: Random, split: Split, key: str) -> str | int | float:
    """A plausible value of a property."""
    match key:
        case "price":
            return round(1 + rng.random() * 200, 2) if rng.random() < 0.5 else 1 + int(rng.random() * 300)
        case "weight" | "temperature":
            return round(rng.random() * 40, 1)
        case "stock" | "age" | "room" | "size" | "height":
            return 1 + int(rng.random() * 99 * (10 if key in ("room", "stock", "height") else 1))
        case "population":
            return 1000 + int(rng.random() * 900_000)
        case "color":
            return _COLORS[int(rng.random() * len(_COLORS))]
        case "job":
            return _JOBS[int(rng.random() * len(_JOBS))]
        case "code":
            return syllables(rng, split, 1).upper()[:3] + "-" + str(100 + int(rng.random() * 900))
        case "phone":
            return f"555-{1000 + int(rng.random() * 9000)}"
        case "email":
            return f"{syllables(rng, split)}@{syllables(rng, split)}.com"
        case "mayor":
            return person(rng, split)
        case _:
            return place(rng, split)


def subject(rng: Random, split: Split) -> tuple[str, tuple[str, ...], list[str]]:
    """The kind of thing, its properties, and four different names."""
    kind, properties, make = (
        ("item", THING_PROPERTIES, thing),
        ("person", PERSON_PROPERTIES, person),
        ("city", PLACE_PROPERTIES, place),
    )[int(rng.random() * 3)]
    names: list[str] = []
    while len(names) < 4:
        name = make(rng, split)
        if name not in names:
            names.append(name)
    return kind, properties, names


def spoken(kind: str, name: str, rng: Random) -> str:
    """How a question refers to it; the name itself stays verbatim."""
    return f"the {name}" if kind == "item" and rng.random() < 0.7 else name


def lookup_capability(key: str, kind: str, table: dict[str, Any], rng: Random, split: Split) -> Capability:
    """A look-up of one property (`key`) over `table` (name -> value), or of whole records when `key` is empty."""
    folded = {name.lower(): value for name, value in table.items()}

    def compute(values: dict[str, Any]) -> str:
        found = folded.get(str(values["name"]).strip().lower())
        if found is None:
            raise ToolError(f"{str(values['name'])[:40]} not found")
        return json.dumps(found, ensure_ascii=False) if isinstance(found, dict) else str(found)

    about = (_ABOUT if key else _ALL).pick(rng, split, k=key, w=kind)
    name = _NAME.pick(rng, split, w=kind)
    return Capability(
        f"lookup_{kind}_{key}",
        Fixed(about[0].upper() + about[1:]),
        (Role("name", "string", Fixed(name[0].upper() + name[1:])),),
        compute,
        group=f"lookup_{kind}",
        plain=bool(key),
    )


class Fixed(Phrases):
    """One text that was already picked."""

    def __init__(self, text: str) -> None:
        self.of = {"train": (text,), "eval": (text,)}


def _answer(rng: Random, key: str, who: str, result: str) -> str:
    return ("The {k} of {x} is {r}.", "The {k} is {r}.", "It is {r}.", "The {k} of {x} is {r}.")[
        int(rng.random() * 4)
    ].format(k=key, x=who, r=result)


def lookup(rng: Random, split: Split) -> Task:
    """A property of one thing through a tool; other tools know other properties of the same kind of thing."""
    kind, properties, names = subject(rng, split)
    key, *others = rng.sample(properties, 3)
    name, who = names[0], spoken(kind, names[0], rng)
    value = value_of(rng, split, key)
    whole = rng.random() < 0.3
    if whole:
        record = {key: value, others[0]: value_of(rng, split, others[0])}
        if rng.random() < 0.5:
            record[others[1]] = value_of(rng, split, others[1])
        items = list(record.items())
        rng.shuffle(items)
        capability = lookup_capability("", kind, {name: {"name": name, **dict(items)}}, rng, split)
        rivals: tuple[Capability, ...] = ()
    else:
        capability = lookup_capability(key, kind, {name: value}, rng, split)
        rivals = tuple(
            lookup_capability(other, kind, {name: value_of(rng, split, other)}, rng, split) for other in others
        )
    use = Use(capability, {"name": name}, f"Need the {key} of {name}.")
    question = _ASK.pick(rng, split, k=key, x=who)
    question = question[0].upper() + question[1:]
    if rng.random() < 0.05:  # the tool does not know it
        missing = lookup_capability("" if whole else key, kind, {names[1]: value}, rng, split)
        use = Use(missing, {"name": name}, use.thought)
        return Task(
            "lookup",
            question,
            [[use]],
            f"I could not find {name}.",
            (name, "could not"),
            thought="Not found.",
            rivals=rivals,
        )
    result = str(value)
    return Task("lookup", question, [[use]], _answer(rng, key, who, result), (result,), rivals=rivals)


def _alike(name: str, rng: Random) -> str:
    """Another name of training that begins or ends like this one, so that only the whole name tells them apart."""
    first, _, noun = name.partition(" ")
    if noun:
        return (
            f"{english(rng, 'train', 'adjective')} {noun}"
            if rng.random() < 0.6
            else f"{first} {english(rng, 'train', 'noun')}"
        )
    if not first[0].isupper():
        return f"{english(rng, 'train', 'adjective')} {first}"
    while True:
        other = first[: 2 + int(rng.random() * 2)] + syllables(rng, "train", 1)
        if other != first and split_of(other.lower()) == "train":
            return other


def _more_names(kind: str, names: list[str], rng: Random) -> list[str]:
    """Names for a table of training: two to six, in half of the tables some of them alike."""
    names = names[: 2 + int(rng.random() * 3)]
    if rng.random() < 0.3:
        names += subject_names(kind, rng, 2)
    if rng.random() < 0.5:
        names += [_alike(names[int(rng.random() * len(names))], rng) for _ in range(1 + (rng.random() < 0.4))]
    names = list(dict.fromkeys(names))[:6]
    rng.shuffle(names)
    return names


def subject_names(kind: str, rng: Random, count: int) -> list[str]:
    """Names of training for things of this kind."""
    make = {"item": thing, "person": person, "city": place}[kind]
    return [make(rng, "train") for _ in range(count)]


def _written(records: dict[str, dict[str, Any]], rng: Random) -> tuple[str, dict[str, str]]:
    """Records as a text, in one of three ways, and the part of it that each makes up."""
    roll = rng.random()
    if roll < 0.4:
        parts = {name: json.dumps({"name": name, **record}, ensure_ascii=False) for name, record in records.items()}
        return f"[{', '.join(parts.values())}]", parts
    if roll < 0.7:
        parts = {
            name: f"{name}: " + ", ".join(f"{key} {value}" for key, value in record.items())
            for name, record in records.items()
        }
    else:
        parts = {
            name: f"{name} has {' and '.join(f'{key} {value}' for key, value in record.items())}"
            for name, record in records.items()
        }
    return "; ".join(parts.values()), parts


def _records(rng: Random, split: Split) -> tuple[str, dict[str, dict[str, Any]]]:
    """The kind of thing, and two to four records of it (in training up to six) with the same one or two keys."""
    kind, properties, names = subject(rng, split)
    first, second = rng.sample(properties, 2)
    keys = [first, second] if rng.random() < 0.5 else [first]
    names = names[: 2 + int(rng.random() * 3)] if split == "eval" else _more_names(kind, names, rng)
    return kind, {name: {key: value_of(rng, split, key) for key in keys} for name in names}


def table(rng: Random, split: Split) -> Task:
    """Records in the prompt (or the system prompt): the answer is copied from there, no call is needed."""
    kind, records = _records(rng, split)
    text, parts = _written(records, rng)
    name, key = rng.choice(list(records)), rng.choice(list(next(iter(records.values()))))
    who, result = spoken(kind, name, rng), str(records[name][key])
    question = _ASK.pick(rng, split, k=key, x=who)
    question = question[0].upper() + question[1:]
    answer = _answer(rng, key, who, result)
    thought = f"Need the {key} of {name}. The data: {parts[name]}. The {key} is {result}. No tool needed."
    return _from_data(rng, split, question, text, Task("no_tool", "", [], answer, (result,), thought, verbatim=True))


def quote(rng: Random, split: Split) -> Task:
    """Whole records, one to three, as they stand in the prompt: each value must come from the record whose name was said.

    The first edition read the right key of the wrong record; here every written token practises the opposite.
    """
    kind, records = _records(rng, split)
    text, parts = _written(records, rng)
    names = rng.sample(list(records), min(len(records), 1 + int(rng.random() * 3)))
    said = [spoken(kind, name, rng) for name in names]
    question = _QUOTE.pick(rng, split, x=" and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said))
    answer = "; ".join(parts[name] for name in names)
    task = Task("no_tool", "", [], answer, (answer,), "The data say it. No tool needed.", verbatim=True)
    return _from_data(rng, split, question[0].upper() + question[1:], text, task)


def _from_data(rng: Random, split: Split, question: str, text: str, task: Task) -> Task:
    """The task with its data before the question, behind it, or in the system prompt."""
    if rng.random() < 0.4:
        task.question, task.system = question, _TABLE_SYSTEM.pick(rng, split, t=text)
    else:
        task.question = _TABLE.pick(rng, split, t=text, q=question)
    return task
