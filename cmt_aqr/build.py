"""From a configuration to the things it describes: one constructor call each, nothing hidden."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_aqr.aqr.router import BiasRouter, ModulationRouter
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import WindowSettings
from cmt_aqr.backbones import make_backbone
from cmt_aqr.classes import CAMERAS
from cmt_aqr.config import CameraConfig, Config, ConfigError, DataConfig, LidarConfig, ModelConfig
from cmt_aqr.config_checks import bev_stride
from cmt_aqr.data.dataset import FrameDataset, TrainingAugmentation
from cmt_aqr.data.failures import Failure, FailureDataset, name_problems, training_failures
from cmt_aqr.data.gt_database import open_gt_database
from cmt_aqr.data.gt_sampling import GtSampler
from cmt_aqr.data.image_transforms import ImageAugmentation
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import check_split, load_index
from cmt_aqr.data.sample import DataError
from cmt_aqr.data.scene_transforms import ModalityDropout, SceneAugmentation
from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.detector import Detector, SharedConv
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.image import ImageBranch
from cmt_aqr.models.lidar import LidarBranch, SparseEncoder, missing_spconv
from cmt_aqr.models.local_init import init_local
from cmt_aqr.models.neck import CPFPN
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.models.queries import ReferencePoints
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.predictions import task_classes
from cmt_aqr.training.optim import prefix_problems

POINT_FEATURES = 5
# Bytes of a float32 weight; in training with its gradient and AdamW's two moments.
WEIGHT_BYTES, TRAINING_BYTES = 4, 16


def check_device(config: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError, with all problems, for a model that cannot run on the device."""
    problems = _device_problems(config, device)
    problems += _memory_problems(count_parameters(build_on_meta(config)), WEIGHT_BYTES, device)
    if problems:
        raise ConfigError(problems)


def check_training(config: Config, device: torch.device) -> None:
    """As :func:`check_device` for training, which takes more memory and has prefixes that may fit no parameter."""
    model = build_on_meta(config.model)
    problems = _device_problems(config.model, device)
    problems += prefix_problems(model, config.training)
    problems += name_problems([entry.case for entry in config.data.failures], sensors_of(config.model))
    problems += _memory_problems(count_parameters(model), TRAINING_BYTES, device)
    if problems:
        raise ConfigError(problems)


def _device_problems(config: ModelConfig, device: torch.device) -> list[str]:
    problems = []
    if config.aqr is not None and config.attention.backend == "flex" and device.type != "cuda":
        problems.append(f"model.attention.backend: 'flex' needs a CUDA GPU, this run is on {device.type}; use 'auto'")
    if config.lidar is not None and config.lidar.out_of_range == "alias" and device.type == "cuda":
        problems.append("model.lidar.out_of_range: 'alias' exists on the CPU only, this run is on cuda; use 'drop'")
    return problems


def sensors_of(config: ModelConfig) -> tuple[str, ...]:
    """Which of ``lidar`` and ``camera`` the model uses."""
    return tuple(name for name in ("lidar", "camera") if getattr(config, name) is not None)


def build_on_meta(config: ModelConfig) -> Detector:
    """The detector without memory for its weights: names and shapes only, in a fraction of a second."""
    with torch.device("meta"):
        return build_detector(config)


def _memory_problems(parameters: int, bytes_each: int, device: torch.device) -> list[str]:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = parameters * bytes_each
    if total <= memory:
        return []
    needed = f"{parameters / 1e6:,.0f} million parameters of {bytes_each} bytes need {total / 1e9:,.0f} GB"
    return [f"model: {needed}, {device.type} has {memory / 1e9:,.0f}; lower model.hidden_dim, ffn_dim or num_layers"]


def build_detector(config: ModelConfig) -> Detector:
    """The detector with fresh weights, on the current default device.

    A configuration that :func:`cmt_aqr.config.load_config` accepts can be built: a ValueError here is a bug.
    """
    classes = task_classes(config.tasks)
    lidar = None if config.lidar is None else build_lidar_branch(config.lidar, config.point_range)
    camera = None if config.camera is None else build_image_branch(config.camera, config.hidden_dim)
    detector = Detector(
        image_branch=camera,
        lidar_branch=lidar,
        shared_conv=None if lidar is None else SharedConv(in_channels=lidar.neck.out_channels, dim=config.hidden_dim),
        reference_points=ReferencePoints(num_queries=config.num_queries),
        bev_embedding=BevEmbedding(dim=config.hidden_dim),
        ray_embedding=None
        if camera is None
        else RayEmbedding(dim=config.hidden_dim, num_depths=config.depth_bins, point_range=config.point_range),
        decoder=Decoder(
            dim=config.hidden_dim,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            dropout=config.dropout,
            checkpoint_layers=config.activation_checkpointing,
        ),
        head=Heads(
            classes=classes,
            num_layers=config.num_layers,
            dim=config.hidden_dim,
            point_range=config.point_range,
            hidden=config.head_channels,
            kernel=config.head_kernel,
            cls_prior=config.cls_prior,
        ),
        aqr=build_aqr(config),  # last: all else starts from the same random numbers with AQR and without
        bev_origin=config.point_range[:2],
        bev_cell_size=None if config.lidar is None else bev_cell_size(config.lidar),
    )
    if config.init == "local" and not detector.reference_points.weight.is_meta:
        init_local(detector)
    return detector


