"""docs/config.md from the schema: each key with its values, its meaning, and its name in the original program.

The meaning of a key is the comment of its field in ``cmt_aqr/config.py``, after the field or in the lines above it.
"""

import ast
import dataclasses
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from cmt_aqr import config
from cmt_aqr.errors import UserError
from cmt_aqr.yaml_reader import show_key, suggest

# Our key -> the key in the configuration files of CMT (mmdetection3d). "(= 10)": a default in its code, not in a file.
OFFICIAL = {
    "data.root": "data_root",
    "data.train_split": "data.train.ann_file",
    "data.val_split": "data.val.ann_file",
    "data.num_sweeps": "LoadPointsFromMultiSweeps.sweeps_num",
    "data.train_boxes": "use_valid_flag of the data set",
    "data.class_balanced": "CBGSDataset",
    "data.drop_lidar": "ModalMask3D (= 0.25)",
    "data.drop_cameras": "ModalMask3D (= 0.25)",
    "data.image_augmentation.resize": "ida_aug_conf.resize_lim",
    "data.image_augmentation.crop_bottom": "ida_aug_conf.bot_pct_lim",
    "data.image_augmentation.rotation_deg": "ida_aug_conf.rot_lim",
    "data.image_augmentation.flip": "ida_aug_conf.rand_flip",
    "data.scene_augmentation.rotation": "GlobalRotScaleTransAll.rot_range",
    "data.scene_augmentation.scale": "GlobalRotScaleTransAll.scale_ratio_range",
    "data.scene_augmentation.translation_std": "GlobalRotScaleTransAll.translation_std",
    "data.scene_augmentation.flip": "CustomRandomFlip3D.flip_ratio_bev_horizontal, flip_ratio_bev_vertical",
    "data.gt_sampling": "UnifiedObjectSample",
    "data.gt_sampling.per_class": "db_sampler.sample_groups",
    "data.gt_sampling.min_points": "db_sampler.prepare.filter_by_min_points",
    "data.gt_sampling.mix": "UnifiedObjectSample.mixup_rate",
    "data.workers": "data.workers_per_gpu",
    "model.point_range": "point_cloud_range",
    "model.hidden_dim": "pts_bbox_head.hidden_dim",
    "model.num_queries": "CmtHead.num_query (= 900)",
    "model.num_layers": "transformer.decoder.num_layers",
    "model.num_heads": "attn_cfgs.num_heads",
    "model.ffn_dim": "ffn_cfgs.feedforward_channels",
    "model.dropout": "attn_cfgs.dropout",
    "model.depth_bins": "CmtHead.depth_num (= 64)",
    "model.head_channels": "SeparateTaskHead.head_conv (= 64)",
    "model.head_kernel": "separate_head.final_kernel",
    "model.cls_prior": "separate_head.init_bias (never applied there)",
    "model.activation_checkpointing": "transformerlayers.with_cp",
    "model.tasks": "pts_bbox_head.tasks",
    "model.lidar.voxel_size": "pts_voxel_layer.voxel_size",
    "model.lidar.sparse_shape": "pts_middle_encoder.sparse_shape",
    "model.lidar.max_points_per_voxel": "pts_voxel_layer.max_num_points",
    "model.lidar.max_voxels_train": "pts_voxel_layer.max_voxels[0]",
    "model.lidar.max_voxels_test": "pts_voxel_layer.max_voxels[1]",
    "model.lidar.base_channels": "SparseEncoder.base_channels (= 16)",
    "model.lidar.encoder_channels": "pts_middle_encoder.encoder_channels",
    "model.lidar.downsample_paddings": "pts_middle_encoder.encoder_paddings, the last of each stage",
    "model.lidar.encoder_out_channels": "pts_middle_encoder.output_channels",
    "model.lidar.second_channels": "pts_backbone.out_channels",
    "model.lidar.second_layers": "pts_backbone.layer_nums",
    "model.lidar.second_strides": "pts_backbone.layer_strides",
    "model.lidar.neck_channels": "pts_neck.out_channels",
    "model.lidar.neck_strides": "pts_neck.upsample_strides",
    "model.camera.input_size": "ida_aug_conf.final_dim",
    "model.camera.channel_order": "img_norm_cfg.to_rgb",
    "model.camera.mean": "img_norm_cfg.mean",
    "model.camera.std": "img_norm_cfg.std",
    "model.camera.backbone": "img_backbone.type, depth, spec_name",
    "model.camera.base_channels": "ResNet.base_channels (= 64)",
    "model.camera.grid_mask": "use_grid_mask (probability = 0.7)",
    "model.camera.activation_checkpointing": "img_backbone.with_cp",
    "model.denoising.num_dn": "CmtHead.num_query: copies of the boxes fill at most as many rows",
    "model.denoising.max_groups": "CmtHead.scalar (= 10)",
    "model.denoising.noise_scale": "CmtHead.noise_scale (= 1.0)",
    "model.denoising.positive_threshold": "CmtHead.split (= 0.75)",
    "loss.cls_weight": "loss_cls.loss_weight",
    "loss.box_weight": "loss_bbox.loss_weight",
    "loss.dn_weight": "CmtHead.dn_weight (= 1.0)",
    "loss.cls_cost": "assigner.cls_cost.weight",
    "loss.box_cost": "assigner.reg_cost.weight",
    "loss.code_weights": "train_cfg.pts.code_weights, assigner.code_weights",
    "training.epochs": "total_epochs",
    "training.batch_size": "data.samples_per_gpu times the number of GPUs",
    "training.precision": "CustomFp16OptimizerHook",
    "training.lr": "optimizer.lr",
    "training.weight_decay": "optimizer.weight_decay",
    "training.lr_peak": "lr_config.target_ratio[0]",
    "training.lr_end": "lr_config.target_ratio[1]",
    "training.pct_start": "lr_config.step_ratio_up",
    "training.min_momentum_ratio": "momentum_config.target_ratio[0]",
    "training.grad_clip": "optimizer_config.grad_clip.max_norm",
    "training.lr_mult": "optimizer.paramwise_cfg.custom_keys.*.lr_mult",
    "training.decay_mult": "optimizer.paramwise_cfg.custom_keys.*.decay_mult",
    "training.norm_eval": "img_backbone.norm_eval",
    "training.init_from": "load_from",
    "training.log_every": "log_config.interval",
    "training.eval_every": "evaluation.interval",
    "training.save_every": "checkpoint_config.interval",
    "training.keep_checkpoints": "checkpoint_config.max_keep_ckpts",
    "evaluation.max_detections": "bbox_coder.max_num",
    "evaluation.post_range": "bbox_coder.post_center_range",
    "evaluation.score_threshold": "bbox_coder.score_threshold",
}

