"""A file of weights is told by the names of its tensors."""

import pytest
import torch
from torchvision.models import resnet50

from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.tools.import_checkpoint import main
from cmt_aqr.tools.recognise import recognise
from cmt_aqr.training.checkpoint import load_weights
from tests.unit.tools.official_files import FUSION, MODELS, SMALL, config_file, official_shapes


@pytest.mark.parametrize("model", MODELS)
def test_official_models(model):
    assert recognise(official_shapes(model)) == ("detector", f"the official model of {MODELS[model]}")


def test_others():
    assert recognise(["a.weight"])[0] == "unknown"
    assert recognise(["pts_bbox_head.a"]) == ("detector", "a detector of CMT's family")
    assert recognise(["img_backbone.stage2.OSA2_1.layers.0.OSA2_1_0/conv.weight"])[1].endswith("alone, VoVNet")


def test_own_files_and_backbones_are_named(tmp_path, capsys):
    source, out = tmp_path / "weights.pth", tmp_path / "w.safetensors"
    arguments = [str(source), str(out), "--config", config_file(FUSION)]
    torch.save(build_detector(load_config(config_file(FUSION), SMALL).model).state_dict(), source)
    assert main(arguments) == 2
    assert "weights with the names of this project: nothing to import" in capsys.readouterr().err
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = resnet50(weights=None).state_dict()
    torch.save(state, source)
    assert main(arguments) == 2
    assert "looks like an image backbone alone, ResNet: add --backbone" in capsys.readouterr().err
    assert not out.exists()
    assert main([*arguments, "--backbone"]) == 0
    name = "layer4.2.conv3.weight"
    assert torch.equal(load_weights(out)[f"image_branch.backbone.{name}"], state[name])
