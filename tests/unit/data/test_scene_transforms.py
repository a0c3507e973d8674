import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Targets, box_corners, points_in_boxes
from cmt_aqr.data.sample import Sample
from cmt_aqr.data.scene_transforms import (
    ModalityDropout,
    SceneAugmentation,
    SceneDraw,
    draw_dropout,
    draw_scene_augmentation,
    filter_points,
    filter_targets,
    scene_matrix,
    shuffle_points,
    transform_scene,
)
from cmt_aqr.geometry import homogeneous, transform_points

DRAWS = [
    SceneDraw(0.6, 1.0, (0.0, 0.0, 0.0), False, False),
    SceneDraw(0.0, 1.1, (1.0, -2.0, 0.5), False, False),
    SceneDraw(0.0, 1.0, (0.0, 0.0, 0.0), True, False),
    SceneDraw(0.0, 1.0, (0.0, 0.0, 0.0), False, True),
    SceneDraw(-0.7, 0.93, (0.3, -0.4, 0.2), True, True),
]


def _sample() -> Sample:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(20, 9, generator=generator) * torch.tensor([80, 80, 4, 5, 2, 2, 6, 10, 10.0])
    boxes = boxes - torch.tensor([40, 40, 3, 0, 0, 0, 3, 5, 5.0]) + torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0.0])
    points = torch.cat((boxes[:, :3], boxes[:, :3] + 0.3, boxes[:, :3] + 30))
    points = torch.cat((points, torch.rand(60, 2, generator=generator)), dim=1)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, 3] = torch.tensor([400.0, 900.0, 1.0])
    return Sample(
        token="a",
        images=None,
        points=points,
        lidar2img=torch.rand(6, 4, 4, dtype=torch.float64, generator=generator),
        targets=Targets(boxes, torch.zeros(20, dtype=torch.int64)),
        lidar2global=pose,
        lidar2ego=torch.eye(4, dtype=torch.float64),
        ego2global=pose,
        augmentation=torch.eye(4, dtype=torch.float64),
    )


@pytest.mark.parametrize("draw", DRAWS)
def test_everything_moves_together(draw):
    before, after = _sample(), transform_scene(_sample(), draw)
    old = homogeneous(before.points[:, :3].double())
    new = homogeneous(after.points[:, :3].double())
    torch.testing.assert_close(new @ scene_matrix(draw).inverse().T, old, atol=1e-5, rtol=0)
    # Project after augmenting = project the original point; the same for the map.
    torch.testing.assert_close(new @ after.lidar2img[2].T, old @ before.lidar2img[2].T, atol=1e-4, rtol=0)
    torch.testing.assert_close(new @ after.lidar2global.T, old @ before.lidar2global.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(new, old @ after.augmentation.T, atol=1e-5, rtol=0)
    assert torch.equal(after.points[:, 3:], before.points[:, 3:])
    assert torch.equal(after.lidar2ego, before.lidar2ego) and torch.equal(after.ego2global, before.ego2global)
    # The same points lie in the same boxes, and a box's corners are the moved corners.
    inside = points_in_boxes(before.points, before.targets.boxes)
    assert inside.sum() >= 20 and torch.equal(points_in_boxes(after.points, after.targets.boxes), inside)
    moved = transform_points(scene_matrix(draw).float(), box_corners(before.targets.boxes).view(-1, 3)).view(20, 8, 3)
    distance = torch.cdist(box_corners(after.targets.boxes), moved)
    assert distance.amin(dim=-1).max() < 1e-4
    # The front centre (corners 1, 2, 5, 6) stays the front: a yaw off by pi would pass the test above.
    front = [1, 2, 5, 6]
    torch.testing.assert_close(
        box_corners(after.targets.boxes)[:, front].mean(1), moved[:, front].mean(1), atol=1e-4, rtol=0
    )
    step = before.targets.boxes[:, :3] + torch.nn.functional.pad(before.targets.boxes[:, 7:9], (0, 1))
    step = transform_points(scene_matrix(draw).float(), step) - after.targets.boxes[:, :3]
    torch.testing.assert_close(after.targets.boxes[:, 7:9], step[:, :2], atol=1e-4, rtol=0)


def test_unknown_velocities_stay_unknown_and_inputs_stay_untouched():
    sample = _sample()
    sample.targets.boxes[3, 7:] = math.nan
    copy = replace(sample, points=sample.points.clone(), lidar2img=sample.lidar2img.clone())
    after = transform_scene(sample, DRAWS[-1])
    assert torch.isnan(after.targets.boxes[:, 7]).nonzero().tolist() == [[3]]
    assert not torch.isnan(after.targets.boxes[:, :7]).any()
    assert torch.equal(sample.points, copy.points) and torch.equal(sample.lidar2img, copy.lidar2img)


def test_draw_statistics():
    rng = np.random.default_rng(0)
    draws = [draw_scene_augmentation(rng, SceneAugmentation()) for _ in range(2000)]
    rotation, scale = np.array([d.rotation for d in draws]), np.array([d.scale for d in draws])
    shift = np.array([d.translation for d in draws])
    assert rotation.min() < -0.78 and rotation.max() > 0.78 and abs(rotation).max() <= 0.785
    assert scale.min() < 0.901 and scale.max() > 1.099 and ((scale >= 0.9) & (scale <= 1.1)).all()
    np.testing.assert_allclose(shift.std(axis=0), 0.5, rtol=0.06)
    for name in ("flip_x", "flip_y"):
        assert abs(np.mean([getattr(d, name) for d in draws]) - 0.5) < 0.04


def test_dropout_proportions_and_exclusion():
    rng = np.random.default_rng(0)
    draws = np.array([draw_dropout(rng, ModalityDropout(0.25, 0.25)) for _ in range(4000)])
    np.testing.assert_allclose(draws.mean(axis=0), 0.25, atol=0.025)
    assert not draws.all(axis=1).any()
    assert not np.array([draw_dropout(rng, ModalityDropout(0.0, 0.0)) for _ in range(100)]).any()
    assert np.array([draw_dropout(rng, ModalityDropout(0.0, 1.0)) for _ in range(100)])[:, 1].all()


def test_range_filters_are_strict():
    point_range = (-10.0, -10.0, -5.0, 10.0, 10.0, 3.0)
    points = torch.tensor([[0, 0, 0], [10, 0, 0], [-10, 0, 0], [0, 9.9, 2.9], [0, 0, 3], [0, -11, 0]])
    points = torch.nn.functional.pad(points, (0, 2))
    assert torch.equal(filter_points(points, point_range), points[[0, 3]])
    boxes = torch.zeros(4, 9)
    boxes[:, 0] = torch.tensor([9.9, 10.0, 0.0, -12.0])
    boxes[:, 2] = 50.0  # height does not matter
    boxes[:, 6] = torch.tensor([4.0, 0.0, -math.pi, 0.0])
    kept = filter_targets(Targets(boxes, torch.arange(4)), point_range)
    assert kept.labels.tolist() == [0, 2]
    torch.testing.assert_close(kept.boxes[:, 6], torch.tensor([4.0 - 2 * math.pi, -math.pi]))
    assert boxes[0, 6] == 4.0


def test_shuffle_is_a_permutation():
    points = torch.arange(500.0).view(100, 5)
    shuffled = shuffle_points(points, np.random.default_rng(0))
    assert not torch.equal(shuffled, points)
    assert torch.equal(shuffled[shuffled[:, 0].argsort()], points)
