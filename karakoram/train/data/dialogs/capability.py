"""A capability is what a tool can do; a bound tool is one capability under invented names.

The same capability (say, adding days to a date) appears in every dialog under another tool name, other argument names,
another wording, and with its result wrapped in another way. Only the descriptions tell a model which tool fits and
which argument takes which value: that is the skill to be learned.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from karakoram.tools import Tool
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.names import Split, argument_name, tool_name, word


@dataclass(frozen=True, slots=True)
class Role:
    """One argument of a capability.

    kind  a JSON type, `numbers` or `strings` (arrays), or `enum` (with `options`)
    said  what a thought calls it, whatever its name in the dialog: the key, if empty
    """

    key: str
    kind: str
    about: Phrases
    options: tuple[str, ...] = ()
    said: str = ""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the argument, without a description."""
        if self.kind in ("numbers", "strings"):
            return {"type": "array", "items": {"type": self.kind[:-1]}}
        if self.kind == "enum":
            return {"type": "string", "enum": list(self.options)}
        return {"type": self.kind}


@dataclass(frozen=True, slots=True)
class Capability:
    """`compute` maps role values to the result text and raises ValueError on nonsense. Tools of one `group` never distract."""

    key: str
    about: Phrases
    roles: tuple[Role, ...]
    compute: Callable[[dict[str, Any]], str]
    group: str = ""
    plain: bool = True  # False: the result is a text of its own form (JSON, a listing) and is never wrapped


@dataclass(slots=True)
class Bound:
    """A capability under the names of one dialog. `names` maps role keys to argument names."""

    capability: Capability
    tool: Tool
    names: dict[str, str]
    wrap: Callable[[str], str]
    order: list[str] = field(default_factory=list)  # role keys in the order in which the declaration renders them

    def arguments(self, values: dict[str, Any]) -> dict[str, Any]:
        """Arguments under their names, in the order of the declaration."""
        return {self.names[key]: values[key] for key in self.order if key in values}

    def result(self, values: dict[str, Any]) -> str:
        """What the tool returns, as the model will see it."""
        return self.wrap(self.capability.compute(values))


def _wrapper(rng: Random, split: Split, plain: bool) -> Callable[[str], str]:
    roll = rng.random()
    if not plain or roll < 0.5:
        return str
    if roll < 0.75:
        key = word(rng, split) if rng.random() < 0.5 else "result"
        return lambda text: f'{{"{key}": {_literal(text)}}}'
    label = rng.choice(("result: ", "Result: ", "= ", "Answer: ", "ok: ", "value: "))
    return lambda text: label + text


def _literal(text: str) -> str:
    number = text.lstrip("-").replace(".", "", 1).isdigit()
    return text if number else json.dumps(text, ensure_ascii=False)


def bind(capability: Capability, rng: Random, split: Split, taken: set[str]) -> Bound:
    """The capability under new names; `taken` holds the tool names of the dialog."""
    arguments: set[str] = set()
    names = {role.key: argument_name(rng, split, arguments) for role in capability.roles}
    described = len(names) > 1 or rng.random() < 0.85
    properties: dict[str, Any] = {}
    for role in sorted(capability.roles, key=lambda role: names[role.key]):
        schema = role.schema()
        if described:
            schema["description"] = role.about.pick(rng, split)
        properties[names[role.key]] = schema
    order = sorted(names, key=lambda key: names[key])
    required = list(properties)
    if rng.random() < 0.08:  # an optional argument that nobody needs
        properties[argument_name(rng, split, arguments)] = {"type": rng.choice(("string", "boolean", "integer"))}
    wrap = _wrapper(rng, split, capability.plain)
    role_of = {name: key for key, name in names.items()}

    def run(given: dict[str, Any]) -> str:
        return wrap(capability.compute({role_of[name]: value for name, value in given.items() if name in role_of}))

    tool = Tool(
        name=tool_name(rng, split, taken),
        description=capability.about.pick(rng, split),
        parameters={"type": "object", "properties": properties, "required": required},
        run=run,
    )
    return Bound(capability, tool, names, wrap, order)


def bind_fixed(capability: Capability, tool: Tool, names: dict[str, str]) -> Bound:
    """The capability as a tool that exists already, with names of its own."""
    return Bound(capability, tool, names, str, sorted(names, key=lambda key: names[key]))
