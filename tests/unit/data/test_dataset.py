import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.gt_database import open_gt_database
from cmt_aqr.data.gt_sampling import GtSampler
from cmt_aqr.data.image_transforms import ImageAugmentation
from cmt_aqr.data.readers import read_image, read_points
from cmt_aqr.data.sample import DataError, collate
from cmt_aqr.data.sampling import SampleKey
from cmt_aqr.data.scene_transforms import ModalityDropout, SceneAugmentation
from tests.unit.data.conftest import index_of
from tests.unit.data.world import IMAGE_SIZE, car_position, to_lidar, view_colour, write_world

FINAL_SIZE = (16, 48)
POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def _augmentation(**options) -> TrainingAugmentation:
    defaults = {"seed": 3, "point_range": POINT_RANGE}
    return TrainingAugmentation(**defaults | options)


def _dataset(index, **options) -> FrameDataset:
    return FrameDataset(index, **{"final_size": FINAL_SIZE, "num_sweeps": 2} | options)


def test_evaluation_sample(index):
    sample = _dataset(index)[1]
    assert sample.token == "scene-a-sample-1"
    assert sample.images.shape == (6, *FINAL_SIZE, 3) and sample.images.dtype == torch.uint8
    for image, camera in zip(sample.images, CAMERAS, strict=True):
        assert (image.float().mean((0, 1)) - torch.tensor(view_colour(camera))).abs().max() < 4
    assert sample.points.dtype == torch.float32 and sample.points.shape[1] == 5
    assert sample.targets.labels.tolist() == [0, CLASSES.index("pedestrian")]
    torch.testing.assert_close(sample.lidar2global, sample.ego2global @ sample.lidar2ego)
    centre = torch.cat((sample.targets.boxes[0, :3].double(), torch.ones(1)))
    np.testing.assert_allclose((sample.lidar2global @ centre)[:3], car_position(0.5), atol=1e-4)
    # Frustum: what the front camera projects into the middle of the image lies straight ahead of the vehicle.
    scale = FINAL_SIZE[1] / IMAGE_SIZE[1]
    ahead = torch.tensor([1.0 + 20, 0, 1.5, 1], dtype=torch.float64)
    u, v, depth, _ = sample.lidar2img[0] @ torch.linalg.inv(sample.lidar2ego) @ ahead
    bottom = int(IMAGE_SIZE[0] * scale) - FINAL_SIZE[0]
    assert (u / depth).item() == pytest.approx(32 * scale, abs=2) and depth.item() == pytest.approx(20, abs=0.5)
    assert (v / depth).item() == pytest.approx(18 * scale - bottom, abs=2)


def test_only_what_is_used_is_read(world, index):
    camera, lidar = world.root / index.frame(0).cameras[0].file, world.root / index.frame(0).lidar_file
    os.rename(camera, camera.with_suffix(".away"))
    sample = _dataset(index, final_size=None)[0]
    assert sample.images is None and len(sample.points) > 300 and sample.lidar2img.shape == (6, 4, 4)
    os.rename(camera.with_suffix(".away"), camera)
    os.remove(lidar)
    sample = _dataset(index, num_sweeps=None, augmentation=_augmentation(scene=SceneAugmentation()))[0]
    assert sample.points is None and sample.images is not None
    assert collate([sample, sample]).points is None
    with pytest.raises(ValueError, match="expected at least one sensor"):
        _dataset(index, final_size=None, num_sweeps=None)
    for num_sweeps in (-1, 11):
        with pytest.raises(ValueError, match=rf"num_sweeps is {num_sweeps}, expected 0 to 10"):
            _dataset(index, num_sweeps=num_sweeps)
    with pytest.raises(ValueError, match="dropout needs both sensors"):
        _dataset(index, num_sweeps=None, augmentation=_augmentation(dropout=ModalityDropout()))


