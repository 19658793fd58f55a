"""Dates: add days, count days, name the weekday. Questions write dates in ISO form or as `March 5, 2024`; tools take
ISO."""

from datetime import date, timedelta
from random import Random

from karakoram.tools.dates import add_days, days_between, weekday
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split

_DATE = Phrases(
    "dates.date",
    """Date, YYYY-MM-DD
    The date (YYYY-MM-DD)
    ISO date
    A date such as 2024-03-05
    Day as YYYY-MM-DD
    [The|A|Which|Start] [date|day] [in the form YYYY-MM-DD|as YYYY-MM-DD|like 2024-03-05|to start from|to begin with]""",
    "The day, YYYY-MM-DD\nDate in ISO form",
)
DATE_ADD = Capability(
    "date_add",
    Phrases(
        "date_add.about",
        """Add a number of days to a date.
        Add days to a date.
        Returns the date some days after a date.
        Move a date by a number of days.
        Computes a date that is N days later.
        Shift a date by days.
        Date plus days.
        [Give|Gives|Tell|Tells|Find] the date [N days later|that comes N days later|after a number of days|some days away].
        [Go|Move|Count] [N|some|a number of] days [forward|on|ahead] from a date.""",
        """Returns a date plus a number of days.
        Compute the date N days after a date.
        Add some days to a date.""",
    ),
    (
        Role("date", "string", _DATE),
        Role(
            "days",
            "integer",
            Phrases(
                "date_add.days",
                """Days to add, negative to go back
                Number of days
                How many days to add
                Days to add
                Days (negative for earlier)
                [How many days|Days|Number of days|Count of days] [to move|to shift by|later|to go forward|to count on|after it]""",
                "The number of days to add\nDays, negative to go back",
            ),
        ),
    ),
    lambda values: add_days(values["date"], int(values["days"])),
)
DATE_DIFFERENCE = Capability(
    "date_difference",
    Phrases(
        "date_difference.about",
        """Count the days between two dates.
        Number of days from one date to another.
        Returns how many days lie between two dates.
        Difference of two dates in days.
        How many days between two dates.
        Days between dates.
        [Tell|Tells|Give|Gives] how many days [there are|pass|lie] [between two dates|from one date to another|from a start date to an end date].
        [Time|Distance|Span] between dates in days.""",
        """Computes the number of days between two dates.
        Count days from one date to another.""",
    ),
    (
        Role(
            "from",
            "string",
            Phrases(
                "date_difference.start",
                """First date, YYYY-MM-DD
                Start date (YYYY-MM-DD)
                From this date
                The earlier date
                Start
                [First|Start|Early] [day|date]
                [Count|Begins|Starts] [from|at] this [day|date]
                [The day|The date|When] it [starts|begins]""",
                "The first date, YYYY-MM-DD\nThe start date",
            ),
        ),
        Role(
            "to",
            "string",
            Phrases(
                "date_difference.end",
                """Last date, YYYY-MM-DD
                End date (YYYY-MM-DD)
                To this date
                The later date
                End
                [Last|End|Late] [day|date]
                [Count|Stops|Ends] [to|at] this [day|date]
                [The day|The date|When] it [ends|stops]""",
                "The last date, YYYY-MM-DD\nThe end date",
            ),
        ),
    ),
    lambda values: str(days_between(values["from"], values["to"])),
)
WEEKDAY = Capability(
    "weekday",
    Phrases(
        "weekday.about",
        """Name the day of the week of a date.
        Returns the weekday of a date.
        Which weekday a date is.
        Day of the week for a date.
        Get the weekday.
        Tells the day of the week.
        [Find|Finds|Give|Gives|Show] [the weekday|the day of the week] [of|for] [a|some|any] day.
        [Monday to Sunday|Mon, Tue, ...] for a date.""",
        """Returns the day of the week of a date.
        The weekday for a date.""",
    ),
    (
        Role(
            "date",
            "string",
            Phrases(
                "weekday.date",
                """The date
                Date, YYYY-MM-DD
                ISO date
                Day as YYYY-MM-DD
                A date (YYYY-MM-DD)
                [Which|Some|Any] [date|day]
                [A date|A day] [in the form YYYY-MM-DD|like 2024-03-05]""",
                "Date as YYYY-MM-DD\nThe day",
            ),
        ),
    ),
    lambda values: weekday(values["date"]),
)

