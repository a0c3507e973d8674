"""Scene augmentation against the original's `GlobalRotScaleTransAll` + `CustomRandomFlip3D`."""

import math

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.data.sample import Sample
from cmt_aqr.data.scene_transforms import SceneAugmentation, SceneDraw, draw_scene_augmentation, transform_scene
from tests.parity.golden import Golden, load_golden

# The original keeps points and boxes in float32 and turns and scales its matrices in float32 too.
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("augment3d")


def _seeds(golden: Golden) -> list[str]:
    return sorted({name.split("/")[0] for name in golden.names if name.startswith("seed")})


def _draw(golden: Golden, seed: str) -> SceneDraw:
    rotation = golden[f"{seed}/pcd_rotation"].astype(np.float64)  # transposed: acts on rows
    flip_y, flip_x = golden[f"{seed}/flip_hv"].tolist()
    return SceneDraw(
        rotation=math.atan2(rotation[0, 1], rotation[0, 0]),
        scale=float(golden[f"{seed}/pcd_scale"]),
        translation=tuple(golden[f"{seed}/pcd_trans"].tolist()),
        flip_y=flip_y,
        flip_x=flip_x,
    )


def _gravity(bottom: torch.Tensor) -> torch.Tensor:
    boxes = bottom.clone()
    boxes[:, 2] += boxes[:, 5] / 2
    return boxes


def _sample(golden: Golden, seed: str) -> Sample:
    boxes = _gravity(golden.tensor(f"{seed}/boxes_in_bottom"))
    eye = torch.eye(4, dtype=torch.float64)
    return Sample(
        token=seed,
        images=None,
        points=golden.tensor(f"{seed}/points_in"),
        lidar2img=golden.tensor(f"{seed}/lidar2img_in"),
        targets=Targets(boxes, torch.zeros(len(boxes), dtype=torch.int64)),
        lidar2global=eye,
        lidar2ego=eye,
        ego2global=eye,
        augmentation=eye,
    )


def test_points_boxes_and_matrices(golden):
    assert _seeds(golden)
    for seed in _seeds(golden):
        after = transform_scene(_sample(golden, seed), _draw(golden, seed))
        golden.check("points", after.points, f"{seed}/points_out", FLOAT32)
        expected = _gravity(golden.tensor(f"{seed}/boxes_out_bottom"))
        known = ~torch.isnan(expected[:, 7:]).any(dim=1)
        assert torch.equal(known, ~torch.isnan(after.targets.boxes[:, 7:]).any(dim=1))
        for name, columns in (("centres", slice(0, 3)), ("sizes", slice(3, 6)), ("velocities", slice(7, 9))):
            ours, theirs = after.targets.boxes[:, columns], expected[:, columns]
            rows = known if name == "velocities" else slice(None)
            golden.check(f"boxes, {name}", ours[rows], theirs[rows], FLOAT32)
        turn = (after.targets.boxes[:, 6] - expected[:, 6]).double()
        turn = torch.remainder(turn + math.pi, 2 * math.pi).sub(math.pi).abs().max().item()
        golden.record("boxes, yaw (radians)", torch.float32, turn, FLOAT32)
        golden.check("lidar2img (float32 steps there)", after.lidar2img, f"{seed}/lidar2img_out", FLOAT32)


def test_draws_come_in_the_original_order(golden):
    for seed in _seeds(golden):
        drawn = draw_scene_augmentation(np.random.RandomState(int(seed[4:])), SceneAugmentation())
        stored = _draw(golden, seed)
        assert drawn.rotation == pytest.approx(stored.rotation, abs=1e-7)
        assert (drawn.scale, drawn.flip_x, drawn.flip_y) == (stored.scale, stored.flip_x, stored.flip_y)
        assert drawn.translation == stored.translation
