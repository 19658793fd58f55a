"""What every test can rely on: two threads, fixed seeds, no network, and markers that skip with a reason.

Ring 0 (the default) needs a CPU and nothing else. A test that needs more says so with a marker; where the thing is
absent it is skipped and the summary (`-ra`) says why. Marked `slow` means deselected unless asked for (pyproject.toml).
"""

import os

# Before anything imports torch: results and times should not depend on how many cores a machine happens to have.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MKL_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import random
import socket
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SHARED_DIR = ROOT.parent / "shared"

# The same examples in every run: a red test must be red again. Machines differ in speed, hence no deadline.
settings.register_profile("karakoram", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("karakoram")


def _missing_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _missing_cpu_flag(flag: str) -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return None if flag in flags else f"this CPU does not report {flag}"


def _missing_weights() -> str | None:
    folder = os.environ.get("KARAKORAM_TEST_WEIGHTS", "")
    return None if folder and Path(folder).is_dir() else "KARAKORAM_TEST_WEIGHTS names no folder of checkpoints"


def _missing_shared() -> str | None:
    return None if (SHARED_DIR / "data").is_dir() else "../shared is not beside this checkout"


_MISSING: dict[str, Callable[[], str | None]] = {
    "gpu": cache(_missing_gpu),
    "amx": cache(lambda: _missing_cpu_flag("amx_tile")),
    "avx512": cache(lambda: _missing_cpu_flag("avx512f")),
    "weights": cache(_missing_weights),
    "shared": cache(_missing_shared),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test, with the reason, where the machine lacks what the marker names."""
    for marker, missing in _MISSING.items():
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(f"{marker}: {reason}")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    """Seed whatever is loaded; a test of words should not pay two seconds for importing torch."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ring 0 needs no download: connecting to anything but this machine fails at once and says so."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {address!r}; tests run without a network")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """`../shared`, the data beside the checkout; skips where it is absent."""
    if reason := _missing_shared():
        pytest.skip(f"shared: {reason}")
    return SHARED_DIR