def test_training_draws_depend_on_the_key_alone(index):
    augmentation = _augmentation(scene=SceneAugmentation(), image=ImageAugmentation((0.7, 0.9)))
    dataset = _dataset(index, augmentation=augmentation, boxes="lidar_or_radar")
    first = dataset[SampleKey(2, 1, 7)]
    dataset[SampleKey(0, 1, 8)]
    again = _dataset(index, augmentation=augmentation, boxes="lidar_or_radar")[SampleKey(2, 1, 7)]
    for name in ("images", "points", "lidar2img", "augmentation"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    others = [SampleKey(2, 2, 7), SampleKey(2, 1, 8)]
    assert all(not torch.equal(dataset[key].augmentation, first.augmentation) for key in others)
    assert first.targets.labels.tolist() == [0]
    # Switching off one step leaves the draws of the others alone.
    bare = _dataset(index, augmentation=replace(augmentation, scene=None), boxes="lidar_or_radar")[SampleKey(2, 1, 7)]
    torch.testing.assert_close(bare.lidar2img, first.lidar2img @ first.augmentation)


def test_augmented_sample_still_projects_to_the_same_pixel(index):
    plain = _dataset(index, augmentation=_augmentation(image=ImageAugmentation((0.7, 0.9))))[SampleKey(1, 0, 0)]
    moved = _dataset(index, augmentation=_augmentation(image=ImageAugmentation((0.7, 0.9)), scene=SceneAugmentation()))[
        SampleKey(1, 0, 0)
    ]
    old, new = (torch.nn.functional.pad(s.targets.boxes[:, :3].double(), (0, 1), value=1) for s in (plain, moved))
    torch.testing.assert_close(new @ moved.lidar2img[0].T, old @ plain.lidar2img[0].T, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(new @ moved.lidar2global.T, old @ plain.lidar2global.T, atol=1e-4, rtol=0)


def test_sensor_dropout(index):
    image = _dataset(index, augmentation=_augmentation(dropout=ModalityDropout(1.0, 0.0)))[0]
    assert not image.images.any() and image.points[:, :3].abs().max() > 1
    points = _dataset(index, augmentation=_augmentation(dropout=ModalityDropout(0.0, 1.0)))[0]
    assert points.images.any() and len(points.points) > 300 and not points.points.any()


def test_missing_camera_is_black_with_a_calibration(world, tmp_path):
    plain = _dataset(index_of(world, tmp_path / "cache"))[1]
    world.edit(
        "sample_data", lambda rows: rows.remove(next(r for r in rows if r["token"] == "scene-a-sample-1-CAM_BACK"))
    )
    index = index_of(world, tmp_path / "cache")
    sample = _dataset(index)[1]
    back = CAMERAS.index("CAM_BACK")
    assert not sample.images[back].any() and sample.images[back - 1].any()
    torch.testing.assert_close(sample.lidar2img[:back], plain.lidar2img[:back])
    # The stand-in leaves out 10 ms of ego motion, nothing else.
    behind = torch.linalg.inv(plain.lidar2ego) @ torch.tensor([-19.0, 0, 1.5, 1], dtype=torch.float64)
    (u, v, depth, _), (u_stand_in, v_stand_in, depth_stand_in, _) = (
        s.lidar2img[back] @ behind for s in (plain, sample)
    )
    assert 0 < abs(depth - depth_stand_in) < 0.1
    assert abs(u / depth - u_stand_in / depth_stand_in) < 0.5 and abs(v / depth - v_stand_in / depth_stand_in) < 0.5
    assert collate([sample, plain]).images.shape == (2, 6, *FINAL_SIZE, 3)


def test_camera_missing_everywhere_uses_any_calibration_or_says_so(world, tmp_path):
    def drop(rows):
        rows[:] = [row for row in rows if not row["filename"].startswith("samples/CAM_BACK/")]

    world.edit("sample_data", drop)
    sample = _dataset(index_of(world, tmp_path / "cache"))[0]
    assert not sample.images[CAMERAS.index("CAM_BACK")].any()
    assert torch.linalg.matrix_rank(sample.lidar2img[CAMERAS.index("CAM_BACK")]) == 4
    world.edit("calibrated_sensor", lambda rows: rows.pop(CAMERAS.index("CAM_BACK")))
    with pytest.raises(DataError, match="no CAM_BACK image and no calibration of CAM_BACK"):
        index_of(world, tmp_path / "cache")


def test_empty_cloud_and_frame_without_boxes_train(world, tmp_path):
    world.edit("sample_annotation", lambda rows: rows.clear())
    world.edit("instance", lambda rows: rows.clear())
    index = index_of(world, tmp_path / "cache")
    # One point, too far away to be in range: an empty file would be refused.
    np.array([[900, 0, 0, 1, 0]], np.float32).tofile(world.root / index.frame(0).lidar_file)
    augmented = _augmentation(scene=SceneAugmentation(), image=ImageAugmentation((0.7, 0.9)))
    for augmentation, num_points in ((None, 1), (augmented, 0)):
        sample = _dataset(index, augmentation=augmentation)[0]
        assert sample.points.shape == (num_points, 5) and sample.points.dtype == torch.float32
        assert sample.targets.boxes.shape == (0, 9) and sample.targets.labels.shape == (0,)
        batch = collate([sample, _dataset(index, augmentation=augmentation)[1]])
        assert len(batch) == 2 and len(batch.points[1]) > 0


def _damage_points(path, change):
    points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
    change(points)
    points.tofile(path)


def test_bad_lidar_files(world, index):
    frame = index.frame(0)
    path = world.root / frame.lidar_file
    dataset = _dataset(index)
    _damage_points(path, lambda points: points.__setitem__((17, 1), np.nan))
    with pytest.raises(DataError, match=rf"{frame.lidar_file}: point 17 has y = nan, expected a finite number"):
        dataset[0]
    path.write_bytes(path.read_bytes()[:999])
    with pytest.raises(DataError, match=r"is truncated: 999 bytes, expected a multiple of 20"):
        dataset[0]
    path.unlink()
    with pytest.raises(DataError, match=rf"LiDAR file .*{frame.lidar_file} is named in the tables but does not exist"):
        dataset[0]


def test_points_larger_than_any_sensor_sees_are_refused(tmp_path):
    points = np.full((4, 5), 9e4, dtype=np.float32)
    points.tofile(tmp_path / "a.bin")
    assert read_points(tmp_path / "a.bin").shape == (4, 5)
    points[2, 3] = -3e38
    points.tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: point 2 has intensity = -3e\+38, expected .* at most 100000$"):
        read_points(tmp_path / "a.bin")


def test_empty_lidar_file_is_refused_and_no_other_kind_of_file_is_waited_for(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"LiDAR file .*a\.bin is empty: 0 bytes, expected at least the 20 of"):
        read_points(tmp_path / "a.bin")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(DataError, match=rf"LiDAR file .*{name} is no regular file"):
            read_points(tmp_path / name)
        with pytest.raises(DataError, match=rf"image file .*{name} is no regular file"):
            read_image(tmp_path / name, size=(4, 4))
    with pytest.raises(DataError, match=r"cannot be read: Is a directory"):
        read_points(tmp_path)


def test_image_whose_header_asks_for_gigabytes_is_not_decoded(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (36, 64, 3), dtype=np.uint8)
    data = bytearray(cv2.imencode(".jpg", image)[1].tobytes())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = b"\xff\xff\xff\xff"
    (tmp_path / "a.jpg").write_bytes(data)
    monkeypatch.setattr("cmt_aqr.data.readers.decode", None)
    with pytest.raises(DataError, match=r"a\.jpg has 65535 x 65535 pixels, the sample_data table says 64 x 36"):
        read_image(tmp_path / "a.jpg", size=(36, 64))


def test_bad_images(world, index):
    path = world.root / index.frame(0).cameras[2].file
    dataset, data = _dataset(index), path.read_bytes()
    for content, words in (
        (data[: len(data) // 2], "is truncated"),
        (b"", "is truncated: none of its 0 bytes"),
        (b"no JPEG at all \xff\xd9", "is corrupt"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"image file .*CAM_FRONT_LEFT.* {words}"):
            dataset[0]
    cv2.imwrite(str(path), np.zeros((20, 30, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"has 30 x 20 pixels, the sample_data table says 64 x 36"):
        dataset[0]
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        dataset[0]


def test_views_of_different_sizes_are_refused(world, tmp_path):
    world.edit("sample_data", lambda rows: rows[1].update(width=128))
    with pytest.raises(
        DataError, match="different image sizes in sample_data: CAM_BACK_RIGHT 64 x 36, CAM_FRONT_RIGHT 128"
    ):
        _dataset(index_of(world, tmp_path / "cache"))[0]


def test_batch(index):
    dataset = _dataset(index)
    batch = collate([dataset[0], dataset[2]])
    assert batch.tokens == ["scene-a-sample-0", "scene-a-sample-2"]
    assert batch.images.shape == (2, 6, *FINAL_SIZE, 3) and batch.lidar2img.shape == (2, 6, 4, 4)
    assert batch.lidar2img.dtype == torch.float64
    assert torch.equal(batch.points[1], dataset[2].points)
    moved = batch.to("meta")
    assert moved.tokens == batch.tokens and moved.lidar2img.device.type == "meta"
    tensors = [moved.images, *moved.points, moved.lidar2img, moved.lidar2global, moved.augmentation, moved.lidar2ego]
    assert all(tensor.device.type == "meta" for tensor in (*tensors, moved.targets[0].boxes, moved.targets[1].labels))
    with pytest.raises(ValueError, match="1 of 2 samples have points"):
        collate([dataset[0], replace(dataset[0], points=None)])
    with pytest.raises(ValueError, match="different shapes"):
        collate([dataset[0], _dataset(index, final_size=(16, 32))[0]])


def test_global_wall_is_where_it_was_written(world, index):
    sample = _dataset(index)[2]
    wall = torch.from_numpy(to_lidar(world.wall, 1.0)).float()
    torch.testing.assert_close(sample.points[: len(wall), :3], wall, atol=1e-4, rtol=0)


def _with_cars_in(world, frames: set[int]) -> None:
    """No LiDAR point on the cars of all other frames."""

    def edit(rows):
        for row in rows:
            if int(row["token"].split("-")[3]) not in frames:
                row["num_lidar_pts"] = 0

    world.edit("sample_annotation", edit)


def test_empty_frames_are_replaced(tmp_path):
    world = write_world(tmp_path / "world", scenes={"scene-a": 5})
    _with_cars_in(world, {2, 4})
    index = index_of(world, tmp_path / "cache")
    augmentation = _augmentation(image=ImageAugmentation((0.7, 0.9)), scene=SceneAugmentation())
    kept = _dataset(index, augmentation=augmentation, boxes="lidar")
    skipping = _dataset(index, augmentation=augmentation, boxes="lidar", skip_empty_frames=True)
    assert kept[SampleKey(0)].token == "scene-a-sample-0" and len(kept[SampleKey(0)].targets.labels) == 0
    keys = [SampleKey(0, epoch, position) for epoch in range(3) for position in range(8)]
    replacements = [skipping[key] for key in keys]
    assert {sample.token for sample in replacements} == {"scene-a-sample-2", "scene-a-sample-4"}
    assert all(sample.targets.labels.tolist() == [0] for sample in replacements)
    # Each is augmented anew, the same whenever it is asked for; a frame with a box is what it was.
    assert len({float(sample.augmentation[0, 0]) for sample in replacements}) == len(keys)
    again = _dataset(index, augmentation=augmentation, boxes="lidar", skip_empty_frames=True)
    for key, sample in reversed(list(zip(keys, replacements, strict=True))):
        assert torch.equal(again[key].points, sample.points) and torch.equal(again[key].images, sample.images)
    assert torch.equal(skipping[SampleKey(2, 1, 3)].points, kept[SampleKey(2, 1, 3)].points)


def test_whether_a_frame_is_empty_is_seen_after_pasting_and_after_the_range_filter(tmp_path):
    world = write_world(tmp_path / "world", scenes={"scene-a": 3})
    _with_cars_in(world, {1})
    index = index_of(world, tmp_path / "cache")
    options = {"num_sweeps": 1, "boxes": "lidar", "skip_empty_frames": True}
    database = open_gt_database(index, cache_dir=tmp_path / "cache", num_sweeps=1, with_patches=True)
    pasting = _augmentation(gt_sampler=GtSampler(database, counts={"car": 1}), gt_sampling_epochs=1)
    dataset = _dataset(index, augmentation=pasting, **options)
    assert dataset[SampleKey(0, 0)].token == "scene-a-sample-0"  # it has the pasted car
    assert dataset[SampleKey(0, 1)].token == "scene-a-sample-1"
    near = _augmentation(point_range=(-1.0, -1.0, -5.0, 1.0, 1.0, 3.0))
    sentence = (
        r"^data.skip_empty_frames: none of 100 frames drawn from the split 'all' has a box to train on after "
        r"augmentation, expected at least one; check data.train_boxes and model.point_range, or set "
        r"data.skip_empty_frames to false$"
    )
    with pytest.raises(DataError, match=sentence):
        _dataset(index, augmentation=near, **options)[SampleKey(1)]
