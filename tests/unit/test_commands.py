"""The lists of commands name every program that a user can start, and what a package needs beside its code."""

import configparser
import re
import subprocess
import sys

import yaml

import cmt_aqr
from cmt_aqr.__main__ import main
from cmt_aqr.tools.__main__ import main as tools_main
from tests.parity.golden import REPOSITORY

PROGRAMS = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__main__")
    for path in (REPOSITORY / "cmt_aqr").rglob("*.py")
    if re.search(r"^if __name__ == .__main__.:$", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def listed(text: str) -> dict[str, str]:
    """Command -> what it does."""
    return dict(re.findall(r"^  (python .+?) {2,}(.+)$", text, re.MULTILINE))


def test_all_commands_are_listed_with_what_they_do(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cmt_aqr", "--help"])
    assert main() == 0
    found = listed(capsys.readouterr().out)
    scripts = {"python train.py CONFIG", "python test.py CONFIG --checkpoint FILE"}
    assert found.keys() == scripts | {
        f"python -m {name}" for name in PROGRAMS - {"cmt_aqr", "cmt_aqr.tools"} if name.startswith("cmt_aqr.")
    }
    assert "python -m cmt_aqr.synthetic" in found and "python -m cmt_aqr.tools.visualize" in found
    assert found["python train.py CONFIG"] == "Train a detector, evaluate it, draw what it sees."
    assert all(len(purpose.split()) > 4 for purpose in found.values())


def test_the_tools_are_listed_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools"])
    assert tools_main() == 0
    found = listed(capsys.readouterr().out)
    assert len(found) >= 5 and all(command.startswith("python -m cmt_aqr.tools.") for command in found)


def test_the_list_needs_no_heavy_library():
    code = "import sys, cmt_aqr.__main__; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "False False\n"


def test_citation_and_type_marker_belong_to_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == cmt_aqr.__version__ and citation["license"] == "Apache-2.0"
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["options.package_data"]["cmt_aqr"] == "py.typed" and (REPOSITORY / "cmt_aqr" / "py.typed").is_file()
