from typing import get_args

import pytest
import torch
import torchvision

from cmt_aqr.backbones import BackboneName, make_backbone
from cmt_aqr.models.image import ImageBranch, normalize_images, pad_images
from cmt_aqr.models.neck import CPFPN
from cmt_aqr.models.resnet import ResNet
from cmt_aqr.models.vovnet import V99_ESE, VoVNet, VoVNetSpec

MEAN, STD = (103.530, 116.280, 123.675), (57.375, 57.120, 58.395)
MINI = VoVNetSpec(stem=(4, 4, 6), conv_channels=(4, 4, 6, 6), out_channels=(6, 8, 8, 12), blocks=(1, 1, 2, 1), layers=2)


def images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_normalize_images_in_both_orders(dtype):
    pixels = images(2, 3, 4, 6, 3)
    rgb = pixels.movedim(-1, -3).double()
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    for order, network in (("rgb", rgb), ("bgr", rgb.flip(-3))):
        out = normalize_images(pixels, mean=MEAN, std=STD, channel_order=order, dtype=dtype)
        assert out.dtype == dtype and out.shape == (2, 3, 3, 4, 6)
        torch.testing.assert_close(out.double(), (network - mean) / std, rtol=0, atol=1e-6)
    flat = normalize_images(pixels.flatten(0, 1), mean=MEAN, std=STD)
    assert flat.is_contiguous(memory_format=torch.channels_last)


def test_padding_is_zero_after_normalising_and_below_and_right():
    x = torch.randn(2, 3, 30, 33)
    padded = pad_images(x, divisor=32)
    assert padded.shape == (2, 3, 32, 64)
    assert torch.equal(padded[..., :30, :33], x)
    assert not padded[..., 30:, :].any() and not padded[..., 33:].any()
    assert pad_images(x[..., :32], divisor=2).shape == x[..., :32].shape


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_resnet_equals_torchvision(depth):
    official = torchvision.models.get_model(f"resnet{depth}").eval()
    state = {name: tensor for name, tensor in official.state_dict().items() if not name.startswith("fc.")}
    ours = ResNet(depth=depth).eval()
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        third, fourth = ours(x)
        x = official.maxpool(official.relu(official.bn1(official.conv1(x))))
        expected = official.layer3(official.layer2(official.layer1(x)))
        torch.testing.assert_close(third, expected)
        torch.testing.assert_close(fourth, official.layer4(expected))
    assert ours.out_channels == (third.shape[1], fourth.shape[1])


def test_stages_that_are_not_returned_are_not_built():
    assert not hasattr(ResNet(depth=18, base_channels=4, out_stages=(2, 3)), "layer4")
    assert not hasattr(VoVNet(spec=MINI, out_stages=(3, 4)), "stage5")


@pytest.mark.parametrize(
    "backbone", [lambda: ResNet(depth=18, base_channels=4), lambda: VoVNet(spec=MINI)], ids=["resnet", "vovnet"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_branch_in_training(backbone, dtype):
    torch.manual_seed(0)
    backbone = backbone()
    neck = CPFPN(in_channels=backbone.out_channels, channels=8)
    branch = ImageBranch(mean=MEAN, std=STD, backbone=backbone, neck=neck).to(dtype)
    pixels = images(3, 60, 90, 3)
    mask = torch.rand(60, 90) > 0.5
    out = branch(pixels, mask=mask)
    assert out.shape == (3, 8, 4, 6) and out.dtype == dtype
    normalized = normalize_images(pixels, mean=MEAN, std=STD, dtype=dtype)
    expected = neck(backbone(torch.nn.functional.pad(normalized * mask, (0, 6, 0, 4)).contiguous()))[0]
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    unused = {name for name, parameter in branch.named_parameters() if parameter.grad is None}
    assert unused == set()


def test_vovnet_pools_odd_sizes_up():
    maps = VoVNet(spec=MINI, out_stages=(2, 3, 4, 5)).eval()(torch.randn(1, 3, 72, 100))
    assert [tuple(x.shape[-2:]) for x in maps] == [(18, 25), (9, 12), (4, 6), (2, 3)]


def test_v99_has_the_published_size():
    with torch.device("meta"):
        model = VoVNet(spec=V99_ESE)
    assert model.out_channels == (768, 1024)


def test_errors():
    with pytest.raises(ValueError, match="channel_order is 'gbr'"):
        normalize_images(images(1, 4, 4, 3), mean=MEAN, std=STD, channel_order="gbr")
    with pytest.raises(ValueError, match=r"expected \(\.\.\., H, W, 3\)"):
        normalize_images(images(1, 3, 4, 4), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="depth is 101"):
        ResNet(depth=101)
    for out_stages in ((), (5,), (4, 3), (3, 3)):
        with pytest.raises(ValueError, match="out_stages"):
            ResNet(depth=18, out_stages=out_stages)
    with pytest.raises(ValueError, match="out_stages"):
        VoVNet(spec=MINI, out_stages=(1,))


@pytest.mark.parametrize("name", get_args(BackboneName))
def test_every_backbone_gives_maps_of_strides_16_and_32(name):
    with torch.device("meta"):
        backbone = make_backbone(name, base_channels=16, use_checkpoint=False)
        maps = backbone(torch.zeros(2, 3, 64, 96))
    sizes = [
        (2, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.out_channels, (16, 32), strict=True)
    ]
    assert [tuple(x.shape) for x in maps] == sizes
