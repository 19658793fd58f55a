"""The machine as floor 0 sees it, on this machine and from recorded files of others."""

import sys
from pathlib import Path

import pytest

from karakoram import env

AMD = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm bf16\n"


def test_cpuinfo_of_x86_and_arm() -> None:
    model, flags = env._linux_cpu(AMD)  # pyright: ignore[reportPrivateUsage]
    assert model == "AMD EPYC"
    assert flags == {"fpu", "avx2", "avx512f", "amx_tile"}
    assert {"asimd", "i8mm"} <= env._linux_cpu(ARM)[1]  # pyright: ignore[reportPrivateUsage]
    assert env._linux_cpu("") == ("", frozenset())  # pyright: ignore[reportPrivateUsage]


def test_meminfo_counts_kib() -> None:
    found = env._linux_memory("MemTotal:       16000 kB\nMemAvailable:    8000 kB\n")  # pyright: ignore[reportPrivateUsage]
    assert found == (16000 * 1024, 8000 * 1024)
    assert env._linux_memory("garbage") == (None, None)  # pyright: ignore[reportPrivateUsage]


def test_container_limits(tmp_path: Path) -> None:
    def read(v2: str = "v2", v1: str = "v1") -> tuple[int | None, int | None]:
        return env._cgroup_memory((tmp_path / v2, tmp_path / v1))  # pyright: ignore[reportPrivateUsage]

    assert read() == (None, None)
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "memory.max").write_text("max\n")
    assert read() == (None, None)
    (tmp_path / "v2" / "memory.max").write_text("1000\n")
    (tmp_path / "v2" / "memory.current").write_text("400\n")
    (tmp_path / "v2" / "memory.stat").write_text("anon 250\ninactive_file 60\nactive_file 40\n")
    assert read() == (1000, 300)
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # what v1 writes for "none"
    assert read("absent") == (None, None)
    (tmp_path / "v1" / "memory.limit_in_bytes").write_text("5000\n")
    assert read("absent") == (5000, None)


def test_groups_from_the_root_to_the_own_one() -> None:
    found = env._cgroups("4:cpu,memory:/box/job\n0::/unit\n", Path("/c"))  # pyright: ignore[reportPrivateUsage]
    assert found == [
        (Path("/c"), Path("/c/memory")),
        (Path("/c/unit"), Path("/c/memory/box")),
        (Path("/c/unit"), Path("/c/memory/box/job")),
    ]
    assert env._cgroups("", Path("/c")) == [(Path("/c"), Path("/c/memory"))]  # pyright: ignore[reportPrivateUsage]


def test_resident_memory_grows_with_what_is_written() -> None:
    before = env.resident_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    block = bytearray(b"x") * (64 << 20)
    after = env.resident_bytes()
    assert after is not None
    assert after - before > len(block) // 2


def test_folders_follow_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KARAKORAM_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.hub_cache_dir() == tmp_path / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert env.hub_cache_dir() == tmp_path / "hf" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    assert env.hub_cache_dir() == tmp_path / "c"
    monkeypatch.setenv("KARAKORAM_CACHE", str(tmp_path / "k"))
    assert env.cache_dir() == tmp_path / "k"


def test_variables_hide_secrets() -> None:
    assert env.variables({"HF_TOKEN": "hf_x", "CXX": "g++", "HOME": "/h", "HF_HOME": ""}) == {
        "HF_TOKEN": "(set)",
        "CXX": "g++",
    }


def test_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    found = env.disk(tmp_path / "a" / "b")
    assert found is not None
    assert 0 < found.free_bytes <= found.total_bytes


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert env.compiler() is None
    program = tmp_path / "g++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert env.compiler() == program
    monkeypatch.setenv("CXX", "clang++ -O2")
    assert env.compiler() is None  # what CXX names is not there; another is not taken in its place


def test_first_line_of_programs() -> None:
    assert env.first_line([sys.executable, "-c", "print('one'); print('two')"]) == "one"
    assert env.first_line([sys.executable, "-c", "raise SystemExit(1)"]) is None
    assert env.first_line(["no-such-program-anywhere"]) is None


def test_this_machine() -> None:
    cpu, memory = env.processor(), env.memory()
    assert cpu.cores >= 1
    assert cpu.features <= set(env.CPU_FEATURES)
    assert memory.total_bytes is None or memory.total_bytes > 10**8
    assert env.bundled_model_dir().name == "nano"
