"""Built on first use: what happens without a compiler, with a broken one, and with two builders at once.

Each case is a process of its own with its own cache, since a process loads the library once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from karakoram.kernels.cpu.library import Library

PATIENCE_S = 240
COMPUTE = """
import json, warnings
import torch
from karakoram.kernels import ops, reference
from tests.kernels import drawn
torch.manual_seed(0)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    x, weight = drawn.rows(12, 96), drawn.matrix("int4", 40, 96)
    y = ops.linear(x, weight)
    parts = drawn.feed_forward("fp8", 96, 64)
    ops.mlp(x, *parts)
expected = reference.linear(x, weight)
lib = ops.chosen()
print(json.dumps({
    "warnings": [f"{w.category.__name__}: {w.message}" for w in seen],
    "exact": torch.equal(y, expected),
    "near": drawn.near(y, expected),
    "isa": lib and lib.isa,
    "threads": lib and lib.threads,
    "choice": ops.describe_choice(),
}))
"""
# Scalar only and unoptimised: what is asked is who builds, not what.
QUICK = """
from karakoram.kernels.cpu import library
library.FLAGS, library.ISA_FLAGS = (*library.FLAGS, "-O0"), {}
"""


def start(script: str, project_root: Path, **variables: str) -> subprocess.Popen[str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("CXX", "KARAKORAM_ISA", "KARAKORAM_CACHE")}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=project_root,
        env=keep | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> dict:
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return json.loads(out)


def own_cache() -> dict[str, str]:
    """The cache that this process uses, if it is not the usual one."""
    return {k: v for k, v in os.environ.items() if k == "KARAKORAM_CACHE"}


def test_a_broken_compiler_warns_once_and_the_reference_serves(project_root: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'x.cpp: In function f:' >&2\necho 'x.cpp:1: error: boom' >&2\nexit 1\n")
    broken.chmod(0o755)
    found = result(start(COMPUTE, project_root, CXX=str(broken), KARAKORAM_CACHE=str(tmp_path / "cache")))
    assert found["exact"] and found["isa"] is None and found["choice"].startswith("reference")
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: ") and "x.cpp:1: error: boom" in warning and str(broken) in warning
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing half built stays"


@pytest.mark.parametrize("variables", [{"PATH": ""}, {"CXX": "no-such-compiler -O1"}], ids=["no PATH", "wrong CXX"])
def test_no_compiler_warns_once_and_the_reference_serves(
    project_root: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    found = result(start(COMPUTE, project_root, KARAKORAM_CACHE=str(tmp_path), **variables))
    assert found["exact"] and found["isa"] is None and found["choice"].startswith("reference")
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: ") and "no C++ compiler" in warning and "apt install g++" in warning


def test_a_cache_that_cannot_be_written_warns_once(lib: Library, project_root: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    found = result(start(COMPUTE, project_root, KARAKORAM_CACHE=str(in_the_way)))
    assert found["exact"] and found["isa"] is None
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: ") and str(in_the_way) in warning


def test_an_instruction_set_and_threads_by_variable(lib: Library, project_root: Path) -> None:
    found = result(start(COMPUTE, project_root, KARAKORAM_ISA="scalar", OMP_NUM_THREADS="1", **own_cache()))
    assert (found["isa"], found["threads"], found["warnings"]) == ("scalar", 1, [])
    assert found["choice"].startswith("cpu, scalar, 1 threads")
    assert found["near"]


def test_the_reference_by_variable(project_root: Path) -> None:
    found = result(start(COMPUTE, project_root, KARAKORAM_ISA="reference"))
    assert found["exact"] and found["isa"] is None and found["warnings"] == []


def test_nonsense_by_variable_is_an_error_that_names_it(lib: Library, project_root: Path) -> None:
    process = start(COMPUTE, project_root, KARAKORAM_ISA="nonsense", **own_cache())
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("karakoram.errors.InputError") and "KARAKORAM_ISA=nonsense" in last and "scalar" in last


@pytest.mark.slow
def test_two_builders_at_once(lib: Library, project_root: Path, tmp_path: Path) -> None:
    both = [start(QUICK + COMPUTE, project_root, KARAKORAM_CACHE=str(tmp_path)) for _ in range(2)]
    for found in [result(process) for process in both]:
        assert (found["isa"], found["warnings"]) == ("scalar", [])
        assert found["near"]
    (folder,) = tmp_path.iterdir()
    assert [path.suffix for path in folder.iterdir()] == [".so"], "one library, nothing else left"


@pytest.mark.slow
def test_a_second_process_takes_what_the_first_has_built(lib: Library, project_root: Path, tmp_path: Path) -> None:
    def build() -> tuple[Path, int]:
        result(start(QUICK + COMPUTE, project_root, KARAKORAM_CACHE=str(tmp_path)))
        (file,) = tmp_path.rglob("*.so")
        return file, file.stat().st_mtime_ns

    assert build() == build()