_ADD = Phrases(
    "date_add.ask",
    """What date is {n} days after {d}?
    Which date is {n} days after {d}?
    Add {n} days to {d}.
    What is the date {n} days after {d}?
    What is {d} plus {n} days?
    {d} plus {n} days?
    {d} + {n} days
    I start on {d} and need {n} days. When am I done?
    A course begins on {d} and takes {n} days. On which date does it end?
    Today is {d}. What date is it in {n} days?
    What will be the date {n} days from {d}?
    If I wait {n} days from {d}, what date is it?
    Which day comes {n} days after {d}?
    My order of {d} arrives after {n} days. Which date?
    Give me the date {n} days later than {d}.""",
    """On {d} I begin a trip of {n} days. Which date is it after that?
    Please add {n} days to the date {d}.
    It is {d} today. Which date will it be in {n} days?
    Tell me the date that is {n} days after {d}.""",
)
_BACK = Phrases(
    "date_add.ask_back",
    """What date was {n} days before {d}?
    Which date is {n} days before {d}?
    Go back {n} days from {d}.
    Subtract {n} days from {d}.
    What is {d} minus {n} days?
    Today is {d}. What date was it {n} days ago?
    What is the date {n} days earlier than {d}?""",
    """Tell me the date that is {n} days before {d}.
    Please subtract {n} days from the date {d}.
    It is {d} today. Which date was it {n} days ago?""",
)
_DIFFERENCE = Phrases(
    "date_difference.ask",
    """How many days are between {d} and {e}?
    How many days from {d} to {e}?
    How many days lie between {d} and {e}?
    Days between {d} and {e}?
    Count the days from {d} to {e}.
    Today is {d}. How many days until {e}?
    It is {d}. How long until {e} in days?
    I was away from {d} to {e}. How many days is that?
    A project runs from {d} to {e}. How many days does it take?
    How many days is it from {d} until {e}?
    What is the difference between {d} and {e} in days?
    How long is it from {d} to {e}?""",
    """Tell me how many days there are between {d} and {e}.
    It is {d} today. How many days is it to {e}?
    My trip goes from {d} to {e}. How many days is that?
    Please count the days between {d} and {e}.""",
)
_WEEKDAY = Phrases(
    "weekday.ask",
    """What weekday is {d}?
    Which day of the week is {d}?
    What day of the week is {d}?
    What day is {d}?
    Which weekday was {d}?
    On which weekday does {d} fall?
    {d} is what day of the week?
    Is {d} a Monday or another weekday?
    My birthday is on {d}. Which weekday is that?
    The meeting is on {d}. What day of the week is it?
    Tell me the weekday of {d}.
    I was born on {d}. What day was that?""",
    """Please tell me which weekday {d} is.
    The party is on {d}. Which day of the week is that?
    Find the day of the week for {d}.
    On what day of the week is {d}?""",
)
MONTHS = "January February March April May June July August September October November December".split()


def day(rng: Random) -> date:
    """A date between 1990 and 2040, most of them near the present."""
    start = date(2018, 1, 1) if rng.random() < 0.7 else date(1990, 1, 1)
    return start + timedelta(days=int(rng.random() * (365 * 12 if start.year == 2018 else 365 * 50)))


def written(rng: Random, when: date) -> str:
    """The date as a person writes it: ISO in three of four cases."""
    roll = rng.random()
    month = MONTHS[when.month - 1]
    if roll < 0.76:
        return when.isoformat()
    return f"{month} {when.day}, {when.year}" if roll < 0.9 else f"{when.day} {month} {when.year}"


_RIVALS = (DATE_ADD, DATE_DIFFERENCE, WEEKDAY)


def adding(rng: Random, split: Split) -> Task:
    """The date some days after or before another."""
    when = day(rng)
    days = 1 + int(rng.random() * (30 if rng.random() < 0.5 else 400))
    back = rng.random() < 0.25
    question = (_BACK if back else _ADD).pick(rng, split, n=days, d=written(rng, when))
    days = -days if back else days
    result = add_days(when.isoformat(), days)
    use = Use(
        DATE_ADD,
        {"date": when.isoformat(), "days": days},
        f"Date {when} plus {days} days." if not back else f"Date {when} and {days} days.",
    )
    answer = ("The date is {r}.", "That is {r}.", "It is {r}.")[int(rng.random() * 3)].format(r=result)
    return Task("dates", question, [[use]], answer, (result,))


def difference(rng: Random, split: Split) -> Task:
    """How many days lie between two dates; the later one is named last."""
    first = day(rng)
    second = first + timedelta(days=1 + int(rng.random() * (60 if rng.random() < 0.5 else 900)))
    question = _DIFFERENCE.pick(rng, split, d=written(rng, first), e=written(rng, second))
    result = str((second - first).days)
    use = Use(DATE_DIFFERENCE, {"from": first.isoformat(), "to": second.isoformat()}, f"Days from {first} to {second}.")
    answer = ("That is {r} days.", "There are {r} days.", "It is {r} days.")[int(rng.random() * 3)].format(r=result)
    return Task("dates", question, [[use]], answer, (result,))


def day_of_week(rng: Random, split: Split) -> Task:
    """The weekday of a date."""
    when = day(rng)
    spoken = written(rng, when)
    result = weekday(when.isoformat())
    use = Use(WEEKDAY, {"date": when.isoformat()}, f"Weekday of {when}.")
    answer = ("{d} is a {r}.", "It is a {r}.", "That is a {r}.")[int(rng.random() * 3)].format(d=spoken, r=result)
    return Task("dates", _WEEKDAY.pick(rng, split, d=spoken), [[use]], answer, (result,))
