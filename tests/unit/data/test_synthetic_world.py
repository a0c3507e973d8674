"""The whole way on a generated dataset: tables, sweeps, boxes, database, training batches."""

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import points_in_boxes
from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.gt_database import open_gt_database
from cmt_aqr.data.gt_sampling import GtSampler
from cmt_aqr.data.image_transforms import ImageAugmentation
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.loader import make_loader
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import load_points
from cmt_aqr.data.sampling import TrainingSampler
from cmt_aqr.data.scene_transforms import ModalityDropout, SceneAugmentation
from cmt_aqr.geometry import homogeneous
from cmt_aqr.synthetic import WorldSettings, generate_world

POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> FrameIndex:
    folder = tmp_path_factory.mktemp("synthetic")
    generate_world(
        folder / "world",
        WorldSettings(scenes=2, val_scenes=1, seed=3, samples_per_scene=3, image_size=(400, 225), lidar_columns=540),
        progress=False,
    )
    options = {"dataroot": folder / "world", "version": "v1.0-synthetic", "cache_dir": folder / "cache"}
    assert len(load_index(split="synthetic_val", **options)) == 3
    return load_index(split="synthetic_train", **options)


def test_point_counts(synthetic):
    for k in range(len(synthetic)):
        frame = synthetic.frame(k)
        points = load_points(frame, synthetic.dataroot, num_sweeps=0, close_radius=0)
        counts = points_in_boxes(points, frame.targets("all").boxes).sum(dim=0)
        stored = torch.tensor(frame.num_lidar_points)
        assert stored.sum() > 500 and (counts - stored).abs().sum() <= 0.03 * stored.sum()


def test_standing_objects_keep_their_points_over_the_sweeps(synthetic):
    """Sweep points of standing objects fall into their boxes; without ego motion compensation they would not.

    Objects close to the vehicle are left out: how many points they get changes within the half second. In the first
    scene's fog chance would decide: there are only some fifty points a sweep.
    """
    frame = synthetic.frame(4)
    assert len(frame.sweeps) == 10
    targets = frame.targets("lidar_or_radar")
    distance = targets.boxes[:, :2].norm(dim=1)
    standing = (targets.boxes[:, 7:9].norm(dim=1) < 0.05) & (distance > 12) & (distance < 40)
    assert standing.sum() >= 3
    points = load_points(frame, synthetic.dataroot, num_sweeps=9, close_radius=1.0)
    inside = points_in_boxes(points, targets.boxes[standing]).any(dim=1)
    lag = points[inside, 4]
    per_sweep = torch.stack([(lag == value).sum() for value in lag.unique()]).float()
    assert len(per_sweep) == 10 and per_sweep[0] > 500
    assert ((per_sweep - per_sweep[0]).abs() < 0.3 * per_sweep[0]).all()


def test_velocities_are_the_motion_of_the_instances(synthetic):
    first, second, third = (synthetic.frame(k) for k in range(3))
    assert first.scene == second.scene == third.scene
    lidar2global = [
        torch.tensor(f.ego2global, dtype=torch.float64) @ torch.tensor(f.lidar2ego, dtype=torch.float64)
        for f in (first, second, third)
    ]
    boxes = [f.targets("all").boxes.double() for f in (first, second, third)]
    centres = [homogeneous(b[:, :3]) @ m.T for b, m in zip(boxes, lidar2global, strict=True)]
    moving = (boxes[1][:, 7:9].norm(dim=1) > 1).nonzero()[:, 0]
    assert len(moving) >= 3
    close = 0
    for i in moving.tolist():
        velocity = lidar2global[1][:3, :3] @ torch.nn.functional.pad(boxes[1][i, 7:9], (0, 1))
        for other, sign in ((0, -1), (2, 1)):
            expected = centres[1][i, :2] + sign * 0.5 * velocity[:2]
            close += bool(((centres[other][:, :2] - expected).norm(dim=1) < 0.3).any())
    assert close > 0.8 * 2 * len(moving)


def test_training_batches_of_everything(synthetic):
    cache = synthetic.path.parent
    database = open_gt_database(synthetic, cache_dir=cache, num_sweeps=9, with_patches=True)
    assert len(np.unique(database.labels)) >= 6
    augmentation = TrainingAugmentation(
        seed=0,
        point_range=POINT_RANGE,
        image=ImageAugmentation((1.88, 2.5)),
        scene=SceneAugmentation(),
        dropout=ModalityDropout(),
        gt_sampler=GtSampler(database),
        gt_sampling_epochs=1,
    )
    dataset = FrameDataset(
        synthetic, final_size=(320, 800), num_sweeps=9, boxes="lidar_or_radar", augmentation=augmentation
    )
    sampler = TrainingSampler(frame_labels=synthetic.frame_labels("lidar_or_radar"), class_balanced=True, seed=0)
    loader = make_loader(dataset, sampler=sampler, batch_size=4, num_workers=0)
    low, high = torch.tensor(POINT_RANGE[:3]), torch.tensor(POINT_RANGE[3:])
    labels, visible = [], 0
    for batch in loader:
        assert batch.images.shape[1:] == (6, 320, 800, 3)
        for points, targets, lidar2img in zip(batch.points, batch.targets, batch.lidar2img, strict=True):
            assert torch.isfinite(points).all() and ((points[:, :3] > low) & (points[:, :3] < high)).all()
            assert (targets.boxes[:, 3:6] > 0).all() and (targets.boxes[:, :2].abs() < 54).all()
            labels += targets.labels.tolist()
            pixels = homogeneous(targets.boxes[:, :3].double()) @ lidar2img.transpose(-1, -2)
            uv = pixels[..., :2] / pixels[..., 2:3]
            seen = (pixels[..., 2] > 0) & (uv > 0).all(-1) & (uv < torch.tensor([800, 320])).all(-1)
            visible += int(seen.any(dim=0).sum())
    assert len(set(labels)) >= 8 and visible > 0.5 * len(labels)
