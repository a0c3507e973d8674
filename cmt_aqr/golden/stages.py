"""Run the detector's own stages one after the other and keep their results under the names of the catalogue.

The calls are those of ``Detector.forward``; branches and decoder are called part by part. Tensors that exist only
inside such a call, such as a sine embedding, are computed once more with the same function.

``made`` is, everywhere, the dictionary that the results are added to.

Shape letters: see catalogue.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmt_aqr.aqr.router import Routed
from cmt_aqr.attention import AttendWithLse, AttentionBias, make_attend
from cmt_aqr.attention.bias import is_inside
from cmt_aqr.attention.dense import dense_attention
from cmt_aqr.boxes import Targets
from cmt_aqr.cameras import Cameras
from cmt_aqr.evaluation.postprocess import Decoding, class_tables, find_best
from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.losses.matcher import encode_targets
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.image import ImageBranch
from cmt_aqr.models.lidar import LidarBranch
from cmt_aqr.models.position import bev_cell_centres, camera_rays, pixel_corners, ray_depths, sine_embedding
from cmt_aqr.models.queries import embedded_points, project_to_pixels
from cmt_aqr.models.voxels import VoxelBatch
from cmt_aqr.predictions import DenoisingQueries, Predictions
from cmt_aqr.tokens import Queries
from cmt_aqr.transformer_layers import KEY, VALUE

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Frame:
    """The inputs of the detector, B = 1 or more.

    Attributes:
        images: (B, V, H, W, 3) uint8 or None.
        points: B tensors (P, 5) or None.
        lidar2img: (B, V, 4, 4) float64 or None.
        targets: B records; for losses only.
    """

    images: Tensor | None
    points: list[Tensor] | None
    lidar2img: Tensor | None
    targets: Sequence[Targets] = ()

    def to(self, device: torch.device) -> "Frame":
        """The same frame on another device."""
        return Frame(
            None if self.images is None else self.images.to(device),
            None if self.points is None else [points.to(device) for points in self.points],
            None if self.lidar2img is None else self.lidar2img.to(device),
            [targets.to(device) for targets in self.targets],
        )

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return len(self.images) if self.points is None else len(self.points)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height, width in pixels; None without cameras."""
        return None if self.images is None else tuple(self.images.shape[2:4])


def run_branches(detector: Detector, frame: Frame, made: Tensors) -> tuple[Tensor | None, Tensor | None]:
    """Images and points -> camera maps, BEV map, as ``encode_images`` and ``encode_points`` make them."""
    pv_maps = bev_map = None
    if detector.lidar_branch is not None:
        bev_map = run_lidar(detector.lidar_branch, run_voxels(detector.lidar_branch, frame.points, made), made)
    if detector.image_branch is not None:
        made["images/input"] = detector.image_branch.prepare(frame.images.flatten(0, 1))
        pv_maps = run_images(detector.image_branch, made["images/input"], frame.images.shape[:2], made)
    return pv_maps, bev_map


def run_voxels(branch: LidarBranch, points: list[Tensor], made: Tensors) -> VoxelBatch:
    """Points, one (P, 5) a sample -> voxels."""
    voxels = branch.voxelize(points)
    made["voxels/coords"], made["voxels/features"] = voxels.coords_bzyx, voxels.features
    return voxels


def run_lidar(branch: LidarBranch, voxels: VoxelBatch, made: Tensors) -> Tensor:
    """Voxels -> BEV map (B, C, rows, cols)."""
    made["lidar/encoder"] = branch.encoder(voxels)
    maps = branch.backbone(made["lidar/encoder"])
    made |= {f"lidar/second.{level}": x for level, x in enumerate(maps)}
    made["lidar/bev_map"] = branch.neck(maps)
    return made["lidar/bev_map"]


def run_images(branch: ImageBranch, images: Tensor, views: Sequence[int], made: Tensors) -> Tensor:
    """Normalised images (B * V, 3, H, W) -> camera maps (B, V, C, h, w); ``views``: B, V."""
    maps = branch.backbone(images)
    made |= {f"images/backbone.{level}": x for level, x in enumerate(maps)}
    made["images/pv_maps"] = branch.neck(maps)[0].unflatten(0, views)
    return made["images/pv_maps"]


