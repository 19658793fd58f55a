"""The examples are documentation that runs: few, short, and executed as a reader would execute them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_EXAMPLES, MAX_LINES = 8, 50


def test_examples_are_few_and_short() -> None:
    assert 0 < len(EXAMPLES) <= MAX_EXAMPLES
    long = {file.name: n for file in EXAMPLES if (n := len(file.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    needs_nano = "bundled_model_dir" in example.read_text()
    if needs_nano and not (ROOT / "karakoram/assets/nano/config.json").exists():
        pytest.skip("the bundled nano model (karakoram/assets/nano) is not there yet")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, str(example)], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "an example shows something"
