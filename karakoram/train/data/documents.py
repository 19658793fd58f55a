"""What training data is made of before it becomes token ids.

A `Document` is a conversation in OpenAI's shape, or plain text when `text` is set. A `Scenario` is a document together
with what is needed to let a model live through it: tools that really run, and the strings its final answer must
contain.
"""

from dataclasses import dataclass
from typing import Any

from karakoram.tools import Tool

Message = dict[str, Any]


@dataclass(slots=True)
class Document:
    """A finished conversation; `tools` are OpenAI declarations.

    mistakes  which messages are calls gone wrong: they are shown, followed by their correction, and never learned
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    thinking: bool = True
    text: str | None = None  # plain text instead of a conversation
    mistakes: tuple[int, ...] = ()


@dataclass(slots=True)
class Scenario:
    """`document` ends with the wanted answer; `prompt_messages` is all of it up to and with the last user message."""

    document: Document
    tools: list[Tool]
    expected: tuple[str, ...]  # every one must be found in the final answer
    family: str

    @property
    def prompt_messages(self) -> list[Message]:
        """All messages up to and with the last one of the user."""
        messages = self.document.messages
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        return messages[: last + 1]
