"""Run the stage functions of ``python -m cmt_aqr.golden export`` in float64 on what a recorded case is given."""

import torch
from torch import Tensor

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import WindowSettings
from cmt_aqr.build import build_criterion
from cmt_aqr.cameras import make_cameras
from cmt_aqr.config import Config, load_config
from cmt_aqr.evaluation.postprocess import Decoding
from cmt_aqr.golden.export import draw_denoising
from cmt_aqr.golden.stages import (
    Frame,
    keep_gradients,
    keep_routed,
    run_boxes,
    run_head,
    run_images,
    run_lidar,
    run_losses,
    run_voxels,
)
from cmt_aqr.jobs import decoding_of
from cmt_aqr.models.image import ImageBranch
from cmt_aqr.models.lidar import LidarBranch
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.voxels import VoxelBatch
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, Predictions
from cmt_aqr.tokens import Queries, Tokens
from tests.parity.golden import REPOSITORY, Golden
from tests.parity.head_case import HeadCase
from tests.parity.recorded_cases import Recorded
from tests.parity.test_image_branch import build_branch as build_image_branch
from tests.parity.test_lam_windows import golden_layout
from tests.parity.test_lidar_branch import build_branch as build_lidar_branch
from tests.parity.test_lidar_branch import build_oob_encoder, voxel_settings

NORMALISATION = {"mean": (103.530, 116.280, 123.675), "std": (57.375, 57.120, 58.395), "channel_order": "bgr"}


def exported(golden: Golden, case: Recorded) -> dict[str, Tensor]:
    """The stages of a case by name, made with the weights of its golden file."""
    if "images/input" in case.given:
        return export_images(golden, case)
    if "inputs/points.0" in case.given:
        return export_lidar(golden, case)
    if "windows/lidar" in case.stages:
        return export_windows(golden, case)
    return export_head(golden, case) if case.weights else export_boxes(case)


def export_head(golden: Golden, case: Recorded) -> dict[str, Tensor]:
    """From the maps of the branches to boxes; in training from boxes and noise to gradients."""
    head, made = HeadCase(golden, torch.float64, prefix=case.prefix, meta=case.settings), {}
    config, detector = settings_of(case), head.detector
    blank = None
    if head.pv_maps is not None:  # their size alone is read
        blank = torch.zeros(*head.pv_maps.shape[:2], *head.image_size, 3, dtype=torch.uint8)
    frame = Frame(blank, None if head.bev_map is None else [torch.zeros(0, 5)] * len(head.bev_map), head.lidar2img)
    if "inputs/noise" not in case.given:
        with torch.no_grad():
            run_boxes(
                run_head(detector.eval(), (head.pv_maps, head.bev_map), frame, None, made), decoding_of(config), made
            )
        return made
    frame = Frame(frame.images, frame.points, frame.lidar2img, head.targets())
    denoising = draw_denoising(config, frame, case.given["inputs/noise"])
    # Batch norm takes the statistics of the batch, as in the recorded step; the models of these files have no dropout.
    predictions = run_head(detector.train(), (head.pv_maps, head.bev_map), frame, denoising, made)
    criterion = build_criterion(config, reduce_mean=None, num_processes=1)
    run_losses(criterion, predictions, frame.targets, denoising, made).backward()
    chosen = [name.removeprefix("gradients/") for name in case.stages if name.startswith("gradients/")]
    assert keep_gradients(detector, chosen, made) == list(case.gradient_names)
    return {name: x.detach() for name, x in made.items()}


def settings_of(case: Recorded) -> Config:
    """A configuration with the settings of a case, for the functions that are given one."""
    meta = case.settings
    values = {
        "model.point_range": meta["pc_range"], "model.num_queries": meta["num_query"], "model.tasks": meta["tasks"],
    }  # fmt: skip
    if "max_num" in meta:
        values |= {
            "evaluation.max_detections": meta["max_num"], "evaluation.post_range": meta["post_center_range"],
        }  # fmt: skip
    if "scalar" in meta:
        assert meta["noise_trans"] == 0  # what noised_centres leaves out
        values |= {
            "model.denoising.num_dn": case.given["inputs/noise"].shape[1], "model.denoising.max_groups": meta["scalar"],
            "model.denoising.noise_scale": meta["noise_scale"], "model.denoising.positive_threshold": meta["split"],
            "loss.code_weights": meta["code_weights"], "loss.cls_weight": meta["loss_cls_weight"],
            "loss.box_weight": meta["loss_bbox_weight"], "loss.dn_weight": meta["dn_weight"],
            "loss.cls_cost": meta["cost_cls_weight"], "loss.box_cost": meta["cost_reg_weight"],
        }  # fmt: skip
    return load_config(REPOSITORY / "configs" / "cmt_r50_800x320.yaml", [f"{key}={x}" for key, x in values.items()])


