"""A schema document: which of its keywords are enforced, where each of its parts is, and what a reference means.

Every keyword is of one of three sorts, and there is no fourth: enforced, annotation (says nothing about values), or
refused. A refused or unknown keyword is a SchemaError in a strict document and passed over in another one. Beside
`enum` or `const` nothing is refused: their few values are tried one by one on the validator.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote

from referencing.exceptions import Unresolvable

from karakoram.engine.constrain.validate import schema_validator
from karakoram.errors import SchemaError

ENFORCED = frozenset(
    "type enum const $ref $defs definitions allOf anyOf oneOf "
    "properties required additionalProperties patternProperties propertyNames minProperties maxProperties "
    "items prefixItems additionalItems minItems maxItems "
    "minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)
ANNOTATIONS = frozenset(
    "$schema $id $anchor $comment title description default example examples deprecated readOnly writeOnly "
    "contentMediaType contentEncoding contentSchema".split()
)
"""And every keyword that begins with `x-`."""
REFUSED = frozenset(
    "not if then else dependentRequired dependentSchemas dependencies contains minContains maxContains uniqueItems "
    "unevaluatedItems unevaluatedProperties $dynamicRef $dynamicAnchor $recursiveRef $recursiveAnchor $vocabulary "
    "nullable discriminator".split()
)

# Of all patterns and number ranges together: some seconds' work.
MAX_STATES = 200_000


class Document:
    """One schema, parsed and checked as a whole. SchemaError if it is broken or too deep."""

    def __init__(self, text: str, strict: bool) -> None:
        """`text`: the schema as JSON (`validate.schema_text`)."""
        self.strict = strict
        self._validator = schema_validator(text)
        self.root: Any = json.loads(text)
        self._anchors: dict[str, Any] = {}
        self._where: dict[int, str] = {}
        self._checked: set[int] = set()
        self._spent = 0
        self._impossible: dict[int, tuple[str, str, str]] = {}
        self._locate(self.root, "")

    def _locate(self, part: Any, where: str) -> None:
        if isinstance(part, dict):
            self._where[id(part)] = where
            if isinstance(part.get("$anchor"), str):
                self._anchors[part["$anchor"]] = part
            for key, value in part.items():
                self._locate(value, f"{where}/{key.replace('~', '~0').replace('/', '~1')}")
        elif isinstance(part, list):
            for number, value in enumerate(part):
                self._locate(value, f"{where}/{number}")

    def where(self, schema: Any) -> str:
        """JSON pointer to a part of the document."""
        return self._where.get(id(schema), "")

    def check(self, schema: dict[str, Any]) -> None:
        """Refuse the keywords of one schema object that cannot be enforced; SchemaError in a strict document."""
        if id(schema) in self._checked:
            return
        self._checked.add(id(schema))
        if "enum" in schema or "const" in schema:
            return
        for keyword, value in schema.items():
            if keyword in ENFORCED or keyword in ANNOTATIONS or keyword.startswith("x-"):
                continue
            if keyword == "uniqueItems" and (value is False or schema.get("maxItems", 2) <= 1):
                continue
            why = "is not enforced" if keyword in REFUSED else "is not known"
            self.refuse(schema, keyword, why)
        if "$id" in schema and schema is not self.root:
            self.refuse(schema, "$id", "inside a schema would change what references mean")

    def spend(self, states: int) -> None:
        """Count the states of an automaton, or the most there can be where one grew too large. SchemaError if all of
        them are too many: any client may send a schema."""
        self._spent += states
        if self._spent > MAX_STATES:
            raise SchemaError("The patterns of the schema are too large.", "Use fewer or simpler ones.", "pattern", "")

    def refuse(self, schema: Any, keyword: str, why: str) -> None:
        """SchemaError in a strict document, else nothing: the keyword is passed over."""
        if self.strict:
            where = self.where(schema)
            what = f"The keyword {keyword!r} at {where or 'the root'} {why}."
            raise SchemaError(what, "Leave it out, or do not ask for strict arguments.", keyword, where)

    def note(self, schema: Any, keyword: str, why: str) -> None:
        """Remember what cannot be satisfied, for the error if it turns out that nothing else can."""
        self._impossible.setdefault(id(schema), (keyword, self.where(schema), why))

    def reason(self, possible: set[int]) -> tuple[str, str, str]:
        """(keyword, where, why) of what was found first that nothing satisfies, schemas of these ids apart."""
        found = (reason for schema, reason in self._impossible.items() if schema not in possible)
        return next(found, ("", "", "leaves nothing"))

    def resolve(self, schema: dict[str, Any]) -> Any:
        """The schema that `$ref` names: within this document. SchemaError; True where a lax one cannot find it."""
        reference = schema["$ref"]
        own = self.root.get("$id") if isinstance(self.root, dict) else None
        if isinstance(own, str) and own and reference.startswith(own.rstrip("#")):
            reference = reference[len(own.rstrip("#")) :] or "#"
        if not reference.startswith("#"):
            self.refuse(schema, "$ref", f"refers to {reference[:80]!r} outside the schema")
            return True
        fragment = unquote(reference[1:])
        if fragment and not fragment.startswith("/"):
            target = self._anchors.get(fragment)
        else:
            target = self.root
            for step in fragment.split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                if isinstance(target, list) and step.isdigit() and int(step) < len(target):
                    target = target[int(step)]
                else:
                    target = target.get(step) if isinstance(target, dict) else None
        if not isinstance(target, (dict, bool)):
            self.refuse(schema, "$ref", f"refers to {reference[:80]!r}, which is no schema")
            return True
        return target

    def valid(self, schema: Any, value: Any) -> bool:
        """Whether `value` satisfies a part of the document, all its keywords considered."""
        try:
            return self._validator.evolve(schema=schema).is_valid(value)
        except RecursionError:
            return False
        except (re.error, Unresolvable):
            return True
