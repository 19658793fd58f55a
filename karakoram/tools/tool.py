"""One tool: what the model is told about it, and the function that runs when the model calls it.

A tool is an OpenAI function declaration (name, description, JSON schema of the parameters) together with an in-process
Python function from the parsed arguments to a short text. `call` is the only way in for text that a model wrote: it
parses, checks the schema, runs, and turns every failure into an `error: …` text, because a model can read and correct
that.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from karakoram.tools.schema import validate

MAX_ARGUMENTS_CHARS = 20_000  # far above any honest call; keeps a runaway generation from reaching the JSON parser
MAX_RESULT_CHARS = 4_000


class ToolError(ValueError):
    """What a tool raises when the arguments make no sense; the text is shown to the model after `error: `."""


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is a JSON schema of type object; `run` takes parsed arguments and returns the result as text."""

    name: str
    description: str
    parameters: dict[str, Any]
    run: Callable[[dict[str, Any]], str]

    def declaration(self) -> dict[str, Any]:
        """The tool in OpenAI's shape, as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def parse_arguments(tool: Tool, arguments_json: str) -> tuple[dict[str, Any], list[str]]:
    """The arguments and the list of what is wrong with them; empty when they parse and satisfy the schema."""
    if len(arguments_json) > MAX_ARGUMENTS_CHARS:
        return {}, [f"arguments longer than {MAX_ARGUMENTS_CHARS} characters"]
    try:
        arguments = json.loads(arguments_json)
    except (ValueError, RecursionError) as error:
        return {}, [f"arguments are not JSON ({error})"]
    if not isinstance(arguments, dict):
        return {}, ["arguments are not a JSON object"]
    return arguments, validate(tool.parameters, arguments)


def call(tool: Tool, arguments_json: str) -> str:
    """Runs the tool on JSON text. Never raises on bad input: the result then starts with `error: `."""
    arguments, problems = parse_arguments(tool, arguments_json)
    if problems:
        return "error: " + "; ".join(problems[:3])
    try:
        result = tool.run(arguments)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"error: {error}"
    return result[:MAX_RESULT_CHARS]
