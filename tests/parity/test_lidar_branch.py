"""Voxels, sparse encoder, SECOND and FPN against the original's tensors (see tests/parity/golden.py)."""

import pytest
import torch

from cmt_aqr.models import spconv_backend
from cmt_aqr.models.lidar import LidarBranch, SparseEncoder
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.sparse import SparseRows, find_sites
from cmt_aqr.models.voxels import VoxelBatch, voxel_grid_shape, voxelize, voxelize_batch
from tests.parity.golden import load_golden, relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
needs_spconv = pytest.mark.skipif(spconv_backend.import_error() is not None, reason="spconv cannot be imported")
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("spconv", marks=needs_spconv)])
PREFIXES = {"pts_middle_encoder.": "encoder.", "pts_backbone.": "backbone.", "pts_neck.": "neck."}


def rename(name):
    """Official name -> ours: only the three prefixes differ."""
    for official, ours in PREFIXES.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    raise KeyError(name)


def voxel_settings(meta):
    vox = meta["cfg"]["vox"]
    return {
        "voxel_size": vox["voxel_size"],
        "point_range": vox["point_cloud_range"],
        "max_points": vox["max_num_points"],
        "max_voxels": vox["max_voxels"][1],
    }


def build_encoder(meta, *, backend="auto", out_of_range="drop"):
    mid = meta["cfg"]["mid"]
    return SparseEncoder(
        in_channels=mid["in_channels"],
        sparse_shape=mid["sparse_shape"],
        base_channels=mid["base_channels"],
        encoder_channels=mid["encoder_channels"],
        downsample_paddings=[paddings[-1] for paddings in mid["encoder_paddings"][:-1]],
        out_channels=mid["output_channels"],
        out_of_range=out_of_range,
        backend=backend,
    )


def build_branch(golden, *, dtype, backend="auto"):
    second, fpn = golden.meta["cfg"]["bb"], golden.meta["cfg"]["neck"]
    vox = golden.meta["cfg"]["vox"]
    branch = LidarBranch(
        voxel_size=vox["voxel_size"],
        point_range=vox["point_cloud_range"],
        max_points=vox["max_num_points"],
        max_voxels_train=vox["max_voxels"][0],
        max_voxels_test=vox["max_voxels"][1],
        encoder=build_encoder(golden.meta, backend=backend),
        backbone=SECOND(
            in_channels=second["in_channels"],
            channels=second["out_channels"],
            layers=second["layer_nums"],
            strides=second["layer_strides"],
        ),
        neck=SECONDFPN(
            in_channels=fpn["in_channels"], channels=fpn["out_channels"], upsample_strides=fpn["upsample_strides"]
        ),
    )
    state = {rename(name): tensor for name, tensor in golden.state_dict().items()}
    branch.load_state_dict(state, strict=True)
    return branch.to(dtype).eval()


def build_oob_encoder(golden, *, out_of_range, backend="auto"):
    """The encoder of backbone3d_oob, whose file holds no other weights."""
    encoder = build_encoder(golden.meta, out_of_range=out_of_range, backend=backend)
    state = {rename(name).removeprefix("encoder."): tensor for name, tensor in golden.state_dict().items()}
    encoder.load_state_dict(state, strict=True)
    return encoder.eval()


def golden_clouds(golden):
    clouds = []
    while f"in/points{len(clouds)}" in golden:
        clouds.append(golden.tensor(f"in/points{len(clouds)}"))
    return clouds


def golden_voxels(golden, dtype, *, device="cpu"):
    """Voxels of the original. float64 takes the float32 means, as the original's float64 run does."""
    features, coords = golden.tensor("out32/voxel_features", dtype), golden.tensor("out/coors_bzyx")
    return VoxelBatch(features.to(device), coords.to(device), len(golden_clouds(golden)))


@pytest.mark.parametrize("name", ["backbone3d", "backbone3d_oob"])
def test_voxels(name):
    golden = load_golden(name)
    voxels = voxelize_batch(golden_clouds(golden), **voxel_settings(golden.meta))
    assert voxels.coords_bzyx.dtype == torch.int32
    golden.check_equal("voxels, cells", voxels.coords_bzyx, golden.tensor("out/coors_bzyx"))
    assert voxels.batch_size == len(golden_clouds(golden))
    for column, reference in zip(voxels.features.T, golden["out32/voxel_features"].T, strict=True):
        golden.check("voxels, means (float32 there)", column, reference, 1e-6)
    # A voxel of one point is that point, to the bit.
    if "out/num_points" in golden:
        single = golden.tensor("out/num_points") == 1
        assert torch.equal(voxels.features[single], golden.tensor("out32/voxel_features")[single])


def test_voxels_up_to_the_cap():
    golden = load_golden("backbone3d")
    settings = voxel_settings(golden.meta) | {"max_voxels": int(golden["trunc/max_voxels"])}
    features, coords = voxelize(golden.tensor("in/points0"), **settings)
    assert len(coords) == settings["max_voxels"]
    golden.check_equal("voxels up to the cap, cells", coords, golden.tensor("trunc/coors_zyx"))
    golden.check("voxels up to the cap, means (float32 there)", features, "trunc/voxel_mean", 1e-6)


@BACKENDS
@DTYPES
def test_branch(dtype, backend):
    check_branch(load_golden("backbone3d"), dtype, backend=backend)


