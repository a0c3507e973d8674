"""The configuration: what every key of a YAML file means, its type and its range.

A file in ``configs/`` is complete: every key below appears in it, there are no defaults and no include chains, so that
``diff`` of two files shows an experiment. ``load_config`` checks a file, applies ``--set a.b=c`` and reports every
problem at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cmt_aqr.backbones import BackboneName
from cmt_aqr.box_format import BoxChoice
from cmt_aqr.config_checks import CHECKS
from cmt_aqr.strict_yaml import apply_overrides, build, limits, name_source, to_tree
from cmt_aqr.yaml_reader import ConfigError, find_config, read_yaml

# Keys that earlier versions wrote into checkpoints, and their names now.
RENAMED = {
    "model.start": "init",
    "model.denoising.split": "positive_threshold",
    "training.up_fraction": "pct_start",
    "training.momentum_dip": "min_momentum_ratio",
}
# Keys of a block that checkpoints of earlier versions do not have, with the value that means what those versions did.
ADDED = {
    "data": {"failures": []},
    "evaluation": {"compile": False},
    "model.lidar": {"sparse_precision": "fp32"},
    "training": {"schedule": "cyclic", "accumulation": 1, "lr_batch_size": None, "ema_decay": None, "compile": False},
}

Range6 = tuple[float, float, float, float, float, float]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class SyntheticConfig:
    """The synthetic world that is written to ``data.root`` when that folder does not exist."""

    train_scenes: int = limits(low=1, high=99_999)  # scenes of the split synthetic_train
    val_scenes: int = limits(low=1, high=99_999)  # scenes of the split synthetic_val
    samples_per_scene: int = limits(low=1, high=200)  # key frames, at 2 Hz
    image_size: tuple[int, int] = limits(low=16, high=4096)  # width, height in pixels
    sweeps_per_keyframe: int = limits(low=0, high=19)  # LiDAR sweeps between two key frames
    lidar_columns: int = limits(low=16, high=4096)  # azimuth steps of one revolution of the 32 beams
    seed: int = limits(low=0, high=2**32 - 1)  # of everything that is drawn in the world
    workers: int = limits(low=0, high=1024)  # processes that write; 0 = in this process


@dataclass(frozen=True)
class ImageAugmentationConfig:
    """Training-time resize, crop, flip and rotation of the six images; ``lidar2img`` follows."""

    resize: tuple[float, float] = limits(above=0, high=10)  # range of the scale from the camera's size
    crop_bottom: tuple[float, float] = limits(low=0, high=1)  # range of the fraction cut off at the bottom
    rotation_deg: tuple[float, float] = limits(low=-360, high=360)  # range, degrees, about the centre of the crop
    flip: bool  # mirror each image left to right with probability 0.5


@dataclass(frozen=True)
class SceneAugmentationConfig:
    """Training-time rotation, scale, shift and flips of the whole scene in the LiDAR frame."""

    rotation: tuple[float, float] = limits(low=-7, high=7)  # range, radians about +z
    scale: tuple[float, float] = limits(above=0, high=10)  # range of the factor on coordinates, sizes and velocities
    translation_std: Triple = limits(low=0, high=100)  # standard deviation, metres along x, y, z
    flip: bool  # mirror x and y, each with probability 0.5


@dataclass(frozen=True)
class GtSamplingConfig:
    """Paste objects of other training frames, points and image patches, until a class has this many boxes."""

    # class -> number of boxes in a frame up to which objects are pasted
    per_class: dict[str, int] = limits(low=0, high=1000)
    min_points: int = limits(low=0, high=100_000)  # objects with fewer LiDAR points are not pasted
    mix: float = limits(low=0, high=1)  # share of a pasted patch in its pixels
    stop_before_end: int = limits(low=0, high=10_000)  # epochs at the end that train without it


@dataclass(frozen=True)
class FailureConfig:
    """A sensor failure in training, after objects are pasted; docs/failures.md lists all of them."""

    case: str  # such as beams:4, view_drop:FRONT,BACK; without a level one of the case's levels is drawn
    probability: float = limits(low=0, high=1)  # of this failure in a frame, whatever else fails


@dataclass(frozen=True)
class DataConfig:
    """Where the data lie and what is done to a frame before it reaches the network."""

    root: str  # folder of a data set in nuScenes format
    version: str  # folder of its tables, such as v1.0-trainval
    train_split: str  # name of the split to train on
    val_split: str  # name of the split to evaluate on
    # index files and the object database are kept here; null: in the folder cmt_aqr of root
    index_dir: str | None
    velocity_file: str | None  # relative to root; replaces velocities found by differencing annotations
    num_sweeps: int = limits(low=0, high=10)  # previous LiDAR sweeps added to the key frame's
    train_boxes: BoxChoice  # which boxes are ground truth in training: those that hold a point of these sensors, or all
    class_balanced: bool  # CBGS: frames with rare classes are repeated
    balance_boxes: BoxChoice  # which boxes CBGS counts
    skip_empty_frames: bool  # a sample left without a box after augmentation is replaced by a frame drawn at random
    drop_lidar: float = limits(low=0, high=1)  # probability of training on a frame without points
    drop_cameras: float = limits(low=0, high=1)  # probability of training on a frame with blank images
    image_augmentation: ImageAugmentationConfig | None  # null: images are resized and cropped as in evaluation
    scene_augmentation: SceneAugmentationConfig | None  # null: the scene stays as it is
    gt_sampling: GtSamplingConfig | None  # null: nothing is pasted
    failures: tuple[FailureConfig, ...]  # sensors that fail in training; [] is none
    # processes of each training process that load frames; 0: none, frames are loaded by the process itself
    workers: int = limits(low=0, high=256)
    synthetic: SyntheticConfig | None  # null: root holds a data set already


@dataclass(frozen=True)
class LidarConfig:
    """Voxels, sparse encoder, BEV backbone and neck."""

    voxel_size: Triple = limits(low=0.001, high=100)  # metres along x, y, z
    sparse_shape: tuple[int, int, int] = limits(low=1, high=4096)  # cells along z, y, x
    max_points_per_voxel: int = limits(low=1, high=1000)  # later points of a voxel are dropped
    max_voxels_train: int = limits(low=1, high=10_000_000)  # later voxels of a frame are dropped, in training
    max_voxels_test: int = limits(low=1, high=10_000_000)  # later voxels of a frame are dropped, in evaluation
    out_of_range: Literal["drop", "alias"]  # voxels outside sparse_shape (docs/quirks.md, Q13)
    sparse_backend: Literal["auto", "torch", "spconv"]  # a matter of speed; auto: the faster one that is installed
    sparse_precision: Literal["fp32", "fp16", "bf16"]  # of the sparse encoder on a GPU; bf16 is not in spconv
    base_channels: int = limits(low=1, high=2048)  # of the sparse encoder's first convolution
    # stages of the sparse encoder: widths of their convolutions
    encoder_channels: tuple[tuple[int, ...], ...] = limits(low=1, high=2048, entries=(1, 16))
    # z, y, x padding of each stage's stride-2 convolution
    downsample_paddings: tuple[tuple[int, int, int], ...] = limits(low=0, high=1, entries=(0, 16))
    encoder_out_channels: int = limits(low=1, high=2048)  # of the sparse encoder, for each cell along z that is left
    # width of each level of the BEV backbone (SECOND)
    second_channels: tuple[int, ...] = limits(low=1, high=2048, entries=(1, 8))
    # 3x3 convolutions of each level after its first one
    second_layers: tuple[int, ...] = limits(low=0, high=64, entries=(1, 8))
    second_strides: tuple[int, ...] = limits(low=1, high=16, entries=(1, 8))  # stride of each level's first convolution
    # width of each level in the BEV neck, which concatenates them
    neck_channels: tuple[int, ...] = limits(low=1, high=2048, entries=(1, 8))
    neck_strides: tuple[int, ...] = limits(low=1, high=16, entries=(1, 8))  # upsampling of each level in the BEV neck


@dataclass(frozen=True)
class CameraConfig:
    """Image size and normalisation, backbone and neck."""

    input_size: tuple[int, int] = limits(low=32, high=4096)  # height, width that the network sees
    channel_order: Literal["bgr", "rgb"]  # of the images that mean, std and the weights belong to
    mean: Triple = limits(low=-1000, high=1000)  # subtracted from the pixels, 0 to 255, in channel_order
    std: Triple = limits(low=0.001, high=1000)  # divides them afterwards
    backbone: BackboneName  # its stride 16 and stride 32 maps are used
    base_channels: int = limits(low=1, high=512)  # of the ResNet's first stage; 64 is the standard network
    grid_mask: float = limits(low=0, high=1)  # probability of GridMask on a training step's images
    activation_checkpointing: bool  # the backbone is computed again in the backward pass: less memory


@dataclass(frozen=True)
class DenoisingConfig:
    """Denoising queries: noised ground truth that the decoder must correct."""

    num_dn: int = limits(low=0, high=10_000)  # rows kept for them in every batch; 0 switches them off
    # most copies of the ground truth in a step, each with its own noise
    max_groups: int = limits(low=1, high=1000)
    noise_scale: float = limits(low=0, high=100)  # largest shift of a centre, in units of half the box's size
    # queries whose noise vector (three components in [-1, 1]) is longer are background, the others keep their class
    positive_threshold: float = limits(above=0, high=1)


@dataclass(frozen=True)
class AttentionConfig:
    """How the cross-attention with AQR's bias is computed: a matter of speed, but for lowrank, which approximates."""

    backend: Literal["auto", "flex", "score_mod", "dense", "lowrank"]  # auto: flex on a GPU, dense elsewhere
    lowrank_energy: float = limits(above=0, high=1)  # of lowrank: share of the bias's squared singular values it keeps


