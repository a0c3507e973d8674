"""Files with the official names: the lists of the four official models, and small stand-ins for their files."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from cmt_aqr.config import load_config
from cmt_aqr.tools.import_checkpoint import empty_state
from cmt_aqr.tools.official_names import rename_official
from tests.parity.golden import REPOSITORY, golden_dir

# Official model -> our configuration of it.
MODELS = {
    "fusion_voxel0100_r50_800x320": "cmt_r50_800x320",
    "fusion_voxel0075_vov_1600x640": "cmt_vov_1600x640",
    "lidar_voxel0075": "cmt_lidar_0075",
    "camera_vov_1600x640": "cmt_camera_vov_1600x640",
}
FUSION = "fusion_voxel0100_r50_800x320"
# The fusion model with the same names and small tensors.
SMALL = (
    "model.hidden_dim=16",
    "model.num_heads=4",
    "model.ffn_dim=24",
    "model.num_queries=10",
    "model.denoising.num_dn=10",
    "model.depth_bins=4",
    "model.head_channels=8",
    "model.lidar.base_channels=4",
    "model.lidar.encoder_channels=[[4,4,6],[6,6,8],[8,8,8],[8,8]]",
    "model.lidar.encoder_out_channels=8",
    "model.lidar.second_channels=[8,12]",
    "model.lidar.neck_channels=[8,8]",
    "model.camera.base_channels=4",
)


def config_file(model: str) -> str:
    return str(REPOSITORY / "configs" / f"{MODELS[model]}.yaml")


def official_lists() -> dict[str, dict[str, tuple[int, ...]]]:
    """{model: {official name: shape}}; skips without the file."""
    path = golden_dir() / "names_full.json"
    if not path.is_file():
        pytest.skip(f"{path} does not exist (set CMT_AQR_GOLDEN)")
    return {model: {n: tuple(s) for n, s in v["sd"].items()} for model, v in json.loads(path.read_text()).items()}


def official_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """{official name: shape} of one model; skips without it."""
    lists = official_lists()
    if model not in lists:
        pytest.skip(f"names_full.json has no model {model}")
    return lists[model]


def own_state(model: str, overrides=()) -> dict[str, torch.Tensor]:
    return empty_state(load_config(config_file(model), overrides).model)


def is_sparse(name: str, tensor) -> bool:
    return name.startswith("pts_middle_encoder.") and tensor.dim() == 5


def to_spconv1(weight):
    """(out, z, y, x, in) -> (z, y, x, in, out)."""
    return weight.permute(1, 2, 3, 4, 0)


def small_official(*, layout="spconv2") -> "OrderedDict[str, torch.Tensor]":
    """Random tensors under the fusion model's official names, with the metadata that its program would save."""
    shapes = own_state(FUSION, SMALL)
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict()
    metadata = OrderedDict({"": {"version": 1}})
    for name in official_shapes(FUSION):
        like = shapes[rename_official(name)]
        tensor = torch.rand(like.shape, generator=generator).to(like.dtype)
        state[name] = to_spconv1(tensor) if layout == "spconv1" and is_sparse(name, tensor) else tensor
        module = name.rpartition(".")[0]
        version = {"spconv2": 2, "spconv1": 1}[layout] if is_sparse(name, tensor) else 1
        metadata.setdefault(module, {"version": version})
    state._metadata = metadata
    return state


def save_official(path: Path, state) -> Path:
    """As mmcv saves: the state dict beside a few plain facts."""
    torch.save({"meta": {"epoch": 20, "CLASSES": ("car", "truck"), "config": "text"}, "state_dict": state}, path)
    return path
