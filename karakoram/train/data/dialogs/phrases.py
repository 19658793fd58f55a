"""Sentence templates that know which split they belong to.

Every sentence that a model reads in a dialog (questions, descriptions of tools and arguments, system prompts) comes
from a `Phrases`: one tuple for training, another for evaluation, checked to be disjoint by a test that walks over
`ALL`. Slots are written `{name}` and filled with `str.format_map`; `[has|owns]` is a choice, made anew each time.

Training has two sets: few phrasings at first, while copying is learned, then all of them (`more_phrases.py` and
`chain_phrases.py`), so that words are learned rather than sentences. A `Chance` with `rich` draws from all.
"""

import re
from random import Random
from typing import Any

from karakoram.train.data.dialogs.chain_phrases import CHAINS
from karakoram.train.data.dialogs.more_phrases import MORE
from karakoram.train.data.names import Split

RICH_SHARE = 0.7
FURTHER = MORE | CHAINS


class Chance(Random):
    """The random numbers of one dialog. `rich`: from all phrasings of training, not only the first ones."""

    rich = False


_CHOICE = re.compile(r"\[([^\]]*)\]")

ALL: dict[str, "Phrases"] = {}


class Phrases:
    """Alternatives for one purpose; `pick` returns one of the split with its slots filled."""

    name = ""  # of what was picked already

    def __init__(self, name: str, train: str, evaluation: str) -> None:
        """Both lists as text, one template per line; `name` must be new."""
        lines = {"train": train, "eval": evaluation}
        self.of: dict[str, tuple[str, ...]] = {
            split: tuple(line.strip() for line in text.strip().splitlines() if line.strip())
            for split, text in lines.items()
        }
        self.name = name
        assert name not in ALL, name
        ALL[name] = self

    def pick(self, rng: Random, split: Split, **slots: Any) -> str:
        """One template at random, filled."""
        choices = self.of[split]
        if split == "train" and isinstance(rng, Chance) and rng.rich:
            more = FURTHER.get(self.name, ())
            if more and rng.random() < RICH_SHARE:  # the few first ones stay in practice
                choices = more
        template = choices[int(rng.random() * len(choices))]
        if "[" in template:
            template = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), template).strip()
        return template.format_map(slots) if slots else template
