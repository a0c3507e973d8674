"""Full-size branches: names and shapes of their parameters and buffers equal the official models'."""

import json

import pytest
import torch

from cmt_aqr.models.lidar import SparseEncoder
from cmt_aqr.models.neck import CPFPN
from cmt_aqr.models.resnet import ResNet
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.vovnet import VoVNet
from tests.parity import test_image_branch, test_lidar_branch
from tests.parity.golden import golden_dir


def official_shapes(model, prefix, rename):
    """{our name: shape} of the entries of `model` whose official names start with `prefix`; skips without the file."""
    path = golden_dir() / "names_full.json"
    if not path.is_file():
        pytest.skip(f"{path} does not exist (set CMT_AQR_GOLDEN)")
    entries = json.loads(path.read_text())[model]["sd"].items()
    return {rename(name): tuple(shape) for name, shape in entries if name.startswith(prefix)}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("model", "cells"),
    [("fusion_voxel0100_r50_800x320", 1024), ("fusion_voxel0075_vov_1600x640", 1440), ("lidar_voxel0075", 1440)],
)
def test_lidar(model, cells):
    expected = official_shapes(model, tuple(test_lidar_branch.PREFIXES), test_lidar_branch.rename)
    with torch.device("meta"):
        encoder = SparseEncoder(in_channels=5, sparse_shape=(41, cells, cells))
        backbone = SECOND(in_channels=encoder.output_shape[0])
        modules = {"encoder": encoder, "backbone": backbone, "neck": SECONDFPN()}
    assert shapes(torch.nn.ModuleDict(modules)) == expected


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("fusion_voxel0100_r50_800x320", ResNet),
        ("fusion_voxel0075_vov_1600x640", VoVNet),
        ("camera_vov_1600x640", VoVNet),
    ],
)
def test_image(model, backbone):
    expected = official_shapes(model, ("img_backbone.", "img_neck."), test_image_branch.rename)
    with torch.device("meta"):
        backbone = backbone()
        modules = {"backbone": backbone, "neck": CPFPN(in_channels=backbone.out_channels)}
    assert shapes(torch.nn.ModuleDict(modules)) == expected
