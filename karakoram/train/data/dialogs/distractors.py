"""Tools that are declared and never needed: they make the choice of a tool a real one."""

from random import Random
from typing import Any

from karakoram.train.data.dialogs.actions import ACTIONS
from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.records import Fixed
from karakoram.train.data.names import Split

_ABOUTS = Phrases(
    "distractors.about",
    """Take a picture.
    Order food.
    Draw an image.
    Make a phone call.
    Print a page.
    Post on social media.
    Show a map.
    Open a door.
    Write a poem.
    Start the washing machine.
    Get the news.
    Create a new account.
    Delete a user.
    Check the spelling of a text.
    Roll a die.""",
    """Makes a photo.
    Calls a person.
    Prints a letter.
    Shows the news.
    Writes a story.
    Opens the window.""",
)
_ARGUMENTS = Phrases(
    "distractors.argument",
    """The text
    Who gets it
    City
    Title
    Where
    When
    On or off
    Search words
    Language
    The message
    How loud
    Subject""",
    """A text
    Some city
    Search for this""",
)


def _nothing(values: dict[str, Any]) -> str:
    return "ok"


def distractor(rng: Random, split: Split) -> Capability:
    """A capability that no question of the dialog asks for: an action of another kind, or a made-up one."""
    if rng.random() < 0.5:
        action = ACTIONS[int(rng.random() * len(ACTIONS))]
        return Capability(action.key, action.about, action.roles, _nothing)
    kinds = ("string", "string", "string", "integer", "boolean")
    roles = tuple(
        Role(str(index), kinds[int(rng.random() * 5)], Fixed(_ARGUMENTS.pick(rng, split)))
        for index in range(1 if rng.random() < 0.6 else 2)
    )
    return Capability("distractor", Fixed(_ABOUTS.pick(rng, split)), roles, _nothing)
