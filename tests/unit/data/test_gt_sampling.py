import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Targets, box_corners, points_in_boxes
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.gt_database import (
    _cut_patches,
    _FrameObjects,
    near_boxes,
    open_gt_database,
    points_of_boxes,
    project_boxes,
)
from cmt_aqr.data.gt_sampling import ORIGINAL_COUNTS, GtSampler, bev_overlap
from cmt_aqr.data.jpeg import decode
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.sample import DataError, Sample
from cmt_aqr.geometry import transform_points
from tests.unit.data.conftest import index_of
from tests.unit.data.world import KEY_INTERVAL, ego_pose, view_colour, write_world

BUILD = {"num_sweeps": 1, "with_patches": True}


def _random_boxes(count: int, extent: float, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    boxes = np.zeros((count, 9))
    boxes[:, :2] = rng.uniform(-extent, extent, (count, 2))
    boxes[:, 2] = rng.uniform(-1, 1, count)
    boxes[:, 3:6] = rng.uniform(0.5, 6, (count, 3))
    boxes[:, 6] = rng.uniform(-4, 4, count)
    return torch.from_numpy(boxes).float()


def test_bev_overlap_against_polygon_intersection():
    boxes, others = _random_boxes(40, 8, 0), _random_boxes(30, 8, 1)
    found = bev_overlap(boxes, others)
    corners = [np.ascontiguousarray(box_corners(b)[:, :4, :2].numpy()) for b in (boxes, others)]
    areas = np.array([[cv2.intersectConvexConvex(a, b)[0] for b in corners[1]] for a in corners[0]])
    assert 0.05 < found.float().mean() < 0.95
    clear = (areas > 1e-3) | (areas == 0)
    assert np.array_equal(found.numpy()[clear], areas[clear] > 0) and clear.mean() > 0.99


def test_near_boxes_is_a_tight_superset():
    boxes = _random_boxes(12, 30, 2)
    points = torch.from_numpy(np.random.default_rng(3).uniform(-60, 60, (20_000, 5))).float()
    near = near_boxes(points, boxes)
    inside = points_in_boxes(points, boxes).any(dim=1).nonzero()[:, 0]
    assert len(inside) > 0 and set(inside.tolist()) <= set(near.tolist())
    assert len(near) < 0.15 * len(points)
    found = torch.zeros(len(points), len(boxes), dtype=torch.bool)
    for i, indices in enumerate(points_of_boxes(points, boxes)):
        found[indices, i] = True
    assert torch.equal(found, points_in_boxes(points, boxes))
    assert len(near_boxes(points, boxes[:0])) == 0 and len(near_boxes(points[:0], boxes)) == 0


def test_database_of_the_tiny_world(world, tmp_path):
    index = index_of(world, tmp_path / "cache")
    database = open_gt_database(index, cache_dir=tmp_path / "cache", **BUILD)
    # One car a frame; the pedestrian has no point. Frame 0 has no sweep, the others one.
    assert database.labels.tolist() == [0, 0, 0]
    assert np.diff(database.point_offsets).tolist() == [30, 60, 60]
    for i in range(3):
        box = index.frame(i).targets("lidar_or_radar").boxes
        np.testing.assert_array_equal(database.boxes[i], box[0])
        points = database.points(i)
        assert points_in_boxes(points[:30], box).all()
        assert (points[:30, 4] == 0).all() and (points[30:, 4] > 0).all()
    visible = [database.patch(i) for i in range(3) if database.patch(i) is not None]
    assert visible and all(min(patch.shape[:2]) > 10 for patch in visible)
    colours = [np.array(view_colour(camera)) for camera in CAMERAS]
    for patch in visible:  # one camera's colour, as RGB
        assert min(np.abs(patch.mean((0, 1)) - colour).max() for colour in colours) < 4
    with_workers = open_gt_database(index, cache_dir=tmp_path / "other", num_workers=2, **BUILD)
    for name in ("objects.npz", "points.bin", "patches.bin"):
        if name != "objects.npz":
            assert (with_workers.folder / name).read_bytes() == (database.folder / name).read_bytes()
    np.testing.assert_array_equal(with_workers.boxes, database.boxes)


def test_database_is_rebuilt_for_other_inputs_only(world, tmp_path):
    cache = tmp_path / "cache"
    first = open_gt_database(index_of(world, cache), cache_dir=cache, **BUILD)
    stamp = (first.folder / "points.bin").stat().st_mtime_ns
    again = open_gt_database(index_of(world, cache), cache_dir=cache, **BUILD)
    assert again.folder == first.folder and (again.folder / "points.bin").stat().st_mtime_ns == stamp
    fewer = open_gt_database(index_of(world, cache), cache_dir=cache, min_points=40, **BUILD)
    assert fewer.folder != first.folder and len(fewer) == 2
    world.edit("sample_annotation", lambda rows: rows[0].update(size=[2.5, 4.5, 2]))
    other = open_gt_database(index_of(world, cache), cache_dir=cache, **BUILD)
    assert other.folder != first.folder and other.boxes[0, 3] == 4.5
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_empty_database_changes_nothing(world, tmp_path):
    world.edit("sample_annotation", lambda rows: rows.clear())
    world.edit("instance", lambda rows: rows.clear())
    index = index_of(world, tmp_path / "cache")
    database = open_gt_database(index, cache_dir=tmp_path / "cache", **BUILD)
    sample = FrameDataset(index, final_size=None, num_sweeps=0)[0]
    assert len(database) == 0
    assert GtSampler(database).paste(sample, None, np.random.default_rng(0)) is sample


def test_failed_build_leaves_nothing(world, tmp_path):
    index = index_of(world, tmp_path / "cache")
    (world.root / index.frame(2).lidar_file).write_bytes(b"123")
    with pytest.raises(DataError, match="is truncated: 3 bytes"):
        open_gt_database(index, cache_dir=tmp_path / "gt", **BUILD)
    assert list((tmp_path / "gt").iterdir()) == []


def test_no_tensor_is_sent_between_processes(index):
    # Each would take a file descriptor of its own: with eight workers more than the usual 1024.
    frames = _FrameObjects(index, num_sweeps=1, with_patches=True, min_points=5)
    assert [[type(value) for value in one] for one in frames[1]] == [[int, np.ndarray, np.ndarray, bytes]]


def test_a_damaged_database_is_one_sentence(index, tmp_path):
    folder = open_gt_database(index, cache_dir=tmp_path / "gt", **BUILD).folder
    with open(folder / "objects.npz", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"objects.npz cannot be read: .*; delete the folder, it is then built again$"):
        open_gt_database(index, cache_dir=tmp_path / "gt", **BUILD)


def _bare(sample: Sample, targets: Targets) -> Sample:
    values = vars(sample) | {"targets": targets}
    return Sample(**values)


@pytest.fixture
def real(real_frame, tmp_path):
    index = load_index(dataroot=real_frame, version="v1.0-mini", split="one_frame", cache_dir=tmp_path)
    database = open_gt_database(index, cache_dir=tmp_path, num_sweeps=0, with_patches=True)
    sample = FrameDataset(index, final_size=None, num_sweeps=0)[0]
    return index, database, sample


def test_choice_fills_up_and_never_collides(real):
    _, database, sample = real
    empty = Targets(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64))
    sampler = GtSampler(database)
    for seed in range(10):
        chosen = sampler.choose(empty, np.random.default_rng(seed))
        boxes, labels = torch.from_numpy(database.boxes[chosen]), database.labels[chosen]
        assert not (bev_overlap(boxes, boxes) & ~torch.eye(len(chosen), dtype=torch.bool)).any()
        assert len(set(chosen)) == len(chosen) > 3
        for label, name in enumerate(CLASSES):
            assert (labels == label).sum() <= min(ORIGINAL_COUNTS[name], (database.labels == label).sum())
    # In its own frame everything collides with itself, and full classes get nothing.
    assert sampler.choose(sample.targets, np.random.default_rng(0)) == []
    cars = Targets(torch.zeros(2, 9) + 500, torch.zeros(2, dtype=torch.int64))
    assert (database.labels[sampler.choose(cars, np.random.default_rng(0))] != 0).all()
    with pytest.raises(ValueError, match="unknown class 'tram'"):
        GtSampler(database, counts={"tram": 1})


