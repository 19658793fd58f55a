"""A task is one question with its solution, before names are given and the conversation is written."""

from dataclasses import dataclass, field
from typing import Any

from karakoram.train.data.dialogs.capability import Capability


@dataclass(slots=True)
class Use:
    """One call: the capability, values by role, and the thought that leads to it (a sentence, with the needed values)."""

    capability: Capability
    values: dict[str, Any]
    thought: str = ""


@dataclass(slots=True)
class Task:
    """`steps` are done one after another, the calls of one step in parallel; no steps = answered directly.

    `expected` are the strings that the answer must contain. `rivals` may be declared beside the needed tools although they are
    of the same group, because the question tells them apart.
    """

    family: str
    question: str
    steps: list[list[Use]]
    answer: str
    expected: tuple[str, ...]
    thought: str = ""  # before the final answer; a default is written when empty
    system: str | None = None
    rivals: tuple[Capability, ...] = ()
    verbatim: bool = False  # the question ends in free text that is copied: nothing is said around it
    failure: str | None = None  # the first call returns this error once, and is made again
    company: int = 3  # at most so many tools that nobody needs
    mistaken: bool = False  # the first call goes wrong and is made again, with the right names
    gives_up: bool = False  # or goes wrong again, and is not made a third time
    bare: bool = field(default=False)  # no tools at all

    @property
    def calls(self) -> int:
        """How many calls it takes."""
        return sum(len(step) for step in self.steps)
