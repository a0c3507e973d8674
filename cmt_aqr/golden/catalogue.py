# ruff: noqa: E501 (a table: one row a line)
"""Every tensor of a bundle: its axes, frame, unit and meaning, and the function that makes it.

Names are ``stage/tensor``. A part that differs from one model to the next (a sample, a layer, a task) is ``*`` here.
Shape letters: B batch, V views, N images (B * V), P points, S voxels, K tokens, Q queries (denoising rows first),
C channels, M heads, L layers, T tasks, G boxes.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

# In the order of the forward pass; the comparison names the first one that differs.
STAGES = (
    "inputs", "weights", "voxels", "lidar", "images", "cameras", "positions", "tokens", "denoising", "queries",
    "windows", "aqr", "bias", "decoder", "heads", "boxes", "losses", "gradients",
)  # fmt: skip
# From exact to coarse; a bundle holds some of them.
PRECISIONS = ("float64", "float32", "bf16")
GRADIENTS = (
    "reference_points", "aqr.scale", "aqr.generator.linear", "aqr.generator.layers.0.attention", "bev_embedding",
    "ray_embedding", "shared_conv.0", "decoder.layers.0.cross_attention", "decoder.post_norm",
    "head.tasks.0.branches.center.out", "lidar_branch.encoder.conv_input", "image_branch.neck.lateral_convs",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One kind of tensor.

    Attributes:
        names: a pattern.
        axes: what the axes are, in order.
        unit: of the values.
        frame: coordinate frame or order that the values are in; empty where there is none.
        meaning: one sentence.
        source: file below cmt_aqr/ and function.
    """

    names: str
    axes: str
    unit: str
    frame: str
    meaning: str
    source: str


_LIDAR = "LiDAR frame: x right, y forward, z up"
_UNIT = "0 to 1 over the point range, x y z"
_PIXELS = "pixels of the network's input: u right, v down"
_CELLS = "row <- y, col <- x"

