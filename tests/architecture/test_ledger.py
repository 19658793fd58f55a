"""The size ledger: the worst file, the worst function and the fullest folder are what readers meet: bounded.

Soft limits (400 lines a file, 40 a function) are printed, hard ones asserted: `pytest tests/architecture -s` shows the
ledger. Lengths count every line from the first to the last, docstrings included; tests are held to the file limit too.
"""

import ast
from pathlib import Path
from typing import NamedTuple

FILE_SOFT, FILE_HARD = 400, 600
FUNCTION_SOFT, FUNCTION_HARD = 40, 100
FILES_PER_FOLDER = 12
# Folders where one file is one plug-in of the same kind: their number says nothing about how hard they are to read.
PLUGIN_FOLDERS = {"karakoram/cli", "karakoram/train/data/dialogs"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}


class Size(NamedTuple):
    """How long something is, and where."""

    lines: int
    where: str


def _package_files(root: Path) -> list[Path]:
    files = sorted((root / "karakoram").rglob("*.py"))
    assert files, "no package files found: the ledger would be empty"
    return files


def _file_sizes(root: Path, files: list[Path]) -> list[Size]:
    sizes = [Size(len(f.read_text().splitlines()), str(f.relative_to(root))) for f in files]
    return sorted(sizes, reverse=True)


def _function_sizes(root: Path, files: list[Path]) -> list[Size]:
    sizes: list[Size] = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                sizes.append(Size(lines, f"{file.relative_to(root)}:{node.lineno} {node.name}"))
    return sorted(sizes, reverse=True)


def _print_ledger(title: str, sizes: list[Size], soft: int) -> None:
    over = sum(size.lines > soft for size in sizes)
    median = sizes[len(sizes) // 2].lines
    print(f"\n{title}: {len(sizes)}, median {median} lines, {over} over the soft limit of {soft}")
    for size in sizes[:8]:
        print(f"{size.lines:6d}  {size.where}")


def test_no_file_is_too_long(project_root: Path) -> None:
    sizes = _file_sizes(project_root, _package_files(project_root))
    _print_ledger("files", sizes, FILE_SOFT)
    tests = _file_sizes(project_root, sorted((project_root / "tests").rglob("*.py")))
    too_long = [size for size in sizes + tests if size.lines > FILE_HARD]
    assert not too_long, f"over {FILE_HARD} lines, split by what the parts are named for: {too_long}"


def test_no_function_is_too_long(project_root: Path) -> None:
    sizes = _function_sizes(project_root, _package_files(project_root))
    _print_ledger("functions", sizes, FUNCTION_SOFT)
    too_long = [size for size in sizes if size.lines > FUNCTION_HARD]
    assert not too_long, f"over {FUNCTION_HARD} lines: {too_long}"


def test_no_folder_is_too_full(project_root: Path) -> None:
    count: dict[str, int] = {}
    for file in _package_files(project_root):
        folder = str(file.parent.relative_to(project_root))
        count[folder] = count.get(folder, 0) + (file.name != "__init__.py")
    too_full = {folder: n for folder, n in count.items() if n > FILES_PER_FOLDER and folder not in PLUGIN_FOLDERS}
    assert not too_full, f"more than {FILES_PER_FOLDER} files: {too_full}"


def test_names_say_what_a_unit_is_for(project_root: Path) -> None:
    vague = [
        str(path.relative_to(project_root))
        for path in (project_root / "karakoram").rglob("*")
        if path.stem in FORBIDDEN_NAMES and path.suffix in ("", ".py")
    ]
    assert not vague, f"a unit is named for what it does: {vague}"
