"""The README's scripts, where that takes no installation: what they refuse, and the quick second run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def _environment_script(root: Path, venv: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "KARAKORAM_VENV": str(venv), **variables}
    command = ["bash", str(root / "scripts/environment"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def _fake_python(folder: Path, body: str) -> str:
    python = folder / "python3"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("script", ["scripts/environment", "scripts/chat", "scripts/test", ".ci/run"])
def test_scripts_parse(project_root: Path, script: str) -> None:
    done = subprocess.run(["bash", "-n", script], cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_python_that_is_too_old_is_named(project_root: Path, tmp_path: Path) -> None:
    old = _fake_python(tmp_path, 'case "$*" in *--version*) echo "Python 3.9.6";; *) exit 1;; esac')
    done = _environment_script(project_root, tmp_path / "venv", PYTHON=old)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "is Python 3.9.6" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_missing_is_named(project_root: Path, tmp_path: Path) -> None:
    done = _environment_script(project_root, tmp_path / "venv", PYTHON=str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere is missing" in done.stderr


def test_a_python_without_venv_is_told_how_to_get_it(project_root: Path, tmp_path: Path) -> None:
    bare = _fake_python(tmp_path, 'case "$*" in *ensurepip*) exit 1;; esac')
    done = _environment_script(project_root, tmp_path / "venv", PYTHON=bare)
    assert done.returncode == 2
    assert "python3-venv" in done.stderr


@pytest.mark.parametrize(("installed", "asked"), [("dev", "dev"), ("run", "run"), ("dev", "run")])
def test_a_second_run_installs_nothing(project_root: Path, tmp_path: Path, installed: str, asked: str) -> None:
    checksum = subprocess.run(
        ["cksum"], input=(project_root / "pyproject.toml").read_bytes(), capture_output=True, check=True
    )
    marker = f"{installed} {checksum.stdout.decode().strip()} {project_root}\n"
    (tmp_path / ".karakoram-installed").write_text(marker)
    done = _environment_script(project_root, tmp_path, asked, PYTHON=str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path), "")


@pytest.mark.parametrize(("installed", "asked"), [("run", "dev"), ("dev 0 0", "dev")])
def test_a_changed_project_is_installed_again(project_root: Path, tmp_path: Path, installed: str, asked: str) -> None:
    (tmp_path / ".karakoram-installed").write_text(f"{installed}\n")
    done = _environment_script(project_root, tmp_path, asked, PYTHON=str(tmp_path / "nowhere"))
    assert done.returncode == 2, "it must try to install, and there is no Python to do it with"
