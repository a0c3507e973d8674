"""The whole detector as one function of tensors of fixed sizes: what torch.export and ONNX can hold.

A program begins with the points, or after the sparse encoder, whose tables of cells ONNX has no operators for:

    images, points, lidar2img       -> boxes, scores, labels, queries, is_kept, needed
    images, lidar2img, encoder_map  -> boxes, scores, labels, queries, is_kept

Shape letters: B batch, V views, P points, N boxes, C channels.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cmt_aqr.cameras import Cameras
from cmt_aqr.evaluation.postprocess import ClassTables, Decoding, class_tables, find_best, select_best
from cmt_aqr.golden.stages import Frame
from cmt_aqr.inference import HEAD_ROOM, POINT_STEP
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.fixed_lidar import encode_points_fixed, measure_sizes
from cmt_aqr.models.folding import fold_batch_norm
from cmt_aqr.models.lidar import LidarBranch
from cmt_aqr.models.sparse import Capacities
from cmt_aqr.models.voxels import pad_points
from cmt_aqr.predictions import Predictions
from cmt_aqr.tokens import Geometry

# Arguments and results in their order, with axes, units and frames.
INPUTS = {
    "images": "B V H W 3, R G B from 0 to 255, views in the order of the entry cameras",
    "points": "B P 5, x y z in metres in the LiDAR frame, intensity, seconds before now; NaN in rows that are no point",
    "lidar2img": "B V 4 4, LiDAR frame to (u d, v d, d, 1) in pixels of images; the last row is 0 0 0 1",
    "encoder_map": "B C H W, output of the sparse encoder: lidar/encoder in python -m cmt_aqr.golden",
}
OUTPUTS = {
    "boxes": "B N 9, cx cy cz length width height yaw vx vy in metres, radians, m/s in the LiDAR frame, best first",
    "scores": "B N, probability",
    "labels": "B N, position in the entry classes",
    "queries": "B N, the query that each box comes from",
    "is_kept": "B N, whether the box counts: inside evaluation.post_range and above evaluation.score_threshold",
    "needed": "rows that these points need, beside the entry sizes; where one is larger than its size, no box is kept "
    "and those behind it may be too low",
}


class DetectionProgram(nn.Module):
    """A detector from tensors to tensors, for tracing: eval mode, no gradients, batch norms folded.

    Args:
        detector: with its weights, which are copied.
        decoding: how predictions become boxes.
        sizes: rows kept for the voxels and for the output of each strided sparse convolution, as of
            ``encode_points_fixed``; None: there is no LiDAR, or the program begins after the sparse encoder.
        precision: dtype of autocast; float32 switches it off.
        has_stages: also return tensors in between, under the names of ``golden.catalogue``.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        decoding: Decoding,
        sizes: Sequence[int] | None,
        precision: torch.dtype = torch.float32,
        has_stages: bool = False,
    ) -> None:
        super().__init__()
        self.detector = fold_batch_norm(detector)
        self.decoding = decoding
        self.sizes = sizes
        self.precision = precision
        self.has_stages = has_stages
        for name, table in class_tables(detector.head.classes, self.device)._asdict().items():
            self.register_buffer(name, table)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.detector.reference_points.weight.device

    def forward(
        self,
        images: Tensor | None = None,
        points: Tensor | None = None,
        lidar2img: Tensor | None = None,
        encoder_map: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Detect; arguments and results are those of ``INPUTS`` and ``OUTPUTS``. What the program lacks is None."""
        detector, is_reduced = self.detector, self.precision != torch.float32
        with torch.autocast(self.device.type, dtype=self.precision, enabled=is_reduced, cache_enabled=False):
            pv_maps = detector.encode_images(images)
            bev_map, needed = self._encode_lidar(points, encoder_map)
            cameras = None
            if pv_maps is not None:
                inverse = affine_inverse(lidar2img).to(detector.reference_points.weight.dtype)
                cameras = Cameras(lidar2img, inverse, tuple(images.shape[2:4]))
            batch_size = len(bev_map if pv_maps is None else pv_maps)
            geometry = detector.compute_geometry(detector.make_layout(bev_map, pv_maps), batch_size, cameras)
            predictions = detector.forward_with_geometry(bev_map, pv_maps, geometry)
        best = find_best(predictions, self.decoding, ClassTables(self.class_of, self.task_of))
        found = {"boxes": best.boxes, "scores": best.scores, "labels": best.labels}
        found |= {"queries": select_best(predictions, self.decoding)[1], "is_kept": best.is_kept}
        if needed is not None:
            found["needed"] = needed
        return found | (stages(predictions, geometry) if self.has_stages else {})

    def _encode_lidar(self, points: Tensor | None, encoder_map: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The BEV map, and the sizes that the points need."""
        branch = self.detector.lidar_branch
        if encoder_map is not None:
            return branch.neck(branch.backbone(encoder_map)), None
        return (None, None) if points is None else encode_points_fixed(branch, points, self.sizes)


def affine_inverse(matrix: Tensor) -> Tensor:
    """Inverse of (..., 4, 4) whose last row is 0 0 0 1, by cross products: ONNX has no operator for an inverse.

    A singular matrix gives non-finite values.
    """
    rows, shift = matrix[..., :3, :3], matrix[..., :3, 3:]
    a, b, c = rows.unbind(-2)
    columns = torch.stack([torch.linalg.cross(x, y) for x, y in ((b, c), (c, a), (a, b))], dim=-1)
    inverse = columns / (a * columns[..., 0]).sum(-1)[..., None, None]
    return torch.cat((torch.cat((inverse, -inverse @ shift), dim=-1), matrix[..., 3:, :]), dim=-2)


def stages(predictions: Predictions, geometry: Geometry) -> dict[str, Tensor]:
    """Tensors in front of the boxes, named as in a bundle of ``python -m cmt_aqr.golden export``."""
    made = {"tokens/positions": geometry.token_positions, "queries/positions": geometry.queries.positions}
    if geometry.windows is not None:
        grids = geometry.windows.layout.grids
        made |= {f"windows/{grid.name}": cells for grid, cells in zip(grids, geometry.windows.cells, strict=True)}
        made["aqr/weights"] = predictions.aqr_weights
    for number, task in enumerate(predictions.tasks):
        made |= {f"heads/task{number}.{name}": x for name, x in task.items()}
    return made


def example_inputs(detector: Detector, frame: Frame, *, has_encoder: bool) -> dict[str, Tensor]:
    """What a program is traced with: its inputs at their sizes, on the device of the frame.

    Args:
        has_encoder: the program begins with the points, which get a quarter more rows than the frame needs; False: it
            begins with the map of the sparse encoder, of which only the shape counts.
    """
    inputs = {}
    if detector.image_branch is not None:
        inputs |= {"images": frame.images, "lidar2img": frame.lidar2img}
    if detector.lidar_branch is not None and has_encoder:
        cloud = frame.points[0]
        rows = POINT_STEP * math.ceil(max(1, len(cloud)) * HEAD_ROOM / POINT_STEP)
        inputs["points"] = cloud.new_empty(1, rows, cloud.shape[1])
        pad_points(frame.points, inputs["points"])
    elif detector.lidar_branch is not None:
        like = detector.reference_points.weight
        inputs["encoder_map"] = like.new_zeros(1, *detector.lidar_branch.encoder.output_shape)
    # A package reads its inputs with the strides that it was traced with.
    return {name: inputs[name].contiguous() for name in INPUTS if name in inputs}


def choose_sizes(branch: LidarBranch, points: Tensor) -> tuple[int, ...]:
    """Sizes for these points (B, P, 5), a quarter more than they need; no more voxels than the branch ever makes."""
    voxels, *others = Capacities(measure_sizes(branch, points)).rows
    return min(voxels, points.shape[0] * branch.max_voxels_test), *others


def trace(program: DetectionProgram, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    """The program as a graph for inputs of these sizes."""
    with torch.no_grad():
        return torch.export.export(program.eval(), (), dict(inputs))
