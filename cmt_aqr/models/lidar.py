"""LiDAR branch: points -> voxels -> sparse 3D convolutions -> bird's-eye grid of features.

Shapes: B batch, S voxels, F features of a point, C channels, (D, H, W) = cells in (z, y, x). H runs along y and W
along x.

The sparse convolutions are those of sparse.py or spconv's, see `choose_backend`; the weights are the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.models import sparse, spconv_backend
from cmt_aqr.models.second import SECOND, SECONDFPN
from cmt_aqr.models.sparse import (
    SparseConvolution,
    SparseRows,
    convolved_shape,
    dense_map,
    find_output_sites,
    find_sites,
)
from cmt_aqr.models.voxels import VoxelBatch, voxelize_batch

BATCH_NORM_EPS = 1e-3
BATCH_NORM_MOMENTUM = 0.01
OUT_OF_RANGE = ("drop", "alias")
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "torch", "spconv")
# The faster backend by (device type, in training). Measured on one thread of an x86-64 CPU, 2026-11-25, for 120 000
# voxels (docs/benchmarks.md): evaluation 3.6 s by torch and 4.3 s by spconv, a training step 12.2 and 11.4 s. On an
# H200, 2026-11-26, in eager mode: evaluation 37.6 and 14.7 ms, a training step 105 and 30 ms.
FASTER = {("cpu", False): "torch", ("cpu", True): "spconv", ("cuda", False): "spconv", ("cuda", True): "spconv"}


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


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype, *, is_training: bool, out_of_range: str = "drop"
) -> str:
    """The backend, "torch" or "spconv", that a name means for features of this dtype on a device.

    "auto" takes spconv where only spconv can do it (voxels outside the shape are aliased), torch where spconv cannot
    (it is not installed; float64 or bfloat16 on CUDA), otherwise the faster one.

    Raises:
        ValueError: spconv is asked for float64 or bfloat16 on CUDA, or for aliased voxels elsewhere than on the CPU.
    """
    if out_of_range == "alias" and device.type != "cpu":
        raise ValueError(
            "SparseEncoder with out_of_range='alias' repeats what spconv does on the CPU; elsewhere voxels outside the "
            "sparse shape collide differently: use out_of_range='drop', or the CPU"
        )
    spconv_can = device.type != "cuda" or dtype in (torch.float32, torch.float16)
    if backend == "spconv" and not spconv_can:
        raise ValueError(f"spconv has no {dtype} kernels on CUDA; use the backend 'torch', or float32")
    if backend != "auto":
        return backend
    if out_of_range == "alias":
        return "spconv"
    chosen = FASTER.get((device.type, is_training), "torch") if spconv_can else "torch"
    # Asking for spconv imports it, which takes seconds.
    return "torch" if chosen == "torch" or spconv_backend.import_error() is not None else chosen


def _check_choices(backend: str, out_of_range: str, precision: torch.dtype) -> None:
    """Raise ValueError for an unknown choice, or one that this installation does not have."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {BACKENDS}")
    if out_of_range not in OUT_OF_RANGE:
        raise ValueError(f"out_of_range is {out_of_range!r}; expected one of {OUT_OF_RANGE}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision}; expected one of {PRECISIONS}")
    if backend == "torch" and out_of_range == "alias":
        raise ValueError("out_of_range is 'alias', which only spconv does, and sparse_backend is 'torch'; use 'drop'")
    if error := missing_spconv(backend, out_of_range):
        raise ValueError(error)


