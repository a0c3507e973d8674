"""A small detector without branches, a ring of six cameras, and random inputs for both."""

import math

import torch

from cmt_aqr.aqr.router import BiasRouter, ModulationRouter
from cmt_aqr.aqr.scale import Scale
from cmt_aqr.aqr.weights import WeightGenerator
from cmt_aqr.attention import WindowSettings
from cmt_aqr.boxes import Targets
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from cmt_aqr.models.detector import Detector, SharedConv
from cmt_aqr.models.heads import Heads
from cmt_aqr.models.position import BevEmbedding, RayEmbedding
from cmt_aqr.models.queries import ReferencePoints

POINT_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
BEV_CELL_SIZE = (18.0, 18.0)  # 6 x 6 cells
IMAGE_SIZE = (64, 160)
ONE_TASK = (tuple(range(10)),)
TWO_TASKS = ((3, 0, 5, 9), (1, 2, 4, 6, 7, 8))
DIM, BEV_CHANNELS = 16, 6


def ring_of_cameras(batch):
    """lidar2img (batch, 6, 4, 4) float64: cameras 1.5 m up, 60 degrees apart, 80 degrees wide."""
    height, width = IMAGE_SIZE
    focal = width / 2 / math.tan(math.radians(40))
    intrinsic = torch.tensor([[focal, 0, width / 2, 0], [0, focal, height / 2, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    matrices = []
    for view in range(6):
        heading = math.pi / 2 - view * math.pi / 3
        cos, sin = math.cos(heading), math.sin(heading)
        forward, right = (cos, sin, 0.0), (sin, -cos, 0.0)
        rotation = torch.tensor([right, (0.0, 0.0, -1.0), forward])
        camera = torch.eye(4)
        camera[:3, :3] = rotation
        camera[:3, 3] = -rotation @ torch.tensor([0.5 * cos, 0.5 * sin, 1.5])
        matrices.append(intrinsic @ camera)
    return torch.stack(matrices).double().expand(batch, -1, -1, -1).clone()


def make_aqr(design, **options):
    """AQR for a small detector; the fresh generator, which gives every query nearly the same weights."""
    router = BiasRouter if design == "bias" else ModulationRouter
    generator = WeightGenerator(
        dim=DIM,
        num_heads=2,
        ffn_dim=24,
        num_layers=1,
        num_grids=2,
        activation="tanh" if design == "bias" else "sigmoid",
        neutral=router.NEUTRAL_WEIGHT,
    )
    windows = WindowSettings({"lidar": 3, "camera": 3}, **options)
    common = {"generator": generator, "windows": windows, "point_range": POINT_RANGE}
    if design != "bias":
        return ModulationRouter(design=design, **common)
    scale = Scale(value=2.5, is_learned=True, limits=(0.5, 5.0))
    return BiasRouter(**common, scale=scale, max_bias=5.0, backend="dense")


def make_detector(
    *,
    lidar=True,
    cameras=True,
    classes=ONE_TASK,
    kernel=1,
    dropout=0.0,
    num_queries=12,
    num_layers=2,
    seed=0,
    dtype=torch.float64,
    design=None,
):
    """Randomly initialised, norms and biases included, so that nothing is hidden by a zero or a one.

    With an AQR design, everything else has the values that it has without.
    """
    torch.manual_seed(seed)
    detector = Detector(
        reference_points=ReferencePoints(num_queries=num_queries),
        bev_embedding=BevEmbedding(dim=DIM),
        decoder=Decoder(dim=DIM, num_heads=2, ffn_dim=24, num_layers=num_layers, dropout=dropout),
        head=Heads(classes=classes, num_layers=num_layers, dim=DIM, point_range=POINT_RANGE, hidden=8, kernel=kernel),
        shared_conv=SharedConv(in_channels=BEV_CHANNELS, dim=DIM) if lidar else None,
        ray_embedding=RayEmbedding(dim=DIM, num_depths=5, point_range=POINT_RANGE) if cameras else None,
        bev_origin=POINT_RANGE[:2],
        bev_cell_size=BEV_CELL_SIZE,
    )
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    if design is not None:
        detector.aqr = make_aqr(design)
    return detector.to(dtype)


def make_features(batch, *, lidar=True, cameras=True, seed=1, dtype=torch.float64):
    """Positional arguments of `forward_features` up to the image size."""
    generator = torch.Generator().manual_seed(seed)
    bev_map = torch.randn(batch, BEV_CHANNELS, 6, 6, generator=generator, dtype=dtype) if lidar else None
    pv_maps = torch.randn(batch, 6, DIM, 2, 5, generator=generator, dtype=dtype) if cameras else None
    return bev_map, pv_maps, ring_of_cameras(batch) if cameras else None, IMAGE_SIZE if cameras else None


def make_targets(counts, *, seed=2, dtype=torch.float64):
    """Random boxes inside the range, `counts[b]` in sample b."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for count in counts:
        unit = torch.rand(count, 9, generator=generator, dtype=dtype)
        low = torch.tensor([-50, -50, -3, 0.5, 0.5, 0.5, -3, -5, -5], dtype=dtype)
        high = torch.tensor([50, 50, 1, 9, 3, 3, 3, 5, 5], dtype=dtype)
        labels = torch.randint(10, (count,), generator=generator)
        records.append(Targets(unit * (high - low) + low, labels))
    return records


def make_noised(targets, *, num_dn=10, noise=None, num_queries=12):
    """Denoising queries in at most two groups, the same at every call; noise (B, num_dn, 3)."""
    if noise is None:
        size = (len(targets), num_dn, 3)
        noise = torch.rand(size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    settings = DenoisingSettings(max_groups=2)
    return make_denoising(
        targets,
        num_queries=num_queries,
        num_dn=num_dn,
        point_range=POINT_RANGE,
        settings=settings,
        noise=noise.to(targets[0].boxes),
    )


def gradients(module):
    """Name -> gradient (zeros where there is none) of all parameters."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
