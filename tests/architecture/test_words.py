"""Every module opens with an essay, every public function states its contract.

Public means: reachable by names without a leading underscore. A docstring states a contract and never restates the
signature, so these may stay without: methods of a class with bases (the contract is the base's), methods of a single
statement (the body is the contract), `forward` (its class states the shapes), overloads, nested functions.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for file in sorted((root / "karakoram").rglob("*.py")):
        yield str(file.relative_to(root)), ast.parse(file.read_text())


def _needs_docstring(node: Definition, owner: ast.ClassDef | None) -> bool:
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    if node.name == "forward" or "overload" in decorators:
        return False
    return owner is None or not (owner.bases or len(node.body) == 1)


def _silent(body: list[ast.stmt], owner: ast.ClassDef | None = None) -> Iterator[Definition]:
    """The public definitions in `body` that should state a contract and do not."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            if not ast.get_docstring(node) and _needs_docstring(node, owner):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _silent(node.body, node)


def test_every_module_opens_with_a_docstring(project_root: Path) -> None:
    silent = [where for where, tree in _modules(project_root) if tree.body and not ast.get_docstring(tree)]
    assert not silent, f"no opening docstring: {silent}"


def test_public_functions_state_their_contract(project_root: Path) -> None:
    silent = [
        f"{where}:{node.lineno} {node.name}" for where, tree in _modules(project_root) for node in _silent(tree.body)
    ]
    assert not silent, f"{len(silent)} public definitions without a docstring:\n" + "\n".join(silent)


def test_the_check_itself_finds_what_it_should() -> None:
    method = "    def {}(self):\n        x = 1\n        return x\n"
    code = f"def f(): pass\nclass C:\n    'a'\n{method.format('g')}class D(C):\n    'a'\n{method.format('h')}"
    assert [node.name for node in _silent(ast.parse(code).body)] == ["f", "g"]