def build_aqr(config: ModelConfig) -> BiasRouter | ModulationRouter | None:
    """The weight generator and what its weights do, or None for the plain detector."""
    aqr = config.aqr
    if aqr is None:
        return None
    router = BiasRouter if aqr.design == "bias" else ModulationRouter
    windows = WindowSettings(
        {"lidar": aqr.bev_window, "camera": aqr.camera_window},
        camera_assignment=aqr.camera_assignment,
        unseen=aqr.unseen,
        is_local=aqr.local,
    )
    generator = WeightGenerator(
        dim=config.hidden_dim,
        num_heads=config.num_heads,
        ffn_dim=config.ffn_dim,
        num_layers=aqr.num_layers,
        num_grids=len(windows.sizes),
        activation=aqr.activation,
        neutral=router.NEUTRAL_WEIGHT,
    )
    if aqr.design != "bias":
        return ModulationRouter(design=aqr.design, generator=generator, windows=windows, point_range=config.point_range)
    return BiasRouter(
        generator=generator,
        windows=windows,
        point_range=config.point_range,
        scale=Scale(value=aqr.scale, is_learned=aqr.learn_scale, limits=aqr.scale_range),
        max_bias=aqr.max_bias,
        backend=config.attention.backend,
        lowrank_energy=config.attention.lowrank_energy,
    )


def bev_cell_size(config: LidarConfig) -> tuple[float, float]:
    """Metres along x, y of a cell of the BEV map."""
    stride = bev_stride(config)
    return config.voxel_size[0] * stride, config.voxel_size[1] * stride


def build_lidar_branch(config: LidarConfig, point_range: tuple[float, ...]) -> LidarBranch:
    """Points -> BEV map; ConfigError where its sparse convolutions need spconv and there is none."""
    error = missing_spconv(config.sparse_backend, config.out_of_range)
    if error is not None:
        raise ConfigError([f"model.lidar.{error}"])
    encoder = SparseEncoder(
        in_channels=POINT_FEATURES,
        sparse_shape=config.sparse_shape,
        base_channels=config.base_channels,
        encoder_channels=config.encoder_channels,
        downsample_paddings=config.downsample_paddings,
        out_channels=config.encoder_out_channels,
        out_of_range=config.out_of_range,
        precision=PRECISIONS[config.sparse_precision],
        backend=config.sparse_backend,
    )
    return LidarBranch(
        voxel_size=config.voxel_size,
        point_range=point_range,
        max_points=config.max_points_per_voxel,
        max_voxels_train=config.max_voxels_train,
        max_voxels_test=config.max_voxels_test,
        encoder=encoder,
        backbone=SECOND(
            in_channels=encoder.output_shape[0],
            channels=config.second_channels,
            layers=config.second_layers,
            strides=config.second_strides,
        ),
        neck=SECONDFPN(
            in_channels=config.second_channels, channels=config.neck_channels, upsample_strides=config.neck_strides
        ),
    )


def build_image_branch(config: CameraConfig, channels: int) -> ImageBranch:
    """Images -> camera maps of this many channels."""
    backbone = make_backbone(
        config.backbone, base_channels=config.base_channels, use_checkpoint=config.activation_checkpointing
    )
    return ImageBranch(
        mean=config.mean,
        std=config.std,
        channel_order=config.channel_order,
        backbone=backbone,
        neck=CPFPN(in_channels=backbone.out_channels, channels=channels),
    )


