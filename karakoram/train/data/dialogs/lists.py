"""Operations on a list that the question writes out: sum, largest, smallest, count, average, sort, join."""

from fractions import Fraction
from random import Random
from typing import Any

from karakoram.tools import ToolError
from karakoram.tools.calculator import format_number
from karakoram.train.data.dialogs.arithmetic import json_number
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.names import Split, english, syllables

_NUMBERS = Role(
    "numbers",
    "numbers",
    Phrases(
        "lists.numbers",
        "The numbers\nList of numbers\nNumbers\nThe list\n[Some|Several|These] numbers\nNumbers [to use|to take|in a list]",
        "The list of numbers\nAll numbers",
    ),
)
_WORDS = Role(
    "words",
    "strings",
    Phrases(
        "lists.words",
        "The words\nList of words\nWords\nThe list of words\n[Some|Several|These] words\nWords [to use|to take|in a list]",
        "All words\nA list of words",
    ),
)


def _fractions(values: dict[str, Any]) -> list[Fraction]:
    numbers = [Fraction(str(value)) for value in values["numbers"]]
    if not numbers:
        raise ToolError("the list is empty")
    return numbers


def _capability(
    key: str, train: str, evaluation: str, compute: Any, role: Role = _NUMBERS, plain: bool = True
) -> Capability:
    return Capability(
        f"list_{key}",
        Phrases(f"lists.{key}.about", train, evaluation),
        (role,),
        compute,
        "numbers" if role is _NUMBERS else "words",
        plain,
    )


SUM = _capability(
    "sum",
    "Add up a list of numbers.\nSum of a list.\nReturns the total of numbers.\nTotal of a list of numbers.\n[Sum|Sums|Adds|Add] [up|together] [many|several|some|the given] numbers.\n[Gives|Computes|Finds] the [sum|total] of [some|many|several] numbers.",
    "Returns the sum of a list of numbers.\nAdd all numbers of a list.",
    lambda v: format_number(sum(_fractions(v), Fraction(0))),
)
LARGEST = _capability(
    "largest",
    "Find the largest number of a list.\nReturns the maximum of numbers.\nLargest of a list of numbers.\nThe biggest number in a list.\n[Gives|Finds|Picks] the [largest|biggest|highest|greatest] [of some numbers|of several numbers|value].",
    "Returns the largest number in a list.\nMaximum of a list.",
    lambda v: format_number(max(_fractions(v))),
)
SMALLEST = _capability(
    "smallest",
    "Find the smallest number of a list.\nReturns the minimum of numbers.\nSmallest of a list of numbers.\nThe lowest number in a list.\n[Gives|Finds|Picks] the [smallest|lowest|least] [of some numbers|of several numbers|value].",
    "Returns the smallest number in a list.\nMinimum of a list.",
    lambda v: format_number(min(_fractions(v))),
)
AVERAGE = _capability(
    "average",
    "Average of a list of numbers.\nReturns the mean of numbers.\nCompute the average of numbers.\nMean of a list.\n[Gives|Finds|Works out] the [average|mean] of [some|many|several] numbers.",
    "Returns the average of a list of numbers.\nThe mean of all numbers.",
    lambda v: format_number(sum(_fractions(v), Fraction(0)) / len(v["numbers"])),
)
SORT = _capability(
    "sort",
    "Sort a list of numbers.\nSorts numbers from small to large.\nReturns the numbers in order.\nPut numbers in order.\n[Sorts|Orders|Arranges] [some|many|several] numbers[| from low to high].",
    "Returns the sorted list of numbers.\nSort numbers in order.",
    lambda v: ", ".join(format_number(n) for n in sorted(_fractions(v))),
    plain=False,
)
COUNT = _capability(
    "count",
    "Count the words of a list.\nReturns how many words a list has.\nNumber of words in a list.\n[Gives|Finds|Tells] [how many words there are in a list|the number of words].",
    "Counts words in a list.\nHow many words there are.",
    lambda v: str(len(v["words"])),
    _WORDS,
)
ORDER = _capability(
    "order",
    "Sort words by the alphabet.\nPut words in alphabetical order.\nReturns words from A to Z.\n[Sorts|Orders|Arranges] [some|many|several] words[| by letter| from A to Z].",
    "Sorts a list of words from A to Z.\nAlphabetical order of words.",
    lambda v: ", ".join(sorted(v["words"])),
    _WORDS,
    plain=False,
)
_NUMERIC = (SUM, LARGEST, SMALLEST, AVERAGE, SORT)