def export_boxes(case: Recorded) -> dict[str, Tensor]:
    """From outputs of the heads to boxes."""
    tasks, classes, made = [], [], {}
    while f"heads/task{len(tasks)}.center" in case.given:
        names = (*BOX_BRANCHES, CLASS_BRANCH)
        tasks.append({name: case.given[f"heads/task{len(tasks)}.{name}"] for name in names})
        # Every grouping of the original keeps the order of the classes.
        first = sum(map(len, classes))
        classes.append(tuple(range(first, first + tasks[-1][CLASS_BRANCH].shape[-1])))
    values = (case.constants[key] for key in ("max_detections", "post_range", "score_threshold"))
    run_boxes(Predictions(tuple(tasks), tuple(classes)), Decoding(*values), made)
    return made


@torch.no_grad()
def export_lidar(golden: Golden, case: Recorded) -> dict[str, Tensor]:
    """From points to voxels, and from the recorded voxels, whose float32 means float64 cannot come closer to, on."""
    made = {}
    if "lidar/bev_map" in case.stages:
        branch = build_lidar_branch(golden, dtype=torch.float64, backend="torch")
    else:
        branch = lidar_branch_of(golden).eval()
    points = [x for name, x in case.given.items() if name.startswith("inputs/points.")]
    run_voxels(branch, points, made)
    recorded = VoxelBatch(case.stages["voxels/features"].double(), case.stages["voxels/coords"], len(points))
    run_lidar(branch, recorded, made)
    return made


def lidar_branch_of(golden: Golden) -> LidarBranch:
    """The sparse encoder of a file without other weights, with a backbone and a neck that nothing is compared with."""
    settings = voxel_settings(golden.meta)
    most = settings.pop("max_voxels")
    encoder = build_oob_encoder(golden, out_of_range="drop", backend="torch").double()
    channels = encoder.output_shape[0]
    backbone = SECOND(in_channels=channels, channels=(1,), layers=(0,), strides=(1,)).double()
    neck = SECONDFPN(in_channels=(1,), channels=(1,), upsample_strides=(1,)).double()
    return LidarBranch(
        **settings, max_voxels_train=most, max_voxels_test=most, encoder=encoder, backbone=backbone, neck=neck
    )


@torch.no_grad()
def export_images(golden: Golden, case: Recorded) -> dict[str, Tensor]:
    """From normalised images to the camera maps."""
    made = {}
    branch = image_branch(golden)
    run_images(branch, case.given["images/input"].double(), case.stages["images/pv_maps"].shape[:2], made)
    return made


def image_branch(golden: Golden) -> ImageBranch:
    """The camera branch of a golden file in float64, with the official normalisation."""
    parts = build_image_branch(golden, dtype=torch.float64)
    return ImageBranch(**NORMALISATION, backbone=parts["backbone"], neck=parts["neck"]).eval()


@torch.no_grad()
def export_windows(golden: Golden, case: Recorded) -> dict[str, Tensor]:
    """From reference points to windows and bias, by a router whose weights mean nothing: none are recorded."""
    layout, made = golden_layout(golden), {}
    settings = WindowSettings(case.constants["windows"], unseen=case.constants["unseen"])
    generator = WeightGenerator(
        dim=4, num_heads=1, ffn_dim=4, num_layers=1, num_grids=2, activation="tanh", neutral=0.0
    )
    router = BiasRouter(
        generator=generator, windows=settings, point_range=case.constants["point_range"],
        scale=Scale(value=1.0, is_learned=False, limits=(1.0, 1.0)), max_bias=None, backend="dense",
    ).double()  # fmt: skip
    points = case.given["queries/reference_points"].double()
    zeros = torch.zeros(len(points), layout.num_tokens, 4, dtype=torch.float64)
    cameras = make_cameras(case.given["inputs/lidar2img"], tuple(case.constants["image_size"]), dtype=torch.float64)
    queries = Queries(points, torch.zeros(*points.shape[:2], 4, dtype=torch.float64))
    keep_routed(router(queries, Tokens(zeros, zeros, layout), cameras), made)
    return made
