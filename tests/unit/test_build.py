"""From shipped configurations to models, data sets and the loss."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cmt_aqr.build import build_criterion, build_detector, count_parameters, training_dataset
from cmt_aqr.classes import CLASSES
from cmt_aqr.config import Config, load_config
from cmt_aqr.models.heads import CLASS_BRANCH

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
# Counted in the original program's models, built from its own configurations.
OFFICIAL = {
    "cmt_r50_800x320": 40_919_572,
    "cmt_vov_1600x640": 86_607_380,
    "cmt_lidar_0075": 16_769_492,
    "cmt_camera_vov_1600x640": 78_156_100,
}


def shipped(name: str, *overrides: str) -> Config:
    (path,) = (path for path in CONFIGS if path.stem == name)
    return load_config(path, overrides)


def on_meta(config: Config) -> torch.nn.Module:
    """The model of a configuration without memory for its weights."""
    with torch.device("meta"):
        return build_detector(config.model)


def test_the_official_settings_are_shipped():
    assert OFFICIAL.keys() <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_model_builds(path):
    config = load_config(path)
    model = on_meta(config)
    assert (model.lidar_branch is None) == (config.model.lidar is None)
    assert (model.image_branch is None) == (config.model.camera is None)
    assert model.reference_points.num_queries == config.model.num_queries
    assert len(model.decoder.layers) == config.model.num_layers
    assert config.name == path.stem
    if path.stem in OFFICIAL:
        assert count_parameters(model) == OFFICIAL[path.stem]


def test_the_class_prior_reaches_the_heads():
    config = shipped("synthetic_tiny", "model.cls_prior=0.02", "model.start=official")
    model = build_detector(config.model)
    (task,) = model.head.tasks
    bias = task.branches[CLASS_BRANCH].out.bias
    assert bias.numel() == config.model.num_layers * len(CLASSES)
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.02))


def test_the_criterion_has_the_weights_of_the_configuration():
    config = shipped("synthetic_tiny", "loss.cls_weight=3.5", "loss.box_cost=0.75", "model.denoising.split=0.5")
    criterion = build_criterion(config, reduce_mean=None, num_processes=4)
    assert criterion.cls_weight == 3.5 and criterion.box_weight == config.loss.box_weight
    assert criterion.box_cost == 0.75 and criterion.cls_cost == config.loss.cls_cost
    assert criterion.dn_split == 0.5 and criterion.num_processes == 4
    assert criterion.code_weights == config.loss.code_weights
    assert [CLASSES[i] for task in criterion.classes for i in task] == [n for task in config.model.tasks for n in task]


class Index:
    """As much of a FrameIndex as a data set asks for when it is made."""

    max_sweeps = 10

    def __len__(self) -> int:
        return 1


@pytest.fixture
def augmentation_of(monkeypatch):
    """Configuration -> the augmentation that its training frames get; no object database is written."""
    asked = {}

    def open_database(index, **settings):
        asked.update(settings)
        return {name: [] for name in CLASSES}

    monkeypatch.setattr("cmt_aqr.build.open_gt_database", open_database)
    monkeypatch.setattr("cmt_aqr.build.GtSampler", lambda database, **settings: settings)

    def make(config: Config):
        dataset = training_dataset(config, Index())
        return dataset._augmentation, dataset, asked

    return make


def test_the_official_fusion_augmentation(augmentation_of):
    config = shipped("cmt_r50_800x320")
    augmentation, dataset, asked = augmentation_of(config)
    image, scene = config.data.image_augmentation, config.data.scene_augmentation
    assert augmentation.image.resize_range == image.resize
    assert augmentation.image.bottom_crop_range == image.crop_bottom
    assert augmentation.image.rotate_range == image.rotation_deg
    assert augmentation.image.flip is image.flip
    assert augmentation.scene.rotation_range == scene.rotation
    assert augmentation.scene.scale_range == scene.scale
    assert augmentation.scene.translation_std == scene.translation_std
    assert augmentation.scene.flip_x_probability == augmentation.scene.flip_y_probability == 0.5
    assert augmentation.point_range == config.model.point_range
    assert augmentation.gt_sampler["counts"] == config.data.gt_sampling.per_class
    assert augmentation.gt_sampling_epochs == config.training.epochs - config.data.gt_sampling.stop_before_end
    assert asked["num_clouds"] == 11 and asked["with_patches"] is True
    assert dataset._final_size == config.model.camera.input_size and dataset._num_clouds == 11
    assert dataset._valid_only is True


def test_a_lidar_model_pastes_no_patches_and_reads_no_image(augmentation_of):
    augmentation, dataset, asked = augmentation_of(shipped("cmt_lidar_0075"))
    assert asked["with_patches"] is False
    assert dataset._final_size is None and dataset._num_clouds == 11
    assert augmentation.image is None


def test_a_camera_model_reads_no_points(augmentation_of):
    _, dataset, _ = augmentation_of(shipped("cmt_camera_vov_1600x640"))
    assert dataset._num_clouds is None and dataset._final_size == (640, 1600)


def test_what_is_null_is_off(augmentation_of):
    settings = ("image_augmentation", "scene_augmentation", "gt_sampling")
    config = shipped("synthetic_tiny", *(f"data.{key}=null" for key in settings), "data.drop_lidar=0.0")
    augmentation, _, asked = augmentation_of(config)
    assert (augmentation.image, augmentation.scene, augmentation.gt_sampler, augmentation.dropout) == (None,) * 4
    assert asked == {}
    config = shipped("synthetic_tiny", "data.drop_lidar=0.1", "data.drop_cameras=0.2")
    dropout = augmentation_of(config)[0].dropout
    assert dataclasses.asdict(dropout) == {"image_probability": 0.2, "point_probability": 0.1}