@dataclass(frozen=True)
class AqrConfig:
    """AQR: every query weighs LiDAR and cameras, in windows around its reference point.

    The bias is clamp(scale * weight, -max_bias, max_bias); the designs v1 and v2 use none of the last four keys.
    """

    design: Literal["bias", "v1", "v2"]  # a bias of the cross-attention, or the earlier maps on token features
    num_layers: int = limits(low=1, high=4)  # of the weight generator
    activation: Literal["tanh", "sigmoid"]  # weights in [-1, 1] or in [0, 1]
    bev_window: int = limits(low=1, high=1000)  # cells of the BEV grid; size w reaches w // 2 cells to every side
    camera_window: int = limits(low=1, high=1000)  # cells in the grid of a camera, size as in bev_window
    camera_assignment: Literal["first", "all"]  # a window in the first camera that sees the point, or in every one
    unseen: Literal["none", "corner"]  # corner: a point that no camera sees has one at view 0, cell 0 (Quirk Q11)
    local: bool  # false: the bias acts on the whole modality
    scale: float = limits(low=0, high=1000)  # factor of the bias, the first value where it is learned
    learn_scale: bool  # train the scale
    scale_range: tuple[float, float] = limits(low=0, high=1000)  # a learned scale is clamped to it after every step
    max_bias: float | None = limits(above=0, high=1000)  # null: no clamp


