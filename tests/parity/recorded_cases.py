"""Arrays of the golden files under the names, axes and order of an exported bundle, one record a case.

Arrays that a bundle has no name for are left out; docs/porting.md lists them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.golden.catalogue import stage_of
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, task_classes
from cmt_aqr.tools.official_names import rename_official
from tests.parity.golden import Golden
from tests.parity.head_case import OFFICIAL_PREFIX, HeadCase
from tests.parity.test_image_branch import build_branch as build_image_branch
from tests.parity.test_lam_windows import golden_layout, is_on_far_border
from tests.parity.test_lidar_branch import build_branch as build_lidar_branch
from tests.parity.test_lidar_branch import build_oob_encoder, golden_clouds

# Largest error as a share of the largest value. Losses sum thousands of terms, gradients pass six layers; some stages
# the original computes or stores in float32 in its float64 run, too.
FORWARD = {"float64": 1e-12, "float32": 5e-6}
BACKWARD = {"float64": 1e-9, "float32": 1e-5}
ROUNDED = {"float64": 1e-6, "float32": 1e-5}


@dataclass(frozen=True)
class Recorded:
    """One case.

    Attributes:
        name: of the golden file, and of the part of it where it holds several cases.
        prefix: of the arrays of that part.
        given: what the case starts from, by the names of a bundle.
        stages: what the original's float64 run made of it.
        weights: this project's names -> float32.
        constants: sizes and settings, as in the manifest of an exported bundle.
        settings: of the original's run, as in the golden file.
        gradient_names: order of ``gradients/norms``.
    """

    name: str
    prefix: str
    given: dict[str, Tensor]
    stages: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    gradient_names: tuple[str, ...] = ()

    def limit(self, name: str, precision: str) -> float:
        """Largest error of a stage, as a share of its largest value."""
        if self.stages[name].dtype == torch.float32:
            return ROUNDED[precision]
        return (BACKWARD if stage_of(name) in ("losses", "gradients") else FORWARD)[precision]


def read_cases(golden: Golden) -> Iterator[Recorded]:
    """The cases in a file; none where it is about something else, such as augmentation."""
    if "in/ref_points" in golden:
        yield from (windows_case(golden, f"w{camera}_{bev}/", (camera, bev)) for camera, bev in golden.meta["windows"])
    elif "out64/neck0" in golden:
        yield image_case(golden)
    elif "out/coors_bzyx" in golden:
        yield lidar_case(golden)
    for prefix in prefixes(golden, "out64/task0/center"):
        meta = json.loads(str(golden[prefix + "meta_json"]))
        yield head_case(HeadCase(golden, torch.float64, prefix=prefix, meta=meta))
    for prefix in prefixes(golden, "in/task0/center"):
        yield decoding_case(golden, prefix)


def prefixes(golden: Golden, name: str) -> list[str]:
    """What stands before a name in a file."""
    return [stored.removesuffix(name) for stored in golden.names if stored.endswith(name)]


def case_name(golden: Golden, prefix: str) -> str:
    """Name of the file, and of the part."""
    return "_".join(filter(None, (golden.name, prefix.rstrip("/"))))


def float_weights(module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Weights as they are stored, in float32."""
    state = module.state_dict().items()
    return {prefix + name: x.float() if x.is_floating_point() else x for name, x in state}


def head_case(case: HeadCase) -> Recorded:
    """From the maps of the branches to boxes; in training from boxes and noise to gradients."""
    given = {}
    if case.pv_maps is not None:
        given["images/pv_maps"] = case.pv_maps.float()
    if case.bev_map is not None:
        given["lidar/bev_map"] = case.bev_map.float()
    given["inputs/lidar2img"] = case.lidar2img
    stages = token_stages(case) | query_stages(case) | prediction_stages(case)
    gradient_names = ()
    if "out/dn/attn_mask" in case.golden:
        given |= training_inputs(case)
        stages |= denoising_stages(case) | loss_stages(case)
        gradient_names = tuple(name for name, _ in case.detector.named_parameters())
    return Recorded(
        case_name(case.golden, case.prefix), case.prefix, given, stages, float_weights(case.detector),
        head_constants(case), case.meta, gradient_names,
    )  # fmt: skip


