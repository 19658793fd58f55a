"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, the pool of threads under ThreadSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from karakoram import env
from karakoram.kernels.cpu import library

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PATIENCE_S = 280
# A matrix that claims twice the outputs that it has bytes for.
READ_BESIDE = """
import sys, torch
from pathlib import Path
from karakoram.kernels.cpu.library import Library, describe, describe_packed
x, y = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)
data = torch.zeros(576, dtype=torch.uint8)
library = Library(Path(sys.argv[1]))
library.call("k2_linear", describe(x), describe_packed(data, "int4", 32, 64), describe(y))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizers by Linux's rules"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """These libraries are for this run only."""
    return tmp_path_factory.mktemp("cache")


def runtime(name: str) -> str:
    """Where the compiler keeps a sanitizer's library; skips where it has none."""
    compiler = env.compiler()
    found = compiler and env.first_line([str(compiler), f"-print-file-name={name}"])
    if not found or not Path(found).is_absolute() or not Path(found).exists():
        pytest.skip(f"the compiler brings no {name}")
    return found


def sanitized(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    preload = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        # the interpreter keeps what it has until the end: no leaks of ours
        env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.mark.parametrize("only", [("none",), ()], ids=["scalar", "every instruction set"])
def test_every_operation_with_odd_shapes_is_clean(
    lib: library.Library, project_root: Path, cache: Path, only: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KARAKORAM_CACHE", str(cache))
    runtime("libasan.so")
    built = library.build(FLAGS, only)
    done = sanitized(project_root, "-m", "tests.kernels.every_operation", str(built))
    assert done.returncode == 0, done.stderr[-6000:]
    assert "runtime error" not in done.stderr
    assert done.stdout.split() == ["all", "done", "on", *(["scalar"] if only else lib.isas())]


def test_the_sanitizer_would_see_a_read_beside_a_matrix(
    lib: library.Library, project_root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KARAKORAM_CACHE", str(cache))
    runtime("libasan.so")
    done = sanitized(project_root, "-c", READ_BESIDE, str(library.build(FLAGS, only=("none",))))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_callers_at_once_race_for_nothing(lib: library.Library, tmp_path: Path) -> None:
    """A program of its own: the interpreter's threads mean nothing to ThreadSanitizer."""
    runtime("libtsan.so")
    program, compiler = tmp_path / "callers", str(env.compiler())
    sources = [Path(__file__).with_name("callers.cpp"), *sorted(library.SOURCES.rglob("*.cpp"))]
    include = f"-I{library.SOURCES.parent / 'include'}"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wno-psabi", include]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=PATIENCE_S)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's memory layout")
    assert done.returncode == 0, done.stderr[:6000]
    assert done.stdout.strip() == "ok"