_ASK = {
    SUM.key: Phrases(
        "lists.sum.ask",
        """What is the sum of {l}?
        Add up {l}.
        Sum these numbers: {l}
        What is the total of {l}?
        Add these numbers: {l}.
        Total of {l}?
        My expenses are {l}. What is the total?
        How much is {l} in total?""",
        """Please add up these numbers: {l}
        Tell me the total of the numbers {l}.
        I have the numbers {l}. What is their sum?""",
    ),
    LARGEST.key: Phrases(
        "lists.largest.ask",
        """Which is the largest of {l}?
        What is the maximum of {l}?
        Find the largest number: {l}
        Which number is the biggest: {l}?
        The scores are {l}. Which is the highest?
        Largest of {l}?""",
        """Tell me the largest of these numbers: {l}
        I have the numbers {l}. Which is the biggest?""",
    ),
    SMALLEST.key: Phrases(
        "lists.smallest.ask",
        """Which is the smallest of {l}?
        What is the minimum of {l}?
        Find the smallest number: {l}
        Which number is the lowest: {l}?
        The prices are {l}. Which is the lowest?
        Smallest of {l}?""",
        """Tell me the smallest of these numbers: {l}
        I have the numbers {l}. Which is the lowest?""",
    ),
    AVERAGE.key: Phrases(
        "lists.average.ask",
        """What is the average of {l}?
        Average of {l}?
        Find the mean of {l}.
        The grades are {l}. What is the average?
        Compute the average of these numbers: {l}
        What is the mean of {l}?""",
        """Tell me the average of these numbers: {l}
        I have the numbers {l}. What is their average?""",
    ),
    SORT.key: Phrases(
        "lists.sort.ask",
        """Sort {l}.
        Sort these numbers: {l}
        Put {l} in order.
        Order these numbers from small to large: {l}
        Can you sort {l}?""",
        """Please sort the numbers {l}.
        I have the numbers {l}. Put them in order.""",
    ),
    COUNT.key: Phrases(
        "lists.count.ask",
        """How many words are in this list: {l}?
        Count the words {l}.
        How many words: {l}
        Count these words: {l}
        How many words is {l}?""",
        """Please count these words: {l}
        Tell me how many words are here: {l}""",
    ),
    ORDER.key: Phrases(
        "lists.order.ask",
        """Sort the words {l}.
        Put these words in alphabetical order: {l}
        Sort these words from A to Z: {l}
        Sort {l} by the alphabet.""",
        """Please put the words {l} in alphabetical order.
        I have the words {l}. Sort them from A to Z.""",
    ),
}
_THOUGHTS = {
    SUM.key: "Sum",
    LARGEST.key: "Largest",
    SMALLEST.key: "Smallest",
    AVERAGE.key: "Average",
    SORT.key: "Sort the numbers",
    COUNT.key: "Count the words",
    ORDER.key: "Sort the words",
}
_ANSWERS = {
    SUM.key: "The sum is {r}.",
    LARGEST.key: "The largest is {r}.",
    SMALLEST.key: "The smallest is {r}.",
    AVERAGE.key: "The average is {r}.",
    SORT.key: "Sorted: {r}.",
    COUNT.key: "There are {r} words.",
    ORDER.key: "Sorted: {r}.",
}


def _spoken(items: list[str], rng: Random) -> str:
    if rng.random() < 0.65:
        return ", ".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]


def listing(rng: Random, split: Split) -> Task:
    """One operation on a list of three to seven numbers or words, beside tools for other operations."""
    size = 3 + int(rng.random() * 4)
    if rng.random() < 0.75:
        capability = _NUMERIC[int(rng.random() * len(_NUMERIC))]
        top = 30 if rng.random() < 0.5 else 500
        decimals = 0.08 if split == "eval" else 0.18  # held-out ones were cut at the point too often
        items = [
            f"{rng.random() * top:.1f}" if rng.random() < decimals else str(1 + int(rng.random() * top))
            for _ in range(size)
        ]
        values: dict[str, Any] = {"numbers": [json_number(item) for item in items]}
        rivals = tuple(other for other in _NUMERIC if other is not capability)
    else:
        capability, other = rng.sample((COUNT, ORDER), 2)
        items = [syllables(rng, split) if rng.random() < 0.3 else english(rng, split, "noun") for _ in range(size)]
        values = {"words": items}
        rivals = (other,)
    result = capability.compute(values)
    question = _ASK[capability.key].pick(rng, split, l=_spoken(items, rng))
    expected = tuple(result.split(", ")) if capability in (SORT, ORDER) else (result,)
    expected = (result,) if capability in (SORT, ORDER) else expected
    use = Use(capability, values, f"{_THOUGHTS[capability.key]}.")
    return Task("lists", question, [[use]], _ANSWERS[capability.key].format(r=result), expected, rivals=rivals)