def test_pasted_points_replace_what_was_there(real):
    _, database, sample = real
    empty = Targets(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64))
    pasted = GtSampler(database).paste(_bare(sample, empty), None, np.random.default_rng(1))
    boxes = pasted.targets.boxes
    assert len(boxes) == len(pasted.targets.labels) > 3
    # The objects come from this very frame, so the cloud is the same again, in another order.
    before, after = (points[np.lexsort(points.numpy().T)] for points in (sample.points, pasted.points))
    assert len(before) == len(after)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    count = int(points_in_boxes(pasted.points, boxes).any(dim=1).sum())
    assert points_in_boxes(pasted.points[-count:], boxes).any(dim=1).float().mean() > 0.99


def test_pasted_patches_appear_where_the_box_projects(tmp_path):
    index = index_of(write_world(tmp_path / "world", scenes={"scene-a": 2}), tmp_path / "cache")
    database = open_gt_database(index, cache_dir=tmp_path / "cache", **BUILD)
    source = next(i for i in range(len(database)) if database.patch(i) is not None)
    sample = FrameDataset(index, final_size=None, num_sweeps=0)[source]
    empty = _bare(sample, Targets(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64)))
    for mix in (1.0, 0.5):
        views = [np.zeros((36, 64, 3), dtype=np.uint8) for _ in CAMERAS]
        for seed in range(20):  # the class has two objects; take the draw that picks the one looked for
            pasted = GtSampler(database, counts={"car": 1}, mix=mix)
            if pasted.choose(empty.targets, np.random.default_rng(seed)) == [source]:
                pasted.paste(empty, views, np.random.default_rng(seed))
                break
        touched = [view.any() for view in views]
        rectangles = [project_boxes(torch.from_numpy(database.boxes[[source]]), m, (36, 64)) for m in sample.lidar2img]
        assert any(touched)
        for view, (rectangle, _, visible) in zip(views, rectangles, strict=True):
            x0, y0, x1, y1 = rectangle[0].tolist()
            large = bool(visible[0]) and min(x1 - x0, y1 - y0) > 1
            assert view.any() == large
            if large:
                patch = database.patch(source).astype(float).mean((0, 1))
                np.testing.assert_allclose(view[y0:y1, x0:x1].mean((0, 1)), mix * patch, atol=3)
                view[y0:y1, x0:x1] = 0
                assert not view.any()


