"""`child.py` in processes of its own, and what they print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")
TIMEOUT_S = 240  # a start of torch takes 3 s on an idle core, and ten times that on a busy one; the rest, one


def start(mode: str, out: Path, *arguments: str) -> "subprocess.Popen[str]":
    """One process."""
    return subprocess.Popen(
        [sys.executable, str(CHILD), mode, str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def lines_of(process: "subprocess.Popen[str]") -> list[dict[str, Any]]:
    """What it printed, when it has ended."""
    try:
        printed, complaints = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, complaints
    return [json.loads(line) for line in printed.splitlines()]
