"""The folder works alone: it imports torch, the standard library and itself."""

import ast
import sys
from pathlib import Path

import pytest

from cmt_aqr import attention

FOLDER = Path(attention.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))


def imported_modules(source):
    """Full names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def is_allowed(module):
    top = module.split(".")[0]
    own = module == "cmt_aqr.attention" or module.startswith("cmt_aqr.attention.")
    return own or top == "torch" or top in sys.stdlib_module_names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_only_torch_and_the_standard_library(file):
    foreign = [module for module in imported_modules(file.read_text(encoding="utf-8")) if not is_allowed(module)]
    assert foreign == []


def test_the_check_finds_what_it_should():
    assert {"layout.py", "windows.py", "bias.py", "dense.py"} <= {file.name for file in FILES}
    source = "import torch.nn, math\nfrom . import x\ndef f():\n    from cmt_aqr import boxes\n    import numpy as np\n"
    foreign = [module for module in imported_modules(source) if not is_allowed(module)]
    assert sorted(foreign) == [".", "cmt_aqr", "numpy"]
    assert not is_allowed("cmt_aqr.attention_other") and not is_allowed("cmt_aqr.geometry")