@dataclass(frozen=True)
class ModelConfig:
    """The detector."""

    point_range: Range6 = limits(low=-10_000, high=10_000)  # metres, LiDAR frame
    hidden_dim: int = limits(low=4, high=4096)  # channels of tokens and queries
    num_queries: int = limits(low=1, high=10_000)  # object queries, without the denoising queries
    num_layers: int = limits(low=1, high=64)  # decoder layers, each with heads of its own
    num_heads: int = limits(low=1, high=256)  # attention heads
    ffn_dim: int = limits(low=1, high=32_768)  # hidden channels of the feed-forward network
    # in self-attention and on the residual branches of both attentions (Quirk Q15)
    dropout: float = limits(low=0, high=1)
    # points on the ray of a camera token or query that its position embedding sees
    depth_bins: int = limits(low=1, high=1024)
    head_channels: int = limits(low=1, high=4096)  # hidden channels of the box and class heads
    head_kernel: Literal[1, 3]  # over the query axis; the official LiDAR-only model has 3
    cls_prior: float | None  # initial probability of every class; null keeps the layer's own initialisation
    init: Literal["official", "local"]  # local: attention begins near each query (models/local_init.py)
    activation_checkpointing: bool  # decoder layers are computed again in the backward pass: less memory
    tasks: tuple[tuple[str, ...], ...] = limits(entries=(1, 10))  # groups of classes with heads of their own
    lidar: LidarConfig | None  # null: no LiDAR
    camera: CameraConfig | None  # null: no cameras
    denoising: DenoisingConfig  # queries that exist in training only
    attention: AttentionConfig  # of the cross-attention with AQR
    aqr: AqrConfig | None  # null: the plain CMT


