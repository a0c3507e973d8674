"""Files, functions and parameter lists stay short enough to be read at once."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FILES = [*sorted((REPOSITORY / "cmt_aqr").rglob("*.py")), REPOSITORY / "train.py", REPOSITORY / "test.py"]

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8


def violations(source: str) -> list[str]:
    """Every file, function and parameter list of a source that is too long; ``__init__`` may take more parameters."""
    found = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        found.append(f"{lines} lines")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{node.name}: {length} lines")
        count = num_parameters(node.args)
        if count > MAX_PARAMETERS and node.name != "__init__":
            found.append(f"{node.name}: {count} parameters")
    return found


def num_parameters(arguments: ast.arguments) -> int:
    """Parameters of a function, ``*args`` and ``**kwargs`` included, ``self`` and ``cls`` left out."""
    named = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    gathered = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    return len(named) + len(gathered) - (named[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(REPOSITORY).as_posix())
def test_nothing_is_too_long(file):
    assert violations(file.read_text(encoding="utf-8")) == []


def test_the_measure_finds_what_is_too_long():
    lines = "\n".join("    pass" for _ in range(60))
    assert violations(f"def f():\n{lines}\n") == ["f: 61 lines"]
    assert violations("def f(a, /, b, c, d, e, *x, f, g, **y): pass\n") == ["f: 9 parameters"]
    assert violations("class C:\n    def m(self, a, b, c, d, e, f, g, h): pass\n") == []
    assert violations("class C:\n    def __init__(self, a, b, c, d, e, f, g, h, i): pass\n") == []
    assert violations("x = 1\n" * 401) == ["401 lines"]
