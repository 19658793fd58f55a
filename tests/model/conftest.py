"""Collects what the parity tests measure and prints it: the numbers of docs/numerics.md."""

from collections.abc import Callable

import pytest

_MAXIMA: dict[str, tuple[float, int]] = {}
_MUTANTS: dict[str, float] = {}


@pytest.fixture
def measured() -> Callable[[str, float], None]:
    """`measured(group, value)` remembers a value; the summary prints the group's maximum."""

    def remember(group: str, value: float) -> None:
        largest, count = _MAXIMA.get(group, (0.0, 0))
        _MAXIMA[group] = max(largest, value), count + 1

    return remember


@pytest.fixture
def mutants() -> Callable[[str, float], None]:
    """`mutants(name, distance)` remembers how far a wrong variant is off; the summary prints all, the mildest first."""
    return _MUTANTS.__setitem__


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line a group, one line a wrong variant."""
    if _MAXIMA:
        terminalreporter.section("measured maxima (docs/numerics.md)")
        for group, (largest, count) in sorted(_MAXIMA.items()):
            terminalreporter.write_line(f"{largest:10.2e}  {group} ({count} measured)")
    if _MUTANTS:
        terminalreporter.section("distance of wrong variants (docs/numerics.md)")
        for name, distance in sorted(_MUTANTS.items(), key=lambda item: item[1]):
            terminalreporter.write_line(f"{distance:10.2e}  {name}")
