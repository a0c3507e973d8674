"""Checks across keys of the data, names and paths of a configuration; see ``config_checks`` for what a check is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING

from cmt_aqr.classes import CLASSES
from cmt_aqr.yaml_reader import show_key

if TYPE_CHECKING:
    from cmt_aqr.config import Config

Found = Iterator[tuple[str, str]]

# What the generator writes (cmt_aqr/synthetic/tables.py).
SYNTHETIC_VERSION = "v1.0-synthetic"
SYNTHETIC_SPLITS = ("synthetic_train", "synthetic_val")
# Bytes that file systems allow in one name, less what a suffix takes.
MAX_NAME = 200
MAX_PATH = 2000


def check_image_ranges(config: Config) -> Found:
    """Ranges of the image augmentation."""
    image = config.data.image_augmentation
    if image is not None:
        for key in ("resize", "crop_bottom", "rotation_deg"):
            yield from ordered(f"data.image_augmentation.{key}", getattr(image, key))


def check_scene_ranges(config: Config) -> Found:
    """Ranges of the scene augmentation."""
    scene = config.data.scene_augmentation
    if scene is not None:
        for key in ("rotation", "scale"):
            yield from ordered(f"data.scene_augmentation.{key}", getattr(scene, key))


def ordered(key: str, limits: tuple[float, float]) -> Found:
    """The smaller end of a range comes first; both may be equal."""
    low, high = limits
    if low > high:
        yield key, f"{low:g} is above {high:g}: give the smaller value first"


def check_sampling(config: Config) -> Found:
    """Names of the classes to paste."""
    sampling = config.data.gt_sampling
    for name in sorted(set(sampling.per_class if sampling else ()) - set(CLASSES)):
        yield f"data.gt_sampling.per_class.{show_key(name)}", f"no such class; the classes are {', '.join(CLASSES)}"


def check_dropout(config: Config) -> Found:
    """Probabilities of training without a sensor."""
    lidar, cameras = config.data.drop_lidar, config.data.drop_cameras
    if lidar + cameras > 1:
        yield "data.drop_lidar", f"{lidar:g} and data.drop_cameras {cameras:g} add up to more than 1"
    for sensor in ("lidar", "camera"):
        if getattr(config.model, sensor) is None:
            for key, value in (("drop_lidar", lidar), ("drop_cameras", cameras)):
                if value > 0:
                    yield f"data.{key}", f"must be 0 in a model with one sensor (model.{sensor} is null), got {value:g}"


def check_synthetic(config: Config) -> Found:
    """The synthetic world has one version and two splits."""
    data = config.data
    if data.synthetic is None:
        return
    if data.version != SYNTHETIC_VERSION:
        yield "data.version", f"the synthetic world has the version {SYNTHETIC_VERSION!r}, got {data.version!r}"
    for key in ("train_split", "val_split"):
        split = getattr(data, key)
        if split not in SYNTHETIC_SPLITS:
            yield f"data.{key}", f"the synthetic world has the splits {' and '.join(SYNTHETIC_SPLITS)}, got {split!r}"


def check_names(config: Config) -> Found:
    """Names that become part of a path."""
    for key, value, nests in (
        ("name", config.name, True),
        ("data.version", config.data.version, False),
        ("data.train_split", config.data.train_split, False),
        ("data.val_split", config.data.val_split, False),
    ):
        parts = PurePath(value).parts
        if not parts or ".." in parts or value.startswith("/") or (not nests and len(parts) > 1):
            slash = "begin with" if nests else "contain"
            yield key, f"expected a name that is not empty, has no '..' and does not {slash} '/', got {value!r}"
        elif len(value.encode()) > MAX_NAME:
            yield key, f"{len(value.encode())} bytes are more than the {MAX_NAME} of the longest name"


def check_paths(config: Config) -> Found:
    """Files and folders that the configuration names."""
    for key, path in (
        ("data.root", config.data.root),
        ("data.index_dir", config.data.index_dir),
        ("data.velocity_file", config.data.velocity_file),
        ("training.init_from", config.training.init_from),
    ):
        if path is None:
            continue
        longest = max((len(part.encode()) for part in PurePath(path).parts), default=0)
        if not longest:
            yield key, "is empty, expected a path"
        elif longest > MAX_NAME or len(path.encode()) > MAX_PATH:
            yield (
                key,
                f"{len(path.encode())} bytes, its longest part {longest}: a path has at most {MAX_PATH} bytes and "
                f"each of its parts {MAX_NAME}",
            )
