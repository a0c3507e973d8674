"""Who may import whom (docs/architecture.md), read from the source of every file."""

import ast
import sys
from pathlib import Path

import pytest

import cmt_aqr

PACKAGE = Path(cmt_aqr.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    "backbones", "box_format", "boxes", "cameras", "classes", "config", "config_checks", "config_data_checks",
    "devices", "errors", "files", "geometry", "locks", "nuscenes_tables", "precision", "predictions", "progress",
    "rotations", "strict_yaml", "table_schema", "tokens", "transformer_layers", "yaml_reader",
}  # fmt: skip
# What the files of a package may import besides the base layer and their own package.
ALLOWED = {
    "attention": set(),
    "aqr": {"attention"},
    "models": {"attention", "aqr"},
    "losses": set(),
    "data": set(),
    "evaluation": set(),
    "viz": set(),
    "synthetic": set(),
    "training": set(),
}
# What a file of the base layer imports inside a function, when it makes something.
LAZY = {"backbones": {"models"}}
# Files that import torch, the standard library and the package alone.
TORCH_ONLY = ("aqr/",)
# The only places where an optional or heavy library appears.
LIBRARIES = {
    "nuscenes": ("nuscenes_tables.py", "data/", "evaluation/"),
    "spconv": ("models/spconv_backend.py",),
    "scipy": ("losses/matcher.py", "models/local_init.py", "tools/experiment_report.py"),
    "torch.distributed": ("training/distributed.py",),
    "matplotlib": ("viz/",),
    "rerun": ("viz/rerun_file.py",),
}


def imported(source: str, *, inside_functions: bool = True) -> set[str]:
    """Full names of all modules that a file imports; relative ones stay in their package."""
    names = set()
    tree = ast.parse(source)
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_parts(names: set[str]) -> set[str]:
    """First part below ``cmt_aqr`` of every import."""
    return {name.split(".")[1] for name in names if name.startswith("cmt_aqr.")}


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_the_base_layer_and_what_lies_below_it(package):
    files = [file for file in FILES if place(file).startswith(f"{package}/")]
    assert files
    for file in files:
        foreign = own_parts(imported(file.read_text(encoding="utf-8"))) - {package} - ALLOWED[package] - BASE
        assert foreign == set(), file


def test_the_base_layer_imports_itself_and_attention():
    for file in (PACKAGE / f"{name}.py" for name in BASE):
        if file.exists():
            source = file.read_text(encoding="utf-8")
            assert own_parts(imported(source)) <= BASE | {"attention"} | LAZY.get(file.stem, set()), file
            assert own_parts(imported(source, inside_functions=False)) <= BASE | {"attention"}, file


def test_aqr_needs_torch_only():
    files = [file for file in FILES if place(file).startswith(TORCH_ONLY)]
    assert len(files) > 5
    for file in files:
        tops = {name.split(".")[0] for name in imported(file.read_text(encoding="utf-8"))}
        assert tops <= {"torch", "cmt_aqr", *sys.stdlib_module_names}, file


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_in_its_place_only(library):
    found = {
        place(file)
        for file in FILES
        if any(name == library or name.startswith(f"{library}.") for name in imported(file.read_text(encoding="utf-8")))
    }
    assert found
    assert [file for file in found if not file.startswith(LIBRARIES[library])] == []


def test_no_package_is_left_out():
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert packages - set(ALLOWED) <= {"tools", "golden"}


def test_the_check_sees_every_way_to_import():
    source = (
        "import cmt_aqr.viz.paint\nfrom cmt_aqr import losses\ndef f():\n    from cmt_aqr.data.sample import Batch\n"
    )
    assert own_parts(imported(source)) == {"viz", "losses", "data"}
    assert own_parts(imported(source, inside_functions=False)) == {"viz", "losses"}