INTRODUCTION = """\
# Configuration

Every key of a file in `configs/`. Files are complete: all keys are in every file, and there are no defaults. A block
that may be null is switched off by null. The last column names the key with the same meaning in the configuration files
of [CMT](https://github.com/junjie18/CMT) (mmdetection3d); `(= 10)` is a default of its code that no file sets. Rules
that involve several keys are in `cmt_aqr/config_checks.py` and `config_data_checks.py`.

This page is generated from the comments in `cmt_aqr/config.py` and the names in `cmt_aqr/tools/config_doc.py`: change
them there, then run `python -m cmt_aqr.tools.configs doc`.
"""


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of the schema: dotted name, its values in words, and its meaning."""

    name: str
    takes: str
    meaning: str


def page(schema: type = config.Config, official: Mapping[str, str] = types.MappingProxyType(OFFICIAL)) -> str:
    """The text of docs/config.md."""
    parts = [INTRODUCTION]
    for prefix, block in blocks(schema):
        head = f"## `{prefix}`\n\n{inspect.cleandoc(block.__doc__)}\n" if prefix else "## Top level\n"
        rows = [
            " ".join(
                ["|", f"`{key.name}`", "|", key.takes, "|", *_cell(key.meaning), *_cell(official.get(key.name, ""))]
            )
            for key in keys(block, prefix)
        ]
        table = ["| key | takes | meaning | in CMT |", "|---|---|---|---|", *rows]
        parts.append(head + "\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def explain(name: str) -> str:
    """The meaning of a key, of all keys of a block, or of the keys whose names end like this (``lr``).

    Raises:
        UserError: there is no such key; names the one that was probably meant.
    """
    inside = {prefix: block for prefix, block in blocks(config.Config) if prefix}
    found = {key.name: key for prefix, block in blocks(config.Config) for key in keys(block, prefix)}
    if name in inside:
        doc = inspect.cleandoc(inside[name].__doc__)
        return "\n\n".join([f"{name}: {doc}", *(_explain_key(key) for key in keys(inside[name], name))])
    chosen = [key for key in found.values() if name in (key.name, key.name.rpartition(".")[2])]
    if not chosen:
        last_parts = [key.rpartition(".")[2] for key in found]
        meant = suggest(name, found) or suggest(name, last_parts) or "; docs/config.md has all"
        raise UserError(f"--help-config {show_key(name)}: no such key{meant}")
    return "\n\n".join(_explain_key(key) for key in chosen)


def _explain_key(key: Key) -> str:
    takes = key.takes.replace("` `", ", ").replace("`", "")
    rows = {"takes": takes, "meaning": key.meaning, "in CMT": OFFICIAL.get(key.name, "")}
    return "\n".join([key.name, *(f"  {title:<7}  {text}" for title, text in rows.items() if text)])


def blocks(schema: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Every dataclass of a schema with its dotted name, the schema itself first."""
    yield prefix, schema
    for name, hint in typing.get_type_hints(schema).items():
        inner = block_of(hint)
        if inner is not None:
            yield from blocks(inner, f"{prefix}.{name}" if prefix else name)


