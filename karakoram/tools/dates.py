"""Dates in ISO form (YYYY-MM-DD): add days, count days between two dates, name the weekday."""

import re
from datetime import date, timedelta
from typing import Any

from karakoram.tools.tool import Tool, ToolError

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MAX_DAYS = 3_000_000


def parse_date(text: str) -> date:
    """Raises ToolError, saying the form that is wanted."""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):  # fromisoformat also takes week dates
            raise ValueError
        return date.fromisoformat(text)
    except ValueError:
        raise ToolError(f"{text[:40]!r} is not a date like 2024-03-05") from None


def add_days(start: str, days: int) -> str:
    """The date `days` after `start` (before it when negative)."""
    if abs(days) > MAX_DAYS:
        raise ToolError(f"more than {MAX_DAYS} days")
    try:
        return (parse_date(start) + timedelta(days=int(days))).isoformat()
    except OverflowError:
        raise ToolError("the date leaves the calendar (years 1 to 9999)") from None


def days_between(start: str, end: str) -> int:
    """Days from `start` to `end`; negative when `end` is earlier."""
    return (parse_date(end) - parse_date(start)).days


def weekday(day: str) -> str:
    """The English name of the day of the week."""
    return WEEKDAYS[parse_date(day).weekday()]


def _schema(**properties: tuple[str, str]) -> dict[str, Any]:
    fields = {name: {"type": kind, "description": about} for name, (kind, about) in properties.items()}
    return {"type": "object", "properties": fields, "required": list(fields)}


DATE_ADD = Tool(
    name="date_add",
    description="Add a number of days to a date.",
    parameters=_schema(date=("string", "Date, YYYY-MM-DD"), days=("integer", "Days to add, negative to go back")),
    run=lambda arguments: add_days(arguments["date"], arguments["days"]),
)
DATE_DIFFERENCE = Tool(
    name="date_difference",
    description="Count the days between two dates.",
    parameters=_schema(end=("string", "Last date, YYYY-MM-DD"), start=("string", "First date, YYYY-MM-DD")),
    run=lambda arguments: str(days_between(arguments["start"], arguments["end"])),
)
WEEKDAY = Tool(
    name="weekday",
    description="Name the day of the week of a date.",
    parameters=_schema(date=("string", "Date, YYYY-MM-DD")),
    run=lambda arguments: weekday(arguments["date"]),
)