@pytest.fixture
def front_view(index, tmp_path):
    """A sampler with a near and a far object, one behind the other in view 0, and their rectangles there."""
    database = open_gt_database(index, cache_dir=tmp_path / "cache", **BUILD)
    sample = FrameDataset(index, final_size=None, num_sweeps=0)[0]
    inverse = torch.linalg.inv(sample.lidar2img[0])
    centres = [transform_points(inverse, torch.tensor([[32.0 * d, 18.0 * d, d]]).double())[0] for d in (8.0, 16.0)]
    boxes = torch.stack([torch.cat((c.float(), torch.tensor([2.0, 2, 2, 0, 0, 0]))) for c in centres])
    near, far = project_boxes(boxes, sample.lidar2img[0], (36, 64))[0].tolist()
    assert near[0] < far[0] < far[2] < near[2] and near[1] < far[1] < far[3] < near[3]
    patches = {0: np.full((20, 20, 3), 200, dtype=np.uint8), 1: np.full((20, 20, 3), 40, dtype=np.uint8)}
    object.__setattr__(database, "patch", patches.get)
    database.boxes[:2] = boxes.numpy()
    return sample, database, near, far


def _region(view, rectangle):
    x0, y0, x1, y1 = rectangle
    return view[y0:y1, x0:x1]


@pytest.mark.parametrize("order", ([0, 1], [1, 0]))
def test_near_patches_cover_far_ones(front_view, order):
    sample, database, near, far = front_view
    sampler = GtSampler(database, mix=0.75)
    sampler.choose = lambda targets, rng: order
    views = [np.full((36, 64, 3), 100, dtype=np.uint8) for _ in CAMERAS]
    sampler.paste(sample, views, np.random.default_rng(0))
    # The far one first, 100 -> 55; then the near one over it: 0.25 * 55 + 0.75 * 200, and 175 around it.
    assert (np.abs(_region(views[0], far).astype(int) - 164) <= 1).all()
    _region(views[0], far)[:] = 175
    assert (_region(views[0], near) == 175).all()