def exact(case: HeadCase, name: str) -> Tensor | None:
    """An output of the float64 run; None where the file does not have all of it."""
    name = f"{case.prefix}out64/{name}"
    return case.golden.tensor(name) if name in case.golden else None


def token_stages(case: HeadCase) -> dict[str, Tensor]:
    """Values and positions of the tokens, BEV first."""
    values, positions = [], []
    if case.bev_map is not None:
        shared, embeds = exact(case, "x_shared"), exact(case, "bev_pos_embeds")
        values.append(None if shared is None else shared.flatten(2).mT)
        positions.append(None if embeds is None else embeds.expand(case.meta["bs"], -1, -1))
    if case.pv_maps is not None:
        embeds = exact(case, "rv_pos_embeds")
        values.append(case.pv_maps.movedim(2, -1).flatten(1, 3))
        positions.append(None if embeds is None else embeds.reshape(case.meta["bs"], -1, embeds.shape[-1]))
    found = {}
    if all(part is not None for part in values):
        found["tokens/values"] = torch.cat(values, dim=1)
    if all(part is not None for part in positions):
        # Where one part is stored in float32, the whole is as exact as float32.
        least = min((part.dtype for part in positions), key=lambda dtype: dtype.itemsize)
        found["tokens/positions"] = torch.cat([part.to(least) for part in positions], dim=1)
    return found


def query_stages(case: HeadCase) -> dict[str, Tensor]:
    """Reference points and position embeddings of the queries."""
    names = ("bev_query_embeds",) if case.pv_maps is None else ("bev_query_embeds", "rv_query_embeds")
    embeds = [exact(case, name) for name in names]
    points = exact(case, "dn/padded_reference_points")
    if points is None:
        points = case.detector.reference_points.weight.detach().expand(case.meta["bs"], -1, -1)
    found = {"queries/reference_points": points}
    if all(part is not None for part in embeds):
        found["queries/positions"] = sum(embeds)
    return found


def prediction_stages(case: HeadCase) -> dict[str, Tensor]:
    """Outputs of decoder and heads, denoising rows first, and the boxes with gravity centres."""
    hidden = exact(case, "outs_dec")
    found = {} if hidden is None else {"decoder/hidden": hidden}
    for task in range(len(case.meta["tasks"])):
        for branch in (*BOX_BRANCHES, CLASS_BRANCH):
            rows = [exact(case, f"task{task}/{name}") for name in (f"dn_{branch}", branch)]
            found[f"heads/task{task}.{branch}"] = torch.cat([part for part in rows if part is not None], dim=2)
    for sample in range(case.meta["bs"]):
        boxes = exact(case, f"boxes{sample}")
        if boxes is not None:
            boxes[:, 2] += boxes[:, 5] / 2
            found |= {f"boxes/{name}.{sample}": exact(case, f"{name}{sample}") for name in ("labels", "scores")}
            found[f"boxes/boxes.{sample}"] = boxes
    return found


def training_inputs(case: HeadCase) -> dict[str, Tensor]:
    """Boxes, labels, and the random numbers of the denoising rows; 0 in rows without a box, which nothing reads."""
    found = {}
    for sample, target in enumerate(case.targets()):
        found |= {f"inputs/boxes.{sample}": target.boxes, f"inputs/labels.{sample}": target.labels}
    noise = torch.zeros(case.meta["bs"], int(case.golden["out/dn/pad_size"]), 3)
    noise[known_rows(case)] = case.golden.tensor("in/dn_rand")
    return found | {"inputs/noise": noise}


def known_rows(case: HeadCase) -> tuple[Tensor, Tensor]:
    """Sample and row of every denoising query that stands for a box, in the order of the recorded arrays."""
    counts = torch.tensor(case.meta["ns"])
    samples = torch.repeat_interleave(torch.arange(len(counts)), counts).repeat(case.meta["groups"])
    return samples, case.golden.tensor("out/dn/map_known_indice")


