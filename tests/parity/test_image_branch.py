"""ResNet, VoVNet and CP-FPN against the original's tensors (see tests/parity/golden.py)."""

import re

import pytest
import torch

from cmt_aqr.models.neck import CPFPN
from cmt_aqr.models.resnet import ResNet
from cmt_aqr.models.vovnet import VoVNet, VoVNetSpec
from tests.parity.golden import load_golden, relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
FILES = pytest.mark.parametrize("name", ["image_branch", "image_branch_vov"])


def rename(name):
    """Official name -> ours. ResNet names are equal; VoVNet repeats its position in every part of a name."""
    name = re.sub(r"^img_backbone\.", "backbone.", name)
    name = re.sub(r"^img_neck\.(\w+)\.(\d)\.conv\.", r"neck.\1.\2.", name)
    name = re.sub(r"stem\.stem_(\d)/", lambda m: f"stem.{int(m[1]) - 1}.", name)
    name = re.sub(r"\.OSA\d_(\d+)\.", lambda m: f".{int(m[1]) - 1}.", name)
    return re.sub(r"\.OSA\d_\d+_\w+/", ".", name)


def build_branch(golden, *, dtype, use_checkpoint=False):
    backbone_cfg, neck_cfg, spec = (golden.meta[key] for key in ("backbone", "neck", "vov_spec"))
    if spec is None:
        backbone = ResNet(
            depth=backbone_cfg["depth"],
            base_channels=backbone_cfg["base_channels"],
            out_stages=[index + 1 for index in backbone_cfg["out_indices"]],
            use_checkpoint=use_checkpoint,
        )
    else:
        backbone = VoVNet(
            spec=VoVNetSpec(
                stem=tuple(spec["stem"]),
                conv_channels=tuple(spec["stage_conv_ch"]),
                out_channels=tuple(spec["stage_out_ch"]),
                blocks=tuple(spec["block_per_stage"]),
                layers=spec["layer_per_block"],
            ),
            out_stages=[int(name.removeprefix("stage")) for name in backbone_cfg["out_features"]],
            use_checkpoint=use_checkpoint,
        )
    neck = CPFPN(in_channels=neck_cfg["in_channels"], channels=neck_cfg["out_channels"])
    branch = torch.nn.ModuleDict({"backbone": backbone, "neck": neck})
    state = {rename(name): tensor for name, tensor in golden.state_dict().items()}
    branch.load_state_dict(state, strict=True)
    return branch.to(dtype).eval()


@DTYPES
@FILES
def test_branch(name, dtype):
    check_branch(load_golden(name), dtype)


def check_branch(golden, dtype, *, device="cpu"):
    branch = build_branch(golden, dtype=dtype).to(device)
    images = golden.tensor("in/img", dtype).to(device)
    with torch.no_grad():
        maps = branch["backbone"](images.flatten(0, 1))
        levels = branch["neck"](maps)
    assert branch["backbone"].out_channels == tuple(golden.meta["neck"]["in_channels"])
    assert len(maps) == len(levels) == golden.meta["neck"]["num_outs"]
    for i, (x, level) in enumerate(zip(maps, levels, strict=True)):
        golden.check(f"backbone, map {i}", x, f"out64/backbone{i}", TOLERANCE[dtype])
        golden.check(f"neck, map {i}", level, f"out64/neck{i}", TOLERANCE[dtype])


@FILES
def test_checkpointing_changes_no_value_and_no_gradient(name):
    golden = load_golden(name)
    images = golden.tensor("in/img", torch.float64)[:, 0]
    results = []
    for use_checkpoint in (False, True):
        branch = build_branch(golden, dtype=torch.float64, use_checkpoint=use_checkpoint)
        out = branch["neck"](branch["backbone"](images))[0]
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in branch.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert relative_error(recomputed, plain) <= 1e-12


@FILES
def test_channels_last_gives_the_same(name):
    check_channels_last(load_golden(name))


def check_channels_last(golden, *, device="cpu"):
    branch = build_branch(golden, dtype=torch.float32).to(device, memory_format=torch.channels_last)
    images = golden.tensor("in/img").flatten(0, 1).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        out = branch["neck"](branch["backbone"](images))[0]
    golden.check("neck, map 0, channels last", out, "out64/neck0", TOLERANCE[torch.float32])
