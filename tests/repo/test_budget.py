"""The caps that keep the code readable. Shorter is not simpler, but longer is not either."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [
    p for folder in ("lowvram_i2v", "kernels", "convert", "tools") for p in sorted((ROOT / folder).rglob("*.py"))
]
FILES = [*SHIPPED, *sorted((ROOT / "tests").rglob("*.py"))]
FILE_LINES, FUNCTION_LINES, PARAMETERS, NESTING = 500, 80, 10, 4
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTED = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.AsyncFor, ast.AsyncWith)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")])


def depth(node: ast.AST) -> int:
    """Deepest nesting of statements inside a node; `elif` does not count as deeper than its `if`."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (*FUNCTIONS, ast.ClassDef)):
                continue
            chained = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (isinstance(child, NESTED) and not chained))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_file_keeps_the_budget(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    faults = []
    if len(text.splitlines()) > FILE_LINES:
        faults.append(f"{len(text.splitlines())} lines, at most {FILE_LINES}")
    if path.stem in BANNED_NAMES:
        faults.append("a name that says nothing")
    tree = ast.parse(text)
    if not ast.get_docstring(tree) and text.strip():
        faults.append("no docstring says what the file is")
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES:
                faults.append(f"{node.name}: {lines} lines, at most {FUNCTION_LINES}")
            if parameters(node) > PARAMETERS and not is_kernel(node):
                faults.append(f"{node.name}: {parameters(node)} parameters, at most {PARAMETERS}")
            if depth(node) > NESTING:
                faults.append(f"{node.name}: nested {depth(node)} deep, at most {NESTING}")
        if isinstance(node, ast.Global):
            faults.append(f"line {node.lineno}: global")
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                faults.append(f"line {node.lineno}: bare except")
            if all(isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and s.value is ...) for s in node.body):
                faults.append(f"line {node.lineno}: an except that swallows")
    assert not faults, f"{relative(path)}: " + "; ".join(faults)


def test_the_budget_can_fail() -> None:
    deep = "def f():\n if a:\n  if b:\n   if c:\n    if d:\n     if e: pass\n"
    function = ast.parse(deep).body[0]
    assert depth(function) == 5
    assert depth(ast.parse("def f():\n if a: pass\n elif b: pass\n elif c: pass\n").body[0]) == 1


def test_no_machine_or_workplace_is_named() -> None:
    """Paths of a developer's machine and registry addresses have no place in the project."""
    words = ["/" + "work/", "/" + "root/", "/" + "tmp/v", "pypi" + ".org", ".lib" + "rary", "../sha" + "red"]
    suffixes = {".py", ".md", ".toml", ".json", ".yml", ""}
    skipped = {".git", ".venv", "build", "golden", "demo_out", "__pycache__", ".hypothesis"}
    for path in ROOT.rglob("*"):
        parts = set(path.relative_to(ROOT).parts)
        if path.is_file() and path.suffix in suffixes and not parts & skipped and "cache" not in str(path):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not [word for word in words if word in text], relative(path)


def test_goldens_stay_small() -> None:
    files = [p for p in (ROOT / "tests" / "golden").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 12e6