def missing_spconv(backend: str, out_of_range: str) -> str | None:
    """The sentence for settings that need spconv where it cannot be imported; None where all is well."""
    is_needed = backend == "spconv" or out_of_range == "alias"
    if not is_needed or (error := spconv_backend.import_error()) is None:
        return None
    asked = "sparse_backend: 'spconv'" if backend == "spconv" else "out_of_range: 'alias'"
    return (
        f"{asked} needs the package spconv, which cannot be imported ({error}); install spconv-cu121, or use "
        "sparse_backend 'torch' and out_of_range 'drop'"
    )


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over voxels. Fewer than two rows have no variance: they use, and leave, the running statistics."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor, is_active: Tensor | None = None) -> Tensor:
        """X (S, C) -> (S, C); is_active (S,): the rows that count, None: all."""
        if self.training and is_active is not None:
            return self._normalise_active(x, is_active)
        if self.training and x.shape[0] < 2:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)

    def _normalise_active(self, x: Tensor, is_active: Tensor) -> Tensor:
        """Training with statistics of the active rows; their number stays on the device, so nothing waits for it."""
        values = x if x.dtype == torch.float64 else x.float()
        mask, count = is_active[:, None], is_active.sum()
        divisor = count.clamp(min=1)
        has_variance = count >= 2
        mean = values.masked_fill(~mask, 0).sum(0) / divisor
        var = (values - mean).masked_fill(~mask, 0).square().sum(0) / divisor
        mean, var = mean.where(has_variance, self.running_mean), var.where(has_variance, self.running_var)
        with torch.no_grad():
            unbiased = var.where(~has_variance, var * divisor / (divisor - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += has_variance
        out = (values - mean) * (var + self.eps).rsqrt() * self.weight + self.bias
        return out.to(x.dtype)


def _convolve(convolution: SparseConvolution, x):
    return (sparse if isinstance(x, SparseRows) else spconv_backend).convolve(convolution, x)


def _normalise(norm: RowBatchNorm, x) -> Tensor:
    return norm(x.features, x.sites.is_used if isinstance(x, SparseRows) else None)


class SparseBlock(nn.Module):
    """Residual block of two submanifold convolutions: relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = SparseConvolution(channels, channels, subm=True)
        self.bn1 = RowBatchNorm(channels)
        self.conv2 = SparseConvolution(channels, channels, subm=True)
        self.bn2 = RowBatchNorm(channels)

    def forward(self, x):
        """Sparse tensor -> sparse tensor with the same sites and channels."""
        out = _convolve(self.conv1, x)
        out = out.replace_feature(F.relu(_normalise(self.bn1, out)))
        out = _convolve(self.conv2, out)
        return out.replace_feature(F.relu(_normalise(self.bn2, out) + x.features))


class SparseConvNorm(nn.Sequential):
    """Sparse convolution (0), batch norm (1), ReLU."""

    def __init__(self, convolution: SparseConvolution):
        super().__init__(convolution, RowBatchNorm(convolution.weight.shape[0]))

    def forward(self, x):
        """Sparse tensor -> sparse tensor on the sites of the convolution's output."""
        convolution, norm = self
        out = _convolve(convolution, x)
        return out.replace_feature(F.relu(_normalise(norm, out)))


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
        precision: float32, float16 or bfloat16 (which spconv lacks) on CUDA, also under autocast. On
            CPU the dtype of the weights is used, float64 included.
        backend: "torch", "spconv", or "auto" for :func:`choose_backend`.

    Parameter names equal those of the official checkpoints without `pts_middle_encoder.`; weights are laid out
    (out, kz, ky, kx, in), whatever the backend.

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
        backend: str = "auto",
    ):
        super().__init__()
        if len(downsample_paddings) != len(encoder_channels) - 1:
            raise ValueError(
                f"downsample_paddings {tuple(downsample_paddings)} has {len(downsample_paddings)} entries; expected "
                f"{len(encoder_channels) - 1}, one for every stage of encoder_channels but the last"
            )
        _check_choices(backend, out_of_range, precision)
        self.sparse_shape = tuple(sparse_shape)
        self.out_of_range = out_of_range
        self.precision = precision
        self.backend = backend
        self.output_shape = encoder_output_shape(
            sparse_shape=sparse_shape, downsample_paddings=downsample_paddings, out_channels=out_channels
        )

        self.conv_input = SparseConvNorm(SparseConvolution(in_channels, base_channels, subm=True))
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
            stage: list[nn.Module] = [SparseBlock(channels) for _ in blocks]
            if not is_last:
                padding = _triple(downsample_paddings[i])
                stage.append(SparseConvNorm(SparseConvolution(channels, widths[-1], stride=(2, 2, 2), padding=padding)))
                channels = widths[-1]
            self.encoder_layers[f"encoder_layer{i + 1}"] = nn.Sequential(*stage)
        self.conv_out = SparseConvNorm(
            SparseConvolution(channels, out_channels, kernel=(3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0))
        )

    def choose_backend(self, device: torch.device, *, is_training: bool) -> str:
        """The backend, "torch" or "spconv", that works on a device."""
        dtype = self._feature_dtype(device)
        return choose_backend(self.backend, device, dtype, is_training=is_training, out_of_range=self.out_of_range)

    def describe(self, device: torch.device) -> str:
        """A sentence for the log."""
        training, evaluation = (self.choose_backend(device, is_training=mode) for mode in (True, False))
        taken = training if training == evaluation else f"{training} in training, {evaluation} in evaluation"
        return f"sparse encoder: {taken} (model.lidar.sparse_backend: {self.backend})"

    def forward(self, voxels: VoxelBatch) -> Tensor:
        """Voxels -> (B, out_channels * D, H, W) = (B, *output_shape); channel c of height d has index c * D + d.

        A frame without voxels gives zeros; a batch without any gives zeros from which every parameter gets a zero
        gradient.
        """
        weight = self.conv_out[0].weight
        features, coords = voxels.features.to(weight.dtype), voxels.coords_bzyx
        if self.out_of_range == "drop":
            shape = coords.new_tensor(self.sparse_shape)
            inside = ((coords[:, 1:] >= 0) & (coords[:, 1:] < shape)).all(dim=1)
            features, coords = features[inside], coords[inside]
        if self.choose_backend(weight.device, is_training=self.training) == "torch":
            with torch.autocast(weight.device.type, enabled=False):
                sites = find_sites(coords, self.sparse_shape, voxels.batch_size, is_fixed=False)
                x = SparseRows(features.to(self._feature_dtype(weight.device)), sites)
                return self._encode(x).to(weight.dtype)
        x = spconv_backend.make_tensor(features, coords, self.sparse_shape, voxels.batch_size)
        is_half = weight.device.type == "cuda" and self.precision == torch.float16
        with torch.autocast(weight.device.type, dtype=torch.float16 if is_half else None, enabled=is_half):
            return self._encode(x).to(weight.dtype)

    def encode_fixed(self, voxels: VoxelBatch, capacities: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`forward` with fixed sizes, by the torch backend: nothing waits for the GPU, so a CUDA graph can hold it.

        Voxels outside the sparse shape, or of a negative frame (see `pad_voxels`), count for nothing.

        Args:
            capacities: rows of every strided convolution's output; `measure_rows` tells how many it takes.

        Returns:
            The map, NaN where a capacity was too small, and the rows that each capacity should hold (int64, on the
            device; compare them where the result is read). Equal to `forward` up to rounding.
        """
        if self.out_of_range == "alias":
            raise ValueError("fixed sizes need out_of_range='drop'")
        dtype = self.conv_out[0].weight.dtype
        num_strided = len(self.encoder_layers)
        if len(capacities) != num_strided or min(capacities) < 1:
            raise ValueError(f"capacities is {tuple(capacities)}; expected {num_strided} positive numbers")
        with torch.autocast(voxels.features.device.type, enabled=False):
            sites = find_sites(voxels.coords_bzyx, self.sparse_shape, voxels.batch_size, is_fixed=True)
            features = voxels.features.to(self._feature_dtype(voxels.features.device))
            x = SparseRows(features, sites, tuple(capacities))
            for layer in self._layers():
                x = layer(x)
            return dense_map(x).to(dtype), torch.stack(x.counts)

    def measure_rows(self, voxels: VoxelBatch) -> tuple[int, ...]:
        """Rows of every strided convolution's output for these voxels."""
        sites, rows = find_sites(voxels.coords_bzyx, self.sparse_shape, voxels.batch_size, is_fixed=True), []
        for module in self.modules():
            if isinstance(module, SparseConvolution) and not module.subm:
                sites = find_output_sites(sites, module, None)
                rows.append(sites.rows)
        return tuple(rows)

    def _feature_dtype(self, device: torch.device) -> torch.dtype:
        dtype = self.conv_out[0].weight.dtype
        return self.precision if device.type == "cuda" and dtype != torch.float64 else dtype

    def _layers(self) -> list[nn.Module]:
        return [self.conv_input, *self.encoder_layers.values(), self.conv_out]

    def _encode(self, x) -> Tensor:
        for layer in self._layers():
            if x.features.shape[0] == 0:
                # Every parameter stays in the graph, which distributed training counts on.
                zero = sum(parameter.sum() for parameter in self.parameters()) * 0
                return x.features.new_zeros(x.batch_size, *self.output_shape) + zero
            x = layer(x)
        return dense_map(x) if isinstance(x, SparseRows) else spconv_backend.dense_map(x)


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
        return self.encode_grid(self.encoder(voxels))

    def encode_grid(self, grid: Tensor) -> Tensor:
        """Output of the encoder (B, *encoder.output_shape) -> (B, C, H, W), see `forward`."""
        return self.neck(self.backbone(grid))
