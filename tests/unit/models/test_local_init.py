"""Local initialisation: from the first step on, queries look at the tokens around their reference points."""

import math

import pytest
import torch

from cmt_aqr.cameras import make_cameras
from cmt_aqr.geometry import to_metres, to_unit
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.detector import Detector, SharedConv
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.local_init import init_local, init_reference_points, reference_grid
from cmt_aqr.models.position import BevEmbedding, RayEmbedding, bev_positions, pv_positions
from cmt_aqr.models.queries import ReferencePoints, query_positions
from cmt_aqr.predictions import task_classes
from cmt_aqr.transformer_layers import split_heads

POINT_RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
CLASSES = ("car", "truck", "bus")
DIM, HEADS, ROWS, COLS = 64, 2, 32, 32
PV_ROWS, PV_COLS, STRIDE = 6, 16, 16
IMAGE_SIZE = (PV_ROWS * STRIDE, PV_COLS * STRIDE)
FOCAL = 128.0  # pixels: 90 degrees across


def detector(*, lidar: bool = True, cameras: bool = True, num_queries: int = 40) -> Detector:
    """A decoder with its position networks; branches play no part in the start."""
    return Detector(
        reference_points=ReferencePoints(num_queries=num_queries),
        bev_embedding=BevEmbedding(dim=DIM),
        ray_embedding=RayEmbedding(dim=DIM, num_depths=16, point_range=POINT_RANGE) if cameras else None,
        shared_conv=SharedConv(in_channels=8, dim=DIM) if lidar else None,
        decoder=Decoder(dim=DIM, num_heads=HEADS, ffn_dim=32, num_layers=2),
        head=Heads(classes=task_classes((CLASSES,)), num_layers=2, dim=DIM, point_range=POINT_RANGE),
    )


def four_cameras() -> torch.Tensor:
    """(1, 4, 4, 4) lidar2img of cameras at the origin that look along +y, +x, -y, -x."""
    matrices = []
    intrinsic = torch.eye(4, dtype=torch.float64)
    intrinsic[0, 0] = intrinsic[1, 1] = FOCAL
    intrinsic[0, 2], intrinsic[1, 2] = IMAGE_SIZE[1] / 2, IMAGE_SIZE[0] / 2
    for yaw in (90.0, 0.0, -90.0, 180.0):
        c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
        lidar2cam = torch.eye(4, dtype=torch.float64)  # rows: right, down, forward
        lidar2cam[:3, :3] = torch.tensor([[s, -c, 0], [0, 0, -1], [c, s, 0]], dtype=torch.float64)
        matrices.append(intrinsic @ lidar2cam)
    return torch.stack(matrices)[None]


def ground_points() -> torch.Tensor:
    """(1, Q, 3) unit reference points all around, 8 to 45 m away, about a metre below the sensor."""
    points = [
        [r * math.cos(a), r * math.sin(a), -1.0] for r in (8.0, 20.0, 33.0, 45.0) for a in torch.arange(0.2, 6.2, 0.6)
    ]
    return to_unit(torch.tensor(points, dtype=torch.float32), POINT_RANGE)[None]


def attention_weights(attention, queries, keys, heads: slice) -> torch.Tensor:
    """(B, m, Q, K) softmax of the scores of these heads."""
    dim = queries.shape[-1]
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = split_heads(queries @ weight[:dim].T + bias[:dim], HEADS)[:, heads]
    k = split_heads(keys @ weight[dim : 2 * dim].T + bias[dim : 2 * dim], HEADS)[:, heads]
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)


@torch.no_grad()
def bev_mass(model: Detector, points: torch.Tensor, heads: slice, cells: float) -> torch.Tensor:
    """(m, Q) share of the attention to a BEV map that lies within so many cells of the reference point."""
    keys = bev_positions(model.bev_embedding, ROWS, COLS, like=points)
    queries = query_positions(model.bev_embedding, None, points, None)
    weights = attention_weights(model.decoder.layers[0].cross_attention, queries, keys, heads)[0]
    col, row = torch.arange(COLS) + 0.5, torch.arange(ROWS) + 0.5
    dx = col - points[0, :, :1] * COLS
    dy = row - points[0, :, 1:2] * ROWS
    distance = (dx[:, None, :] ** 2 + dy[:, :, None] ** 2).sqrt().flatten(1)
    return (weights * (distance <= cells)).sum(-1)


