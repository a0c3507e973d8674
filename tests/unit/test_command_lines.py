"""``--help`` and a wrong command line are answered before PyTorch is imported, which takes seconds."""

import os
import re
import subprocess
import sys

import pytest

from tests.parity.golden import REPOSITORY

HEAVY = ("torch", "torchvision", "scipy", "matplotlib", "nuscenes", "safetensors")
ADVICE = "; parse the command line before the imports that need it, as cmt_aqr/tools/visualize.py does"
# Runs a program as python does, then tells what it imported.
RUNNER = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, ".")
sys.argv[0] = name
try:
    runpy.run_path(name, run_name="__main__") if name.endswith(".py") else runpy.run_module(name, run_name="__main__")
except SystemExit as end:
    print("\\nSTATUS", end.code or 0, "MODULES", *sys.modules)
"""


def programs() -> list[str]:
    """What a user starts: scripts by file, modules by name."""
    names = ["train.py", "test.py"]
    for path in sorted((REPOSITORY / "cmt_aqr").rglob("*.py")):
        if re.search(r"^if __name__ == .__main__.:$", path.read_text(encoding="utf-8"), re.MULTILINE):
            names.append(".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__"))
    return names


def run(program: str, *arguments: str) -> tuple[int, set[str], str]:
    """Exit status, imported modules and everything printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, program, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    printed, mark, rest = done.stdout.rpartition("\nSTATUS ")
    assert mark, done.stdout + done.stderr
    status, _, *modules = rest.split()
    return int(status), set(modules), printed + done.stderr


def heavy(modules: set[str]) -> list[str]:
    return [name for name in HEAVY if name in modules]


@pytest.mark.parametrize("program", programs())
def test_help_imports_hardly_anything(program):
    status, modules, printed = run(program, "--help")
    is_list = program in ("cmt_aqr", "cmt_aqr.tools")  # they print the commands
    assert status == 0 and ("Each of them takes --help" if is_list else "usage: ") in printed
    assert modules & {"argparse", "cmt_aqr"} and heavy(modules) == [], program + ADVICE
    light = not modules & {"yaml", "numpy", "cv2", "tqdm", "cmt_aqr.config"}
    assert light, "this --help is to take no longer than import yaml"


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["train.py"], 2, "the following arguments are required: config"),
        (["train.py", "synthetic_tiny", "--max-steps", "0"], 2, "--max-steps: expected at least 1, got 0"),
        (["train.py", "--help-config", "training.lr"], 0, "training.lr\n"),
        (["train.py", "--help-config", "training.rl"], 2, "--help-config training.rl: no such key"),
        (["test.py", "synthetic_tiny"], 2, "the following arguments are required: --checkpoint"),
        (["cmt_aqr.tools.bench", "attention", "--shapes", "99"], 2, "invalid choice: 99"),
        (["cmt_aqr.golden", "compare", "a", "b", "--factor", "0"], 2, "expected a number above 0, got 0"),
        (["cmt_aqr.golden", "compare", "a", "b", "--factor", "x"], 2, "expected a number above 0, got x"),
        (["cmt_aqr.golden", "export", "c.yaml", "out", "--points", "-1"], 2, "--points: expected at least 0, got -1"),
        (["cmt_aqr.golden", "export", "c.yaml", "out", "--boxes", "-1"], 2, "--boxes: expected at least 0, got -1"),
        (["cmt_aqr.tools.verify_frozen", "c.yaml", "--points", "0"], 2, "--points: expected at least 1, got 0"),
        (["cmt_aqr.tools.export", "c.yaml", "--points", "2.5"], 2, "--points: expected a whole number, got '2.5'"),
    ],
)
def test_a_wrong_command_line_is_answered_before_pytorch_is_imported(arguments, status, part):
    found, modules, printed = run(*arguments)
    assert found == status and part in printed and "Traceback" not in printed
    assert heavy(modules) == []


def test_the_configuration_is_read_without_pytorch():
    code = "import sys, cmt_aqr.config as c; c.load_config('synthetic_tiny'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "False\n"


def test_the_list_of_programs_is_whole():
    assert {"train.py", "cmt_aqr.synthetic", "cmt_aqr.tools.bench", "cmt_aqr.tools.visualize"} <= set(programs())