def build_criterion(config: Config, *, reduce_mean: Callable[[Tensor], Tensor] | None, num_processes: int) -> Criterion:
    """The training loss; see :class:`Criterion` for the two arguments."""
    return Criterion(
        classes=task_classes(config.model.tasks),
        code_weights=config.loss.code_weights,
        cls_weight=config.loss.cls_weight,
        box_weight=config.loss.box_weight,
        dn_weight=config.loss.dn_weight,
        cls_cost=config.loss.cls_cost,
        box_cost=config.loss.box_cost,
        positive_threshold=config.model.denoising.positive_threshold,
        reduce_mean=reduce_mean,
        num_processes=num_processes,
    )


def open_split(config: DataConfig, split: str, tables: Tables | None = None) -> FrameIndex:
    """The index file of a split, built when it is missing or stale: from ``tables`` where they are given.

    Raises:
        DataError: one sentence on what is wrong with the data set.
    """
    root = data_root(config)
    return load_index(
        dataroot=root,
        version=config.version,
        split=split,
        cache_dir=_cache_dir(config),
        cameras=CAMERAS,
        velocity_file=None if config.velocity_file is None else root / config.velocity_file,
        tables=tables,
    )


def evaluation_dataset(config: Config, index: FrameIndex) -> FrameDataset:
    """Frames as they are, in order, with all boxes."""
    return FrameDataset(index, **_sensors(config))


def failure_dataset(config: Config, index: FrameIndex, failures: Sequence[Failure | None], seed: int) -> FailureDataset:
    """Every frame under every failure, with all boxes."""
    return FailureDataset(index, failures, seed=seed, **_sensors(config))


def data_root(config: DataConfig) -> Path:
    """The folder of the data set; DataError where there is none."""
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(
            f"data.root {root} does not exist or is no folder; name the folder of the data set with --set "
            f"data.root=FOLDER"
        )
    return root


def _cache_dir(config: DataConfig) -> Path:
    # With the data they were made from: a folder elsewhere could be taken for the data set when data.root is forgotten.
    return Path(config.root) / "cmt_aqr" if config.index_dir is None else Path(config.index_dir)


def check_splits(config: DataConfig) -> None:
    """Refuse a split that the tables do not know, before the hours that an index and an object database can take.

    Raises:
        DataError: names the split and those that have frames.
    """
    root = data_root(config)
    for key in ("train_split", "val_split"):
        try:
            check_split(root, config.version, getattr(config, key))
        except DataError as error:
            raise DataError(f"data.{key}: {error}") from None


def training_dataset(config: Config, index: FrameIndex) -> FrameDataset:
    """Augmented frames with the boxes of `data.train_boxes`."""
    data = config.data
    sampler = None
    if data.gt_sampling is not None:
        database = open_gt_database(
            index,
            cache_dir=_cache_dir(data),
            num_sweeps=data.num_sweeps,
            with_patches=config.model.camera is not None,
            min_points=data.gt_sampling.min_points,
            num_workers=data.workers,
        )
        sampler = GtSampler(database, counts=data.gt_sampling.per_class, mix=data.gt_sampling.mix)
    augmentation = TrainingAugmentation(
        seed=config.seed,
        point_range=config.model.point_range,
        image=_image_augmentation(data),
        scene=_scene_augmentation(data),
        dropout=ModalityDropout(image_probability=data.drop_cameras, point_probability=data.drop_lidar)
        if data.drop_cameras or data.drop_lidar
        else None,
        gt_sampler=sampler,
        gt_sampling_epochs=0 if sampler is None else config.training.epochs - data.gt_sampling.stop_before_end,
        failures=training_failures(
            [(entry.case, entry.probability) for entry in data.failures], index, num_sweeps=data.num_sweeps
        ),
    )
    return FrameDataset(
        index,
        boxes=data.train_boxes,
        skip_empty_frames=data.skip_empty_frames,
        augmentation=augmentation,
        **_sensors(config),
    )


def _sensors(config: Config) -> dict:
    return {
        "final_size": None if config.model.camera is None else config.model.camera.input_size,
        "num_sweeps": None if config.model.lidar is None else config.data.num_sweeps,
    }


def _image_augmentation(config: DataConfig) -> ImageAugmentation | None:
    image = config.image_augmentation
    if image is None:
        return None
    return ImageAugmentation(
        resize_range=image.resize, bottom_crop_range=image.crop_bottom, rotate_range=image.rotation_deg, flip=image.flip
    )


def _scene_augmentation(config: DataConfig) -> SceneAugmentation | None:
    scene = config.scene_augmentation
    if scene is None:
        return None
    flip = 0.5 if scene.flip else 0.0
    return SceneAugmentation(
        rotation_range=scene.rotation,
        scale_range=scene.scale,
        translation_std=scene.translation_std,
        flip_y_probability=flip,
        flip_x_probability=flip,
    )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
