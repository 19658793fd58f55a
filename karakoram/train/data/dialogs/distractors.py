"""Tools that are declared and never needed: they make the choice of a tool a real one."""

from random import Random
from typing import Any

from karakoram.train.data.dialogs.capability import Capability, Role
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.records import Fixed
from karakoram.train.data.names import Split

_ABOUTS = Phrases(
    "distractors.about",
    """Send an email.
    Send a message to a person.
    Play a song.
    Get the weather of a city.
    Book a flight.
    Translate a text.
    Turn a light on or off.
    Set an alarm.
    Take a picture.
    Search the web.
    Order food.
    Draw an image.
    Set a reminder.
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
    """Sends a message by email.
    Plays music.
    Returns the weather for a city.
    Book a hotel.
    Search for a song.
    Write a text.""",
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
    """Text of the message
    The city
    What to search""",
)


def _nothing(values: dict[str, Any]) -> str:
    return "ok"


def distractor(rng: Random, split: Split) -> Capability:
    """A capability with one or two arguments that no question asks for."""
    kinds = ("string", "string", "string", "integer", "boolean")
    roles = tuple(
        Role(str(index), kinds[int(rng.random() * 5)], Fixed(_ARGUMENTS.pick(rng, split))) for index in range(1 if rng.random() < 0.6 else 2)
    )
    return Capability("distractor", Fixed(_ABOUTS.pick(rng, split)), roles, _nothing)
