"""What must never be in the package or the repository: code execution from data, shells, large files, machine paths."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# np.load is not among them: without allow_pickle=True it reads arrays and nothing else.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
MAX_TRACKED_BYTES = 20_000_000
# Home and work folders of some machine. A single leading slash, so that addresses and relative paths do not match.
MACHINE_PATH = re.compile(rb"(?<![\w./:<])/(?:work|root|home/\w+|Users/\w+|opt/\w+)/[\w.-]+")


def _dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def _violations(tree: ast.Module) -> list[str]:
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            found += [f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}" in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            if _dotted(node.func) in FORBIDDEN_CALLS:
                found.append(f"{_dotted(node.func)}() line {node.lineno}")
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true:
                    found.append(f"{keyword.arg}=True line {node.lineno}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "from torch import load",
        "eval(x)",
        "exec(x)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "import os\nos.system(x)",
    ],
)
def test_the_check_itself_finds_what_it_should(code: str) -> None:
    assert _violations(ast.parse(code))


def test_nothing_in_the_package_runs_data_as_code(project_root: Path) -> None:
    files = sorted((project_root / "karakoram").rglob("*.py"))
    found = {str(f.relative_to(project_root)): v for f in files if (v := _violations(ast.parse(f.read_text())))}
    assert not found, f"the package never unpickles, evaluates or calls a shell: {found}"


def _tracked_files(root: Path) -> list[Path]:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=root, check=True).stdout
    return [path for name in listing.decode().split("\0") if name and (path := root / name).is_file()]


def test_no_tracked_file_is_large(project_root: Path) -> None:
    large = {str(f): f.stat().st_size for f in _tracked_files(project_root) if f.stat().st_size > MAX_TRACKED_BYTES}
    assert not large, f"over {MAX_TRACKED_BYTES / 1e6:.0f} MB: {large}"


def test_no_machine_path_is_tracked(project_root: Path) -> None:
    found: list[str] = []
    for file in _tracked_files(project_root):
        content = file.read_bytes()
        if b"\0" not in content[:8192]:  # text only: a path-like accident in weights means nothing
            found += [f"{file.relative_to(project_root)}: {m.decode()}" for m in MACHINE_PATH.findall(content)]
    assert not found, f"paths of some machine: {found}"
