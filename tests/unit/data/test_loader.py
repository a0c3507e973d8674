import pickle
import re

import pytest
import torch

from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.gt_database import open_gt_database
from cmt_aqr.data.gt_sampling import GtSampler
from cmt_aqr.data.image_transforms import ImageAugmentation
from cmt_aqr.data.loader import make_loader
from cmt_aqr.data.sample import DataError
from cmt_aqr.data.sampling import EvaluationSampler, TrainingSampler
from cmt_aqr.data.scene_transforms import SceneAugmentation
from tests.unit.data.conftest import index_of
from tests.unit.data.world import write_world

POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)


def _training_loader(index, num_workers, *, gt_sampler=None, gt_sampling_epochs=0):
    augmentation = TrainingAugmentation(
        seed=1,
        point_range=POINT_RANGE,
        image=ImageAugmentation((0.7, 0.9)),
        scene=SceneAugmentation(),
        gt_sampler=gt_sampler,
        gt_sampling_epochs=gt_sampling_epochs,
    )
    dataset = FrameDataset(index, final_size=(16, 48), num_sweeps=1, boxes="lidar_or_radar", augmentation=augmentation)
    sampler = TrainingSampler(frame_labels=index.frame_labels("lidar_or_radar"), class_balanced=True, seed=2)
    return make_loader(dataset, sampler=sampler, batch_size=2, num_workers=num_workers, drop_last=True)


def _equal(a, b) -> bool:
    tensors = [(a.images, b.images), (a.lidar2img, b.lidar2img), *zip(a.points, b.points, strict=True)]
    tensors += [(x.boxes, y.boxes) for x, y in zip(a.targets, b.targets, strict=True)]
    return a.tokens == b.tokens and all(torch.equal(x, y) for x, y in tensors)


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    index = index_of(write_world(tmp_path / "world", scenes={"scene-a": 5}), tmp_path / "cache")
    loaders = [_training_loader(index, workers) for workers in (0, 1, 2)]
    for epoch in (0, 1):
        epochs = []
        for loader in loaders:
            loader.set_epoch(epoch)
            epochs.append(list(loader))
        assert [len(batches) for batches in epochs] == [2, 2, 2] == [len(loader) for loader in loaders]
        for other in epochs[1:]:
            assert all(_equal(a, b) for a, b in zip(epochs[0], other, strict=True))
    # Resume: a fresh loader at epoch 1 gives what the running one gave.
    fresh = _training_loader(index, 0)
    fresh.set_epoch(1)
    assert all(_equal(a, b) for a, b in zip(fresh, epochs[0], strict=True))


def test_gt_sampling_stops_in_persistent_workers(tmp_path):
    world = write_world(tmp_path / "world", scenes={"scene-a": 4})
    index = index_of(world, tmp_path / "cache")
    database = open_gt_database(index, cache_dir=tmp_path / "cache", num_sweeps=1, with_patches=True, min_points=5)
    sampler = GtSampler(database, counts={"car": 3})
    loader = _training_loader(index, 2, gt_sampler=sampler, gt_sampling_epochs=2)
    most = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        most.append(max(len(targets.labels) for batch in loader for targets in batch.targets))
    assert most[0] > 1 and most[1] > 1 and most[2:] == [1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_keep_their_sentence(world, index, num_workers):
    (world.root / index.frame(1).lidar_file).write_bytes(b"x" * 30)
    dataset = FrameDataset(index, final_size=None, num_sweeps=0)
    loader = make_loader(
        dataset, sampler=EvaluationSampler(num_frames=len(index)), batch_size=1, num_workers=num_workers
    )
    batches = iter(loader)
    assert next(batches).tokens == ["scene-a-sample-0"]
    path = re.escape(str(world.root / index.frame(1).lidar_file))
    sentence = rf"^LiDAR file {path} is truncated: 30 bytes, expected a multiple of 20 \(5 float32 each\)$"
    with pytest.raises(DataError, match=sentence):
        next(batches)


def test_dataset_survives_pickling_for_spawned_workers(world, index, tmp_path):
    options = {"num_sweeps": 1, "with_patches": True}
    sampler = GtSampler(open_gt_database(index, cache_dir=tmp_path, **options))
    loader = _training_loader(index, 0, gt_sampler=sampler, gt_sampling_epochs=1)
    (batch,) = list(loader)
    dataset = pickle.loads(pickle.dumps(loader._loader.dataset))
    samples = [dataset[key] for key in list(loader._sampler)[:2]]
    assert all(torch.equal(sample.points, points) for sample, points in zip(samples, batch.points, strict=True))


def test_evaluation_keeps_the_last_small_batch(index):
    dataset = FrameDataset(index, final_size=(16, 48), num_sweeps=None)
    loader = make_loader(dataset, sampler=EvaluationSampler(num_frames=3), batch_size=2, num_workers=1)
    assert [batch.tokens for batch in loader] == [index.tokens[:2], index.tokens[2:]]


def test_replaced_samples_depend_neither_on_workers_nor_on_processes(tmp_path):
    world = write_world(tmp_path / "world", scenes={"scene-a": 6})

    def edit(rows):
        for row in rows:
            if int(row["token"].split("-")[3]) % 3:
                row["num_lidar_pts"] = 0

    world.edit("sample_annotation", edit)
    index = index_of(world, tmp_path / "cache")
    augmentation = TrainingAugmentation(seed=1, point_range=POINT_RANGE, scene=SceneAugmentation())
    options = {"num_sweeps": 1, "boxes": "lidar", "skip_empty_frames": True, "augmentation": augmentation}
    dataset = FrameDataset(index, final_size=None, **options)

    def epoch(workers: int, rank: int = 0, world_size: int = 1, first_batch: int = 0):
        sampler = TrainingSampler(
            frame_labels=index.frame_labels("all"), class_balanced=True, seed=2, rank=rank, world_size=world_size
        )
        loader = make_loader(dataset, sampler=sampler, batch_size=2 // world_size, num_workers=workers)
        loader.set_epoch(1, first_batch)
        return [
            (token, points, targets.boxes)
            for batch in loader
            for token, points, targets in zip(batch.tokens, batch.points, batch.targets, strict=True)
        ]

    whole = epoch(0)
    assert {token for token, _, _ in whole} <= {"scene-a-sample-0", "scene-a-sample-3"} and len(whole) == 12
    shards = [epoch(0, rank, 2) for rank in range(2)]
    merged = [sample for pair in zip(*shards, strict=True) for sample in pair]
    for other in (epoch(2), merged, whole[:4] + epoch(0, first_batch=2)):
        assert len(other) == len(whole)
        for a, b in zip(whole, other, strict=True):
            assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
