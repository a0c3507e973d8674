"""Sparse convolutions in PyTorch against spconv, at fixed sizes, bit for bit from run to run."""

import logging

import pytest
import torch

from cmt_aqr.data.readers import read_points
from cmt_aqr.models import gather, spconv_backend
from cmt_aqr.models.lidar import RowBatchNorm, SparseEncoder
from cmt_aqr.models.sparse import Capacities, SparseConvolution, find_output_sites, find_sites
from cmt_aqr.models.voxels import VoxelBatch, pad_voxels, voxelize_batch
from tests.parity.golden import relative_error
from tests.unit.evaluation.frame import ROOT, needs_frame
from tests.unit.models.test_lidar import SMALL, random_voxels, small_encoder

SHAPE = SMALL["sparse_shape"]
needs_spconv = pytest.mark.skipif(spconv_backend.import_error() is not None, reason="spconv cannot be imported")


def one_voxel():
    return VoxelBatch(torch.ones(1, 5, dtype=torch.float64), torch.tensor([[0, 20, 15, 23]], dtype=torch.int32), 1)


def no_voxel():
    return VoxelBatch(torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.int32), 2)


def full_borders():
    """Every cell of the six faces of the grid, and none inside."""
    is_active = torch.zeros(SHAPE, dtype=torch.bool)
    for axis in range(3):
        for side in (0, -1):
            is_active.select(axis, side).fill_(True)
    cells = torch.nn.functional.pad(is_active.nonzero(), (1, 0)).int()
    features = torch.randn(len(cells), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return VoxelBatch(features, cells, 1)


CLOUDS = {
    "random": lambda: random_voxels(SHAPE, frames=(0,)),
    "an empty frame between others": lambda: random_voxels(SHAPE, frames=(0, 2)),
    "dense": lambda: random_voxels(SHAPE, frames=(0,), occupancy=0.9),
    "full borders": full_borders,
    "one voxel": one_voxel,
    "none": no_voxel,
}


def results(encoder, voxels, *, capacities=None):
    """Output, gradients of the voxels and of all parameters, and the buffers that training changes, by name."""
    features = voxels.features.clone().requires_grad_()
    voxels = voxels._replace(features=features)
    out = encoder(voxels) if capacities is None else encoder.encode_fixed(voxels, capacities)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    found = {"output": out.detach(), "voxels": features.grad, **gradients}
    return {**found, **{name: buffer.clone() for name, buffer in encoder.named_buffers()}}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if name == "voxels" and value is None:  # no voxel, no gradient
            continue
        assert actual[name].shape == value.shape, name
        if value.numel() and value.any():
            assert relative_error(actual[name], value) <= tolerance, name
        else:
            assert not actual[name].any(), name


@needs_spconv
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_output_and_gradients_equal_spconv(cloud, is_training):
    found = [
        results(small_encoder(backend=backend).train(is_training), CLOUDS[cloud]()) for backend in ("torch", "spconv")
    ]
    assert_close(*found, tolerance=1e-12)


def real_voxels():
    points = read_points(next((ROOT / "samples" / "LIDAR_TOP").iterdir()))
    settings = {"voxel_size": (0.2, 0.2, 0.4), "point_range": (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)}
    return voxelize_batch([points, points[:0]], **settings, max_voxels=20_000)


def results_on_the_real_frame(backend, dtype, *, is_training):
    """Biases of 8 keep every ReLU open: one within rounding of 0 would switch on one side and change a gradient."""
    settings = {"encoder_channels": ((8, 16), (16, 32), (32,)), "downsample_paddings": (1, 1), "base_channels": 8}
    torch.manual_seed(0)
    encoder = SparseEncoder(in_channels=5, sparse_shape=(21, 512, 512), out_channels=32, backend=backend, **settings)
    for module in encoder.modules():
        if isinstance(module, RowBatchNorm):
            torch.nn.init.constant_(module.bias, 8.0)
    voxels = real_voxels()
    return results(encoder.to(dtype).train(is_training), voxels._replace(features=voxels.features.to(dtype)))


@needs_frame
@needs_spconv
@pytest.mark.data
def test_the_real_frame_in_float32_equals_spconv():
    actual, expected = (results_on_the_real_frame(b, torch.float32, is_training=False) for b in ("torch", "spconv"))
    assert_close(actual, expected, tolerance=1e-5)


@needs_frame
@needs_spconv
@pytest.mark.data
def test_training_on_the_real_frame_in_float32():
    """Batch statistics cancel most of a gradient: either backend is 7e-6 from float64, so 1e-5 from the other one."""
    exact = results_on_the_real_frame("torch", torch.float64, is_training=True)
    assert_close(results_on_the_real_frame("spconv", torch.float64, is_training=True), exact, tolerance=1e-10)
    assert_close(results_on_the_real_frame("torch", torch.float32, is_training=True), exact, tolerance=1e-5)


def test_fresh_weights_are_those_of_spconv():
    spconv = pytest.importorskip("spconv.pytorch")
    torch.manual_seed(0)
    expected = spconv.SubMConv3d(5, 16, 3, padding=1, bias=False).weight
    torch.manual_seed(0)
    torch.testing.assert_close(SparseConvolution(5, 16, subm=True).weight, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_training", [False, True])
def test_the_same_bits_in_every_run(is_training):
    voxels = random_voxels(SHAPE, frames=(0, 1), dtype=torch.float32)
    first, second = (
        results(small_encoder(torch.float32, backend="torch").train(is_training), voxels) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_order_of_voxels_does_not_matter():
    voxels = random_voxels(SHAPE, frames=(0, 1))
    order = torch.randperm(len(voxels.features), generator=torch.Generator().manual_seed(2))
    shuffled = VoxelBatch(voxels.features[order], voxels.coords_bzyx[order], 2)
    first, second = (results(small_encoder(backend="torch").train(), v) for v in (voxels, shuffled))
    first["voxels"] = first["voxels"][order]
    assert_close(second, first, tolerance=1e-12)


def test_chunks_of_rows_change_nothing(monkeypatch):
    voxels = random_voxels(SHAPE, frames=(0,))
    expected = results(small_encoder(backend="torch").train(), voxels)
    monkeypatch.setitem(gather.CHUNK, "cpu", 27 * 4 * 10)
    assert_close(results(small_encoder(backend="torch").train(), voxels), expected, tolerance=1e-12)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_fixed_sizes_equal_exact_ones_up_to_rounding(cloud, is_training):
    voxels = CLOUDS[cloud]()
    outside = torch.tensor([[0, 0, 0, SHAPE[2]], [0, -1, 0, 0], [0, 0, SHAPE[1], 0]], dtype=torch.int32)
    with_outside = VoxelBatch(
        torch.cat([voxels.features, torch.full((3, 5), 9.0, dtype=torch.float64)]),
        torch.cat([voxels.coords_bzyx, outside]),
        voxels.batch_size,
    )
    exact = results(small_encoder(backend="torch").train(is_training), voxels)
    rows = len(voxels.features)
    encoder = small_encoder(backend="torch").train(is_training)
    fixed = results(
        encoder, pad_voxels(with_outside, rows + 40), capacities=[n + 30 for n in encoder.measure_rows(voxels)]
    )
    assert not fixed["voxels"][rows:].any()
    fixed["voxels"] = fixed["voxels"][:rows]
    assert_close(fixed, exact, tolerance=1e-12)


def test_a_capacity_that_just_fits_and_one_that_does_not(caplog):
    voxels = random_voxels(SHAPE, frames=(0, 1))
    encoder = small_encoder(backend="torch").eval()
    needed = encoder.measure_rows(voxels)
    out, counts = encoder.encode_fixed(voxels, needed)
    assert tuple(counts.tolist()) == needed
    assert relative_error(out, encoder(voxels)) <= 1e-12
    for level in range(3):
        too_small = [n - (i == level) for i, n in enumerate(needed)]
        out, counts = encoder.encode_fixed(voxels, too_small)
        assert out.isnan().all()
        assert counts[level] == needed[level]

    capacities = Capacities(needed)
    assert capacities.hold(counts) and not caplog.records
    assert all(rows >= 1.25 * n for rows, n in zip(capacities.rows, needed, strict=True))
    capacities.rows = (needed[0], needed[1] - 1, needed[2])
    counts = encoder.encode_fixed(voxels, capacities.rows)[1]
    with caplog.at_level(logging.WARNING):
        assert not capacities.hold(counts)
    assert len(caplog.records) == 1
    assert (capacities.rows[0], capacities.rows[2]) == (needed[0], needed[2])
    out, counts = encoder.encode_fixed(voxels, capacities.rows)
    assert capacities.hold(counts) and len(caplog.records) == 1
    assert relative_error(out, encoder(voxels)) <= 1e-12


def test_errors_of_fixed_sizes():
    encoder = small_encoder(backend="torch")
    with pytest.raises(ValueError, match=r"capacities is \(5, 6\); expected 3 positive numbers"):
        encoder.encode_fixed(one_voxel(), (5, 6))
    with pytest.raises(ValueError, match="1 voxels do not fit into 0 rows"):
        pad_voxels(one_voxel(), 0)
    with pytest.raises(ValueError, match=r"padding .* is \(2, 1, 1\); expected 0 or 1"):
        SparseConvolution(1, 1, padding=(2, 1, 1))


def test_active_cells_of_a_strided_convolution_by_hand():
    # One voxel at z, y, x = 1, 2, 3: along z only the window of 0 (cells -1..1) and of 1 (1..3), and so on.
    sites = find_sites(torch.tensor([[1, 1, 2, 3]]), (5, 6, 7), 2, is_fixed=False)
    out = find_output_sites(sites, SparseConvolution(1, 1, stride=(2, 2, 2)), None)
    assert out.grid.shape == (3, 3, 4)
    cells = torch.stack(out.grid.cells(out.numbers), dim=1).tolist()
    assert cells == [[1, z, 1, x] for z in (0, 1) for x in (1, 2)]
    assert [out.table[number].item() for number in out.numbers] == [0, 1, 2, 3]
    assert (out.table != 4).sum() == 4