@dataclass(frozen=True)
class LossConfig:
    """Weights of the matching cost and of the loss."""

    cls_weight: float = limits(low=0, high=1_000_000)  # of the focal loss of the classes
    box_weight: float = limits(low=0, high=1_000_000)  # of the L1 loss of the box codes
    dn_weight: float = limits(low=0, high=1_000_000)  # of both terms for the denoising queries
    cls_cost: float = limits(low=0, high=1_000_000)  # of the focal cost in the matching
    box_cost: float = limits(low=0, high=1_000_000)  # of the L1 cost in the matching
    # of the ten components of a box code (cx, cy, log l, log w, cz, log h, sin, cos, vx, vy)
    code_weights: tuple[float, ...] = limits(low=0, high=1_000_000)


@dataclass(frozen=True)
class TrainingConfig:
    """The loop, the optimizer and its schedule."""

    epochs: int = limits(low=1, high=10_000)  # passes over the training split
    batch_size: int = limits(low=1, high=4096)  # frames in one step, over all processes
    # forward and backward passes that share the frames of a step: less memory, the same gradient to rounding, but for
    # batch norm, which sees the frames of one pass
    accumulation: int = limits(low=1, high=4096)
    precision: Literal["fp32", "bf16", "fp16"]  # of autocast; positions, heads and losses are float32 always
    # graphs of torch.compile for the images, the BEV map, the decoder and the loss: a slow first step; auto: on a GPU
    compile: Literal["auto", True, False]
    lr: float = limits(above=0, high=10)  # learning rate at the start of the schedule
    lr_batch_size: int | None = limits(low=1, high=4096)  # lr is multiplied by batch_size / lr_batch_size; null: by 1
    # cyclic: the original's cosines up and down, for rate and momentum; one_cycle: those of torch's OneCycleLR, which
    # end with the last step; cosine: linear warm-up, cosine down, constant momentum
    schedule: Literal["cyclic", "one_cycle", "cosine"]
    weight_decay: float = limits(low=0, high=100)  # of AdamW
    lr_peak: float = limits(above=0, high=10_000)  # top of the schedule, in units of lr
    lr_end: float = limits(above=0, high=10_000)  # end of the schedule, in units of lr
    pct_start: float = limits(above=0, high=1)  # part of the steps that climbs
    min_momentum_ratio: float = limits(above=0, high=1)  # momentum at the top of the cycle, in units of beta1
    grad_clip: float = limits(above=0, high=1_000_000)  # largest norm of the gradient
    # share of the old value in the running average of the weights, which is evaluated instead of them; null: none
    ema_decay: float | None = limits(above=0, high=0.999999)
    lr_mult: dict[str, float] = limits(low=0, high=1_000_000)  # parameter-name prefix -> factor; longest wins
    # parameter-name prefix -> factor of the weight decay; longest wins
    decay_mult: dict[str, float] = limits(low=0, high=1_000_000)
    freeze: tuple[str, ...]  # parameter-name prefixes; frozen batch-norm stays in eval mode
    norm_eval: tuple[str, ...]  # module-name prefixes whose batch-norm keeps its statistics while its weights train
    init_from: str | None  # weights to start from: from import_checkpoint or train.py, or a backbone's
    log_every: int = limits(low=1, high=1_000_000)  # steps
    eval_every: int = limits(low=1, high=1_000_000)  # epochs; the last epoch is always evaluated
    save_every: int = limits(low=1, high=1_000_000)  # epochs; the last epoch is always saved
    keep_checkpoints: int = limits(low=1, high=1_000_000)  # the newest epoch_*.pt that stay