def test_own_objects_cover_no_patch(front_view):
    # The original paints them again with crops of the image that it paints, that is with themselves.
    sample, database, _, far = front_view
    sampler = GtSampler(database, mix=0.5)
    sampler.choose = lambda targets, rng: [1]
    own = Targets(torch.from_numpy(database.boxes[:1].copy()), torch.zeros(1, dtype=torch.int64))
    views = [np.full((36, 64, 3), 100, dtype=np.uint8) for _ in CAMERAS]
    sampler.paste(_bare(sample, own), views, np.random.default_rng(0))
    assert (_region(views[0], far) == 70).all()
    _region(views[0], far)[:] = 100
    assert (views[0] == 100).all()


def test_a_patch_comes_from_the_view_that_shows_the_object_largest():
    # The original means the same, but never updates its largest area, so that its last view wins.
    box = torch.tensor([[0.0, 0, 0, 2, 2, 2, 0, 0, 0]])
    views = [np.full((100, 100, 3), colour, dtype=np.uint8) for colour in (50, 120, 200)]

    def camera(focal: float) -> torch.Tensor:
        """Looks along x at the origin, from 5 m."""
        rows = [[50, -focal, 0, 250], [50, 0, -focal, 250], [1, 0, 0, 5], [0, 0, 0, 1]]
        return torch.tensor(rows, dtype=torch.float64)

    (patch,) = _cut_patches(box, torch.stack([camera(40), camera(80), camera(30)]), views)
    image = decode(bytearray(patch))
    assert np.abs(image.astype(int) - 120).max() < 4 and image.shape[0] == image.shape[1] == 40
    # Behind the camera, or 10 pixels wide and less: no patch.
    behind = camera(80) @ torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64))
    behind[:3, 3] *= -1
    assert _cut_patches(box, torch.stack([behind, camera(20)]), views[:2]) == [b""]


def test_objects_have_no_sweep_points_close_to_the_car(world, tmp_path):
    # Every cloud has one point at (0.5, -0.5, 0.1) in its own frame. That of the sweep is left out here, as in the
    # original's database, but not in training frames; that of the key frame stays in both.
    def move(rows):
        for row in rows:
            if row["token"] == "scene-a-sample-1-walker":
                row["translation"] = (ego_pose(KEY_INTERVAL)[0] + [0, 0, 1.8]).tolist()
                row["size"], row["num_lidar_pts"] = [4.0, 4.0, 4.0], 1

    world.edit("sample_annotation", move)
    index = index_of(world, tmp_path / "cache")
    database = open_gt_database(index, cache_dir=tmp_path / "cache", min_points=1, **BUILD)
    (walker,) = np.flatnonzero(database.labels == CLASSES.index("pedestrian"))
    points = database.points(walker)
    torch.testing.assert_close(points[:, :3], torch.tensor([[0.5, -0.5, 0.1]]))
    sample = FrameDataset(index, final_size=None, num_sweeps=1)[1]
    assert points_in_boxes(sample.points, torch.from_numpy(database.boxes[[walker]])).sum() == 2


def test_points_hidden_by_a_pasted_object_stay(index, tmp_path):
    database = open_gt_database(index, cache_dir=tmp_path / "cache", **BUILD)
    sample = FrameDataset(index, final_size=None, num_sweeps=0)[0]
    centre = torch.from_numpy(database.boxes[0, :3])
    points = torch.tensor([[0.0, 0, 0, 1, 0], [0.0, 0, 0, 2, 0]])
    points[:, :3] = torch.stack((centre, 2 * centre))  # inside the object, and behind it
    empty = Targets(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64))
    sampler = GtSampler(database)
    sampler.choose = lambda targets, rng: [0]
    pasted = sampler.paste(replace(sample, points=points, targets=empty), None, np.random.default_rng(0))
    assert torch.equal(pasted.points[0], points[1])
    torch.testing.assert_close(pasted.points[1:], database.points(0))


def test_camera_only_and_lidar_only_pasting(real):
    index, database, _ = real
    augmentation = TrainingAugmentation(
        seed=0, point_range=(-54, -54, -5, 54, 54, 3), gt_sampler=GtSampler(database), gt_sampling_epochs=1
    )
    for options in ({"final_size": None, "num_sweeps": 0}, {"final_size": (80, 200), "num_sweeps": None}):
        sample = FrameDataset(index, **options, augmentation=augmentation, boxes="lidar_or_radar")[0]
        assert len(sample.targets.labels) > 0 and not math.isnan(sample.targets.boxes[:, :7].sum())