def test_queries_look_at_the_ground_around_them():
    torch.manual_seed(0)
    points = ground_points()
    model = detector(cameras=False)
    # Without the start, attention is nearly even: a disc of three cells holds pi 3^2 / 32^2, about 3 %.
    assert bev_mass(model, points, slice(None), 3).mean() < 0.1
    init_local(model)
    near = bev_mass(model, points, slice(None), 3)
    assert near.mean() > 0.7 and near.min() > 0.4


def test_the_strongest_cell_is_the_one_of_the_reference_point():
    model = detector(cameras=False)
    init_local(model)
    # An uneven place: swapped axes or a mirrored one would be far away.
    for x, y in ((0.85, 0.3), (0.1, 0.55), (0.5, 0.95)):
        points = torch.tensor([[[x, y, 0.5]]])
        keys = bev_positions(model.bev_embedding, ROWS, COLS, like=points)
        queries = query_positions(model.bev_embedding, None, points, None)
        with torch.no_grad():
            weights = attention_weights(model.decoder.layers[1].cross_attention, queries, keys, slice(None))[0, :, 0]
        for best in weights.argmax(-1).tolist():
            assert abs(best % COLS + 0.5 - x * COLS) <= 1.5
            assert abs(best // COLS + 0.5 - y * ROWS) <= 1.5


def test_queries_look_along_the_ray_to_their_pixel():
    model = detector()
    init_local(model)
    points = ground_points()
    cameras = make_cameras(four_cameras(), IMAGE_SIZE, dtype=torch.float32)
    with torch.no_grad():
        keys = pv_positions(model.ray_embedding, PV_ROWS, PV_COLS, cameras)
        queries = query_positions(model.bev_embedding, model.ray_embedding, points, cameras)
        rays = slice(HEADS // 2, None)
        weights = attention_weights(model.decoder.layers[0].cross_attention, queries, keys, rays)[0]
    metres = to_metres(points[0].double(), POINT_RANGE)
    homogeneous = torch.cat((metres, torch.ones_like(metres[:, :1])), dim=1)
    projected = torch.einsum("vij,qj->qvi", four_cameras()[0], homogeneous)
    u, v = projected[..., 0] / projected[..., 2], projected[..., 1] / projected[..., 2]
    seen = (projected[..., 2] > 0) & (u >= 0) & (u < IMAGE_SIZE[1]) & (v >= 0) & (v < IMAGE_SIZE[0])
    assert (seen.sum(1) == 1).all()
    # Cells are known by their upper left corners (Quirk Q4).
    du = torch.arange(PV_COLS) - (u / STRIDE)[..., None]
    dv = torch.arange(PV_ROWS) - (v / STRIDE)[..., None]
    near = seen[..., None, None] & (du[..., None, :].abs() <= 3) & (dv[..., :, None].abs() <= 3)
    mass = (weights * near.flatten(1)).sum(-1)
    share = near.flatten(1).double().mean()
    assert mass.mean() > 0.6 and mass.min() > 0.3
    assert mass.mean() > 5 * share


def test_half_of_the_heads_keep_to_the_ground_with_both_sensors():
    model = detector()
    init_local(model)
    near = bev_mass(model, ground_points(), slice(0, HEADS // 2), 3)
    assert near.mean() > 0.7
    ray_channels = slice(DIM // 2, None)
    assert not model.bev_embedding.mlp[2].weight[ray_channels].any()
    assert not model.ray_embedding.mlp[2].weight[: DIM // 2].any()


def test_all_heads_follow_the_only_sensor():
    model = detector(lidar=False)
    init_local(model)
    assert model.ray_embedding.mlp[2].weight.any(dim=1).sum() >= DIM * 3 / 4
    assert not model.bev_embedding.mlp[2].weight.any()


@pytest.mark.parametrize("sensors", [{}, {"lidar": False}, {"cameras": False}], ids=["both", "cameras", "lidar"])
def test_it_works_without_memory_for_the_weights(sensors):
    with torch.device("meta"):
        model = detector(**sensors)
    init_local(model)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_it_repeats_itself_and_leaves_the_random_numbers_alone():
    models = [detector(), detector()]
    models[1].load_state_dict(models[0].state_dict())
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        init_local(model)
        assert torch.equal(torch.get_rng_state(), before)
    for (name, left), right in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right), name


def test_the_grid_fills_the_ground():
    for number in (1, 16, 40, 250):
        grid = reference_grid(number)
        assert grid.shape == (number, 3)
        assert len({tuple(point) for point in grid.tolist()}) == number
        assert (grid > 0).all() and (grid < 1).all() and (grid[:, 2] == 0.5).all()
    torch.testing.assert_close(
        reference_grid(4)[:, :2], torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    )


def crowds() -> torch.Tensor:
    """Centres (N, 3) in metres around three places, and some far outside the point range."""
    generator = torch.Generator().manual_seed(1)
    places = torch.tensor([[30.0, -10.0, -1.0], [-20.0, 25.0, 0.0], [5.0, 40.0, -2.0]])
    near = places[:, None] + torch.randn(3, 60, 3, generator=generator) * torch.tensor([2.0, 2.0, 0.3])
    return torch.cat((near.flatten(0, 1), torch.full((50, 3), 300.0)))


def test_reference_points_go_where_the_boxes_are():
    model = detector(num_queries=12)
    init_reference_points(model, crowds(), POINT_RANGE)
    points = to_metres(model.reference_points.weight.detach(), POINT_RANGE)
    places = torch.tensor([[30.0, -10.0, -1.0], [-20.0, 25.0, 0.0], [5.0, 40.0, -2.0]])
    distance = torch.cdist(points, places)
    assert (distance.min(dim=1).values < 5).all()
    assert (distance.min(dim=0).values < 3).all()  # none of the crowds is left out
    # k-means: the boxes are nearer to these points than to as many of the boxes themselves.
    boxes = crowds()[:180]
    chosen = boxes[torch.randperm(180, generator=torch.Generator().manual_seed(2))[:12]]
    assert torch.cdist(boxes, points).min(1).values.mean() < torch.cdist(boxes, chosen).min(1).values.mean()


def test_reference_points_are_means_of_the_nearest_boxes():
    """Ten rounds of k-means by loops; among few different boxes some means have no box nearest to them and stay."""
    for boxes in (crowds()[:180], crowds()[:4].repeat(20, 1)):
        model = detector(num_queries=12)
        init_reference_points(model, boxes, POINT_RANGE)
        unit = to_unit(boxes.double(), POINT_RANGE)
        unit = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(0))]
        means = [row.clone() for row in unit[:12]]
        for _ in range(10):
            nearest = [min(range(12), key=lambda i: (row - means[i]).square().sum().item()) for row in unit]
            groups = [[row for row, owner in zip(unit, nearest, strict=True) if owner == i] for i in range(12)]
            means = [torch.stack(group).mean(0) if group else mean for group, mean in zip(groups, means, strict=True)]
        torch.testing.assert_close(model.reference_points.weight.detach(), torch.stack(means).float())


def test_reference_points_repeat_themselves():
    models = [detector(num_queries=12), detector(num_queries=12)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        init_reference_points(model, crowds(), POINT_RANGE)
    assert torch.equal(models[0].reference_points.weight, models[1].reference_points.weight)


def test_fewer_boxes_than_queries_change_nothing():
    model = detector(num_queries=181)
    before = model.reference_points.weight.detach().clone()
    init_reference_points(model, crowds(), POINT_RANGE)  # 180 inside the range
    assert torch.equal(model.reference_points.weight, before)
    init_reference_points(model, torch.zeros(0, 3), POINT_RANGE)
    assert torch.equal(model.reference_points.weight, before)
    smaller = detector(num_queries=180)
    init_reference_points(smaller, crowds(), POINT_RANGE)
    inside = to_unit(crowds()[:180].double(), POINT_RANGE).float()
    found = smaller.reference_points.weight.detach()
    assert (inside[:, None] - found).abs().amax(-1).min(1).values.max() < 1e-6
