"""The ladder, and what may be loaded when: import-linter's contracts, and imports watched in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "safetensors", "huggingface_hub", "transformers", "tiktoken")


def _loaded_after(code: str, root: Path) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after running `code`."""
    report = f"\nimport sys\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, cwd=root, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.strip().splitlines()[-1].split()[1:])


def test_the_ladder_holds(project_root: Path) -> None:
    """import-linter in a process of its own: it keeps state, and a cache that concurrent runs would share."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project_root, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout, done.stdout


def test_every_folder_with_code_is_a_package(project_root: Path) -> None:
    """Without `__init__.py` a folder is invisible to the ladder and left out of the wheel."""
    folders = {file.parent for file in (project_root / "karakoram").rglob("*.py")}
    missing = [str(f.relative_to(project_root)) for f in sorted(folders) if not (f / "__init__.py").exists()]
    assert not missing, f"no __init__.py in {missing}"


def test_importing_the_package_loads_nothing_heavy(project_root: Path) -> None:
    assert _loaded_after("import karakoram; dir(karakoram)", project_root) == set()


@pytest.mark.parametrize("name", ["Tokenizer", "ChatFormat", "load_chat_format", "ModelConfig"])
def test_words_need_no_torch(project_root: Path, name: str) -> None:
    assert not _loaded_after(f"import karakoram; karakoram.{name}", project_root) & {"torch", "transformers"}


def test_public_names_resolve() -> None:
    import karakoram

    assert set(karakoram.__all__) <= set(dir(karakoram))
    for name in karakoram.__all__:
        assert getattr(karakoram, name) is getattr(karakoram, name)
    with pytest.raises(AttributeError, match="no attribute 'Tokeniser'"):
        _ = karakoram.Tokeniser  # pyright: ignore


def test_help_needs_no_torch(project_root: Path) -> None:
    code = (
        "import sys\nsys.argv = ['k2', '--help']\nfrom karakoram.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code"
    )
    assert not _loaded_after(code, project_root) & {"torch", "numpy", "transformers"}
