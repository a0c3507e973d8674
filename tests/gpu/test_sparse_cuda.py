"""Sparse convolutions in PyTorch on CUDA against the CPU in float64; fixed sizes, which never wait, as a CUDA graph."""

import copy

import pytest
import torch

from cmt_aqr.models.lidar import RowBatchNorm, SparseEncoder
from cmt_aqr.models.sparse import Capacities, SparseConvolution
from cmt_aqr.models.voxels import VoxelBatch, pad_voxels
from tests.gpu.test_branches_cuda import ieee_arithmetic, random_voxels, to_cuda  # noqa: F401
from tests.parity.golden import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPE = (41, 256, 256)
# One rounding is 6e-8, 5e-4 or 4e-3; the errors of 21 convolutions add up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
# Of gradients in training, where batch statistics cancel most of them.
TRAINING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-1, torch.bfloat16: 5e-1}


def make_encoder(precision=torch.float32, *, gain=1.0):
    """Biases of 8 keep every ReLU open: one within rounding of 0 would switch on one side and change a gradient.

    In evaluation nothing is normalised: only a gain of 0.1, a factor of the weights, keeps all sums below the biases.
    """
    torch.manual_seed(0)
    encoder = SparseEncoder(in_channels=5, sparse_shape=SHAPE, backend="torch", precision=precision)
    for module in encoder.modules():
        if isinstance(module, RowBatchNorm):
            torch.nn.init.constant_(module.bias, 8.0)
        elif isinstance(module, SparseConvolution):
            with torch.no_grad():
                module.weight.mul_(gain)
    return encoder


def results(encoder, voxels, *, capacities=None):
    """Output and gradients of the voxels and all parameters, on the CPU in float64, by name."""
    features = voxels.features.detach().clone().requires_grad_()
    voxels = voxels._replace(features=features)
    encoder.zero_grad()
    out = encoder(voxels) if capacities is None else encoder.encode_fixed(voxels, capacities)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    found = {"output": out.detach(), "voxels": features.grad, **gradients}
    return {name: value.cpu().double() for name, value in found.items()}


def distance(actual, expected):
    """Largest norm of a difference over the norm, of the output and all gradients."""
    return max(((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients_equal_the_cpu_in_float64(dtype, is_training):
    # Gradients that 21 layers with small weights leave are too small for float16, and its limit allows a few switches.
    gain = 1.0 if is_training or dtype in (torch.float16, torch.bfloat16) else 0.1
    reference = make_encoder(gain=gain).double().train(is_training)
    voxels = random_voxels()
    expected = results(reference, voxels._replace(features=voxels.features.double()))
    encoder = make_encoder(torch.float32 if dtype == torch.float64 else dtype, gain=gain).cuda().train(is_training)
    if dtype == torch.float64:
        encoder, voxels = encoder.double(), voxels._replace(features=voxels.features.double())
    found = results(encoder, to_cuda(voxels))
    assert relative_error(found["output"], expected["output"]) <= TOLERANCE[dtype]
    assert distance(found, expected) <= (TRAINING[dtype] if is_training else 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_bits_in_every_run(dtype):
    encoder, voxels = make_encoder(dtype).cuda().train(), to_cuda(random_voxels())
    first, second = results(encoder, voxels), results(encoder, voxels)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("is_training", [False, True])
def test_fixed_sizes_equal_exact_ones_and_nothing_waits(is_training):
    voxels = to_cuda(random_voxels())
    encoder = make_encoder().cuda().train(is_training)
    expected = results(copy.deepcopy(encoder), voxels)
    rows = len(voxels.features)
    padded = pad_voxels(voxels, rows + 1000)
    capacities = Capacities(encoder.measure_rows(voxels)).rows
    features = padded.features.detach().requires_grad_()
    weights = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.float().cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, counts = encoder.encode_fixed(padded._replace(features=features), capacities)
        (out * weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tuple(counts.tolist()) == encoder.measure_rows(voxels)
    found = {"output": out, "voxels": features.grad[:rows]}
    found |= {name: parameter.grad for name, parameter in encoder.named_parameters()}
    found = {name: value.detach().cpu().double() for name, value in found.items()}
    assert distance(found, expected) <= (TRAINING if is_training else TOLERANCE)[torch.float32]


def test_one_graph_for_two_clouds():
    encoder = make_encoder().cuda().eval()
    first = to_cuda(random_voxels())
    cells = first.coords_bzyx.clone()
    cells[:, 3] = SHAPE[2] - 1 - cells[:, 3]  # mirrored, and without some of the voxels
    second = VoxelBatch(first.features[500:] + 1, cells[500:], first.batch_size)
    rows = len(first.features) + 100
    capacities = Capacities(encoder.measure_rows(first)).rows
    static = pad_voxels(first, rows)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(2):
                encoder.encode_fixed(static, capacities)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, counts = encoder.encode_fixed(static, capacities)
        for voxels in (second, first, second):
            padded = pad_voxels(voxels, rows)
            static.features.copy_(padded.features)
            static.coords_bzyx.copy_(padded.coords_bzyx)
            graph.replay()
            assert tuple(counts.tolist()) == encoder.measure_rows(voxels)
            assert relative_error(out, encoder(voxels).cpu().double()) <= TOLERANCE[torch.float32]


def test_a_capacity_that_is_too_small_gives_nan():
    encoder, voxels = make_encoder().cuda().eval(), to_cuda(random_voxels())
    needed = encoder.measure_rows(voxels)
    with torch.no_grad():
        for level in range(len(needed)):
            out, counts = encoder.encode_fixed(voxels, [n - (i == level) for i, n in enumerate(needed)])
            assert out.isnan().all()
            assert counts[level] == needed[level]
