import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmt_aqr.models import lidar, spconv_backend
from cmt_aqr.models.lidar import FASTER, LidarBranch, SparseEncoder, choose_backend, encoder_output_shape
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.voxels import VoxelBatch
from tests.parity.golden import relative_error
from tests.unit.models.dense_oracle import dense_encoder

needs_spconv = pytest.mark.skipif(spconv_backend.import_error() is not None, reason="spconv cannot be imported")
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("spconv", marks=needs_spconv)])
SMALL = {
    "in_channels": 5,
    "sparse_shape": (21, 16, 24),
    "base_channels": 4,
    "encoder_channels": ((4, 6), (6, 8), (8, 8)),
    "downsample_paddings": (1, (0, 1, 1)),
    "out_channels": 6,
}


def small_encoder(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    encoder = SparseEncoder(**(SMALL | changes))
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return encoder.to(dtype)


def random_voxels(shape, frames, seed=0, dtype=torch.float64, occupancy=0.05):
    """Voxels in the given frames of a batch of max(frames) + 1, corners of the grid included."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for b in frames:
        is_active = torch.rand(shape, generator=generator) < occupancy
        is_active[0, 0, 0] = is_active[-1, -1, -1] = is_active[0, -1, 0] = is_active[-1, 0, -1] = True
        cells = is_active.nonzero()
        cells = cells[torch.randperm(len(cells), generator=generator)]
        rows.append(torch.nn.functional.pad(cells, (1, 0), value=b))
    coords = torch.cat(rows).int()
    features = torch.randn(len(coords), SMALL["in_channels"], generator=generator, dtype=torch.float64)
    return VoxelBatch(features.to(dtype), coords, max(frames) + 1)


@BACKENDS
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_equals_the_dense_oracle(dtype, tolerance, is_training, backend):
    encoder = small_encoder(dtype, backend=backend).train(is_training)
    reference = small_encoder().train(is_training)
    voxels = random_voxels(SMALL["sparse_shape"], frames=(0, 2))
    features = voxels.features.clone().requires_grad_()
    expected = dense_encoder(reference, voxels._replace(features=features))
    # The weights of the output are fixed and random: a plain sum has no gradient through a batch norm.
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weights).sum().backward()

    sparse_features = voxels.features.to(dtype).requires_grad_()
    out = encoder(voxels._replace(features=sparse_features))
    (out * weights).sum().backward()
    assert out.shape == (3, *encoder.output_shape)
    assert relative_error(out, expected) <= tolerance
    assert relative_error(sparse_features.grad, features.grad) <= 20 * tolerance
    for (name, actual), parameter in zip(encoder.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(actual.grad, parameter.grad) <= 20 * tolerance, name


@BACKENDS
@pytest.mark.parametrize("is_training", [False, True])
def test_frames_without_voxels_are_zero_and_frames_do_not_mix(is_training, backend):
    encoder = small_encoder(backend=backend).train(is_training)
    voxels = random_voxels(SMALL["sparse_shape"], frames=(1,))
    out = encoder(voxels._replace(batch_size=3))
    assert out.shape == (3, *encoder.output_shape)
    assert not out[0].any() and not out[2].any() and out[1].any()
    alone = small_encoder().train(is_training)(
        VoxelBatch(voxels.features, voxels.coords_bzyx - torch.tensor([1, 0, 0, 0], dtype=torch.int32), 1)
    )
    torch.testing.assert_close(out[1], alone[0], rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("num_voxels", [0, 1])
@pytest.mark.parametrize("is_training", [False, True])
def test_hardly_any_voxel(num_voxels, is_training, backend):
    encoder = small_encoder(backend=backend).train(is_training)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    voxels = VoxelBatch(
        torch.ones(num_voxels, 5, dtype=torch.float64), torch.full((num_voxels, 4), 3, dtype=torch.int32), 4
    )
    voxels.coords_bzyx[:, 0] = 2
    out = encoder(voxels)
    out.sum().backward()
    assert out.shape == (4, *encoder.output_shape)
    assert out.isfinite().all()
    assert bool(out.any()) == bool(num_voxels)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in encoder.parameters())
    if num_voxels == 0:
        assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())


@BACKENDS
def test_voxels_that_no_window_reaches_leave_an_empty_grid(backend):
    # An even number of cells without padding: the last one lies in no window of the stride-2 convolution.
    encoder = small_encoder(sparse_shape=(20, 16, 24), downsample_paddings=(0, 1), backend=backend)
    coords = torch.tensor([[0, 19, 4, x] for x in (3, 4, 5)], dtype=torch.int32)
    voxels = VoxelBatch(torch.ones(3, 5, dtype=torch.float64), coords, 1)
    for is_training in (False, True):
        out = encoder.train(is_training)(voxels)
        assert out.shape == (1, *encoder.output_shape)
        assert not out.any()


@pytest.mark.parametrize(
    ("sparse_shape", "paddings", "expected"),
    [
        ((41, 1024, 1024), (1, 1, (0, 1, 1)), (256, 128, 128)),
        ((41, 1440, 1440), (1, 1, (0, 1, 1)), (256, 180, 180)),
        ((21, 128, 128), (1, 1, 1), (128, 16, 16)),
    ],
)
def test_output_shape(sparse_shape, paddings, expected):
    assert encoder_output_shape(sparse_shape=sparse_shape, downsample_paddings=paddings, out_channels=128) == expected


def test_branch_on_a_small_grid():
    encoder = SparseEncoder(
        in_channels=5,
        sparse_shape=[21, 128, 128],
        base_channels=8,
        encoder_channels=[[8, 8, 16], [16, 16, 16], [16, 16, 16], [16, 16]],
        downsample_paddings=[1, 1, [1, 1, 1]],
        out_channels=16,
    )
    branch = LidarBranch(
        voxel_size=(0.4, 0.4, 0.4),
        point_range=(-25.6, -25.6, -5.0, 25.6, 25.6, 3.0),
        max_voxels_train=400,
        max_voxels_test=900,
        encoder=encoder,
        backbone=SECOND(in_channels=encoder.output_shape[0], channels=(8, 12), layers=(1, 2)),
        neck=SECONDFPN(in_channels=(8, 12), channels=(8, 8)),
    )
    points = torch.randn(3000, 5) * torch.tensor([10.0, 10.0, 1.0, 1.0, 1.0])
    assert len(branch.voxelize([points]).coords_bzyx) == 400
    assert len(branch.eval().voxelize([points]).coords_bzyx) == 900
    out = branch.train()([points, points[:100]])
    assert out.shape == (2, branch.neck.out_channels, *encoder.output_shape[1:])
    out.mean().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())


@BACKENDS
def test_autocast_around_the_encoder_does_not_reach_it(backend):
    encoder = small_encoder(torch.float32, backend=backend).eval()
    voxels = random_voxels(SMALL["sparse_shape"], frames=(0,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(voxels)
    assert out.dtype == torch.float32
    assert torch.equal(out, encoder(voxels))


@needs_spconv
def test_the_backend_follows_device_mode_and_dtype():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for (device, is_training), faster in FASTER.items():
        assert choose_backend("auto", torch.device(device), torch.float32, is_training=is_training) == faster
    for dtype in (torch.float64, torch.bfloat16):
        assert choose_backend("auto", cuda, dtype, is_training=False) == "torch"
        with pytest.raises(ValueError, match=f"spconv has no {dtype} kernels on CUDA"):
            choose_backend("spconv", cuda, dtype, is_training=False)
    assert choose_backend("torch", cpu, torch.float32, is_training=True) == "torch"
    assert choose_backend("spconv", cpu, torch.float64, is_training=True) == "spconv"
    assert choose_backend("auto", cpu, torch.float32, is_training=True, out_of_range="alias") == "spconv"
    with pytest.raises(ValueError, match="out_of_range='alias' repeats what spconv does on the CPU"):
        choose_backend("auto", cuda, torch.float32, is_training=False, out_of_range="alias")


def test_the_log_says_which_backend_is_taken(monkeypatch):
    monkeypatch.setattr(lidar, "FASTER", {("cpu", True): "spconv", ("cpu", False): "torch"})
    monkeypatch.setattr(spconv_backend, "import_error", lambda: None)
    cpu = torch.device("cpu")
    assert SparseEncoder(**SMALL).describe(cpu) == (
        "sparse encoder: spconv in training, torch in evaluation (model.lidar.sparse_backend: auto)"
    )
    said = SparseEncoder(**SMALL, backend="torch").describe(cpu)
    assert said == "sparse encoder: torch (model.lidar.sparse_backend: torch)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_paddings": (1,)}, r"has 1 entries; expected 2"),
        ({"encoder_channels": ((4, 6), (7, 8), (8, 8))}, r"encoder_channels\[1\] = \(7, 8\).*must be 6"),
        ({"out_of_range": "wrap"}, r"out_of_range is 'wrap'"),
        ({"precision": torch.float64}, r"precision is torch.float64"),
        ({"backend": "cuda"}, r"backend is 'cuda'; expected one of"),
        ({"backend": "torch", "out_of_range": "alias"}, r"out_of_range is 'alias', which only spconv does"),
        ({"sparse_shape": (4, 16, 16)}, r"too small"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        SparseEncoder(**(SMALL | changes))


@pytest.mark.parametrize("changes", [{"backend": "spconv"}, {"out_of_range": "alias"}])
def test_missing_spconv_is_one_sentence_where_it_is_asked_for(monkeypatch, changes):
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    key, value = next(iter(changes.items()))
    key = {"backend": "sparse_backend"}.get(key, key)
    with pytest.raises(ValueError, match=f"^{key}: '{value}' needs the package spconv, which .*; install"):
        SparseEncoder(**SMALL, **changes)


WITHOUT_SPCONV = """
import sys
sys.modules["spconv"] = None
import torch
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
config = load_config({config!r}, ["model.lidar.sparse_shape=[21,64,64]"])
torch.manual_seed(0)
branch = build_detector(config.model).lidar_branch
print(branch.encoder.describe(torch.device("cpu")))
out = branch([torch.rand(500, 5) * 4 - torch.tensor([51, 51, 5, 0, 0])])
out.square().sum().backward()
assert branch.encoder.conv_input[0].weight.grad.any()
"""


def test_everything_works_without_spconv():
    repository = Path(__file__).parents[3]
    script = WITHOUT_SPCONV.format(config=str(repository / "configs" / "synthetic_tiny.yaml"))
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "sparse encoder: torch (model.lidar.sparse_backend: auto)\n"


def test_second_and_neck_settings():
    backbone = SECOND(in_channels=6, channels=(4, 6, 8), layers=(1, 0, 2), strides=(1, 2, 2))
    assert backbone.out_strides == (1, 2, 4)
    maps = backbone(torch.randn(2, 6, 8, 12))
    assert [tuple(x.shape) for x in maps] == [(2, 4, 8, 12), (2, 6, 4, 6), (2, 8, 2, 3)]
    neck = SECONDFPN(in_channels=backbone.out_channels, channels=(3, 4, 5), upsample_strides=(1, 2, 4))
    assert neck(maps).shape == (2, neck.out_channels, 8, 12)
    with pytest.raises(ValueError, match="one entry per stage"):
        SECOND(in_channels=6, channels=(4, 6), layers=(1,), strides=(1, 2))
    with pytest.raises(ValueError, match="one entry per stage"):
        SECONDFPN(in_channels=(4,), channels=(4, 6), upsample_strides=(1, 2))


def test_spconv_is_not_imported_where_it_is_not_the_faster_one(monkeypatch):
    """Importing it takes seconds."""
    monkeypatch.setattr("cmt_aqr.models.spconv_backend.import_error", lambda: pytest.fail("imported"))
    assert choose_backend("auto", torch.device("cpu"), torch.float32, is_training=False) == "torch"