@dataclass(frozen=True)
class EvaluationConfig:
    """Inference, decoding and pictures."""

    batch_size: int = limits(low=1, high=4096)  # frames of each process at a time
    precision: Literal["fp32", "bf16", "fp16"]  # of autocast, as in training
    compile: Literal["auto", True, False]  # one compiled graph a stage in test.py, CUDA graphs on a GPU; auto: on a GPU
    max_detections: int = limits(low=1, high=500)  # boxes of a frame with the best scores
    post_range: Range6 = limits(low=-10_000, high=10_000)  # metres; boxes whose centre lies outside are dropped
    score_threshold: float | None = limits(low=0, high=1)  # boxes with a lower score are dropped; null: none are
    num_pictures: int = limits(low=0, high=100_000)  # frames that are drawn at each evaluation
    picture_score: float = limits(low=0, high=1)  # boxes below are not drawn


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str  # path of the file below configs/, and of the run below runs/
    seed: int = limits(low=0, high=2**32 - 1)  # of weights, order of the frames, augmentation and noise
    data: DataConfig  # data set and augmentation
    model: ModelConfig  # the network
    loss: LossConfig  # matching and loss
    training: TrainingConfig  # the loop
    evaluation: EvaluationConfig  # inference and pictures


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: a file that names every key of :class:`Config`, or the bare name of one in ``configs``.
        overrides: ``a.b=c`` entries, applied in order.

    Raises:
        ConfigError: lists every unknown, missing, mistyped and out-of-range key and every contradiction between keys.
    """
    file = find_config(path)
    tree = read_yaml(file)
    return build(Config, tree, str(file), CHECKS, apply_overrides(tree, overrides))


@contextmanager
def naming_source(path: str | Path, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Let the problems of keys that are found later, from the model or the machine, begin as those of load_config do.

    Args:
        path, overrides: those of :func:`load_config`.
    """
    try:
        yield
    except ConfigError as error:
        origins = apply_overrides({}, overrides)
        keys = [problem.partition(": ")[0] for problem in error.problems]
        names = [name_source(key, (key,), str(find_config(path)), origins) for key in keys]
        problems = [f"{name}: {problem}" for name, problem in zip(names, error.problems, strict=True)]
        raise ConfigError(problems) from None


def config_from_tree(tree: dict[str, Any], source: str) -> Config:
    """Check a nested dictionary, such as the one in a checkpoint, and turn it into a :class:`Config`."""
    return build(Config, tree, source, CHECKS)


def current_names(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration of a checkpoint, with the keys of earlier versions under their current names, and all keys."""
    missing = {key: value for key, value in ADDED.get(prefix.rstrip("."), {}).items() if key not in tree}
    return missing | {
        RENAMED.get(f"{prefix}{key}", key): current_names(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else value
        for key, value in tree.items()
    }


__all__ = ["Config", "ConfigError", "config_from_tree", "current_names", "load_config", "naming_source", "to_tree"]
