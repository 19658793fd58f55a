"""Generated dialogs: the n-th dialog of a seed is a pure function, so data need neither be stored nor shipped.

`generate(seed, index, split)` returns the document to train on, `scenario(seed, index, split)` the same with executable
tools and the expected answer. Families and their shares stand in `FAMILIES`; the shares of demo tools, two-turn
conversations and failing tools are the constants below.
"""

from collections.abc import Callable
from random import Random

from karakoram.train.data.dialogs import actions, arithmetic, calendar, chains, files, lists, measures, records, talk
from karakoram.train.data.dialogs.compose import compose, group_of, with_failure
from karakoram.train.data.dialogs.phrases import Chance
from karakoram.train.data.dialogs.task import Task
from karakoram.train.data.documents import Document, Scenario
from karakoram.train.data.names import Split

# share, family, whether the built-in (demo) tools can do it
FAMILIES: tuple[tuple[float, Callable[[Random, Split], Task], bool], ...] = (
    (0.26, arithmetic.calculation, True),
    (0.04, arithmetic.operation, False),
    (0.05, calendar.adding, True),
    (0.05, calendar.difference, True),
    (0.04, calendar.day_of_week, True),
    (0.10, measures.conversion, True),
    (0.12, records.lookup, False),
    (0.06, records.table, False),
    (0.09, lists.listing, False),
    (0.05, files.files, False),
    (0.07, actions.action, False),
    (0.03, talk.small_talk, True),
    (0.03, talk.fact, True),
    (0.02, talk.refusal, True),
    (0.04, chains.chain, False),
    (0.02, chains.parallel, False),
)
DEMO_SHARE = 0.45  # of the families that the demo tools can do: about one document in five, in training only
TWO_TURN_SHARE = 0.06
FAILURE_SHARE = 0.025

_THRESHOLDS: list[float] = []
_total = 0.0
for _share, _, _ in FAMILIES:
    _total += _share
    _THRESHOLDS.append(_total)


def _family(rng: Random) -> tuple[float, Callable[[Random, Split], Task], bool]:
    roll = rng.random() * _total
    return next(family for family, threshold in zip(FAMILIES, _THRESHOLDS, strict=True) if roll < threshold)


def scenario(seed: int, index: int, split: Split = "train", rich: bool = False) -> Scenario:
    """The dialog with its tools. Built-in tools appear in training only: their names would not be held out.

    rich  from all phrasings of training, see `phrases.py`
    """
    rng = Chance(f"{split}:{seed}:{index}")
    rng.rich = rich
    _, make, demo_can = _family(rng)
    demo = demo_can and split == "train" and rng.random() < DEMO_SHARE
    tasks = [make(rng, split)]
    if rng.random() < TWO_TURN_SHARE:
        other = _family(rng)
        while demo and not other[2]:
            other = _family(rng)
        second = other[1](rng, split)
        if second.system is None and _together(tasks[0], second):
            tasks.append(second)
    if tasks[-1].steps and len(tasks) == 1 and not demo and rng.random() < FAILURE_SHARE:
        tasks[-1] = with_failure(tasks[-1], rng)
    return compose(tasks, rng, split, demo)


def _together(first: Task, second: Task) -> bool:
    """Whether two questions can share their tools without one having two answers."""
    if "missing_tool" in (first.family, second.family) and "actions" in (first.family, second.family):
        return False
    used = [{use.capability.key: use.capability for step in task.steps for use in step} for task in (first, second)]
    groups = [{group_of(capability) for capability in capabilities.values()} for capabilities in used]
    same = all(used[0].get(key) is capability for key, capability in used[1].items())
    return same or not groups[0] & (groups[1] | {group_of(rival) for rival in second.rivals})


def generate(seed: int, index: int, split: Split = "train", rich: bool = False) -> Document:
    """The dialog to train on; the same arguments give the same document on every machine."""
    return scenario(seed, index, split, rich).document