def denoising_stages(case: HeadCase) -> dict[str, Tensor]:
    """The denoising queries; the original has as many rows as it needs, so none of them is padding."""
    golden, num_dn = case.golden, int(case.golden["out/dn/pad_size"])
    is_known = torch.zeros(case.meta["bs"], num_dn, dtype=torch.bool)
    is_known[known_rows(case)] = True
    labels = torch.full(is_known.shape, len(CLASSES))
    labels[known_rows(case)] = golden.tensor("out/dn/known_labels")
    return {
        "denoising/reference_points": exact(case, "dn/padded_reference_points")[:, :num_dn].clone(),
        "denoising/attention_mask": ~golden.tensor("out/dn/attn_mask"),
        "denoising/is_valid": torch.ones(num_dn, dtype=torch.bool),
        "denoising/is_known": is_known,
        "denoising/labels": labels,
    }


def loss_stages(case: HeadCase) -> dict[str, Tensor]:
    """Matching, loss terms, the gradients that were recorded, and the norms of all."""
    golden, found = case.golden, {}
    found["losses/assigned"] = golden.tensor("out/assign/orig_gt").permute(2, 0, 1, 3)  # L B T Q -> T L B Q
    for name in golden.names:
        if name.startswith("out64/loss/"):
            found[f"losses/{name.removeprefix('out64/loss/')}"] = golden.tensor(name)
        elif name.startswith("out64/grad/"):
            found[f"gradients/{our_name(name.removeprefix('out64/grad/'))}"] = golden.tensor(name)
    names = [our_name(name) for name in golden["gradnorm_names"].tolist()]
    norms = dict(zip(names, golden.tensor("out64/gradnorm"), strict=True))
    found["gradients/norms"] = torch.stack([norms[name] for name, _ in case.detector.named_parameters()]).clamp(min=0)
    return found


def our_name(official: str) -> str:
    """Name of a parameter of the head."""
    return rename_official(OFFICIAL_PREFIX + official)


def head_constants(case: HeadCase) -> dict[str, Any]:
    """Those of the manifest of an exported bundle that a case without branches has."""
    meta, grids = case.meta, []
    low, high = meta["pc_range"][:2], meta["pc_range"][3:5]
    if case.bev_map is not None:
        rows, cols = case.bev_map.shape[-2:]
        cell_size = [(high[0] - low[0]) / cols, (high[1] - low[1]) / rows]
        grids.append({"name": "lidar", "views": 1, "rows": rows, "cols": cols, "origin": low, "cell_size": cell_size})
    if case.pv_maps is not None:
        views, _, rows, cols = case.pv_maps.shape[1:]
        grids.append({"name": "camera", "views": views, "rows": rows, "cols": cols, "origin": None, "cell_size": None})
    return {
        "point_range": meta["pc_range"], "num_queries": meta["num_query"], "num_heads": meta["num_heads"],
        "num_layers": meta["num_layers"], "hidden_dim": meta["hidden_dim"], "depth_bins": meta["depth_num"],
        "head_kernel": meta["final_kernel"], "classes": list(CLASSES), "cameras": list(CAMERAS),
        "tasks": [list(task) for task in task_classes(meta["tasks"])], "grids": grids,
        "image_size": list(case.image_size), "post_range": meta.get("post_center_range"),
        "max_detections": meta.get("max_num"), "score_threshold": None,
    }  # fmt: skip


def decoding_case(golden: Golden, prefix: str) -> Recorded:
    """From outputs of the heads, one layer, to boxes; all in float32."""
    given, stages, tasks, start = {}, {}, 0, prefix + "in/"
    while f"{start}task{tasks}/center" in golden:
        for name in (*BOX_BRANCHES, CLASS_BRANCH):
            given[f"heads/task{tasks}.{name}"] = golden.tensor(f"{start}task{tasks}/{name}")[None]
        tasks += 1
    for sample in range(len(given["heads/task0.center"][0])):
        for ours, theirs in (("labels", "labels"), ("scores", "scores"), ("boxes", "boxes_gravity")):
            stages[f"boxes/{ours}.{sample}"] = golden.tensor(f"{prefix}out/{theirs}{sample}")
    threshold = float(golden[prefix + "score_threshold"])
    constants = {
        "max_detections": int(golden[prefix + "max_num"]), "score_threshold": None if threshold < 0 else threshold,
        # Of all official models; the files do not hold them.
        "post_range": [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0], "point_range": [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0],
    }  # fmt: skip
    return Recorded(case_name(golden, prefix), prefix, given, stages, constants=constants)


