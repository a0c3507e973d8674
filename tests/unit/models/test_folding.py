"""Folded batch norms give the numbers of the model, and none is forgotten."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.models.folding import fold_batch_norm
from cmt_aqr.models.resnet import ResNet
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.vovnet import VoVNet, VoVNetSpec
from tests.parity.golden import relative_error
from tests.unit.models.test_lidar import random_voxels, small_encoder
from tests.unit.models.tiny_detector import ring_of_cameras

TINY_VOVNET = VoVNetSpec(
    stem=(4, 4, 8), conv_channels=(4, 5, 6, 7), out_channels=(8, 9, 10, 11), blocks=(1, 2, 1, 1), layers=2
)


def with_statistics(model):
    """Norms as training leaves them: nothing is 0 or 1."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def second_with_neck():
    backbone = SECOND(in_channels=6, channels=(4, 6), layers=(1, 1), strides=(1, 2))
    return nn.Sequential(backbone, SECONDFPN(in_channels=(4, 6), channels=(3, 4), upsample_strides=(1, 2)))


MODELS = {
    "resnet50": (lambda: ResNet(depth=50, base_channels=4), lambda: torch.randn(2, 3, 64, 96)),
    "resnet18": (lambda: ResNet(depth=18, base_channels=4), lambda: torch.randn(2, 3, 64, 96)),
    "vovnet": (lambda: VoVNet(spec=TINY_VOVNET), lambda: torch.randn(2, 3, 64, 96)),
    "second": (second_with_neck, lambda: torch.randn(2, 6, 16, 24)),
    "sparse": (
        lambda: small_encoder(torch.float32, backend="torch"),
        lambda: random_voxels((21, 16, 24), frames=(0, 1), dtype=torch.float32),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folded_model_gives_the_same_maps(name):
    make, draw = MODELS[name]
    model = with_statistics(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    inputs = draw()
    with torch.no_grad():
        expected, found = model(inputs), folded(inputs)
    for actual, wanted in zip(*(x if isinstance(x, list) else [x] for x in (found, expected)), strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) <= 2e-6
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_convolution_with_a_bias_of_its_own_and_a_norm_without_a_convolution():
    torch.manual_seed(0)
    layers = (nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5))
    model = with_statistics(nn.Sequential(*layers).double())
    folded = fold_batch_norm(model)
    assert [type(layer) for layer in folded] == [nn.BatchNorm2d, nn.Conv2d, nn.Identity, nn.ReLU, nn.BatchNorm2d]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)


def test_boxes_of_a_folded_detector():
    changes = ["model.lidar.sparse_backend=torch", "model.lidar.sparse_shape=[21,64,64]", "model.num_queries=60"]
    torch.manual_seed(0)
    detector = with_statistics(build_detector(load_config("configs/synthetic_tiny.yaml", changes).model))
    folded = fold_batch_norm(detector)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 6, 96, 256, 3), generator=generator, dtype=torch.uint8)
    points = torch.randn(4000, 5, generator=generator) * torch.tensor([6.0, 6.0, 1.0, 1.0, 1.0])
    points[:, :2] -= 40
    inputs = (images, [points], ring_of_cameras(1))
    with torch.no_grad():
        expected, found = (
            postprocess(model(*inputs), post_range=(-99,) * 3 + (99,) * 3, max_detections=40)[0]
            for model in (detector, folded)
        )
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.boxes[:, :3], expected.boxes[:, :3], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