def run_head(
    detector: Detector,
    maps: tuple[Tensor | None, Tensor | None],
    frame: Frame,
    denoising: DenoisingQueries | None,
    made: Tensors,
) -> Predictions:
    """Camera maps and BEV map -> predictions, as ``forward_features`` does."""
    pv_maps, bev_map = maps
    cameras = detector.make_cameras(pv_maps, frame.lidar2img, frame.image_size)
    device = detector.reference_points.weight.device.type
    with torch.autocast(device, enabled=False):
        keep_positions(detector, bev_map, pv_maps, cameras, made)
    tokens = detector.make_tokens(bev_map, pv_maps, cameras)
    num_tokens = tokens.layout.num_tokens
    made["tokens/values"], made["tokens/positions"] = tokens.values[:, :num_tokens], tokens.positions[:, :num_tokens]
    keep_denoising(denoising, made)
    queries = detector.make_queries(tokens.values.shape[0], cameras, denoising)
    with torch.autocast(device, enabled=False):
        keep_queries(detector, queries, cameras, made)
    routed = detector.route(queries, tokens, cameras)
    keep_routed(routed, made)
    hidden = run_decoder(detector.decoder, queries, routed, lse_attention(detector, routed), made)
    predictions = detector.head(hidden, queries.reference_points, num_dn=queries.num_dn, is_valid=queries.is_valid)
    for task, branches in enumerate(predictions.tasks):
        made |= {f"heads/task{task}.{name}": x for name, x in branches.items()}
    return predictions


def keep_positions(
    detector: Detector, bev_map: Tensor | None, pv_maps: Tensor | None, cameras: Cameras | None, made: Tensors
) -> None:
    """Keep what the position embeddings of the tokens are made from; called without autocast, as the embeddings are."""
    like = detector.reference_points.weight
    if bev_map is not None:
        rows, cols = bev_map.shape[-2:]
        made["positions/bev_xy"] = bev_cell_centres(rows, cols, dtype=like.dtype, device=like.device)
        made["positions/bev_sine"] = sine_embedding(made["positions/bev_xy"], detector.bev_embedding.dim)
    if pv_maps is not None:
        made["cameras/img2lidar"] = cameras.img2lidar
        rows, cols = pv_maps.shape[-2:]
        made["positions/pixels"] = pixel_corners(rows, cols, cameras.image_size, like=cameras.img2lidar)
        ray = detector.ray_embedding
        depths = ray_depths(ray.num_depths, ray.point_range[3], dtype=like.dtype, device=like.device)
        made["positions/rays"] = camera_rays(made["positions/pixels"], cameras.img2lidar, depths, ray.point_range)


def keep_denoising(denoising: DenoisingQueries | None, made: Tensors) -> None:
    """Keep the denoising queries."""
    if denoising is not None:
        names = ("reference_points", "attention_mask", "is_valid", "is_known", "labels")
        made |= {f"denoising/{name}": getattr(denoising, name) for name in names}


def keep_queries(detector: Detector, queries: Queries, cameras: Cameras | None, made: Tensors) -> None:
    """Keep the queries and what their position embeddings are made from; called without autocast, as these are."""
    made["queries/reference_points"] = queries.reference_points
    points = made["queries/clamped_points"] = embedded_points(queries.reference_points)
    made["queries/sine"] = sine_embedding(points[..., :2], detector.bev_embedding.dim)
    if cameras is not None:
        pixels, is_seen = project_to_pixels(points, cameras, detector.ray_embedding.point_range)
        # Where a view does not see a point, its pixel is arbitrary and not used.
        made["queries/pixels"], made["queries/is_seen"] = pixels.where(is_seen[..., None], 0), is_seen
    made["queries/positions"] = queries.positions


def keep_routed(routed: Routed, made: Tensors) -> None:
    """Keep windows, weights and the bias as (sample, query, token) with values, 0 included; of v1, v2 the tokens."""
    if routed.windows is None:
        return
    for grid, cells in zip(routed.windows.layout.grids, routed.windows.cells, strict=True):
        made[f"windows/{grid.name}"] = cells
    made["aqr/weights"] = routed.weights
    if routed.bias is None:
        made["aqr/tokens"] = routed.tokens.values
    elif routed.windows.settings.is_local:
        made["bias/indices"], made["bias/values"] = bias_triplets(routed.bias)


