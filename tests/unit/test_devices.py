"""``--device`` on a machine without a GPU."""

import pytest
import torch

from cmt_aqr.devices import choose_device
from cmt_aqr.golden.__main__ import main as golden
from cmt_aqr.tools.bench import main as bench
from cmt_aqr.tools.export import main as export
from cmt_aqr.tools.precision_report import main as precision_report

CONFIG = "configs/synthetic_tiny.yaml"
COMMANDS = {
    "golden": (golden, ["export", CONFIG, "{folder}/bundle"]),
    "export": (export, [CONFIG, "--to", "pt2", "--checkpoint", "{folder}/latest.pt"]),
    "bench": (bench, ["end2end", CONFIG]),
    "precision_report": (precision_report, [CONFIG]),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_cpu_is_taken():
    assert choose_device(None) == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("command", COMMANDS)
def test_cuda_without_a_gpu_is_one_sentence_and_status_2(command, tmp_path, capsys):
    main, arguments = COMMANDS[command]
    assert main([argument.format(folder=tmp_path) for argument in arguments] + ["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: this PyTorch sees no CUDA GPU; use --device cpu\n"
