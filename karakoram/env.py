"""The machine and its settings, seen from the standard library: variables, folders, processor, memory, disk, compiler.

Everything here is asked, never guessed: what cannot be found out is None or an empty set. In a container the limits of
the container count, not those of the host: cores from the scheduler's affinity mask, memory from the control group.
Sources: /proc and cgroup v1/v2 on Linux, `sysctl` on macOS.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Every variable that this package or the libraries it stands on listen to, and what it does.
VARIABLES: Final[dict[str, str]] = {
    "KARAKORAM_CACHE": "folder for what this package builds and keeps",
    "K2_TRACEBACK": "1 shows tracebacks instead of one-line errors",
    "NO_COLOR": "anything turns colours off",
    "KARAKORAM_ISA": "instruction set of the kernels: amx, avx512, avx512f, avx2, scalar, or reference (torch)",
    "OMP_NUM_THREADS": "threads of the CPU kernels",
    "CXX": "C++ compiler",
    "CUDA_VISIBLE_DEVICES": "accelerators that may be used",
    "HF_HOME": "folder of Hugging Face downloads and tokens",
    "HF_HUB_CACHE": "folder of downloaded checkpoints",
    "HF_HUB_OFFLINE": "1 keeps huggingface_hub off the network",
    "HF_ENDPOINT": "address of the hub or of a mirror",
    "HF_TOKEN": "access token for gated or private checkpoints",
}
_SECRET: Final = frozenset({"HF_TOKEN"})

# What kernels may ask for, by Linux's names in /proc/cpuinfo, widest last.
CPU_FEATURES: Final = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_MACOS_FEATURES: Final = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.neon": "asimd",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
}
_NO_LIMIT: Final = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Processor:
    """`model` as the system names it; `cores` this process may run on; `features` out of `CPU_FEATURES`."""

    model: str
    architecture: str
    cores: int
    features: frozenset[str]


@dataclass(frozen=True)
class Memory:
    """Bytes this process may use: of the machine, or of its container where that allows less. None: unknown."""

    total_bytes: int | None
    available_bytes: int | None


@dataclass(frozen=True)
class Disk:
    """Free and total bytes of the file system that holds, or would hold, `path`."""

    path: Path
    free_bytes: int
    total_bytes: int


def variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Those of `VARIABLES` that are set, with their values; secrets read "(set)"."""
    source = os.environ if environ is None else environ
    return {name: "(set)" if name in _SECRET else source[name] for name in VARIABLES if source.get(name)}