def check_branch(golden, dtype, *, device="cpu", backend="auto"):
    branch = build_branch(golden, dtype=dtype, backend=backend).to(device)
    with torch.no_grad():
        middle = branch.encoder(golden_voxels(golden, dtype, device=device))
        maps = branch.backbone(middle)
        fpn = branch.neck(maps)
    assert middle.shape[1:] == branch.encoder.output_shape
    golden.check("sparse encoder", middle, "out64/middle", TOLERANCE[dtype])
    for i, x in enumerate(maps):
        golden.check(f"SECOND, map {i}", x, f"out64/second{i}", TOLERANCE[dtype])
    golden.check("FPN", fpn, "out64/fpn", TOLERANCE[dtype])


@BACKENDS
def test_branch_from_points(backend):
    check_branch_from_points(load_golden("backbone3d"), backend=backend)


def check_branch_from_points(golden, *, device="cpu", backend="auto"):
    branch = build_branch(golden, dtype=torch.float32, backend=backend).to(device)
    with torch.no_grad():
        fpn = branch([cloud.to(device) for cloud in golden_clouds(golden)])
    golden.check("points to FPN", fpn, "out64/fpn", TOLERANCE[torch.float32])


def sparse_tensor(voxels, shape, backend):
    if backend == "spconv":
        return spconv_backend.make_tensor(voxels.features, voxels.coords_bzyx, shape, voxels.batch_size)
    return SparseRows(voxels.features, find_sites(voxels.coords_bzyx, shape, voxels.batch_size, is_fixed=False))


def shape_and_cells(x):
    """(D, H, W) and the active cells (R, 4) of a sparse tensor of either backend."""
    if isinstance(x, SparseRows):
        return x.sites.grid.shape, torch.stack(x.sites.grid.cells(x.sites.numbers), dim=1)
    return tuple(x.spatial_shape), x.indices


@BACKENDS
@DTYPES
def test_encoder_stages(dtype, backend):
    golden = load_golden("backbone3d")
    encoder = build_branch(golden, dtype=dtype).encoder
    x = sparse_tensor(golden_voxels(golden, dtype), encoder.sparse_shape, backend)
    stages = {"conv_input": encoder.conv_input, **encoder.encoder_layers}
    for name, layer in stages.items():
        with torch.no_grad():
            x = layer(x)
        shape, cells = shape_and_cells(x)
        assert list(shape) == golden[f"out/stage/{name}/spatial_shape"].tolist()
        indices, order = lexicographic(cells, shape)
        if f"out/stage/{name}/indices_sorted" in golden:
            expected = golden.tensor(f"out/stage/{name}/indices_sorted", torch.int64)
            golden.check_equal("sparse encoder stages, active cells", indices, expected)
        else:
            assert len(indices) == int(golden[f"out/stage/{name}/n_active"])
        rows = golden.tensor(f"out/stage/{name}/rows")
        assert torch.equal(indices[rows], golden.tensor(f"out/stage/{name}/row_indices", torch.int64))
        features = x.features[order]
        stage = f"sparse encoder stages, {name}"
        golden.check(stage, features[rows], f"out64/stage/{name}/row_features", TOLERANCE[dtype])
        total = features.double().sum(dim=0).to(dtype)
        golden.check(stage, total, f"out64/stage/{name}/channel_sum", TOLERANCE[dtype])


def lexicographic(indices, spatial_shape):
    """Rows (b, z, y, x) in lexicographic order, int64, and the permutation that sorts them."""
    depth, height, width = spatial_shape
    b, z, y, x = indices.long().T
    order = (((b * depth + z) * height + y) * width + x).argsort()
    return indices.long()[order], order


@BACKENDS
@DTYPES
def test_voxels_outside_the_sparse_shape_are_dropped(dtype, backend):
    check_voxels_outside_dropped(load_golden("backbone3d_oob"), dtype, backend=backend)


def check_voxels_outside_dropped(golden, dtype, *, device="cpu", backend="auto"):
    voxels = golden_voxels(golden, dtype, device=device)
    encoder = build_oob_encoder(golden, out_of_range="drop", backend=backend).to(device, dtype)
    assert (voxels.coords_bzyx[:, 1:].amax(dim=0).cpu() >= torch.tensor(encoder.sparse_shape)).any()
    with torch.no_grad():
        middle = encoder(voxels)
    golden.check("sparse encoder, voxels outside dropped", middle, "out64/middle_oob_dropped", TOLERANCE[dtype])


@needs_spconv
def test_voxels_outside_the_sparse_shape_are_aliased():
    golden = load_golden("backbone3d_oob")
    encoder = build_oob_encoder(golden, out_of_range="alias")
    with torch.no_grad():
        middle = encoder(golden_voxels(golden, torch.float32))
    stage = "sparse encoder, voxels outside aliased (float32 there)"
    golden.check(stage, middle, "out32/middle_spconv_cpu", TOLERANCE[torch.float32])
    assert relative_error(middle, golden["out64/middle_oob_dropped"]) > 1e-3


def test_the_golden_grid_holds_all_voxels():
    meta = load_golden("backbone3d").meta
    vox, mid = meta["cfg"]["vox"], meta["cfg"]["mid"]
    grid = voxel_grid_shape(voxel_size=vox["voxel_size"], point_range=vox["point_cloud_range"])
    assert all(cells <= limit for cells, limit in zip(grid, mid["sparse_shape"], strict=True))
