"""The portable kernels and everything above them under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from karakoram import env
from karakoram.kernels.cpu import library

FLAGS = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PATIENCE_S = 280


def runtime(name: str) -> str:
    """Where the compiler keeps a sanitizer's library; skips where it has none."""
    compiler = env.compiler()
    found = compiler and env.first_line([str(compiler), f"-print-file-name={name}"])
    if not found or not Path(found).is_absolute() or not Path(found).exists():
        pytest.skip(f"the compiler brings no {name}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer by Linux's rules")
@pytest.mark.timeout(600)
def test_every_operation_with_odd_shapes_is_clean(lib: library.Library, project_root: Path) -> None:
    preload = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    built = library.build(FLAGS, only=("none",))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.every_operation", str(built)],
        cwd=project_root,
        env=os.environ
        | {
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it has until the end
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "runtime error" not in done.stderr
    assert done.stdout.strip() == "all done on scalar"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer by Linux's rules")
@pytest.mark.timeout(600)
def test_the_sanitizer_would_see_a_read_beside_a_matrix(lib: library.Library, project_root: Path) -> None:
    """The same set-up with a matrix that claims more outputs than it has bytes for must not pass."""
    preload = f"{runtime('libasan.so')} {runtime('libubsan.so')}"
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from karakoram.kernels.cpu.library import Library, describe, describe_packed\n"
        "lib = Library(Path(sys.argv[1]))\n"
        "x, y = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)\n"
        "data = torch.zeros(576, dtype=torch.uint8)\n"
        "lib.call('k2_linear', describe(x), describe_packed(data, 'int4', 32, 64), describe(y))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(library.build(FLAGS, only=("none",)))],
        cwd=project_root,
        env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