def block_of(hint: Any) -> type | None:
    """The dataclass that a field holds, or may hold."""
    return next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)


def keys(block: type, prefix: str) -> list[Key]:
    """The keys of one block."""
    hints = typing.get_type_hints(block)
    meanings = comments(inspect.getsource(inspect.getmodule(block))).get(block.__name__, {})
    return [
        Key(
            name=f"{prefix}.{field.name}" if prefix else field.name,
            takes=_join(_kind(hints[field.name]), _range(field.metadata)),
            meaning=meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(block)
    ]


def comments(source: str) -> dict[str, dict[str, str]]:
    """class -> field -> the comment after the field, preceded by those in the lines directly above it."""
    lines = source.splitlines()
    found = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    result: dict[str, dict[str, str]] = {}
    for block in ast.parse(source).body:
        for field in block.body if isinstance(block, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign):
                first = field.lineno - 1
                while first in found and lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                text = [found[line] for line in (*range(first + 1, field.lineno), field.end_lineno) if line in found]
                result.setdefault(block.name, {})[field.target.id] = " ".join(text)
    return result


def _cell(text: str) -> list[str]:
    """A cell of a Markdown table and the vertical bar after it."""
    return [text.replace("|", "\\|"), "|"] if text else ["|"]


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _kind(hint: Any, is_plural: bool = False) -> str:
    """The values of a type, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    end = "s" if is_plural else ""
    if origin in (typing.Union, types.UnionType):
        return f"{_kind(next(kind for kind in inner if kind is not type(None)))} or null"
    if origin is typing.Literal:
        return " ".join(f"`{str(option).lower() if isinstance(option, bool) else option}`" for option in inner)
    if origin is dict:
        return f"names with {_kind(inner[1], True)}"
    if origin is tuple:
        is_open = inner[-1] is Ellipsis
        count = "" if is_open else f"{len(inner)} "
        return f"list{end} of {count}{_kind(inner[0], True)}"
    if dataclasses.is_dataclass(hint):
        return f"block{end}"
    return {float: f"number{end}", int: f"whole number{end}", bool: "true or false", str: f"text{end}"}[hint]


def _range(bounds: Mapping[str, Any]) -> str:
    """The limits of a field in words."""
    if not bounds:
        return ""
    low, above, high = ("" if bounds[key] is None else f"{bounds[key]:,}".replace(",", " ") for key in (
        "low", "above", "high"))  # fmt: skip
    start = f"above {above}" if above else low
    end = f", up to {high}" if above and high else f" to {high}" if low and high else f"up to {high}" if high else ""
    numbers = f"at least {low}" if low and not high else start + end
    entries = bounds["entries"]
    return _join(f"{entries[0]} to {entries[1]} entries" if entries else "", numbers)
