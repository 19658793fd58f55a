"""What a schema allows, type by type: the keywords of a schema, and of all it refers to, brought to a normal form.

A *conjunction* is a tuple of schemas that all hold; it stands for one place in a value. `Kinds.of` turns it into a list
of kinds of which any may be written there; each kind has one type and the limits that apply to it, and what lies
inside it (properties, items) is again a conjunction for each place. allOf, $ref and the keywords beside them narrow
every kind; anyOf and oneOf multiply them. So the rest of the package sees neither references nor combinations.

    {"anyOf": [{"type": ["string", "null"]}, {"const": 0}], "maxLength": 3}   ▶   string (at most 3), null, the value 0

A value of `enum` or `const` is a kind of its own, kept if the validator finds it valid in all schemas of the
conjunction: every keyword counts there, also those that cannot be enforced otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from karakoram.engine.constrain.automaton import automaton, occurs
from karakoram.engine.constrain.regex import PatternError, read_search
from karakoram.engine.constrain.schema.document import Document
from karakoram.engine.constrain.schema.formats import FORMATS, NUMBER_FORMATS
from karakoram.engine.constrain.schema.numbers import Interval
from karakoram.errors import SchemaError

Conjunction = tuple[Any, ...]
TYPES = ("null", "boolean", "number", "string", "array", "object")
# anyOf within allOf multiplies; what a person writes stays far below.
MAX_KINDS = 512
MAX_APPLIED = 20_000
_ALL_NUMBERS = Interval()


@dataclass(frozen=True)
class Members:
    """One schema's word on an object's properties; `additional` and `items` None: nothing was said."""

    properties: dict[str, Any]
    patterns: dict[str, Any]
    additional: Any | None
    names_some: bool
    """Properties or patterns are given, be it none at all: others then need a word that allows them."""


@dataclass(frozen=True)
class Kind:
    """Values of one type within limits; `type` "value" is the one `value`."""

    type: str
    value: Any = None
    integer: bool = False
    interval: Interval = _ALL_NUMBERS
    multiples: tuple[Fraction, ...] = ()
    low: int = 0
    """The least length, number of items or properties, and `high` the largest."""
    high: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    arrays: tuple[tuple[tuple[Any, ...], Any | None], ...] = ()
    """(schemas of the first items, of the others or None) of each schema that says something about items."""
    members: tuple[Members, ...] = ()
    required: tuple[str, ...] = ()
    names: Conjunction = ()
    source: Any = field(default=None, compare=False)
    """The schema that narrowed it last, for messages."""

    def named(self, name: str) -> Conjunction | None:
        """What holds for the value of this property; None where it may not exist."""
        schemas: list[Any] = []
        for member in self.members:
            found = [schema for pattern, schema in member.patterns.items() if occurs(pattern, name)]
            if name in member.properties:
                found.insert(0, member.properties[name])
            elif not found and member.additional is not None:
                found = [member.additional]
            schemas += found
        return None if False in schemas else conjunction(schemas)

    @property
    def listed(self) -> tuple[str, ...]:
        """The properties that are named, in the order in which they are written."""
        names = [name for member in self.members for name in member.properties]
        return tuple(dict.fromkeys([*names, *self.required]))

    @property
    def open(self) -> bool:
        """Whether properties that are not named may be written: if the schema says so, or says nothing of properties.

        Where it names some (or, by `"properties": {}`, none) and is silent about others, JSON Schema allows those too;
        here they are not written, since a name that the schema does not know is in practice a misspelled one."""
        spoken = any(member.names_some for member in self.members)
        return not spoken or any(member.additional is not None for member in self.members)

    def item(self, position: int | None) -> Conjunction | None:
        """What holds for the item at a position (None: beyond all that have their own schema); None: none may come."""
        schemas: list[Any] = []
        for first, others in self.arrays:
            own = position is not None and position < len(first)
            # As with properties: first items without a word on others means no others.
            schema = first[position] if own else others if others is not None else not first  # type: ignore[index]
            schemas.append(schema)
        return None if False in schemas else conjunction(schemas)


def conjunction(schemas: list[Any]) -> Conjunction:
    """All these schemas, each once, without those that say nothing."""
    kept: dict[int, Any] = {id(schema): schema for schema in schemas if schema is not True and schema != {}}
    return tuple(kept.values())


class Kinds:
    """The kinds of a document's conjunctions. SchemaError for what cannot be enforced, if the document is strict."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._applied = 0
        """Schemas applied so far: schemas that name each other twice would be applied without end."""
        self._narrow: dict[str, Callable[[dict[str, Any], Kind], Kind | None]] = {
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }

    def of(self, schemas: Conjunction) -> list[Kind]:
        """The kinds of values in which all `schemas` hold; none: nothing satisfies them."""
        kinds = [Kind(type_) for type_ in TYPES]
        for schema in schemas:
            kinds = self._apply(schema, kinds, ())
        kept: dict[str, Kind] = {}
        others: list[Kind] = []
        for kind in kinds:
            if kind.type != "value":
                others.append(kind)
            elif all(self._document.valid(schema, kind.value) for schema in schemas):
                kept.setdefault(json.dumps(kind.value, sort_keys=True), kind)
        return [*kept.values(), *others]

    def _apply(self, schema: Any, kinds: list[Kind], within: tuple[int, ...]) -> list[Kind]:
        """The kinds narrowed by a schema; `within`: the schemas whose application this one is part of."""
        if schema is True:
            return kinds
        if schema is False:
            return []
        where = self._document.where(schema)
        self._applied += 1
        if len(kinds) > MAX_KINDS or self._applied > MAX_APPLIED:
            what = f"The schema at {where or 'the root'} has too many combinations of anyOf and allOf."
            raise SchemaError(what, "Write them out as fewer options.", "anyOf", where)
        if id(schema) in within:
            raise SchemaError(f"The schema at {where or 'the root'} refers to itself.", "Correct it.", "$ref", where)
        within = (*within, id(schema))
        self._document.check(schema)
        if "$ref" in schema:
            kinds = self._apply(self._document.resolve(schema), kinds, within)
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            kinds = [Kind("value", value, source=schema) for value in values] if kinds else []
        kinds = [kind for one in kinds if (kind := self._typed(schema, one)) is not None]
        for part in schema.get("allOf", ()):
            kinds = self._apply(part, kinds, within)
        if "anyOf" in schema:
            kinds = [kind for option in schema["anyOf"] for kind in self._apply(option, kinds, within)]
        if "oneOf" in schema:
            options = [self._apply(option, kinds, within) for option in schema["oneOf"]]
            self._check_exclusive(schema, options)
            kinds = [kind for option in options for kind in option]
        return kinds

    def _typed(self, schema: dict[str, Any], kind: Kind) -> Kind | None:
        types = schema.get("type")
        if types is not None and kind.type != "value":
            types = [types] if isinstance(types, str) else types
            if kind.type == "number" and "number" not in types:
                if "integer" not in types:
                    return None
                kind = replace(kind, integer=True)
            elif kind.type not in types:
                return None
        narrow = self._narrow.get(kind.type)
        return kind if narrow is None else narrow(schema, kind)

    def _number(self, schema: dict[str, Any], kind: Kind) -> Kind | None:
        interval, multiples = kind.interval, kind.multiples
        if "minimum" in schema:
            interval = interval.above(_fraction(schema["minimum"]), False)
        if "maximum" in schema:
            interval = interval.below(_fraction(schema["maximum"]), False)
        if self._is_bound(schema, "exclusiveMinimum"):
            interval = interval.above(_fraction(schema["exclusiveMinimum"]), True)
        if self._is_bound(schema, "exclusiveMaximum"):
            interval = interval.below(_fraction(schema["exclusiveMaximum"]), True)
        if "multipleOf" in schema:
            multiples = (*multiples, _fraction(schema["multipleOf"]))
        bounds = NUMBER_FORMATS.get(schema.get("format", ""))
        if bounds is not None:
            interval = interval.above(Fraction(bounds[0]), False).below(Fraction(bounds[1]), False)
        if interval.empty:
            self._document.note(schema, "minimum", "leaves no number")
            return None
        return replace(kind, interval=interval, multiples=multiples, source=schema)

    def _is_bound(self, schema: dict[str, Any], keyword: str) -> bool:
        if isinstance(schema.get(keyword), bool):
            self._document.refuse(schema, keyword, "is a number since draft 6")
            return False
        return keyword in schema

    def _string(self, schema: dict[str, Any], kind: Kind) -> Kind | None:
        kind = self._sized(schema, kind, "minLength", "maxLength")
        if "pattern" in schema:
            kind = replace(kind, patterns=(*kind.patterns, schema["pattern"]))
        name = schema.get("format")
        if name is not None and name not in NUMBER_FORMATS:
            if name in FORMATS:
                kind = replace(kind, formats=(*kind.formats, name))
            else:
                self._document.refuse(schema, "format", f"with the value {name!r} is not enforced")
        return self._possible(schema, kind, "minLength")

    def _array(self, schema: dict[str, Any], kind: Kind) -> Kind | None:
        kind = self._sized(schema, kind, "minItems", "maxItems")
        first, others = schema.get("prefixItems"), schema.get("items")
        if isinstance(others, list):
            first, others = others, schema.get("additionalItems")
        if first is not None or others is not None:
            kind = replace(kind, arrays=(*kind.arrays, (tuple(first or ()), others)))
        return self._possible(schema, kind, "minItems")

    def _object(self, schema: dict[str, Any], kind: Kind) -> Kind | None:
        kind = self._sized(schema, kind, "minProperties", "maxProperties")
        properties = schema.get("properties", {})
        patterns = {
            pattern: value
            for pattern, value in schema.get("patternProperties", {}).items()
            if self._readable(schema, pattern)
        }
        additional = schema.get("additionalProperties")
        names_some = "properties" in schema or "patternProperties" in schema
        if names_some or additional is not None:
            kind = replace(kind, members=(*kind.members, Members(properties, patterns, additional, names_some)))
        if "required" in schema:
            kind = replace(kind, required=tuple(dict.fromkeys([*kind.required, *schema["required"]])))
        if "propertyNames" in schema:
            kind = replace(kind, names=conjunction([*kind.names, schema["propertyNames"]]))
        return self._possible(schema, kind, "minProperties")

    def _readable(self, schema: dict[str, Any], pattern: str) -> bool:
        try:
            automaton(read_search(pattern))
        except PatternError as error:
            self._document.refuse(schema, "patternProperties", f"has a pattern that cannot be enforced: {error}")
            return False
        return True

    def _sized(self, schema: dict[str, Any], kind: Kind, low: str, high: str) -> Kind:
        highs = [int(value) for value in (kind.high, schema.get(high)) if value is not None]
        return replace(
            kind, low=max(kind.low, int(schema.get(low, 0))), high=min(highs) if highs else None, source=schema
        )

    def _possible(self, schema: dict[str, Any], kind: Kind, keyword: str) -> Kind | None:
        if kind.high is not None and kind.low > kind.high:
            self._document.note(schema, keyword, f"asks for {kind.low}, more than the {kind.high} allowed")
            return None
        return kind

    # -------------------------------------------------------------------------------------------- oneOf

    def _check_exclusive(self, schema: dict[str, Any], options: list[list[Kind]]) -> None:
        """oneOf is anyOf where no value that is written for one option satisfies another; else it is refused.

        Listed values are tried on the validator, which knows oneOf; here only kinds of a type are compared."""
        if sum(map(len, options)) > MAX_KINDS:
            where = self._document.where(schema)
            raise SchemaError(f"The oneOf at {where or 'the root'} has too many options.", "Use anyOf.", "oneOf", where)
        for number, option in enumerate(options):
            for other in options[number + 1 :]:
                if any(not self._exclusive(one, two, 3) for one in option for two in other):
                    why = "has options that one value may satisfy together; anyOf has no such limit"
                    self._document.refuse(schema, "oneOf", why)
                    return

    def _exclusive(self, one: Kind, two: Kind, depth: int) -> bool:
        """Whether surely no value of either kind, as it is written here, is one of the other."""
        if "value" in (one.type, two.type):
            # A listed value that satisfies another option too is dropped later; of two listed values, both are.
            return one.type == two.type or self._listed_excludes(one, two)
        if one.type != two.type:
            return True
        if one.type == "number":
            return one.interval.disjoint(two.interval)
        if one.type in ("string", "array"):
            return _size_disjoint(one, two)
        return one.type == "object" and self._rejects(one, two, depth) and self._rejects(two, one, depth)

    def _listed_excludes(self, one: Kind, two: Kind) -> bool:
        """A listed value beside a type: the other option must not write that value by way of its type."""
        value, kind = (one, two) if one.type == "value" else (two, one)
        return _type_of(value.value) != kind.type

    def _rejects(self, written: Kind, other: Kind, depth: int) -> bool:
        """Whether every object written as `written` breaks `other`: it lacks a property, or has one that may not be."""
        for name in other.required:
            if name not in written.listed and not written.open:
                return True
        for name in written.required:
            mine, theirs = written.named(name), other.named(name)
            if mine is None or theirs is None:
                return True
            if depth and self._disjoint(mine, theirs, depth - 1):
                return True
        return False

    def _disjoint(self, one: Conjunction, two: Conjunction, depth: int) -> bool:
        left, right = self.of(one), self.of(two)
        for a in left:
            for b in right:
                if a.type == b.type == "value":
                    if a.value == b.value:
                        return False
                elif a.type == "value" or b.type == "value":
                    value, schemas = (a.value, two) if a.type == "value" else (b.value, one)
                    if all(self._document.valid(schema, value) for schema in schemas):
                        return False
                elif not self._exclusive(a, b, depth):
                    return False
        return True


def _size_disjoint(one: Kind, two: Kind) -> bool:
    return (one.high is not None and one.high < two.low) or (two.high is not None and two.high < one.low)


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    names: Iterator[tuple[Any, str]] = iter(
        ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array"))
    )
    return next((name for type_, name in names if isinstance(value, type_)), "object")


def _fraction(number: float) -> Fraction:
    """The number as it is written in JSON, not as a double holds it."""
    return Fraction(repr(number))
