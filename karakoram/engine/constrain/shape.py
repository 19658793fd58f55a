"""The shape an output must have, as the API asks for it: which tools, whether one must be called, which JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class ToolShape:
    """A tool's name and the JSON Schema of its arguments. Without `strict`, keywords that cannot be enforced are
    passed over (the arguments are a JSON object all the same); with it they are an error that names the keyword."""

    name: str
    parameters: Schema
    strict: bool = True


@dataclass(frozen=True)
class OutputShape:
    """All that restricts one output.

    tools               those the model may call
    tool_choice         none: no call; auto: free; required: at least one call; named: calls of `named_tool` only, one
                        at least. required and named leave reasoning free and allow no content before the calls
    parallel            more than one call may come
    first_index         index of the output's first call, counted over the conversation
    response            schema that the content must satisfy ({"type": "object"}: any object); None: free text
    response_regex      the same as a regular expression
    in_reasoning        the output starts inside reasoning (the prompt has opened it, or the model will)
    reasoning_tokens    after so many tokens reasoning is closed; None: never
    """

    tools: tuple[ToolShape, ...] = ()
    tool_choice: Literal["none", "auto", "required", "named"] = "auto"
    named_tool: str | None = None
    parallel: bool = True
    first_index: int = 0
    response: Schema | None = None
    response_regex: str | None = None
    in_reasoning: bool = False
    reasoning_tokens: int | None = None
