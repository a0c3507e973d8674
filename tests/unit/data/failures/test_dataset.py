"""Failing samples: alike in any order, batch and process, and each failure touches its own parts only."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.classes import CAMERAS
from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.failures import FailureDataset, FailureSampler, parse_failures, training_failures
from cmt_aqr.data.failures.apply import SensorFiles, merge_sweeps, split_sweeps
from cmt_aqr.data.loader import make_loader
from cmt_aqr.data.sample import Sample
from cmt_aqr.data.sampling import SampleKey
from tests.unit.data.conftest import index_of
from tests.unit.data.world import IMAGE_SIZE, view_colour, write_world

FINAL_SIZE = (16, 48)
POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


@pytest.fixture
def everything(index) -> FailureDataset:
    return failing(index, None, *parse_failures([], "all"))


def failing(index, *failures, seed: int = 0, **options) -> FailureDataset:
    return FailureDataset(index, failures, **{"final_size": FINAL_SIZE, "num_sweeps": 2} | options, seed=seed)


def one(index, name: str, frame: int = 1, **options) -> Sample:
    """A frame under the first failure of a name."""
    return failing(index, parse_failures([name])[0], **options)[frame]


def assert_same(left: Sample, right: Sample) -> None:
    for field in dataclasses.fields(Sample):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name == "targets":
            assert torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)
        else:
            assert a == b


def test_a_clean_frame_is_that_of_an_ordinary_evaluation(index):
    ordinary = FrameDataset(index, final_size=FINAL_SIZE, num_sweeps=2)
    for frame in range(len(index)):
        assert_same(failing(index, None)[frame], ordinary[frame])


def test_frames_fail_alike_in_any_order_batch_and_number_of_workers(index, everything):
    count = len(everything.failures)
    reference = [everything[i] for i in range(len(everything))]
    backwards = failing(index, *everything.failures)
    for i in reversed(range(len(everything))):
        assert_same(backwards[i], reference[i])
    for number, failure in enumerate(everything.failures):  # each failure without the others
        assert_same(failing(index, failure)[2], reference[2 * count + number])
    for batch_size, workers, world_size in ((1, 0, 1), (7, 2, 1), (4, 0, 3)):
        seen = {}
        for rank in range(world_size):
            sampler = FailureSampler(
                num_frames=len(index), num_failures=count, batch_size=batch_size, num_workers=workers, rank=rank,
                world_size=world_size,
            )  # fmt: skip
            loader = make_loader(everything, sampler=sampler, batch_size=batch_size, num_workers=workers)
            keys = iter(sampler.keys)
            for batch in loader:
                for i, token in enumerate(batch.tokens):
                    key = next(keys)
                    seen[key] = batch.images[i], batch.points[i], batch.lidar2img[i], token
        assert sorted(seen) == list(range(len(everything)))
        for key, (images, points, lidar2img, token) in seen.items():
            expected = reference[key]
            assert token == expected.token and torch.equal(images, expected.images)
            assert torch.equal(points, expected.points) and torch.equal(lidar2img, expected.lidar2img)


def test_a_worker_gets_whole_frames():
    for count, failures, batch_size, workers in ((40, 44, 4, 14), (5, 7, 3, 2), (3, 1, 4, 2), (2, 5, 4, 8)):
        sampler = FailureSampler(
            num_frames=count, num_failures=failures, batch_size=batch_size, num_workers=workers, rank=0, world_size=1
        )
        assert sorted(sampler.keys) == list(range(count * failures)) and len(sampler) == count * failures
        batches = [sampler.keys[i : i + batch_size] for i in range(0, len(sampler.keys), batch_size)]
        reads = 0
        for worker in range(workers):
            frames = [key // failures for batch in batches[worker::workers] for key in batch]
            reads += sum(a != b for a, b in zip([-1, *frames], frames, strict=False))
        assert reads <= count + 2 * workers


def test_another_seed_token_or_file_fails_otherwise(index):
    (points,) = parse_failures(["points:20"])
    first, other_seed = failing(index, points)[1], failing(index, points, seed=1)[1]
    assert len(first.points) == len(other_seed.points) and not torch.equal(first.points, other_seed.points)
    # Key frame and sweeps hold as many points each; what is lost differs between them.
    clean = failing(index, None)[1]
    lost = [
        {tuple(p) for p in clean.points[clean.points[:, 4] == lag, :1].tolist()}
        - {tuple(p) for p in first.points[first.points[:, 4] == lag, :1].tolist()}
        for lag in clean.points[:, 4].unique()
    ]
    assert len(lost) == 3 and all(lost)


def test_every_failure_touches_its_own_parts_and_never_the_ground_truth(everything):
    count = len(everything.failures)
    clean = everything[count]
    for number, failure in enumerate(everything.failures[1:], start=1):
        sample, case = everything[count + number], failure.definition
        for name in ("lidar2global", "lidar2ego", "ego2global", "augmentation"):
            assert torch.equal(getattr(sample, name), getattr(clean, name)), failure.name
        assert torch.equal(sample.targets.boxes, clean.targets.boxes)
        assert torch.equal(sample.lidar2img, clean.lidar2img) == (case.calibration is None), failure.name
        if "camera" not in case.sensors or case.calibration:
            assert torch.equal(sample.images, clean.images), failure.name
        if "lidar" not in case.sensors:
            assert torch.equal(sample.points, clean.points), failure.name


def test_named_views_are_black_before_the_resize(index):
    sample = one(index, "view_drop:FRONT,BACK_LEFT")
    black = [not image.any() for image in sample.images]
    assert black == [camera in ("CAM_FRONT", "CAM_BACK_LEFT") for camera in CAMERAS]
    assert not one(index, "view_drop").images.any()
    share = np.mean(
        [not image.any() for seed in range(60) for image in one(index, "missing_camera:2", seed=seed).images]
    )
    assert 0.33 < share < 0.47


def test_files_fail_before_sweeps_merge_and_arrays_after(index):
    clean, still = failing(index, None)[1], one(index, "motion:3")
    for lag in clean.points[:, 4].unique():  # every file has a shift of its own
        before, after = (s.points[s.points[:, 4] == lag, :3] for s in (clean, still))
        assert 0.005 < (after - before).mean(dim=0).norm() < 0.6
    shifts = [(still.points - clean.points)[clean.points[:, 4] == lag, 0].mean() for lag in clean.points[:, 4].unique()]
    assert len({round(float(s), 4) for s in shifts}) == 3
    ahead = one(index, "fov:90").points
    assert (ahead[:, 1] >= 0).all() and len(ahead) == (clean.points[:, 1] >= 0).sum()
    blank = one(index, "lidar_drop").points
    assert blank.shape == clean.points.shape and not blank.any()


def test_a_model_with_one_sensor(index):
    lidar = failing(index, *parse_failures(["beams:4", "fog:1"]), final_size=None)
    assert lidar[0].images is None and lidar[0].points is not None
    camera = failing(index, *parse_failures(["fog:1", "calibration_noise", "temporal:3"]), num_sweeps=None)
    assert camera[0].points is None and camera[0].images is not None


@pytest.fixture
def coloured(tmp_path):
    """Two scenes whose images tell the frame."""
    world = write_world(tmp_path / "coloured", scenes={"scene-a": 6, "scene-b": 6})
    for number, scene in enumerate(("scene-a", "scene-b")):
        for k in range(6):
            for camera in CAMERAS:
                image = np.full((*IMAGE_SIZE, 3), 20 * k + 5 + 120 * number, np.uint8)
                cv2.imwrite(str(world.root / f"samples/{camera}/{scene}-sample-{k}.jpg"), image)
    return index_of(world, tmp_path / "coloured_cache")


def frame_of(image: torch.Tensor) -> int:
    return round((image.float().mean().item() - 5) / 20)


def test_late_images_are_those_of_the_previous_key_frame_of_the_scene(coloured):
    late = dict.fromkeys(("stuck_cameras:50", "temporal:3"), 0)
    for name in late:
        for seed in range(8):
            dataset = failing(coloured, *parse_failures([name]), seed=seed)
            for number in range(12):
                for image in dataset[number].images:
                    back = number - frame_of(image)
                    assert back in ((0, 1) if number % 6 else (0,))
                    late[name] += back
    images = 8 * 10 * 6
    assert late["stuck_cameras:50"] / images == pytest.approx(0.5, abs=0.08)
    assert late["temporal:3"] / images == pytest.approx(0.6, abs=0.08)


def test_a_late_lidar_delivers_the_whole_earlier_cloud(coloured):
    clean = failing(coloured, None)
    counts = {0: 0, 1: 0}
    for seed in range(10):
        dataset = failing(coloured, *parse_failures(["stuck_lidar:50"]), seed=seed)
        for number in range(1, 6):
            points = dataset[number].points
            back = next(b for b in (0, 1) if torch.equal(points, clean[number - b].points))
            counts[back] += 1
            assert torch.equal(dataset[number].images, clean[number].images)
    assert min(counts.values()) > 12
    assert torch.equal(failing(coloured, *parse_failures(["frozen_lidar:90"]))[6].points, clean[6].points)


def test_merged_points_are_split_into_their_sweeps(index):
    frame = index.frame(1)
    files = SensorFiles(index, num_sweeps=2)
    sweeps = files.sweeps(frame)
    found = split_sweeps(frame, merge_sweeps(frame, sweeps), 2)
    assert [len(points) for points in found] == [len(points) for points in sweeps]
    for points, expected in zip(found, sweeps, strict=True):
        assert np.abs(points[:, :4] - expected[:, :4]).max() < 1e-4 and not points[:, 4].any()


def augmentation(index, *entries: tuple[str, float]) -> TrainingAugmentation:
    failures = training_failures(entries, index, num_sweeps=2)
    return TrainingAugmentation(seed=3, point_range=POINT_RANGE, failures=failures)


def trained(index, *entries: tuple[str, float], number: int = 1, position: int = 0) -> Sample:
    dataset = FrameDataset(index, final_size=FINAL_SIZE, num_sweeps=2, augmentation=augmentation(index, *entries))
    return dataset[SampleKey(number, 0, position)]


def test_failures_in_training(index):
    plain = trained(index)
    assert training_failures((), index, num_sweeps=2) is None
    assert_same(trained(index, ("beams:4", 0.0), ("view_drop", 0.0)), plain)
    black = trained(index, ("view_drop:FRONT", 1.0))
    assert not black.images[0].any() and torch.equal(black.images[1:], plain.images[1:])
    assert torch.equal(black.points, plain.points)
    both = trained(index, ("view_drop", 1.0), ("fov:60", 1.0))
    assert not both.images.any() and len(both.points) < len(plain.points)
    assert (both.points[:, 1] >= both.points[:, 0].abs() / np.sqrt(3) - 1e-4).all()
    told = trained(index, ("calibration_noise", 1.0))
    assert not torch.equal(told.lidar2img, plain.lidar2img) and torch.equal(told.images, plain.images)
    assert torch.equal(told.targets.boxes, plain.targets.boxes)


def test_training_draws_a_level_and_a_seed_for_every_sample(index):
    sizes = {len(trained(index, ("points", 1.0), position=position).points) for position in range(12)}
    assert len(sizes) == 3
    half = [not trained(index, ("lidar_drop", 0.5), position=p).points.any() for p in range(60)]
    assert 0.3 < np.mean(half) < 0.7
    first, second = (trained(index, ("points:20", 1.0), position=p).points for p in (0, 1))
    rows = [sorted(map(tuple, p.tolist())) for p in (first, second)]
    assert rows[0] != rows[1]
    again = trained(index, ("points:20", 1.0), position=1).points
    assert torch.equal(again, second)


def test_a_late_sensor_in_training(coloured):
    late = trained(coloured, ("stuck_cameras:90", 1.0), number=3)
    assert {frame_of(image) for image in late.images} <= {2, 3} and 2 in {frame_of(image) for image in late.images}


@pytest.mark.data
def test_real_frame_as_the_network_gets_it(real_index):
    clean, black = (
        FailureDataset(real_index, failures, final_size=(320, 800), num_sweeps=0, seed=0)[0]
        for failures in ((None,), parse_failures(["view_drop:FRONT,BACK"]))
    )
    assert (black.images == 0).all(dim=-1).sum() - (clean.images == 0).all(dim=-1).sum() >= 2 * 320 * 800 - 100
    views = [i for i in range(6) if not black.images[i].any()]
    assert views == [0, 3] and torch.equal(black.images[[1, 2, 4, 5]], clean.images[[1, 2, 4, 5]])
    beams = FailureDataset(real_index, parse_failures(["beams:4"]), final_size=None, num_sweeps=0, seed=0)[0]
    assert len(beams.points) == 4336 and not beams.points[:, 4].any()
    heads = {
        len(
            FailureDataset(real_index, parse_failures(["object_failure"]), final_size=None, num_sweeps=0, seed=s)[
                0
            ].points
        )
        for s in range(8)
    }
    assert heads == {34688, 34688 - 984}


def test_views_are_those_of_the_world(index):
    (failure,) = parse_failures(["stuck_lidar:50"])
    image = failing(index, failure)[0].images[2].float().mean(dim=(0, 1))
    assert (image - torch.tensor(view_colour(CAMERAS[2]))).abs().max() < 4
