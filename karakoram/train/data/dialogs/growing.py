"""What chains of calls and word problems are made with: a question that grows with its steps, and which numbers may occur."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from random import Random
from typing import Any

from karakoram.tools.calculator import evaluate, format_number
from karakoram.train.data.dialogs.arithmetic import CALCULATE
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split

PLAN = "Steps: "
LARGEST_VALUE = 10**7  # of any number on the way
MOST_CHARS = 9  # of any number on the way: chains are to be learned here, not the copying of long numbers


@dataclass(slots=True)
class Chain:
    """A question while it grows: its sentences, its steps, and the value that the last call returned."""

    rng: Random
    split: Split
    sentences: list[str] = field(default_factory=list)
    steps: list[list[Use]] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    value: str = ""

    def say(self, phrases: Phrases, **slots: Any) -> None:
        """Another sentence of the question."""
        self.sentences.append(phrases.pick(self.rng, self.split, **slots))

    def calculate(self, text: str) -> None:
        """One call of the calculator for `text`, after the last value was quoted."""
        self.steps.append([Use(CALCULATE, {"expression": text}, f"{self.so_far()}{text}.")])
        self.value = format_number(evaluate(text))

    def so_far(self) -> str:
        """What a thought begins with: the last result, or that this is the first step."""
        return f"The result is {self.value}. Now " if self.steps else "First "

    def task(self, answer: str) -> Task:
        """The finished task; `{r}` in the answer is the last value."""
        question = " ".join(" ".join(self.sentences).split())
        question = question[0].upper() + question[1:]
        if self.plan:
            self.steps[0][0].thought = f"{PLAN}{', '.join(self.plan)}. {self.steps[0][0].thought}"
        return Task("steps", question, self.steps, answer.format(r=self.value), (self.value,), company=1)


def names_of(rng: Random, split: Split, make: Callable[[Random, Split], str], count: int) -> list[str]:
    """Different names."""
    names: list[str] = []
    while len(names) < count:
        name = make(rng, split)
        if name not in names:
            names.append(name)
    return names


def listed(items: list[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else items[0]


def planned(change: str) -> str:
    """A change of `{v}` as a plan writes it: `-{s}`, `+{t}%`."""
    if change.endswith("{v}*{t}/100"):
        return change[3] + "{t}%"
    return change.removeprefix("{v}")


def readable(text: str) -> bool:
    """Whether the value of an expression can go on: not negative, exact, short."""
    value = evaluate(text)
    written = format_number(value)
    return 0 <= value < LARGEST_VALUE and len(written) <= MOST_CHARS and Fraction(written) == value
