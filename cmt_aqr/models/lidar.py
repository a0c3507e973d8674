"""LiDAR branch: points -> voxels -> sparse 3D convolutions -> bird's-eye grid of features.

Shapes: B batch, S voxels, F features of a point, C channels, (D, H, W) = cells in (z, y, x). H runs along y and W
along x.

spconv is imported when a SparseEncoder is built, so camera-only models work without it.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.voxels import VoxelBatch, voxelize_batch

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01
OUT_OF_RANGE = ("drop", "alias")
PRECISIONS = (torch.float32, torch.float16)


def convolved_shape(
    shape: Sequence[int], *, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Cells (z, y, x) after a strided convolution: floor((n + 2 * padding - kernel) / stride) + 1 along each axis."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape, kernel, stride, padding, strict=True))


def encoder_output_shape(
    *, sparse_shape: Sequence[int], downsample_paddings: Sequence[int | Sequence[int]], out_channels: int
) -> tuple[int, int, int]:
    """Shape (out_channels * D, H, W) of a SparseEncoder's output, from its settings alone.

    Errors: ValueError where a convolution would leave no cell.
    """
    shape = tuple(sparse_shape)
    for padding in downsample_paddings:
        shape = convolved_shape(shape, kernel=(3, 3, 3), stride=(2, 2, 2), padding=_triple(padding))
    depth, height, width = convolved_shape(shape, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0))
    if min(depth, height, width) < 1:
        raise ValueError(
            f"sparse_shape (z, y, x) = {tuple(sparse_shape)} is too small for {len(downsample_paddings)} stride-2 "
            f"convolutions with paddings {tuple(downsample_paddings)} and the final z convolution: the output would "
            f"have {(depth, height, width)} cells; use more cells, more padding or fewer stages"
        )
    return out_channels * depth, height, width


def _triple(padding: int | Sequence[int]) -> tuple[int, ...]:
    return (padding,) * 3 if isinstance(padding, int) else tuple(padding)


def _import_spconv():
    # Every sparse tensor asks torch.fx a question that torch once answers with a warning about something else.
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_no_tracing_advice)
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError(
            f"SparseEncoder needs the package spconv (setup.cfg: spconv-cu121), which cannot be imported: {error}. "
            "Camera-only models work without it."
        ) from error
    return spconv


def _is_no_tracing_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("is_fx_tracing will return true")


def select_algorithm(device: torch.device):
    """spconv's convolution algorithm for a device: only Native has CPU kernels, implicit GEMM is the fast one."""
    algorithms = _import_spconv().ConvAlgo
    return algorithms.MaskImplicitGemm if device.type == "cuda" else algorithms.Native


def _convolve(convolution: nn.Module, x):
    # spconv's own forward would choose by the module's mode, and its evaluation path on CUDA has no gradient and
    # ignores autocast. The training path gives the same values.
    return convolution._conv_forward(True, x, convolution.weight, None)


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over voxels. Fewer than two rows have no variance: they use, and leave, the running statistics."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """X (S, C) -> (S, C)."""
        if self.training and x.shape[0] < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class SparseBlock(nn.Module):
    """Residual block of two submanifold convolutions: relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int, *, indice_key: str):
        super().__init__()
        spconv = _import_spconv()
        # One key per stage: all submanifold convolutions of a stage have the same sites and share one rulebook.
        self.conv1 = spconv.SubMConv3d(channels, channels, 3, padding=1, bias=False, indice_key=indice_key)
        self.bn1 = RowBatchNorm(channels)
        self.conv2 = spconv.SubMConv3d(channels, channels, 3, padding=1, bias=False, indice_key=indice_key)
        self.bn2 = RowBatchNorm(channels)

    def forward(self, x):
        """Sparse tensor -> sparse tensor with the same sites and channels."""
        out = _convolve(self.conv1, x)
        out = out.replace_feature(F.relu(self.bn1(out.features)))
        out = _convolve(self.conv2, out)
        return out.replace_feature(F.relu(self.bn2(out.features) + x.features))


class SparseConvNorm(nn.Sequential):
    """Sparse convolution (0), batch norm (1), ReLU."""

    def __init__(self, convolution: nn.Module, channels: int):
        super().__init__(convolution, RowBatchNorm(channels))

    def forward(self, x):
        """Sparse tensor -> sparse tensor on the sites of the convolution's output."""
        convolution, norm = self
        out = _convolve(convolution, x)
        return out.replace_feature(F.relu(norm(out.features)))


