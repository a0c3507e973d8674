import pytest

from cmt_aqr.data.sample import DataError
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.pictures import PictureError
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.losses.matcher import NonFiniteError
from cmt_aqr.strict_yaml import ConfigError
from cmt_aqr.training.checkpoint import CheckpointError
from cmt_aqr.training.logs import LogError


class Stopped(RuntimeError):
    pass


def _raise(error, cause=None):
    def run():
        raise error from cause

    return run


@pytest.mark.parametrize(
    "error",
    [
        *(kind("a sentence") for kind in (CheckpointError, DataError, EvaluationError, LogError, PictureError)),
        NonFiniteError("a sentence"),
        ConfigError(["a sentence"]),
        Stopped("a sentence"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_one_sentence(error, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert report_errors(_raise(error), Stopped) == 2
    assert capsys.readouterr().err == "error: a sentence\n"


def test_the_system_s_errors_name_the_file(tmp_path, capsys):
    assert report_errors(lambda: len((tmp_path / "missing").read_text())) == 2
    assert capsys.readouterr().err == f"error: [Errno 2] No such file or directory: '{tmp_path / 'missing'}'\n"


@pytest.mark.parametrize("cause", [None, OSError(28, "No space left on device")])
def test_mistakes_of_the_program_are_not_hidden(cause):
    with pytest.raises(ValueError, match="a contradiction"):
        report_errors(_raise(ValueError("a contradiction"), cause))
    with pytest.raises(Stopped):
        report_errors(_raise(Stopped()))


def test_statuses(capsys, monkeypatch):
    assert report_errors(lambda: 0) == 0
    assert report_errors(_raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("RANK", "3")
    assert report_errors(_raise(DataError("a sentence"))) == 2
    assert capsys.readouterr().err == "error (process 3): a sentence\n"