def cache_dir() -> Path:
    """Where this package keeps what it builds: KARAKORAM_CACHE, else the user's cache folder. It may not exist yet."""
    if given := os.environ.get("KARAKORAM_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "karakoram"
    return _xdg_cache() / "karakoram"


def hub_cache_dir() -> Path:
    """Where huggingface_hub keeps checkpoints, by its own rules. It may not exist yet."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return Path(given).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return _xdg_cache() / "huggingface" / "hub"


def _xdg_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache"


def bundled_model_dir() -> Path:
    """The checkpoint that comes with the package; it may be absent from a source tree without its weights."""
    return Path(__file__).resolve().parent / "assets" / "nano"


def processor() -> Processor:
    """The processor as this process sees it."""
    model, features = _macos_cpu() if sys.platform == "darwin" else _linux_cpu(_read("/proc/cpuinfo"))
    return Processor(
        model=model or platform.processor() or "unknown",
        architecture=platform.machine(),
        cores=_cores(),
        features=features & frozenset(CPU_FEATURES),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _linux_cpu(cpuinfo: str) -> tuple[str, frozenset[str]]:
    """Model name and flags of the first processor listed; x86 says `flags`, Arm `Features`."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""
    return fields.get("model name", ""), frozenset(flags.split())


def _macos_cpu() -> tuple[str, frozenset[str]]:
    found = {feature for key, feature in _MACOS_FEATURES.items() if _sysctl(key) == "1"}
    return _sysctl("machdep.cpu.brand_string") or "", frozenset(found)


def memory() -> Memory:
    """Memory of the machine, or of the container where that is less."""
    if sys.platform == "darwin":
        total = _sysctl("hw.memsize")
        return Memory(int(total) if total and total.isdigit() else None, None)
    total, available = _linux_memory(_read("/proc/meminfo"))
    for group in _cgroups(_read("/proc/self/cgroup"), Path("/sys/fs/cgroup")):
        limit, used = _cgroup_memory(group)
        if limit is not None and (total is None or limit < total):
            total, rest = limit, max(limit - (used or 0), 0)
            available = rest if available is None else min(rest, available)
    return Memory(total, available)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM now (RSS); None where the system does not tell."""
    words = _read("/proc/self/statm").split()
    return int(words[1]) * os.sysconf("SC_PAGE_SIZE") if len(words) > 1 and words[1].isdigit() else None


def peak_resident_bytes() -> int | None:
    """The most that it ever was (VmHWM), or since `reset_peak_resident`; None where the system does not tell."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak_resident() -> None:
    """Begin `peak_resident_bytes` anew, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cgroups(membership: str, root: Path) -> list[tuple[Path, Path]]:
    """Folders that may limit this process's memory, by cgroup v2 and v1: of the root (a container's own) and below.

    Each as (folder of v2, folder of v1); within a container the path in /proc/self/cgroup may be of the host, and then
    is not there.
    """
    own_v2, own_v1 = "", ""
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            own_v2 = path.strip("/")
        elif "memory" in controllers.split(","):
            own_v1 = path.strip("/")
    deepest = max(len(Path(own_v2).parts), len(Path(own_v1).parts))
    return [
        (root.joinpath(*Path(own_v2).parts[:depth]), root.joinpath("memory", *Path(own_v1).parts[:depth]))
        for depth in range(deepest + 1)
    ]


def _linux_memory(meminfo: str) -> tuple[int | None, int | None]:
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)

    def in_bytes(key: str) -> int | None:
        words = fields.get(key, "").split()
        return int(words[0]) * 1024 if words and words[0].isdigit() else None  # /proc/meminfo counts KiB

    return in_bytes("MemTotal"), in_bytes("MemAvailable")


def _cgroup_memory(group: tuple[Path, Path]) -> tuple[int | None, int | None]:
    """(limit, used) in bytes by cgroup v2, else v1; page cache that can be dropped does not count as used."""
    for folder, limit_name, used_name in (
        (group[0], "memory.max", "memory.current"),
        (group[1], "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _read(folder / limit_name).strip()
        if not limit.isdigit() or int(limit) >= _NO_LIMIT:
            continue
        used = _read(folder / used_name).strip()
        stat = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
        droppable = sum(int(stat.get(f"{kind}_file") or 0) for kind in ("inactive", "active"))
        return int(limit), max(0, int(used) - droppable) if used.isdigit() else None
    return None, None


def disk(path: str | Path) -> Disk | None:
    """Space on the file system of `path`, or of its nearest existing parent; None if that cannot be asked."""
    place = Path(path).expanduser().absolute()
    for candidate in (place, *place.parents):
        try:
            usage = shutil.disk_usage(candidate)
        except OSError:
            continue
        return Disk(place, usage.free, usage.total)
    return None


def compiler() -> Path | None:
    """The C++ compiler: CXX if it is set, else the first of c++, g++, clang++ on the PATH; None if there is none."""
    if words := os.environ.get("CXX", "").split():  # it may carry options
        found = shutil.which(words[0])
        return Path(found) if found else None
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return Path(found)
    return None


def first_line(command: list[str], timeout_s: float = 10.0) -> str | None:
    """The first line a program prints, or None if it cannot be run, fails, or takes longer than `timeout_s`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _sysctl(key: str) -> str | None:
    return first_line(["sysctl", "-n", key])


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
