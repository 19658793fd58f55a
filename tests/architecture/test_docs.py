"""Prose that can rot: links must resolve, and every script and command that the README names must exist."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    broken = [link for link in targets if not (page.parent / link).exists()]
    assert not broken, f"{page.relative_to(ROOT)} points nowhere: {broken}"


def test_readme_names_scripts_that_exist() -> None:
    named = set(re.findall(r"(?:\./)?((?:scripts|\.ci)/\w+)", (ROOT / "README.md").read_text()))
    assert {"scripts/chat", "scripts/test"} <= named
    missing = [name for name in named if not os.access(ROOT / name, os.X_OK)]
    assert not missing, f"not there or not executable: {missing}"


def test_readme_names_commands_that_exist() -> None:
    from karakoram.cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"```bash\n(.*?)```", readme, re.S) + re.findall(r"`(k2 [^`]+)`", readme))
    named = set(re.findall(r"\bk2 ([a-z]+)", code))
    assert len(named) >= 5, f"the pattern found only {named}"
    assert named <= set(COMMANDS), f"no such command: {named - set(COMMANDS)}"


def test_architecture_page_has_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    package = ROOT / "karakoram"
    files = [path.stem for path in package.glob("*.py") if not path.stem.startswith("_")]
    rooms = files + [path.parent.name for path in package.glob("*/__init__.py")]
    missing = [room for room in rooms if f"`{room}`" not in page]
    assert not missing, f"docs/architecture.md does not name {missing}"