def lidar_case(golden: Golden) -> Recorded:
    """From points to the BEV map; in backbone3d_oob, which has no other weights, to the sparse encoder."""
    given = {f"inputs/points.{sample}": points for sample, points in enumerate(golden_clouds(golden))}
    stages = {
        "voxels/coords": golden.tensor("out/coors_bzyx"),
        "voxels/features": golden.tensor("out32/voxel_features"),
    }
    if "out64/fpn" not in golden:
        encoder = build_oob_encoder(golden, out_of_range="drop")
        stages["lidar/encoder"] = golden.tensor("out64/middle_oob_dropped")
        return Recorded(
            golden.name, "", given, stages, float_weights(encoder, "lidar_branch.encoder."), settings=golden.meta
        )
    stages["lidar/encoder"] = golden.tensor("out64/middle")
    for level in range(len(golden.meta["cfg"]["bb"]["out_channels"])):
        stages[f"lidar/second.{level}"] = golden.tensor(f"out64/second{level}")
    stages["lidar/bev_map"] = golden.tensor("out64/fpn")
    weights = float_weights(build_lidar_branch(golden, dtype=torch.float32), "lidar_branch.")
    return Recorded(golden.name, "", given, stages, weights, settings=golden.meta)


def image_case(golden: Golden) -> Recorded:
    """From normalised images to the map of the pyramid that the head reads."""
    images = golden.tensor("in/img")
    stages = {f"images/backbone.{level}": golden.tensor(f"out64/backbone{level}") for level in range(2)}
    stages["images/pv_maps"] = golden.tensor("out64/neck0").unflatten(0, images.shape[:2])
    weights = float_weights(build_image_branch(golden, dtype=torch.float32), "image_branch.")
    return Recorded(golden.name, "", {"images/input": images.flatten(0, 1)}, stages, weights, settings=golden.meta)


def windows_case(golden: Golden, prefix: str, sizes: tuple[int, int]) -> Recorded:
    """From reference points to windows, and to where a bias acts.

    Without the queries that lie on the far border of the range in one of the samples: Q12, which is left on purpose.
    """
    kept = ~is_on_far_border(golden).any(dim=0)
    layout, (camera, bev) = golden_layout(golden), sizes
    given = {
        "queries/reference_points": golden.tensor("in/ref_points")[:, kept],
        "inputs/lidar2img": golden.tensor("in/lidar2img"),
    }
    cells = golden.tensor("pts_bev", torch.int64)[:, kept]
    stages = {
        "windows/lidar": torch.nn.functional.pad(cells, (1, 0))[:, :, None],
        "windows/camera": golden.tensor("pts_pers", torch.int64)[:, kept, None],
        "bias/indices": bias_indices(golden, prefix, kept),
    }
    grids = [
        {"name": grid.name, "views": grid.views, "rows": grid.rows, "cols": grid.cols, "origin": grid.origin,
         "cell_size": grid.cell_size} for grid in layout.grids
    ]  # fmt: skip
    constants = {
        "point_range": golden["in/pc_range"].tolist(), "image_size": golden["in/img_hw"].tolist(), "grids": grids,
        "windows": {"lidar": bev, "camera": camera}, "camera_assignment": "first", "unseen": "corner",
    }  # fmt: skip
    return Recorded(case_name(golden, prefix), prefix, given, stages, constants=constants)


def bias_indices(golden: Golden, prefix: str, kept: Tensor) -> Tensor:
    """Sample, query, token (n, 3) int32 of every key in a window, in lexicographic order."""
    first_camera = golden_layout(golden).token_range(1)[0]
    keys = [golden.tensor(f"{prefix}{name}_keys", torch.int64)[:, kept] for name in ("bev", "cam")]
    keys = torch.cat((keys[0], torch.where(keys[1] < 0, -1, keys[1] + first_camera)), dim=-1)
    where = (keys >= 0).nonzero()
    return torch.column_stack((where[:, :2], keys[tuple(where.T)])).int()
