"""Unit conversion with exact factors: length, mass, volume, time, speed, data and temperature."""

from fractions import Fraction
from typing import Any

from karakoram.tools.calculator import format_number
from karakoram.tools.tool import Tool, ToolError

MAX_MAGNITUDE = 10**15

# kind -> unit -> (factor to the kind's first unit, other spellings)
UNITS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "length": {
        "m": ("1", ("meter", "meters", "metre", "metres")),
        "km": ("1000", ("kilometer", "kilometers", "kilometre", "kilometres")),
        "cm": ("0.01", ("centimeter", "centimeters", "centimetres")),
        "mm": ("0.001", ("millimeter", "millimeters", "millimetres")),
        "mi": ("1609.344", ("mile", "miles")),
        "ft": ("0.3048", ("foot", "feet")),
        "in": ("0.0254", ("inch", "inches")),
        "yd": ("0.9144", ("yard", "yards")),
    },
    "mass": {
        "kg": ("1", ("kilogram", "kilograms", "kilos")),
        "g": ("0.001", ("gram", "grams")),
        "mg": ("0.000001", ("milligram", "milligrams")),
        "lb": ("0.45359237", ("pound", "pounds", "lbs")),
        "oz": ("0.028349523125", ("ounce", "ounces")),
        "t": ("1000", ("tonne", "tonnes")),
    },
    "volume": {
        "l": ("1", ("liter", "liters", "litre", "litres")),
        "ml": ("0.001", ("milliliter", "milliliters")),
        "gal": ("3.785411784", ("gallon", "gallons")),
        "cup": ("0.2365882365", ("cups",)),
    },
    "time": {
        "s": ("1", ("second", "seconds", "sec")),
        "min": ("60", ("minute", "minutes")),
        "h": ("3600", ("hour", "hours")),
        "d": ("86400", ("day", "days")),
        "week": ("604800", ("weeks",)),
    },
    "speed": {
        "km/h": ("1", ("kmh", "kph")),
        "m/s": ("3.6", ("mps",)),
        "mph": ("1.609344", ()),
    },
    "data": {
        "byte": ("1", ("bytes", "B")),
        "kB": ("1000", ("kilobyte", "kilobytes")),
        "MB": ("1000000", ("megabyte", "megabytes")),
        "GB": ("1000000000", ("gigabyte", "gigabytes")),
    },
}
TEMPERATURES: dict[str, tuple[str, ...]] = {
    "C": ("celsius", "degrees celsius", "°C"),
    "F": ("fahrenheit", "degrees fahrenheit", "°F"),
    "K": ("kelvin",),
}

_FACTORS: dict[str, tuple[str, Fraction]] = {}
for _kind, _units in UNITS.items():
    for _unit, (_factor, _others) in _units.items():
        for _name in (_unit, *_others):
            _FACTORS[_name] = _FACTORS[_name.lower()] = (_kind, Fraction(_factor))
_SCALES = {name.lower(): scale for scale, others in TEMPERATURES.items() for name in (scale, *others)}


def _to_celsius(value: Fraction, scale: str) -> Fraction:
    return {"C": value, "F": (value - 32) * 5 / 9, "K": value - Fraction("273.15")}[scale]


def _from_celsius(value: Fraction, scale: str) -> Fraction:
    return {"C": value, "F": value * 9 / 5 + 32, "K": value + Fraction("273.15")}[scale]


def convert(value: int | float | Fraction, source: str, target: str) -> Fraction:
    """Exact. Raises ToolError for an unknown unit, or two units of different kinds."""
    number = value if isinstance(value, Fraction) else Fraction(str(value))
    if abs(number) > MAX_MAGNITUDE:
        raise ToolError("the value is too large")
    scales = [_SCALES.get(name.strip().lower()) for name in (source, target)]
    if scales[0] and scales[1]:
        return _from_celsius(_to_celsius(number, scales[0]), scales[1])
    found = []
    for name in (source.strip(), target.strip()):
        unit = _FACTORS.get(name) or _FACTORS.get(name.lower())
        if unit is None:
            if name.lower() in _SCALES:
                raise ToolError(f"cannot convert {source[:30]} to {target[:30]}")
            raise ToolError(f"unknown unit {name[:30]!r}")
        found.append(unit)
    if found[0][0] != found[1][0]:
        raise ToolError(f"cannot convert {source[:30]} to {target[:30]}")
    return number * found[0][1] / found[1][1]


def _run(arguments: dict[str, Any]) -> str:
    return format_number(convert(arguments["value"], arguments["from_unit"], arguments["to_unit"]))


CONVERT = Tool(
    name="convert_units",
    description="Convert a value from one unit to another.",
    parameters={
        "type": "object",
        "properties": {
            "from_unit": {"type": "string", "description": "Unit of the value"},
            "to_unit": {"type": "string", "description": "Unit wanted"},
            "value": {"type": "number", "description": "The value"},
        },
        "required": ["from_unit", "to_unit", "value"],
    },
    run=_run,
)
