"""The folder works alone: it imports torch, the standard library and itself."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cmt_aqr import attention

FOLDER = Path(attention.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
README = Path(__file__).parents[3] / "README.md"
CHECKS = """
import sys
from window_attention.evaluate import choose_backend
assert weights.grad.abs().sum() > 0 and out.shape == (1, 8, 300, 32)
assert "cmt_aqr" not in sys.modules
print(choose_backend("auto", torch.device("cuda")), choose_backend("auto", torch.device("cpu")))
"""


def imported_modules(source):
    """Full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def is_allowed(module, file):
    """Relative imports that stay inside the folder, torch, the standard library."""
    if module.startswith("."):
        level = len(module) - len(module.lstrip("."))
        return level <= len(file.relative_to(FOLDER).parts)
    top = module.split(".")[0]
    return top == "torch" or top in sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_torch_the_standard_library_and_itself(file):
    foreign = [module for module in imported_modules(file.read_text(encoding="utf-8")) if not is_allowed(module, file)]
    assert foreign == []


def test_the_check_finds_what_it_should():
    assert {"grids.py", "windows.py", "bias.py", "dense.py", "kernel.py"} <= {file.name for file in FILES}
    source = (
        "import torch.nn, math\nfrom . import x\nfrom ..y import z\n"
        "def f():\n    from cmt_aqr import boxes\n    import numpy as np\n"
    )
    foreign = [module for module in imported_modules(source) if not is_allowed(module, FOLDER / "bias.py")]
    assert sorted(foreign) == ["..y", "cmt_aqr", "numpy"]
    assert is_allowed("..y", FOLDER / "flex" / "kernel.py") and not is_allowed("...y", FOLDER / "flex" / "kernel.py")


def test_a_porter_reads_700_lines_at_most():
    """Everything but flex/, which is for speed alone."""
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES if file.parent == FOLDER}
    assert {"bias.py", "dense.py", "evaluate.py", "grids.py", "score_mod.py", "windows.py"} < set(lines)
    assert {file.parent.name for file in FILES} == {"attention", "flex"}
    assert sum(lines.values()) <= 700, lines


def test_nothing_but_evaluate_and_tools_needs_flex():
    """The folder can be deleted: one lazy import in evaluate.py is all that refers to it."""
    package = FOLDER.parent
    users = [
        file.relative_to(package).as_posix()
        for file in sorted(package.rglob("*.py"))
        if FOLDER / "flex" not in file.parents
        and any(re.search(r"(^|\.)flex($|\.)", m) for m in imported_modules(file.read_text(encoding="utf-8")))
    ]
    assert users == ["attention/evaluate.py", "tools/bench_attention.py"]


BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
(EXAMPLE,) = (block for block in BLOCKS if "from cmt_aqr.attention import" in block)


@pytest.mark.parametrize("with_flex", (True, False))
def test_the_folder_works_alone(tmp_path, with_flex):
    """Copied out under another name, with flex/ or without: the README's example runs."""
    ignore = shutil.ignore_patterns("__pycache__", *([] if with_flex else ["flex"]))
    shutil.copytree(FOLDER, tmp_path / "window_attention", ignore=ignore)
    script = EXAMPLE.replace("cmt_aqr.attention", "window_attention") + CHECKS
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{'flex' if with_flex else 'score_mod'} dense\n"