ENTRIES = (
    Entry("inputs/images", "B V H W 3", "0 to 255", "R G B; views in the order of classes.CAMERAS", "images as decoded, resized and cropped", "data/dataset.py finish_images"),
    Entry("inputs/points.*", "P 5", "m, m, m, intensity, s", _LIDAR, "points of one sample", "data/readers.py load_points"),
    Entry("inputs/lidar2img", "B V 4 4", "pixels times metres", "LiDAR frame -> (u d, v d, d, 1)", "calibration, float64 in every precision", "cameras.py"),
    Entry("inputs/boxes.*", "G 9", "m, rad, m/s", _LIDAR, "ground truth: cx cy cz length width height yaw vx vy", "boxes.py"),
    Entry("inputs/labels.*", "G", "index into classes.CLASSES", "", "classes of the ground truth", "classes.py"),
    Entry("inputs/noise", "B N 3", "0 to 1", "", "random numbers of the denoising queries, one vector a row", "models/denoising.py make_denoising"),
    Entry("weights/*", "", "", "", "parameter or buffer of the detector", "models/detector.py"),
    Entry("voxels/coords", "S 4", "cell", "frame of the batch, z, y, x", "cells that hold points, in the order of their first points", "models/voxels.py voxelize"),
    Entry("voxels/features", "S F", "m, m, m, intensity, s", _LIDAR, "mean of the first points of a cell; computed in float32 in every precision", "models/voxels.py voxelize"),
    Entry("lidar/encoder", "B C H W", "feature", _CELLS, "sparse encoder, channel c * D + d", "models/lidar.py SparseEncoder"),
    Entry("lidar/second.*", "B C H W", "feature", _CELLS, "level of the BEV backbone", "models/second.py SECOND"),
    Entry("lidar/bev_map", "B C H W", "feature", _CELLS, "output of the LiDAR branch", "models/second.py SECONDFPN"),
    Entry("images/input", "N 3 H W", "standard deviations", "channels in model.camera.channel_order", "(pixel - mean) / std, padded with 0 to a multiple of 32", "models/image.py ImageBranch.prepare"),
    Entry("images/backbone.*", "N C h w", "feature", "row <- v, col <- u", "map of stride 16 (0) and 32 (1)", "models/resnet.py, models/vovnet.py"),
    Entry("images/pv_maps", "B V C h w", "feature", "row <- v, col <- u", "output of the image branch, stride 16", "models/neck.py CPFPN"),
    Entry("cameras/img2lidar", "B V 4 4", "m", "inverse of lidar2img", "inverted in float64, then rounded", "cameras.py make_cameras"),
    Entry("positions/bev_xy", "K_bev 2", "1", "0 to 1 over the BEV grid, x first", "centres of the BEV cells, stretched over the grid (Q4, Q13)", "models/position.py bev_cell_centres"),
    Entry("positions/bev_sine", "K_bev 2C", "1", "y half first, then x", "sine embedding of bev_xy (Q3)", "models/position.py sine_embedding"),
    Entry("positions/pixels", "h*w 3", "pixels", _PIXELS, "upper left corners of the camera cells, homogeneous (Q4)", "models/position.py pixel_corners"),
    Entry("positions/rays", "B V h*w 3N", "1", _UNIT + ", not clamped", "points along the rays, depth-major (Q5)", "models/position.py camera_rays"),
    Entry("tokens/values", "B K C", "feature", "BEV row-major, then cameras (view, row, col)", "values of the cross-attention", "models/detector.py Detector.make_tokens"),
    Entry("tokens/positions", "B K C", "feature", "as values", "added to the values to make the keys", "models/position.py bev_positions, pv_positions"),
    Entry("denoising/reference_points", "B N 3", "1", _UNIT, "noised centres; 0 in rows without a box (Q8)", "models/denoising.py make_denoising"),
    Entry("denoising/attention_mask", "Q Q", "bool", "True = row may attend to column", "self-attention of the decoder", "models/denoising.py denoising_mask"),
    Entry("denoising/is_valid", "N", "bool", "", "False: padding row", "models/denoising.py make_denoising"),
    Entry("denoising/is_known", "B N", "bool", "", "the row stands for a box", "models/denoising.py make_denoising"),
    Entry("denoising/labels", "B N", "index into classes.CLASSES", "", "class to learn, 10 = background", "models/denoising.py make_denoising"),
    Entry("queries/reference_points", "B Q 3", "1", _UNIT, "denoising rows first, then the learned points", "models/queries.py ReferencePoints"),
    Entry("queries/clamped_points", "B Q 3", "1", _UNIT, "after inverse sigmoid and sigmoid, for the embeddings alone (Q6)", "models/queries.py embedded_points"),
    Entry("queries/sine", "B Q 2C", "1", "y half first, then x", "sine embedding of clamped_points", "models/position.py sine_embedding"),
    Entry("queries/pixels", "B V Q 3", "pixels", _PIXELS, "projection, divided by the depth moved away from 0 by 1e-6 (Q6); 0 where not seen", "models/queries.py project_to_pixels"),
    Entry("queries/is_seen", "B V Q", "bool", "", "in front of the camera and inside its image", "models/queries.py project_to_pixels"),
    Entry("queries/positions", "B Q C", "feature", "", "ground embedding + ray embeddings of the views that see the point", "models/queries.py query_positions"),
    Entry("windows/*", "B Q N 3", "cell", "view, row, col; view -1: no window", "centre of each query's window; BEV cells are metric (Q13)", "attention/windows.py query_windows"),
    Entry("aqr/weights", "B Q G", "1", "one column a grid, in the order of the tokens", "weights of the sensors", "aqr/weights.py WeightGenerator"),
    Entry("aqr/tokens", "B K C", "feature", "as tokens/values", "tokens times the map of the weights (designs v1, v2)", "aqr/modulation.py modulate"),
    Entry("bias/indices", "nnz 3", "index", "sample, query, token", "where the bias acts", "attention/bias.py is_inside"),
    Entry("bias/values", "nnz", "added to scores", "as indices", "clamp(scale * weight, -max_bias, max_bias)", "attention/bias.py bias_values"),
    Entry("decoder/layer*.self", "B Q C", "feature", "", "after self-attention and norm", "models/decoder.py DecoderLayer"),
    Entry("decoder/layer*.lse", "B M Q", "natural logarithm", "", "log of the sum of exp of the cross-attention's scores", "attention/dense.py softmax_with_lse"),
    Entry("decoder/layer*.cross", "B Q C", "feature", "", "after cross-attention and norm", "models/decoder.py DecoderLayer"),
    Entry("decoder/layer*.output", "B Q C", "feature", "", "after the FFN and norm: what the next layer is given (Q7)", "models/decoder.py DecoderLayer"),
    Entry("decoder/hidden", "L B Q C", "feature", "", "outputs of all layers after the shared norm (Q7)", "models/decoder.py Decoder"),
    Entry("heads/task*.center", "L B Q 2", "m", _LIDAR, "x, y of the box centre", "models/heads.py place_boxes"),
    Entry("heads/task*.height", "L B Q 1", "log m", "", "log length, squashed like a height (Q1)", "models/heads.py place_boxes"),
    Entry("heads/task*.dim", "L B Q 3", "log m, m, log m", _LIDAR, "log width, z of the gravity centre, log height (Q1)", "models/heads.py TaskHead"),
    Entry("heads/task*.rot", "L B Q 2", "1", "", "sin yaw, cos yaw, not normalised", "models/heads.py TaskHead"),
    Entry("heads/task*.vel", "L B Q 2", "m/s", _LIDAR, "vx, vy", "models/heads.py TaskHead"),
    Entry("heads/task*.cls_logits", "L B Q classes", "logit", "classes of the task", "one logit a class, sigmoid not yet taken", "models/heads.py TaskHead"),
    Entry("boxes/queries.*", "n", "index of the matching query", "", "query of each box; with its label the name of a row", "evaluation/postprocess.py find_best"),
    Entry("boxes/labels.*", "n", "index into classes.CLASSES", "", "class of each box", "evaluation/postprocess.py find_best"),
    Entry("boxes/scores.*", "n", "probability", "", "best first", "evaluation/postprocess.py find_best"),
    Entry("boxes/boxes.*", "n 9", "m, rad, m/s", _LIDAR, "cx cy cz length width height yaw vx vy, gravity centre", "boxes.py decode_boxes"),
    Entry("losses/assigned", "T L B Q", "index into the frame's boxes", "", "matching, -1 = background", "losses/matcher.py match"),
    Entry("losses/*", "", "loss", "", "weighted term", "losses/criterion.py Criterion"),
    Entry("gradients/norms", "parameters", "loss per unit", "order: manifest, gradient_names", "norm of the gradient of every parameter", "losses/criterion.py total_loss"),
    Entry("gradients/*", "", "loss per unit", "", "gradient of the total loss", "losses/criterion.py total_loss"),
)  # fmt: skip

# The order of rows in these stages has no meaning: rows are matched by the tensors that identify them.
ROW_NAMES = {
    "voxels": ("voxels/coords",),
    "bias": ("bias/indices",),
    "boxes": ("boxes/queries.{part}", "boxes/labels.{part}"),
}


def describe(name: str) -> Entry | None:
    """The entry of a tensor; None for a name that does not occur in bundles."""
    return next((entry for entry in ENTRIES if fnmatchcase(name, entry.names)), None)


def stage_of(name: str) -> str:
    """First part of a name."""
    return name.partition("/")[0]


def row_names_of(name: str) -> tuple[str, ...]:
    """Tensors that identify the rows of a tensor; empty where the order of rows has a meaning."""
    stage, _, rest = name.partition("/")
    part = rest.rpartition(".")[2]
    return tuple(key.format(part=part) for key in ROW_NAMES.get(stage, ()))
