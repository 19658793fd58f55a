"""The C++ library: built on first use, loaded, and told about tensors.

Every source file is compiled by itself, those of `isa/` with their own `-m` flags, and linked into one shared library
in the user's cache folder. Its name carries a hash of sources, flags and compiler, so a change of any builds anew and
two programs that build at once write two files of which the second replaces the first, whole. Which instruction set
runs is decided by the library, not here. Without a compiler, or where building fails, there is no library: the
reference serves, and `k2 doctor` says so.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import struct
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from karakoram import env
from karakoram.errors import InputError, KarakoramError

ABI_VERSION = 1
SOURCES = Path(__file__).resolve().parent / "src"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma")
ISA_FLAGS: dict[str, tuple[str, ...]] = {  # of the files in isa/, on x86-64; elsewhere they compile to nothing
    "avx2": ("-mavx2", "-mfma"),
    "avx512f": _AVX512,
    "avx512": (*_AVX512, "-mavx512bf16"),
    "amx_emulated": (*_AVX512, "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.int64: 3, torch.uint8: 4}
PANELS = {"int4": 16, "bf16": 17, "fp8": 18}


# `k2_tensor` by number of dimensions: data, dtype, ndim, shape[4], strides[4]. As bytes it takes a third of the time of
# a ctypes structure, and one layer of a decoded token describes forty tensors.
_SHAPES = tuple(struct.Struct(f"=Qii{n}q{8 * (4 - n)}x{n}q{8 * (4 - n)}x") for n in range(5))


class BuildError(KarakoramError):
    """The library cannot be built here; `fix` says what to install."""


def describe(tensor: Tensor) -> bytes:
    """A tensor as the library sees it; the caller keeps the tensor alive. Raises InputError for what no call takes."""
    code, ndim = DTYPES.get(tensor.dtype), tensor.ndim
    if code is None or ndim > 4 or not tensor.is_cpu:
        raise InputError(
            f"A {tensor.dtype} tensor of {ndim} dimensions on {tensor.device} is nothing the CPU kernels take.",
            "They take float32, bfloat16, int32, int64 and uint8 in main memory.",
        )
    return _SHAPES[ndim].pack(tensor.data_ptr(), code, ndim, *tensor.shape, *tensor.stride())


def alone() -> ctypes.c_int32:
    """Whether a call should leave the pool out: whoever told torch to use one thread means us too."""
    return ctypes.c_int32(torch.get_num_threads() == 1)


def describe_packed(data: Tensor, kind: str, outputs: int, inputs: int) -> bytes:
    """A packed matrix; shape is that of the matrix."""
    return _SHAPES[2].pack(data.data_ptr(), PANELS[kind], 2, outputs, inputs, 0, 0)


class Library:
    """The loaded library; `call` raises InputError with the library's own words."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.c = ctypes.CDLL(str(path))
        self.c.k2_last_error.restype = ctypes.c_char_p
        self.c.k2_isa_chosen.restype = ctypes.c_char_p
        self.c.k2_packed_bytes.restype = ctypes.c_int64
        self.c.k2_moe_drop.restype = None
        self.c.k2_deterministic_choose.restype = None
        if self.c.k2_abi_version() != ABI_VERSION:
            raise BuildError(f"{path} has another ABI version.", f"Remove {path}; it is built again.")

    def call(self, name: str, *arguments: object) -> None:
        """Call a function that returns a status; ctypes releases the GIL meanwhile."""
        if status := getattr(self.c, name)(*arguments):
            words = self.c.k2_last_error().decode()
            raise InputError(f"{name.removeprefix('k2_')}: {words}.", f"(status {status})")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.c.k2_isa_chosen().decode()

    def isas(self) -> list[str]:
        """Those that are built in and usable here, best first; the emulated one is for tests."""
        return [name for name in (*reversed(ISA_FLAGS), "scalar") if self.c.k2_isa_available(name.encode())]

    def choose_isa(self, name: str) -> None:
        """Use this instruction set from now on; "auto" is the best. Raises InputError where it cannot be used."""
        self.call("k2_isa_choose", name.encode())

    @property
    def deterministic(self) -> bool:
        """Whether a row's bits may not depend on how many others are in the call."""
        return bool(self.c.k2_deterministic_chosen())

    def choose_deterministic(self, on: bool) -> None:
        """See `ops.deterministic`."""
        self.c.k2_deterministic_choose(ctypes.c_int(on))

    @property
    def threads(self) -> int:
        """Threads of the worker pool, the caller's included."""
        return self.c.k2_threads_chosen()

    def choose_threads(self, threads: int) -> None:
        """Use so many threads from now on. Raises InputError for more than this process may use."""
        self.call("k2_threads_choose", threads)


