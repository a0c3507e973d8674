"""Checks across keys of a configuration: what one key allows depends on another.

A check is a function of the configuration that yields (dotted key, what is wrong). ``CHECKS`` lists each with the keys
it reads; it runs when those are sound, also when others are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cmt_aqr.box_format import CODE_SIZE
from cmt_aqr.classes import CLASSES
from cmt_aqr.config_data_checks import (
    Found,
    check_dropout,
    check_image_ranges,
    check_names,
    check_paths,
    check_sampling,
    check_scene_ranges,
    check_synthetic,
)

if TYPE_CHECKING:
    from cmt_aqr.config import Config, LidarConfig

# FlexAttention refuses narrower heads.
MIN_FLEX_HEAD = 16
# One pair of sine and cosine for each of two coordinates.
MIN_LOCAL_HEAD = 4
# Metres at which a camera's rays begin (cmt_aqr/models/position.py, Quirk Q5).
MIN_RAY_END = 1.0
# Pixels of the network's input to a camera token.
CAMERA_STRIDE = 16
# Parameter-name prefix of AQR's learned scale.
AQR_SCALE = "aqr.scale"


def _check_ranges(config: Config) -> Found:
    boxes = {"model.point_range": config.model.point_range, "evaluation.post_range": config.evaluation.post_range}
    for key, box in boxes.items():
        for axis, name in enumerate("xyz"):
            if box[axis] >= box[axis + 3]:
                yield key, f"{name}_min {box[axis]:g} is not below {name}_max {box[axis + 3]:g}"


def _check_widths(config: Config) -> Found:
    width, heads = config.model.hidden_dim, config.model.num_heads
    if width % heads:
        yield "model.hidden_dim", f"{width} is not a multiple of model.num_heads {heads}"
    if width % 4:
        yield "model.hidden_dim", f"the sine embedding needs a multiple of 4, got {width}"


def _check_local_init(config: Config) -> Found:
    model = config.model
    if model.init != "local":
        return
    channels = model.hidden_dim // model.num_heads
    if channels < MIN_LOCAL_HEAD:
        yield "model.init", f"'local' needs heads of {MIN_LOCAL_HEAD} channels or more, got {channels}"
    if model.camera is not None and model.depth_bins < 2:
        yield "model.depth_bins", f"model.init 'local' needs 2 or more, got {model.depth_bins}"
    if model.camera is not None and model.lidar is not None and model.num_heads < 2:
        yield "model.num_heads", f"model.init 'local' needs 2 or more, one a sensor, got {model.num_heads}"


def _check_sensors(config: Config) -> Found:
    if config.model.lidar is None and config.model.camera is None:
        yield "model", "lidar and camera are both null: a detector needs at least one sensor"
    if config.model.camera is not None:
        height, width = config.model.camera.input_size
        if height % 32 or width % 32:
            yield "model.camera.input_size", f"height and width must be multiples of 32, got {height} x {width}"


def _check_camera_range(config: Config) -> Found:
    if config.model.camera is not None and config.model.point_range[3] <= MIN_RAY_END:
        yield (
            "model.point_range",
            f"x_max must be above {MIN_RAY_END:g} m, where a camera's rays begin, got {config.model.point_range[3]:g}",
        )


def _check_lidar_lengths(config: Config) -> Found:
    lidar = config.model.lidar
    if lidar is None:
        return
    keys = ("second_channels", "second_layers", "second_strides", "neck_channels", "neck_strides")
    if len({len(getattr(lidar, key)) for key in keys}) != 1:
        shown = ", ".join(f"{key} {len(getattr(lidar, key))}" for key in keys)
        yield "model.lidar", f"these lists must have the same length: {shown}"
    halvings = len(lidar.encoder_channels) - 1
    if len(lidar.downsample_paddings) != halvings:
        yield (
            "model.lidar.downsample_paddings",
            f"expected {halvings} entries, one a stage of model.lidar.encoder_channels but the last, got "
            f"{len(lidar.downsample_paddings)}",
        )


def _check_encoder_channels(config: Config) -> Found:
    lidar = config.model.lidar
    if lidar is None:
        return
    channels = lidar.base_channels
    for i, widths in enumerate(lidar.encoder_channels):
        is_last = i == len(lidar.encoder_channels) - 1
        if any(width != channels for width in (widths if is_last else widths[:-1])):
            yield (
                f"model.lidar.encoder_channels[{i}]",
                f"residual blocks keep their width, so all entries{'' if is_last else ' but the last'} must be "
                f"{channels}, the channels that enter the stage, got {list(widths)}",
            )
        channels = widths[-1]


def _check_sparse_backend(config: Config) -> Found:
    lidar = config.model.lidar
    if lidar is not None and lidar.out_of_range == "alias" and lidar.sparse_backend == "torch":
        yield (
            "model.lidar.sparse_backend",
            "'torch' does not alias voxels as spconv does, but model.lidar.out_of_range is 'alias'; use 'spconv' or "
            "'auto', or out_of_range 'drop'",
        )
    if lidar is not None and lidar.sparse_precision == "bf16" and lidar.sparse_backend == "spconv":
        yield "model.lidar.sparse_precision", "spconv has no bf16 kernels; use fp16 or fp32, or sparse_backend 'auto'"


def _check_compile(config: Config) -> Found:
    model, lidar = config.model, config.model.lidar
    if config.evaluation.compile is not True:
        return
    if lidar is not None and (lidar.sparse_backend == "spconv" or lidar.out_of_range == "alias"):
        key, value = ("out_of_range", "alias") if lidar.out_of_range == "alias" else ("sparse_backend", "spconv")
        yield (
            "evaluation.compile",
            f"true needs PyTorch's sparse encoder, but model.lidar.{key} is {value!r}; use false",
        )
    if model.attention.backend == "lowrank":
        yield "evaluation.compile", "true cannot hold model.attention.backend 'lowrank'; use false"


def _check_training_compile(config: Config) -> Found:
    if (
        config.training.compile is True
        and config.model.aqr is not None
        and config.model.attention.backend == "score_mod"
    ):
        yield (
            "training.compile",
            "true cannot hold model.attention.backend 'score_mod', which compiles itself; use false",
        )


def _check_bev_map(config: Config) -> Found:
    """The maps on the way from the voxels to the BEV tokens have cells, and those of SECOND come to one size."""
    lidar = config.model.lidar
    if lidar is None or any(_check_lidar_lengths(config)):
        return
    shape = encoder_cells(lidar.sparse_shape, lidar.downsample_paddings)
    if min(shape) < 1:
        yield (
            "model.lidar.sparse_shape",
            f"{list(lidar.sparse_shape)} (z, y, x) is too small for the {len(lidar.downsample_paddings)} stride-2 "
            f"convolutions of model.lidar.encoder_channels and the final one along z, which would leave "
            f"{list(shape)} cells; use more cells or fewer stages",
        )
        return
    maps, sizes = list(second_maps(lidar, shape[1:])), set()
    for (rows, cols), stride in zip(maps, lidar.neck_strides, strict=True):
        if rows * cols < 2:
            yield (
                "model.lidar.second_strides",
                f"{list(lidar.second_strides)} leave a map of one cell out of {shape[1]} x {shape[2]}; use more cells "
                f"in model.lidar.sparse_shape or smaller strides",
            )
            return
        sizes.add((rows * stride, cols * stride))
    if len(sizes) != 1:
        shown = ", ".join(f"{rows} x {cols}" for rows, cols in sorted(sizes))
        yield (
            "model.lidar.neck_strides",
            f"{list(lidar.neck_strides)} does not bring the maps of model.lidar.second_strides "
            f"{list(lidar.second_strides)} to one size, but to {shown} cells",
        )


def encoder_cells(sparse_shape: tuple[int, ...], paddings: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Cells (z, y, x) that the sparse encoder leaves: kernels of 3 at stride 2, at last along z only, unpadded."""
    for padding in paddings:
        sparse_shape = tuple(max(0, (n + 2 * p - 3) // 2 + 1) for n, p in zip(sparse_shape, padding, strict=True))
    return (max(0, (sparse_shape[0] - 3) // 2 + 1), *sparse_shape[1:])


def second_maps(lidar: LidarConfig, cells: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows and columns of every map of SECOND: kernels of 3, padding 1."""
    rows, cols = cells
    for stride in lidar.second_strides:
        rows, cols = (rows - 1) // stride + 1, (cols - 1) // stride + 1
        yield rows, cols


def _second_scale(lidar: LidarConfig, level: int) -> float:
    """Cells of the encoder's map to a cell of the BEV map, by the way through a level of SECOND."""
    return math.prod(lidar.second_strides[: level + 1]) / lidar.neck_strides[level]


def bev_stride(lidar: LidarConfig) -> float:
    """Voxels to a cell of the BEV map, along x and along y."""
    return 2 ** (len(lidar.encoder_channels) - 1) * _second_scale(lidar, 0)


def _check_voxels(config: Config) -> Found:
    model, lidar = config.model, config.model.lidar
    if lidar is None:
        return
    for axis, name in enumerate("xyz"):
        size, voxel = model.point_range[axis + 3] - model.point_range[axis], lidar.voxel_size[axis]
        cells, declared = size / voxel, lidar.sparse_shape[2 - axis]
        if abs(cells - round(cells)) > 1e-3:
            yield (
                "model.lidar.voxel_size",
                f"{size:g} m along {name} is {cells:g} voxels of {voxel:g} m, not a whole number",
            )
        if axis < 2 and declared > round(cells):
            yield (
                "model.lidar.sparse_shape",
                f"{declared} cells along {name}, but model.point_range holds {round(cells)} voxels of {voxel:g} m",
            )


def _check_classes(config: Config) -> Found:
    named = [name for task in config.model.tasks for name in task]
    if sorted(named) != sorted(CLASSES):
        wrong = sorted(set(named) ^ set(CLASSES)) or sorted({name for name in named if named.count(name) > 1})
        yield "model.tasks", f"must name each of the ten classes once; at fault: {', '.join(wrong)}"


def _check_aqr(config: Config) -> Found:
    model, aqr = config.model, config.model.aqr
    if aqr is None:
        return
    if model.lidar is None or model.camera is None:
        yield (
            "model.aqr",
            f"weighs LiDAR against cameras, but model.{'lidar' if model.lidar is None else 'camera'} is null",
        )
    if aqr.design != "bias":
        if aqr.activation != "sigmoid":
            yield "model.aqr.activation", f"the design {aqr.design} needs 'sigmoid', got {aqr.activation!r}"
        if not aqr.local:
            yield "model.aqr.local", f"the design {aqr.design} draws its maps in windows and needs true, got false"
        return
    low, high = aqr.scale_range
    if low >= high:
        yield "model.aqr.scale_range", f"{low:g} is not below {high:g}: give the smaller value first"
    elif not low <= aqr.scale <= high:
        yield "model.aqr.scale", f"{aqr.scale:g} lies outside model.aqr.scale_range {low:g} to {high:g}"
    if model.attention.backend in ("auto", "flex", "score_mod") and model.hidden_dim // model.num_heads < MIN_FLEX_HEAD:
        yield (
            "model.attention.backend",
            f"{model.attention.backend!r} needs heads of {MIN_FLEX_HEAD} channels or more on a GPU, but "
            f"model.hidden_dim {model.hidden_dim} / model.num_heads {model.num_heads} gives "
            f"{model.hidden_dim // model.num_heads}; use 'dense'",
        )


def _check_aqr_windows(config: Config) -> Found:
    aqr, lidar, camera = config.model.aqr, config.model.lidar, config.model.camera
    if aqr is None or lidar is None or camera is None or not (lidar.second_strides and lidar.neck_strides):
        return
    grids = (
        ("bev_window", aqr.bev_window, max(lidar.sparse_shape[1:]) / bev_stride(lidar)),
        ("camera_window", aqr.camera_window, max(camera.input_size) / CAMERA_STRIDE),
    )
    for key, size, cells in grids:
        if size > 2 * cells:
            yield (
                f"model.aqr.{key}",
                f"{size} is more than twice the {cells:g} cells of its grid; for a bias on the whole modality set "
                f"model.aqr.local to false",
            )


def _check_scale_decay(config: Config) -> Found:
    aqr = config.model.aqr
    has_scale = aqr is not None and aqr.design == "bias" and aqr.learn_scale
    if has_scale and config.training.decay_mult.get(AQR_SCALE) != 0:
        yield "training.decay_mult", f"must hold {AQR_SCALE}: 0.0, a learned scale takes no weight decay"


def _check_numbers(config: Config) -> Found:
    if len(config.loss.code_weights) != CODE_SIZE:
        count = len(config.loss.code_weights)
        yield "loss.code_weights", f"expected {CODE_SIZE} values, one a component of the box code, got {count}"
    prior = config.model.cls_prior
    if prior is not None and not 0 < prior < 1:
        yield "model.cls_prior", f"must lie between 0 and 1, got {prior:g}"
    if config.training.pct_start >= 1:
        yield "training.pct_start", f"must be below 1, got {config.training.pct_start:g}"


# Each check with the keys it reads: it runs when they are sound.
CHECKS = (
    (("name", "data.version", "data.train_split", "data.val_split"), check_names),
    (("data.root", "data.index_dir", "data.velocity_file", "training.init_from"), check_paths),
    (("data.synthetic", "data.version", "data.train_split", "data.val_split"), check_synthetic),
    (("data.image_augmentation",), check_image_ranges),
    (("data.scene_augmentation",), check_scene_ranges),
    (("data.gt_sampling",), check_sampling),
    (("data.drop_lidar", "data.drop_cameras", "model.lidar", "model.camera"), check_dropout),
    (("model.point_range", "evaluation.post_range"), _check_ranges),
    (("model.hidden_dim", "model.num_heads"), _check_widths),
    (
        (
            "model.init",
            "model.hidden_dim",
            "model.num_heads",
            "model.depth_bins",
            "model.lidar",
            "model.camera",
        ),
        _check_local_init,
    ),
    (("model.lidar", "model.camera"), _check_sensors),
    (("model.camera", "model.point_range"), _check_camera_range),
    (("model.lidar",), _check_lidar_lengths),
    (("model.lidar",), _check_encoder_channels),
    (("model.lidar",), _check_sparse_backend),
    (("evaluation.compile", "model.lidar", "model.attention"), _check_compile),
    (("training.compile", "model.aqr", "model.attention"), _check_training_compile),
    (("model.lidar",), _check_bev_map),
    (("model.lidar", "model.point_range"), _check_voxels),
    (("model.tasks",), _check_classes),
    (
        (
            "model.aqr",
            "model.lidar",
            "model.camera",
            "model.hidden_dim",
            "model.num_heads",
            "model.attention",
        ),
        _check_aqr,
    ),
    (("model.aqr", "model.lidar", "model.camera"), _check_aqr_windows),
    (("model.aqr", "training.decay_mult"), _check_scale_decay),
    (("loss.code_weights", "model.cls_prior", "training.pct_start"), _check_numbers),
)
