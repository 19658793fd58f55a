"""Schemas made at random from everything that is enforced: nested, recursive, in several scripts, with long choices."""

from random import Random
from typing import Any

DEFINITIONS = {
    "tree": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "required": ["name", "kids"],
    },
    "term": {
        "anyOf": [
            {"type": "number"},
            {
                "type": "object",
                "properties": {
                    "op": {"enum": ["+", "-"]},
                    "a": {"$ref": "#/$defs/term"},
                    "b": {"$ref": "#/$defs/term"},
                },
                "required": ["op", "a", "b"],
                "additionalProperties": False,
            },
        ]
    },
}
NAMES = (
    "a", "name", "ключ", "naïve", "x y", 'q"uote', "日本", "id", "count", "item_list", "a/b", "e~f", "tab\tkey",
    "smile😀", "a_very_long_property_name_indeed",
)  # fmt: skip
PATTERNS = (
    r"^[A-Z]{3}-[0-9]{4}$", r"^(a|b[0-9]{30})$", r"^\S+@\S+\.com$", "foo", r"^[^\W_]+$", r"^\d{3}(-\d{2})?$",
    "^.{3,9}$", r"^\w+\s\w+$", "^(GET|POST|DELETE) /[a-z/]*$", '^"[^"]*"$', "^ü+$", r"^a|b$",
)  # fmt: skip
VALUES = (
    "red", "green", "blau", "grün", "日本語", 'a"b', "x" * 60, "line\nbreak", None, 1, 2.5, True, [1, "a"], {"k": "v"},
)  # fmt: skip
FORMATS = ("date", "date-time", "email", "uuid", "ipv4", "ipv6", "uri", "time", "hostname", "duration")


def random_schema(seed: int) -> dict[str, Any]:
    """An object schema; the same for the same seed."""
    schema = _Maker(Random(seed)).object(3)
    return {**schema, "$defs": DEFINITIONS}


class _Maker:
    def __init__(self, random: Random) -> None:
        self.random = random

    def any(self, depth: int) -> Any:
        makers = [self.object, self.object, self.array, self.choice, self.both, self.special]
        if depth <= 0 or self.random.random() < 0.4:
            return self.scalar()
        return self.random.choice(makers)(depth)

    def object(self, depth: int) -> dict[str, Any]:
        random = self.random
        properties = {random.choice(NAMES): self.any(depth - 1) for _ in range(random.randint(0, 5))}
        required = random.sample(sorted(properties), random.randint(0, len(properties)))
        schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        additional = random.choice([None, None, False, True, self.scalar()])
        if additional is not None:
            schema["additionalProperties"] = additional
        if random.random() < 0.1:
            schema["minProperties"] = random.randint(0, len(required) + 1)
        if random.random() < 0.1:
            schema["maxProperties"] = random.randint(max(1, len(required)), 6)
        if random.random() < 0.1:
            schema["patternProperties"] = {random.choice(["^x_[a-z]+$", "^[0-9]+$", "foo"]): self.scalar()}
            schema.pop("minProperties", None)
        if properties == {} and additional is None and random.random() < 0.3:
            schema["propertyNames"] = random.choice([{"pattern": "^[a-z]{2,4}$"}, {"enum": ["k1", "k2"]}])
            schema.pop("minProperties", None)
        return schema

    def array(self, depth: int) -> dict[str, Any]:
        random = self.random
        schema: dict[str, Any] = {"type": "array", "items": self.any(depth - 1), "minItems": random.randint(0, 3)}
        if random.random() < 0.5:
            schema["maxItems"] = schema["minItems"] + random.randint(0, 3)
        if random.random() < 0.2:
            schema["prefixItems"] = [self.any(depth - 1) for _ in range(random.randint(1, 3))]
        return schema

    def choice(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any(depth - 1) for _ in range(self.random.randint(1, 3))]}

    def both(self, depth: int) -> dict[str, Any]:
        first = {"type": "object", "properties": {"p": self.scalar()}, "required": ["p"]}
        return {"allOf": [first, {"properties": {"q": self.any(depth - 1), "p": {}}, "required": ["q"]}]}

    def special(self, depth: int) -> Any:
        random = self.random
        one = {"kind": {"const": "a"}, "v": self.scalar()}
        two = {"kind": {"const": "b"}, "w": self.scalar()}
        item = {"type": "object", "properties": {"t": {"enum": ["u" * 80]}, "n": {"type": "integer"}}}
        return random.choice(
            [
                {},
                {"$ref": "#/$defs/tree"},
                {"$ref": "#/$defs/term"},
                {
                    "oneOf": [
                        {"type": "object", "properties": one, "required": ["kind", "v"]},
                        {"type": "object", "properties": two, "required": ["kind"]},
                        {"type": "null"},
                        {"type": "integer", "minimum": 3},
                    ]
                },
                {"type": "object", "properties": {f"opt{n}": self.scalar() for n in range(random.randint(5, 25))}},
                {"type": "array", "items": {"anyOf": [{**item, "required": ["t"]}, {"type": "string"}]}, "maxItems": 4},
                {"enum": [f"value {n} {'z' * (n % 40)}" for n in range(random.randint(1, 90))]},
                {"enum": ["L" * 300, "M" * 200, "s"]},
            ]
        )

    def scalar(self) -> dict[str, Any]:
        random = self.random
        low, length = random.randint(-1000, 1000), random.randint(0, 12)
        bound = round(random.uniform(-50, 50), 2)
        return random.choice(
            [
                {"type": "string"},
                {"type": "string", "minLength": length, "maxLength": length + random.randint(0, 20)},
                {"type": "string", "pattern": random.choice(PATTERNS)},
                {
                    "type": "string",
                    "pattern": "^[a-z]",
                    "minLength": length,
                    "maxLength": length + random.randint(1, 9),
                },
                {"type": "string", "format": random.choice(FORMATS)},
                {"type": "string", "minLength": 90},
                {"enum": [random.choice(VALUES) for _ in range(random.randint(1, 5))]},
                {"const": random.choice(["fixed", 3, {"a": [1, 2, {"b": None}]}, False])},
                {"type": "boolean"},
                {"type": ["string", "null"]},
                {"type": "null"},
                {"type": "integer"},
                {"type": "number"},
                {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 5000)},
                {"type": "number", "exclusiveMinimum": bound, "maximum": bound + round(random.uniform(0.5, 100), 3)},
                {"type": "integer", "multipleOf": random.choice([2, 3, 7, 25])},
                {"type": "number", "multipleOf": random.choice([0.5, 0.25])},
            ]
        )
