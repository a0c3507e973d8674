"""What a user sees of an error: one sentence and a status, from every program of the package."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest

import cmt_aqr
from cmt_aqr.data.sample import DataError
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.strict_yaml import ConfigError
from cmt_aqr.training.checkpoint import CheckpointError

PACKAGE = Path(cmt_aqr.__file__).parent
REPOSITORY = PACKAGE.parent
# A command line of every program that a user starts, with a mistake in it, and a part of the sentence.
MISTAKES = {
    "train": (["missing.yaml"], "missing.yaml"),
    "test": (["missing.yaml", "--checkpoint", "x.pt"], "missing.yaml"),
    "cmt_aqr.__main__": (["tools"], "python -m cmt_aqr tools"),
    "cmt_aqr.tools.__main__": (["bench"], "python -m cmt_aqr.tools bench"),
    "cmt_aqr.golden.__main__": (["compare", "missing", "b.npz"], "missing: no such file or folder"),
    "cmt_aqr.synthetic.__main__": (["world", "--scenes", "-1"], "scenes must be a whole number from 0 to"),
    "cmt_aqr.tools.analyze": (["missing.yaml", "--checkpoint", "x.pt"], "missing.yaml"),
    "cmt_aqr.tools.bench": (["data", "--dataroot", "none", "--version", "v", "--split", "s"], "none"),
    "cmt_aqr.tools.configs": (["ablation", "--configs", "none"], "none"),
    "cmt_aqr.tools.export": (["missing.yaml", "--checkpoint", "x.pt", "--to", "onnx"], "missing.yaml"),
    "cmt_aqr.tools.failures": (
        ["pictures", "--dataroot", "none", "--version", "v", "--split", "s", "--out", "out"],
        "none",
    ),
    "cmt_aqr.tools.experiments": (["report", "none.yml", "--out", "out"], "none.yml"),
    "cmt_aqr.tools.from_folder": (["none", "out"], "frames.json does not exist"),
    "cmt_aqr.tools.import_checkpoint": (["a.pth", "b.safetensors", "--config", "missing.yaml"], "missing.yaml"),
    "cmt_aqr.tools.precision_report": (["missing.yaml"], "missing.yaml"),
    "cmt_aqr.tools.run_export": (["missing.pt2", "bundle", "out.npz"], "missing.pt2: no such file"),
    "cmt_aqr.tools.verify_frozen": (["missing.yaml"], "missing.yaml"),
    "cmt_aqr.tools.visualize": (["--dataroot", "none", "--version", "v", "--split", "s", "--out", "out"], "none"),
}


def modules():
    """Every module of the package and the two scripts."""
    names = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "cmt_aqr.")]
    return [importlib.import_module(name) for name in (*names, "train", "test")]


def is_attention(module) -> bool:
    """The attention package knows torch and the standard library only, so that it can be copied out."""
    return module.__name__.startswith("cmt_aqr.attention")


def raising(error):
    def run():
        raise error

    return run


def test_every_error_class_of_the_package_is_a_user_error():
    own = {
        value
        for module in modules()
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == module.__name__
    }
    assert {"CheckpointError", "ConfigError", "DataError", "EvaluationError", "LogError", "NonFiniteError"} <= {
        error.__name__ for error in own
    }
    assert {"PictureError", "TrainingStopped", "WorldError"} <= {error.__name__ for error in own}
    assert [error.__name__ for error in own if not issubclass(error, UserError)] == []


def test_the_base_layer_imports_nothing_of_the_package():
    for path in (PACKAGE / "errors.py", *(PACKAGE / "attention").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name == "cmt_aqr" or name.startswith("cmt_aqr.errors") for name in names), path
            if path.name == "errors.py" and names:
                assert names[0].split(".")[0] in sys.stdlib_module_names, path


def test_every_program_reports_a_mistake_as_one_sentence(tmp_path, capsys, monkeypatch):
    programs = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in (*PACKAGE.rglob("*.py"), REPOSITORY / "train.py", REPOSITORY / "test.py")
        if 'if __name__ == "__main__":\n' in path.read_text(encoding="utf-8").replace("``if __name__", "")
    }
    assert programs == set(MISTAKES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    by_name = {module.__name__: module for module in modules()}
    for name, (arguments, part) in MISTAKES.items():
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert by_name[name].main() == 2, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and part in error, (name, error)


@pytest.mark.parametrize("error", [UserError("a sentence"), CheckpointError("a sentence"), ConfigError(["a sentence"])])
def test_a_users_error_is_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert report_errors(raising(error)) == 2
    assert capsys.readouterr().err == "error: a sentence\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "no space left on device"),
        (OSError(28, "No space left on device", "a.bin"), "a.bin: no space left on device"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a -> b: invalid cross-device link"),
        (OSError("odd"), "odd"),
        (OSError(), "OSError"),
    ],
)
def test_an_error_of_the_system_is_a_sentence_without_numbers(error, sentence, capsys):
    assert report_errors(raising(error)) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_the_systems_errors_name_the_file(tmp_path, capsys):
    assert report_errors(lambda: len((tmp_path / "missing").read_text())) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: no such file or directory\n"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError])
def test_mistakes_of_the_program_are_not_hidden(error):
    with pytest.raises(error, match="a contradiction"):
        report_errors(raising(error("a contradiction")))


def test_statuses(capsys, monkeypatch):
    assert report_errors(lambda: 0) == 0
    assert report_errors(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("RANK", "3")
    assert report_errors(raising(DataError("a sentence"))) == 2
    assert capsys.readouterr().err == "error (process 3): a sentence\n"


def test_torchrun_finds_the_sentence(tmp_path, monkeypatch):
    errors = pytest.importorskip("torch.distributed.elastic.multiprocessing.errors")
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    report_errors(raising(DataError("a sentence")))
    failure = errors.ProcessFailure(local_rank=0, pid=7, exitcode=2, error_file=str(path))
    summary = errors.ChildFailedError("train.py", {0: failure}).format_msg()
    assert "  traceback : a sentence\n" in summary
    # A file that cannot be written changes nothing.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "error.json"))
    assert report_errors(raising(DataError("a sentence"))) == 2
