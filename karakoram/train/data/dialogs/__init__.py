"""Generated dialogs: the n-th dialog of a seed is a pure function, so data need neither be stored nor shipped.

`generate(seed, index, split)` returns the document to train on, `scenario(seed, index, split)` the same with executable
tools and the expected answer. What a dialog is about is drawn from a mix of families (`MIXES`); the shares of demo tools,
two-turn conversations, failing tools and corrected mistakes are the constants below.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from random import Random
from typing import NamedTuple

from karakoram.errors import TrainingError
from karakoram.train.data.dialogs import (
    actions,
    arithmetic,
    calendar,
    chains,
    files,
    lists,
    measures,
    records,
    steps,
    stories,
    talk,
)
from karakoram.train.data.dialogs.compose import compose, group_of, with_failure
from karakoram.train.data.dialogs.phrases import Chance
from karakoram.train.data.dialogs.task import Task
from karakoram.train.data.documents import Document, Scenario
from karakoram.train.data.names import Split


class Family(NamedTuple):
    """Makes tasks of one kind. `demo`: the built-in tools can do all of them."""

    make: Callable[[Random, Split], Task]
    demo: bool = False


FAMILIES: dict[str, Family] = {
    "calculation": Family(arithmetic.calculation, demo=True),
    "operation": Family(arithmetic.operation),
    "adding": Family(calendar.adding, demo=True),
    "difference": Family(calendar.difference, demo=True),
    "day_of_week": Family(calendar.day_of_week, demo=True),
    "conversion": Family(measures.conversion, demo=True),
    "lookup": Family(records.lookup),
    "table": Family(records.table),
    "listing": Family(lists.listing),
    "files": Family(files.files),
    "action": Family(actions.action),
    "small_talk": Family(talk.small_talk, demo=True),
    "fact": Family(talk.fact, demo=True),
    "refusal": Family(talk.refusal, demo=True),
    "chain": Family(chains.chain),
    "parallel": Family(chains.parallel),
    "quote": Family(records.quote),
    "story": Family(stories.story, demo=True),
    "short_story": Family(stories.short_story, demo=True),
    "short_steps": Family(steps.short_steps),
    "steps": Family(steps.steps),
    **{f"steps_{n}": Family(partial(steps.chain_of, calls=n)) for n in steps.CALLS},
    **{f"story_{n}": Family(partial(stories.story_of, calls=n)) for n in steps.CALLS},
}

# Shares by family. `first`: the first edition's, which its evaluation keeps (its order is part of its dialogs).
# `pretrain`: one call, short chains; `sft`: chains of up to five. What nano's first edition did worst weighs most: records
# in the prompt (34 % wrong), units (26 %), two numbers by name of the operation, several calls at once.
MIXES: dict[str, dict[str, float]] = {
    "first": {
        "calculation": 0.26, "operation": 0.04, "adding": 0.05, "difference": 0.05, "day_of_week": 0.04,
        "conversion": 0.10, "lookup": 0.12, "table": 0.06, "listing": 0.09, "files": 0.05, "action": 0.07,
        "small_talk": 0.03, "fact": 0.03, "refusal": 0.02, "chain": 0.04, "parallel": 0.02,
    },
    "pretrain": {
        "calculation": 0.16, "operation": 0.05, "adding": 0.04, "difference": 0.04, "day_of_week": 0.03,
        "conversion": 0.10, "lookup": 0.10, "table": 0.09, "quote": 0.04, "listing": 0.07, "files": 0.03, "action": 0.06,
        "small_talk": 0.02, "fact": 0.02, "refusal": 0.02, "chain": 0.03, "parallel": 0.02,
        "short_story": 0.04, "short_steps": 0.04,
    },
    "sft": {
        "calculation": 0.115, "operation": 0.045, "adding": 0.03, "difference": 0.03, "day_of_week": 0.02,
        "conversion": 0.08, "lookup": 0.06, "table": 0.075, "quote": 0.025, "listing": 0.05, "files": 0.03,
        "action": 0.055, "small_talk": 0.015, "fact": 0.015, "refusal": 0.02, "chain": 0.035, "parallel": 0.02,
        "story": 0.11, "steps": 0.17,
    },
    "stories": {"story": 1.0},
    **{f"chain_{n}": {f"steps_{n}": 0.8, f"story_{n}": 0.2} for n in steps.CALLS},
}  # fmt: skip
DEMO_SHARE = 0.45  # of the families that the demo tools can do: about one document in five, in training only
TWO_TURN_SHARE = {"first": 0.06, "sft": 0.09, "pretrain": 0.06}  # of a mix; in the others there are none
FAILURE_SHARE = 0.025
MISTAKE_SHARE = 0.04  # of what may fail, in the mix `sft`: a wrong name, the error, the right call
GIVES_UP_SHARE = 0.3  # of these, a second wrong name: a model that cannot copy one would try it until it is stopped

_THRESHOLDS = {mix: list(accumulate(shares.values())) for mix, shares in MIXES.items()}


def _family(rng: Random, mix: str) -> Family:
    thresholds = _THRESHOLDS[mix]
    roll = rng.random() * thresholds[-1]
    return FAMILIES[next(name for name, threshold in zip(MIXES[mix], thresholds, strict=True) if roll < threshold)]


def scenario(seed: int, index: int, split: Split = "train", rich: bool = False, mix: str = "sft") -> Scenario:
    """The dialog with its tools. Built-in tools appear in training only: their names would not be held out.

    rich  from all phrasings of training, see `phrases.py`
    mix   one of `MIXES`; another name raises TrainingError
    """
    if mix not in MIXES:
        raise TrainingError(f"There is no mix {mix!r} of dialogs.", f"Choose one of {', '.join(MIXES)}.")
    rng = Chance(f"{split}:{seed}:{index}")
    rng.rich = rich
    family = _family(rng, mix)
    demo = family.demo and split == "train" and rng.random() < DEMO_SHARE
    tasks = [family.make(rng, split)]
    if rng.random() < TWO_TURN_SHARE.get(mix, 0.0) and tasks[0].calls <= 2:
        other = _family(rng, mix)
        while demo and not other.demo:
            other = _family(rng, mix)
        second = other.make(rng, split)
        if second.system is None and second.calls <= 2 and _together(tasks[0], second):
            tasks.append(second)
    may_fail = tasks[-1].steps and len(tasks) == 1 and not demo
    if may_fail and rng.random() < FAILURE_SHARE:
        tasks[-1] = with_failure(tasks[-1], rng)
    elif may_fail and mix == "sft" and split == "train" and len(tasks[-1].steps[0]) == 1:
        tasks[-1].mistaken = rng.random() < MISTAKE_SHARE
        if tasks[-1].mistaken and rng.random() < GIVES_UP_SHARE:
            tasks[-1].gives_up, tasks[-1].expected = True, ("could not",)
    return compose(tasks, rng, split, demo)


def _together(first: Task, second: Task) -> bool:
    """Whether two questions can share their tools without one having two answers."""
    if "missing_tool" in (first.family, second.family) and "actions" in (first.family, second.family):
        return False
    used = [{use.capability.key: use.capability for step in task.steps for use in step} for task in (first, second)]
    groups = [{group_of(capability) for capability in capabilities.values()} for capabilities in used]
    same = all(used[0].get(key) is capability for key, capability in used[1].items())
    return same or not groups[0] & (groups[1] | {group_of(rival) for rival in second.rivals})


def generate(seed: int, index: int, split: Split = "train", rich: bool = False, mix: str = "sft") -> Document:
    """The dialog to train on; the same arguments give the same document on every machine."""
    return scenario(seed, index, split, rich, mix).document
