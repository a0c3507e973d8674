"""LiDAR and image branch on CUDA against the same modules on the CPU in float64."""

import copy

import pytest
import torch

from cmt_aqr.models import spconv_backend
from cmt_aqr.models.image import ImageBranch
from cmt_aqr.models.lidar import SparseEncoder
from cmt_aqr.models.neck import CPFPN
from cmt_aqr.models.resnet import ResNet
from cmt_aqr.models.voxels import VoxelBatch, voxelize
from tests.parity.golden import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SETTINGS = {"voxel_size": (0.1, 0.1, 0.2), "point_range": (-12.8, -12.8, -5.0, 12.8, 12.8, 3.0), "max_voxels": 20_000}
# float16 rounds to 5e-4; its errors add up over the 21 convolutions.
needs_spconv = pytest.mark.skipif(spconv_backend.import_error() is not None, reason="spconv cannot be imported")
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("spconv", marks=needs_spconv)])
FORWARD = {torch.float32: 5e-6, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def ieee_arithmetic():
    convolution, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matmul


def random_cloud(seed, count=60_000):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator) * torch.tensor([6.0, 6.0, 1.0, 1.0, 1.0])


def random_voxels():
    clouds = [random_cloud(0), torch.zeros(0, 5), random_cloud(1, count=5_000)]
    means, cells = zip(*(voxelize(cloud, **SETTINGS) for cloud in clouds), strict=True)
    coords = [torch.nn.functional.pad(cell, (1, 0), value=b) for b, cell in enumerate(cells)]
    return VoxelBatch(torch.cat(means), torch.cat(coords), len(clouds))


def to_cuda(voxels):
    return voxels._replace(features=voxels.features.cuda(), coords_bzyx=voxels.coords_bzyx.cuda())


def test_voxels_are_the_same_on_both_devices():
    cloud = random_cloud(2, count=200_000)
    features, coords = voxelize(cloud, **SETTINGS)
    cuda_features, cuda_coords = voxelize(cloud.cuda(), **SETTINGS)
    assert torch.equal(cuda_coords.cpu(), coords)
    assert relative_error(cuda_features, features) <= 1e-6
    assert torch.equal(cuda_features, voxelize(cloud.cuda(), **SETTINGS)[0])


def gradients_of(encoder, out):
    """Gradients of a fixed random weighting of the output, on the CPU in float64, by parameter name."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    return {name: parameter.grad.cpu().double() for name, parameter in encoder.named_parameters()}


@BACKENDS
@pytest.mark.parametrize("is_training", [False, True])
def test_encoder_in_float32(is_training, backend):
    torch.manual_seed(0)
    reference = SparseEncoder(in_channels=5, sparse_shape=(41, 256, 256)).double().train(is_training)
    on_cpu, on_cuda = copy.deepcopy(reference).float(), copy.deepcopy(reference).float().cuda()
    on_cpu.backend = on_cuda.backend = backend
    voxels = random_voxels()
    expected, out_cpu = reference(voxels), on_cpu(voxels)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = on_cuda(to_cuda(voxels))
    assert out.dtype == torch.float32
    assert relative_error(out, expected) <= max(FORWARD[torch.float32], 2 * relative_error(out_cpu, expected))


@BACKENDS
def test_encoder_gradients_in_float32(backend):
    """CUDA is as far from float64 as the CPU is in float32.

    Batch-norm biases of 8 keep every ReLU open: one that is within rounding of 0 switches on either device and changes
    a gradient by 1e-3.
    """
    torch.manual_seed(0)
    reference = SparseEncoder(in_channels=5, sparse_shape=(41, 256, 256)).double().train()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.constant_(module.bias, 8.0)
    on_cpu, on_cuda = copy.deepcopy(reference).float(), copy.deepcopy(reference).float().cuda()
    on_cpu.backend = on_cuda.backend = backend
    voxels = random_voxels()
    wanted = gradients_of(reference, reference(voxels))
    errors = [
        {name: ((grad - wanted[name]).norm() / wanted[name].norm()).item() for name, grad in gradients.items()}
        for gradients in (gradients_of(on_cuda, on_cuda(to_cuda(voxels))), gradients_of(on_cpu, on_cpu(voxels)))
    ]
    assert max(errors[0].values()) <= 3 * max(errors[1].values())


@BACKENDS
def test_encoder_in_float16(backend):
    torch.manual_seed(0)
    reference = SparseEncoder(in_channels=5, sparse_shape=(41, 256, 256), precision=torch.float16).double().eval()
    encoder = copy.deepcopy(reference).float().cuda()
    encoder.backend = backend
    voxels = random_voxels()
    expected, out = reference(voxels), encoder(to_cuda(voxels))
    assert relative_error(out, expected) <= FORWARD[torch.float16]
    wanted = gradients_of(reference, expected)
    for name, gradient in gradients_of(encoder, out).items():
        assert (gradient - wanted[name]).norm() <= 0.2 * wanted[name].norm(), name


@BACKENDS
@pytest.mark.parametrize("num_voxels", [0, 1])
def test_hardly_any_voxel(num_voxels, backend):
    encoder = SparseEncoder(in_channels=5, sparse_shape=(41, 256, 256), backend=backend).cuda().train()
    voxels = VoxelBatch(torch.ones(num_voxels, 5), torch.full((num_voxels, 4), 1, dtype=torch.int32), 2)
    out = encoder(to_cuda(voxels))
    out.sum().backward()
    assert out.shape == (2, *encoder.output_shape)
    assert out.isfinite().all()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@BACKENDS
def test_voxels_outside_the_sparse_shape(backend):
    """ "drop" equals the CPU; "alias" is spconv's behaviour on the CPU only (on CUDA 16 % off) and refused."""
    voxels = random_voxels()
    torch.manual_seed(0)
    encoder = SparseEncoder(in_channels=5, sparse_shape=(41, 240, 240), out_of_range="drop", backend=backend).eval()
    with torch.no_grad():
        expected = encoder(voxels)
        out = encoder.cuda()(to_cuda(voxels))
    assert relative_error(out, expected) <= FORWARD[torch.float32]
    if backend == "torch":
        return
    encoder = SparseEncoder(in_channels=5, sparse_shape=(41, 240, 240), out_of_range="alias").cuda()
    with pytest.raises(ValueError, match="alias"):
        encoder(to_cuda(voxels))


@needs_spconv
def test_spconv_refuses_float64():
    encoder = SparseEncoder(in_channels=5, sparse_shape=(41, 256, 256), backend="spconv").double().cuda()
    with pytest.raises(ValueError, match=r"no torch\.float64 kernels on CUDA"):
        encoder(to_cuda(random_voxels()))


def test_image_branch():
    torch.manual_seed(0)
    backbone = ResNet(depth=50, base_channels=16)
    neck = CPFPN(in_channels=backbone.out_channels)
    mean, std = (103.530, 116.280, 123.675), (57.375, 57.120, 58.395)
    reference = ImageBranch(mean=mean, std=std, backbone=backbone, neck=neck).double().eval()
    branch = copy.deepcopy(reference).float().cuda().to(memory_format=torch.channels_last)
    pixels = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        expected, out = reference(pixels), branch(pixels.cuda())
    assert relative_error(out, expected) <= FORWARD[torch.float32]
