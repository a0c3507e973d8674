"""Initial weights with which every query already attends to the tokens around it.

From the usual random initialisation a decoder needs tens of thousands of steps to learn that a query should look near
its reference point: the position embeddings of a query and of a token near it come from the same network, but the two
random projections that compare them destroy that similarity. Here it is there from the first step: the position
networks are set, by least squares, to Fourier series of the position, and the projections of queries and keys to
the same multiple of the identity: the score of a query and a token is then a smooth bump of their distance. With both
sensors, the first half of the heads compares positions on the ground, the second half directions of camera rays. The
model is unchanged, and training changes these weights like all others. The official settings do not use it.

Shape letters: C channels, M heads, D = C / M, N samples of a fit.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from cmt_aqr.geometry import to_unit
from cmt_aqr.models.detector import Detector
from cmt_aqr.models.position import BevEmbedding, RayEmbedding, ray_depths, sine_embedding

# Size of an embedding's components. Large against the content it is added to (about 1), so that content does not blur
# the attention, and so that one optimizer step changes it little.
AMPLITUDE = 30.0
# Score of a query with a token at the same position; far away it is about 0.
PEAK_SCORE = 20.0
# Period of the slowest wave in units of the point range: above 1, so that opposite borders differ.
PERIOD = 1.25
# Width of the Gaussian weights of the harmonics, in units of their number.
SPECTRUM_WIDTH = 1 / 1.5
# k-means of the reference points.
KMEANS_ROUNDS = 10
MAX_CENTRES = 20_000
_SAMPLES = 513
# Ridge of the two least-squares fits; keeps the weights small where the functions are nearly dependent.
_RIDGE_POSITION = 1e-3
_RIDGE_SERIES = 1e-4
_RIDGE_RAY = 1e-1
_RAY_SAMPLES = 8192
# Slope (rise over run) up to which rays are fitted; the cameras see about +-0.5.
MAX_SLOPE = 0.6
# Rays are scaled to depth 1, so off the axis they are longer than 1 on the ground, by 1 / cos of the angle.
MAX_RAY_STRETCH = 1.8


@torch.no_grad()
def init_local(detector: Detector) -> None:
    """Overwrite the position networks, the query and key projections, and the reference points of a fresh detector.

    The reference points are put on a square grid over the ground, half-way up the point range. AQR's weight generator,
    whose heads are as many and as wide, gets the decoder's query and key projections.
    """
    num_heads = detector.decoder.layers[0].cross_attention.num_heads
    ground_heads, ray_heads = range(num_heads), range(0)
    if detector.ray_embedding is not None and detector.shared_conv is not None:
        ground_heads, ray_heads = range(num_heads // 2), range(num_heads // 2, num_heads)
    elif detector.ray_embedding is not None:
        ground_heads, ray_heads = range(0), range(num_heads)
    head_dim = detector.bev_embedding.dim // num_heads
    start_bev_embedding(detector.bev_embedding, ground_heads, head_dim)
    if detector.ray_embedding is not None:
        start_ray_embedding(detector.ray_embedding, ray_heads, head_dim)
    for layer in detector.decoder.layers:
        tie_projections(layer.self_attention, head_dim)
        tie_projections(layer.cross_attention, head_dim)
    for layer in [] if detector.aqr is None else detector.aqr.generator.layers:
        tie_projections(layer.attention, head_dim)
    detector.reference_points.weight.copy_(reference_grid(detector.reference_points.num_queries))


def fourier_features(x: Tensor, num_features: int, *, period: float) -> Tensor:
    """(N,) -> (N, num_features): weighted cosines, then sines, of 2 pi x / period; each row has length 1.

    The dot product of two rows is a bump of the distance of their x, narrower the more features there are.
    """
    harmonics = torch.arange(1, num_features // 2 + 1, dtype=x.dtype, device=x.device)
    weights = torch.exp(-0.5 * (harmonics / (SPECTRUM_WIDTH * len(harmonics))) ** 2)
    weights = weights / weights.norm()
    phase = 2 * math.pi / period * x[:, None] * harmonics
    return torch.cat((weights * phase.cos(), weights * phase.sin()), dim=1)


def start_bev_embedding(embedding: BevEmbedding, heads: range, head_dim: int) -> None:
    """Set the MLP so that the channels of these heads hold the Fourier features of x and of y; the others stay 0.

    Layer 1 turns the sine embedding into x and y, by least squares, and bends each at C / 2 knots; layer 2 interpolates
    the features between the knots, by least squares.
    """
    dim, first, second = embedding.dim, embedding.mlp[0], embedding.mlp[2]
    knots = dim // 2
    x = torch.linspace(0, 1, _SAMPLES, dtype=torch.float64)
    sines = sine_embedding(torch.stack((x, x), dim=-1), dim)[:, :dim]
    to_x = _fit(sines, x[:, None], _RIDGE_POSITION)[:, 0]
    offsets = torch.linspace(-1 / knots, 1 - 1 / knots, knots, dtype=torch.float64)
    steepness = knots / 8
    bent = torch.relu(steepness * (_with_one(sines) @ to_x)[:, None] - steepness * offsets)
    series = AMPLITUDE * fourier_features(x, head_dim // 2, period=PERIOD)
    to_series = _fit(bent, series, _RIDGE_SERIES)

    first.weight.zero_()
    first.bias.copy_(steepness * (to_x[-1] - offsets).repeat(2))
    first.weight[:knots, dim:] = (steepness * to_x[:-1]).to(first.weight)  # x: the second half of the sine embedding
    first.weight[knots:, :dim] = (steepness * to_x[:-1]).to(first.weight)
    both_axes = torch.zeros(dim + 1, 2 * series.shape[1], dtype=torch.float64)
    both_axes[:knots, : series.shape[1]] = both_axes[knots:-1, series.shape[1] :] = to_series[:-1]
    both_axes[-1] = to_series[-1].repeat(2)
    _write_heads(second, both_axes, heads, head_dim)


def start_ray_embedding(embedding: RayEmbedding, heads: range, head_dim: int) -> None:
    """Set the MLP so that the channels of these heads hold the Fourier features of a ray's azimuth and slope.

    Layer 1 reads the ray's direction off its points (a straight-line fit over the depths) and bends it along random
    directions; layer 2 fits the features over the directions that cameras around a vehicle see.
    """
    first, second = embedding.mlp[0], embedding.mlp[2]
    generator = torch.Generator().manual_seed(0)
    azimuth = 2 * math.pi * torch.rand(_RAY_SAMPLES, generator=generator, dtype=torch.float64)
    slope = MAX_SLOPE * (2 * torch.rand(_RAY_SAMPLES, generator=generator, dtype=torch.float64) - 1)
    stretch = 1 + (MAX_RAY_STRETCH - 1) * torch.rand(_RAY_SAMPLES, generator=generator, dtype=torch.float64)
    directions = torch.stack((azimuth.cos(), azimuth.sin(), slope), dim=1) * stretch[:, None]
    axes = torch.randn(first.out_features, 3, generator=generator, dtype=torch.float64)
    axes = axes / axes.norm(dim=1, keepdim=True) * torch.tensor([1, 1, 1 / MAX_SLOPE], dtype=torch.float64)
    bends = 2 * torch.rand(first.out_features, generator=generator, dtype=torch.float64) - 1
    around = fourier_features(azimuth, head_dim // 2, period=2 * math.pi)
    upward = fourier_features(slope / (2 * MAX_SLOPE), head_dim // 2, period=PERIOD)
    series = AMPLITUDE * torch.cat((around, upward), dim=1)
    to_series = _fit(torch.relu(directions @ axes.T + bends), series, _RIDGE_RAY)

    low, high = (torch.tensor(embedding.point_range[i : i + 3], dtype=torch.float64) for i in (0, 3))
    depths = ray_depths(embedding.num_depths, embedding.point_range[3], dtype=torch.float64, device=torch.device("cpu"))
    slope_of_line = (depths - depths.mean()) / ((depths - depths.mean()) ** 2).sum()  # d(point) / d(depth)
    read = axes[:, None, :] * slope_of_line[:, None] * (high - low)  # (hidden, depth, xyz) on unit coordinates
    first.weight.copy_(read.flatten(1))
    first.bias.copy_(bends)
    _write_heads(second, to_series, heads, head_dim)


def _write_heads(layer: nn.Linear, weights: Tensor, heads: range, head_dim: int) -> None:
    """Write weights (hidden + 1, D), bias last, into the rows of these heads and 0 into the others."""
    layer.weight.zero_()
    layer.bias.zero_()
    for head in heads:
        rows = slice(head * head_dim, head * head_dim + weights.shape[1])
        layer.weight[rows] = weights[:-1].T.to(layer.weight)
        layer.bias[rows] = weights[-1].to(layer.bias)


def tie_projections(attention: nn.Module, head_dim: int) -> None:
    """Query and key projections = the same multiple of the identity, so that a query scores PEAK_SCORE with itself."""
    dim = attention.in_proj_weight.shape[1]
    # Both coordinates contribute AMPLITUDE ** 2 to the dot product of a head, which is divided by sqrt(D).
    factor = math.sqrt(PEAK_SCORE * math.sqrt(head_dim) / (2 * AMPLITUDE**2))
    identity = factor * torch.eye(dim).to(attention.in_proj_weight)
    attention.in_proj_weight[: 2 * dim] = torch.cat((identity, identity))


def reference_grid(num_queries: int) -> Tensor:
    """(num_queries, 3) in [0, 1]: cell centres of the smallest square grid with enough cells, evenly thinned out."""
    side = math.ceil(math.sqrt(num_queries))
    chosen = torch.linspace(0, side * side - 1, num_queries).round().long()
    row, col = chosen // side, chosen % side
    return torch.stack(((col + 0.5) / side, (row + 0.5) / side, torch.full_like(chosen, 0.5, dtype=torch.float)), dim=1)


@torch.no_grad()
def init_reference_points(detector: Detector, centres: Tensor, point_range: Sequence[float]) -> None:
    """Put the reference points where the objects of the training frames are, by k-means.

    Args:
        detector: a fresh one; its points stay as they are when there are fewer centres than queries.
        centres: (N, 3) box centres of the training split, metres, LiDAR frame.
        point_range: x_min, y_min, z_min, x_max, y_max, z_max in metres.
    """
    points = detector.reference_points.weight
    unit = to_unit(centres.double(), point_range)
    unit = unit[((unit >= 0) & (unit <= 1)).all(dim=1)]
    if len(unit) < len(points):
        return
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))[:MAX_CENTRES]
    unit = unit[order]
    first_means = unit[: len(points)].numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mean that is nearest to no centre, such as a duplicate, stays where it is
        means, _ = kmeans2(unit.numpy(), first_means, iter=KMEANS_ROUNDS, minit="matrix")
    points.copy_(torch.from_numpy(means))


def _with_one(columns: Tensor) -> Tensor:
    return torch.cat((columns, torch.ones_like(columns[:, :1])), dim=1)


def _fit(columns: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """Weights (F + 1, W), bias last, of the ridge regression columns (N, F) -> wanted (N, W)."""
    columns = _with_one(columns)
    penalty = ridge * torch.eye(columns.shape[1], dtype=columns.dtype)
    zeros = wanted.new_zeros(columns.shape[1], wanted.shape[1])
    return torch.linalg.lstsq(torch.cat((columns, penalty)), torch.cat((wanted, zeros))).solution