@cache
def library() -> Library | None:
    """The library, built if need be; None where that fails: a warning has said why, once."""
    try:
        return Library(build())
    except (BuildError, OSError) as error:
        warnings.warn(f"The CPU kernels are not there, plain torch does their work: {error}", RuntimeWarning, 2)
        return None


def build(extra_flags: tuple[str, ...] = (), only: tuple[str, ...] = ()) -> Path:
    """Build what is not built yet; returns the library's path.

    only  instruction sets to build in beside scalar; all by default. Raises BuildError with the compiler's first error.
    """
    compiler = env.compiler()
    if compiler is None:
        raise BuildError(
            "There is no C++ compiler.",
            "Install g++ or clang (Debian: apt install g++; macOS: xcode-select --install).",
        )
    command = [str(compiler), *shlex.split(os.environ.get("CXX", ""))[1:]]
    plans = _plans(extra_flags, only)
    key = hashlib.sha256(repr((plans, env.first_line([*command, "--version"]))).encode())
    for file in sorted(SOURCES.parent.rglob("*.[ch]*")):
        key.update(file.name.encode() + file.read_bytes())
    target = env.cache_dir() / "kernels" / f"karakoram-{key.hexdigest()[:20]}.so"
    if not target.is_file():
        _compile(command, plans, target, extra_flags)
    return target


def _plans(extra_flags: tuple[str, ...], only: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Source file (relative) and flags, for every object."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    plans: list[tuple[str, tuple[str, ...]]] = []
    for file in sorted(SOURCES.rglob("*.cpp")):
        isa = file.stem if file.relative_to(SOURCES).parts[0] == "isa" else ""
        wanted = x86 and (not only or isa in only)
        plans.append(
            (str(file.relative_to(SOURCES)), (*FLAGS, *(ISA_FLAGS.get(isa, ()) if wanted else ()), *extra_flags))
        )
    return plans


def _compile(
    command: list[str], plans: list[tuple[str, tuple[str, ...]]], target: Path, extra: tuple[str, ...]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def one(plan: tuple[str, tuple[str, ...]]) -> str:
            source, flags = plan
            out = os.path.join(folder, source.replace(os.sep, "_") + ".o")
            try:
                _run([*command, *flags, "-c", str(SOURCES / source), "-o", out], source)
            except BuildError:
                plain = [flag for flag in flags if not flag.startswith("-m")]
                if plain == list(flags):
                    raise
                # a compiler too old for this instruction set: the file compiles to nothing without its flags
                _run([*command, *plain, "-c", str(SOURCES / source), "-o", out], source)
            return out

        with ThreadPoolExecutor(env.processor().cores) as pool:
            objects = list(pool.map(one, plans))
        linked = os.path.join(folder, target.name)
        _run([*command, "-shared", "-pthread", *extra, *objects, "-o", linked], "the library")
        os.replace(linked, target)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode < 0 or "signal terminated" in done.stderr:  # else a library without this file would stay
        raise OSError(f"{command[0]} was ended from outside while it built {what}")
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
        raise BuildError(f"{command[0]} could not build {what}: {first.strip()}", "Set CXX to another compiler.")