class SparseEncoder(nn.Module):
    """Sparse 3D convolutions over the voxels, flattened to a dense bird's-eye grid.

    An input convolution; stages of residual submanifold blocks, each but the last ended by a stride-2 convolution;
    an output convolution that halves z. In `encoder_channels`, one tuple per stage, every entry is a residual block
    with that many channels, and the last entry of every stage but the last is the width of its stride-2 convolution.
    A submanifold convolution keeps the set of active sites; a strided one activates every cell that has an active
    site in its window. Values of inactive cells are 0.

    Args:
        in_channels: F of the voxels.
        sparse_shape: cells (z, y, x). It may be smaller than the voxel grid, see `out_of_range`.
        downsample_paddings: padding, a number or (z, y, x), of each stride-2 convolution.
        out_of_range: what happens to voxels outside `sparse_shape` (*Quirk Q13*): "drop" removes them; "alias" hands
            them to spconv as the original does, where a voxel at x >= W is hashed like (y + 1, x - W) and leaks into
            its neighbours there until the first stride-2 convolution removes it (CPU only: CUDA hashes otherwise).
        precision: float32, or float16 on CUDA (spconv has no bfloat16 there). Autocast is off inside in the first
            case, float16 in the second, whatever surrounds the call. On CPU the dtype of the weights is used,
            float64 included; CUDA has no float64 kernels.

    Parameter names equal those of the official checkpoints without `pts_middle_encoder.`; weights are laid out
    (out, kz, ky, kx, in).

    *Source*: mmdet3d SparseEncoder with basic blocks.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        sparse_shape: Sequence[int],
        base_channels: int = 16,
        encoder_channels: Sequence[Sequence[int]] = ((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
        downsample_paddings: Sequence[int | Sequence[int]] = (1, 1, (0, 1, 1)),
        out_channels: int = 128,
        out_of_range: str = "drop",
        precision: torch.dtype = torch.float32,
    ):
        super().__init__()
        spconv = _import_spconv()
        if len(downsample_paddings) != len(encoder_channels) - 1:
            raise ValueError(
                f"downsample_paddings {tuple(downsample_paddings)} has {len(downsample_paddings)} entries; expected "
                f"{len(encoder_channels) - 1}, one for every stage of encoder_channels but the last"
            )
        if out_of_range not in OUT_OF_RANGE:
            raise ValueError(f"out_of_range is {out_of_range!r}; expected one of {OUT_OF_RANGE}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision}; expected one of {PRECISIONS}")
        self.sparse_shape = tuple(sparse_shape)
        self.out_of_range = out_of_range
        self.precision = precision
        self.output_shape = encoder_output_shape(
            sparse_shape=sparse_shape, downsample_paddings=downsample_paddings, out_channels=out_channels
        )

        stem = spconv.SubMConv3d(in_channels, base_channels, 3, padding=1, bias=False, indice_key="stage1")
        self.conv_input = SparseConvNorm(stem, base_channels)
        self.encoder_layers = nn.ModuleDict()
        channels = base_channels
        for i, widths in enumerate(encoder_channels):
            is_last = i == len(encoder_channels) - 1
            blocks = widths if is_last else widths[:-1]
            if any(width != channels for width in blocks):
                raise ValueError(
                    f"encoder_channels[{i}] = {tuple(widths)}: residual blocks keep their width, so these entries "
                    f"must be {channels}, the channels that enter the stage"
                )
            stage: list[nn.Module] = [SparseBlock(channels, indice_key=f"stage{i + 1}") for _ in blocks]
            if not is_last:
                padding = list(_triple(downsample_paddings[i]))
                down = spconv.SparseConv3d(channels, widths[-1], 3, stride=2, padding=padding, bias=False)
                stage.append(SparseConvNorm(down, widths[-1]))
                channels = widths[-1]
            self.encoder_layers[f"encoder_layer{i + 1}"] = nn.Sequential(*stage)
        flatten = spconv.SparseConv3d(channels, out_channels, (3, 1, 1), stride=(2, 1, 1), bias=False)
        self.conv_out = SparseConvNorm(flatten, out_channels)
        self._set_algorithms()

    def _set_algorithms(self) -> None:
        for module in self.modules():
            if hasattr(module, "algo"):
                module.algo = select_algorithm(module.weight.device)

    def _apply(self, fn, recurse=True):
        # Every move between devices comes through here, and the algorithm depends on the device.
        super()._apply(fn, recurse)
        self._set_algorithms()
        return self

    def forward(self, voxels: VoxelBatch) -> Tensor:
        """Voxels -> (B, out_channels * D, H, W) = (B, *output_shape); channel c of height d has index c * D + d.

        A frame without voxels gives zeros; a batch without any gives zeros from which every parameter gets a zero
        gradient.
        """
        weight = self.conv_out[0].weight
        if weight.device.type == "cuda" and weight.dtype == torch.float64:
            raise ValueError("SparseEncoder has no float64 kernels on CUDA; run it in float64 on the CPU")
        if weight.device.type == "cuda" and self.out_of_range == "alias":
            raise ValueError(
                "SparseEncoder with out_of_range='alias' repeats what spconv does on the CPU; on CUDA voxels outside "
                "the sparse shape collide differently: use out_of_range='drop', or the CPU"
            )
        features, coords = voxels.features.to(weight.dtype), voxels.coords_bzyx
        if self.out_of_range == "drop":
            shape = coords.new_tensor(self.sparse_shape)
            inside = ((coords[:, 1:] >= 0) & (coords[:, 1:] < shape)).all(dim=1)
            features, coords = features[inside], coords[inside]
        is_half = weight.device.type == "cuda" and self.precision == torch.float16
        with torch.autocast(weight.device.type, dtype=torch.float16 if is_half else None, enabled=is_half):
            return self._encode(features, coords, voxels.batch_size).to(weight.dtype)

    def _encode(self, features: Tensor, coords: Tensor, batch_size: int) -> Tensor:
        x = _import_spconv().SparseConvTensor(features, coords, list(self.sparse_shape), batch_size)
        for layer in (self.conv_input, *self.encoder_layers.values(), self.conv_out):
            if x.features.shape[0] == 0:
                # Every parameter stays in the graph, which distributed training counts on.
                zero = sum(parameter.sum() for parameter in self.parameters()) * 0
                return features.new_zeros(batch_size, *self.output_shape) + zero
            x = layer(x)
        return _dense(x.features, x.indices, batch_size, x.spatial_shape).flatten(1, 2)


def _dense(features: Tensor, coords_bzyx: Tensor, batch_size: int, shape: Sequence[int]) -> Tensor:
    """Features (S, C) at distinct cells -> grid (B, C, D, H, W), 0 elsewhere."""
    grid = features.new_zeros(batch_size, *shape, features.shape[1])
    return grid.index_put(coords_bzyx.long().unbind(1), features).movedim(-1, 1)


class LidarBranch(nn.Module):
    """Points -> bird's-eye feature map: voxels, SparseEncoder, SECOND, SECONDFPN.

    voxel_size, point_range, max_points: see `voxelize`. max_voxels_train, max_voxels_test: the cap per frame in
    training and in evaluation mode.
    """

    def __init__(
        self,
        *,
        voxel_size: Sequence[float],
        point_range: Sequence[float],
        max_points: int = 10,
        max_voxels_train: int,
        max_voxels_test: int,
        encoder: SparseEncoder,
        backbone: SECOND,
        neck: SECONDFPN,
    ):
        super().__init__()
        self.voxel_size = tuple(voxel_size)
        self.point_range = tuple(point_range)
        self.max_points = max_points
        self.max_voxels_train = max_voxels_train
        self.max_voxels_test = max_voxels_test
        self.encoder = encoder
        self.backbone = backbone
        self.neck = neck

    def forward(self, points: Sequence[Tensor]) -> Tensor:
        """Clouds, one (P_b, F) a frame, metres, LiDAR frame -> (B, C, H, W), C = neck.out_channels.

        (H, W) is the grid of `encoder.output_shape`, H along y, W along x.
        """
        return self.encode(self.voxelize(points))

    def voxelize(self, points: Sequence[Tensor]) -> VoxelBatch:
        """`voxelize_batch` with the settings of the branch."""
        return voxelize_batch(
            points,
            voxel_size=self.voxel_size,
            point_range=self.point_range,
            max_points=self.max_points,
            max_voxels=self.max_voxels_train if self.training else self.max_voxels_test,
        )

    def encode(self, voxels: VoxelBatch) -> Tensor:
        """Voxels -> (B, C, H, W), see `forward`."""
        return self.neck(self.backbone(self.encoder(voxels)))
