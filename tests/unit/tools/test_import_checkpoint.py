"""Every name and shape of the four official models has its place here."""

import json
import re

import pytest
import torch

from cmt_aqr.classes import CLASSES
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.detector import Detector, SharedConv
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.image import CPFPN, ImageBranch, ResNet
from cmt_aqr.models.lidar import LidarBranch, SparseEncoder
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.models.queries import ReferencePoints
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.vovnet import VoVNet
from cmt_aqr.predictions import task_classes
from cmt_aqr.tools.import_checkpoint import RENAMES, rename_official, rename_state_dict
from tests.parity.golden import golden_dir

POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def lidar_branch(cells):
    return LidarBranch(
        voxel_size=(0.1, 0.1, 0.2),
        point_range=POINT_RANGE,
        max_voxels_train=10,
        max_voxels_test=10,
        encoder=SparseEncoder(in_channels=5, sparse_shape=(41, cells, cells)),
        backbone=SECOND(in_channels=256),
        neck=SECONDFPN(),
    )


def image_branch(backbone):
    return ImageBranch(mean=(0, 0, 0), std=(1, 1, 1), backbone=backbone, neck=CPFPN(in_channels=backbone.out_channels))


BRANCHES = {
    "fusion_voxel0100_r50_800x320": lambda: (lidar_branch(1024), image_branch(ResNet()), 1),
    "fusion_voxel0075_vov_1600x640": lambda: (lidar_branch(1440), image_branch(VoVNet()), 1),
    "lidar_voxel0075": lambda: (lidar_branch(1440), None, 3),
    "camera_vov_1600x640": lambda: (None, image_branch(VoVNet()), 1),
}


def build(name):
    with torch.device("meta"):
        lidar, image, kernel = BRANCHES[name]()
        return Detector(
            reference_points=ReferencePoints(num_queries=900),
            bev_embedding=BevEmbedding(dim=256),
            decoder=Decoder(dim=256, num_heads=8, ffn_dim=1024, num_layers=6),
            head=Heads(classes=task_classes([CLASSES]), num_layers=6, dim=256, point_range=POINT_RANGE, kernel=kernel),
            lidar_branch=lidar,
            shared_conv=SharedConv(in_channels=512, dim=256) if lidar else None,
            image_branch=image,
            ray_embedding=RayEmbedding(dim=256, num_depths=64, point_range=POINT_RANGE) if image else None,
        )


@pytest.fixture(scope="module")
def official():
    path = golden_dir() / "names_full.json"
    if not path.is_file():
        pytest.skip(f"golden file {path} does not exist")
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", BRANCHES)
def test_every_official_name_and_shape_has_its_place_and_no_place_stays_empty(official, name):
    if name not in official:
        pytest.skip(f"names_full.json has no model {name}")
    expected = {}
    for key, shape in official[name]["sd"].items():
        ours = rename_official(key)
        assert ours not in expected, f"{key} and another name both become {ours}"
        expected[ours] = tuple(shape)
    actual = {key: tuple(tensor.shape) for key, tensor in build(name).state_dict().items()}
    assert actual == expected


def test_every_row_of_the_table_is_needed(official):
    if set(official) != set(BRANCHES):
        pytest.skip("names_full.json does not hold the four official models")
    names = [name for model in official.values() for name in model["sd"]]
    for pattern, _ in RENAMES:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'pts_bbox_head\.foo' is not a name of an official CMT checkpoint"):
        rename_official("pts_bbox_head.foo")


def test_state_dicts_keep_their_tensors():
    tensor = torch.ones(3)
    renamed = rename_state_dict({"pts_bbox_head.rv_embedding.0.bias": tensor})
    assert renamed == {"ray_embedding.mlp.0.bias": tensor}