def bias_triplets(bias: AttentionBias) -> tuple[Tensor, Tensor]:
    """Where a bias acts: indices (n, 3) int32 sample, query, token in lexicographic order; values (n,)."""
    indices, values = [], []
    for number in range(len(bias.windows.layout.grids)):
        where = is_inside(bias.windows, number).nonzero()
        values.append(bias.values[where[:, 0], where[:, 1], number])
        where[:, 2] += bias.windows.layout.token_range(number)[0]
        indices.append(where)
    indices, values = torch.cat(indices), torch.cat(values)
    sizes = (*bias.windows.batch_and_queries, bias.windows.layout.num_tokens)
    order = ((indices[:, 0] * sizes[1] + indices[:, 1]) * sizes[2] + indices[:, 2]).argsort()
    return indices[order].int(), values[order]


def lse_attention(detector: Detector, routed: Routed) -> AttendWithLse:
    """The cross-attention that the detector uses, with its lse; without a bias the dense evaluator."""
    if routed.bias is None:
        return lambda q, k, v: dense_attention(q, k, v, None)
    return make_attend(routed.bias, backend=detector.aqr.backend)


def run_decoder(
    decoder: Decoder, queries: Queries, routed: Routed, attend_with_lse: AttendWithLse, made: Tensors
) -> Tensor:
    """The decoder's layers, step by step; returns (L, B, Q, C) as ``Decoder.forward``."""
    positions, values = queries.positions, routed.tokens.values
    keys = values + routed.tokens.positions
    x, outputs, lses = torch.zeros_like(positions), [], []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attend_with_lse(q, k, v)
        lses.append(lse)
        return out

    for number, layer in enumerate(decoder.layers):
        name = f"decoder/layer{number}"
        x = made[f"{name}.self"] = layer.attend_to_queries(x, positions, queries.attention_mask)
        k, v = layer.cross_attention.project(KEY, keys), layer.cross_attention.project(VALUE, values)
        x = layer.attend_to_tokens(x, positions, k, v, attend)
        if lses[-1] is not None:
            made[f"{name}.lse"] = lses[-1]
        made[f"{name}.cross"] = x
        x = made[f"{name}.output"] = layer.transform(x)
        outputs.append(decoder.post_norm(x))
    made["decoder/hidden"] = torch.stack(outputs)
    return made["decoder/hidden"]


def run_boxes(predictions: Predictions, decoding: Decoding, made: Tensors) -> None:
    """Predictions -> boxes, as ``postprocess`` does, with the query of each."""
    tables = class_tables(predictions.classes, predictions.logits(0).device)
    found = find_best(predictions, decoding, tables)
    for sample, kept in enumerate(found.is_kept):
        for name in ("queries", "labels", "scores", "boxes"):
            made[f"boxes/{name}.{sample}"] = getattr(found, name)[sample, kept]


def run_losses(
    criterion: Criterion,
    predictions: Predictions,
    targets: Sequence[Targets],
    denoising: DenoisingQueries | None,
    made: Tensors,
) -> Tensor:
    """Predictions -> matching and loss terms; returns the total loss."""
    padded = encode_targets(targets, dtype=predictions.tasks[0]["center"].dtype)
    made["losses/assigned"] = criterion.assign(predictions, padded)
    terms = criterion(predictions, targets, denoising)
    made |= {f"losses/{name}": value for name, value in terms.items()}
    made["losses/total"] = total_loss(terms)
    return made["losses/total"]


def keep_gradients(detector: Detector, chosen: Sequence[str], made: Tensors) -> list[str]:
    """Keep gradients of parameters whose names begin with one of ``chosen``, and norms of all; returns their order."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in detector.named_parameters()
    }
    made |= {f"gradients/{name}": x for name, x in gradients.items() if name.startswith(tuple(chosen))}
    made["gradients/norms"] = torch.stack([gradient.norm() for gradient in gradients.values()])
    return list(gradients)
