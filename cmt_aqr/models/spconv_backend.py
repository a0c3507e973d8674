"""spconv's convolutions with the weights of :class:`SparseConvolution`. spconv is imported when it is first used."""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from cmt_aqr.models.sparse import SparseConvolution


def import_error() -> str | None:
    """Why spconv cannot be imported; None where it can."""
    try:
        _import_spconv()
    except ImportError as error:
        return str(error)
    return None


def _import_spconv():
    # spconv queries torch.fx for every sparse tensor, and torch answers the first query with an unrelated warning.
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_no_tracing_advice)
    import spconv.pytorch as spconv

    return spconv


def _is_no_tracing_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("is_fx_tracing will return true")


def make_tensor(features: Tensor, coords_bzyx: Tensor, shape: Sequence[int], batch_size: int):
    """spconv's sparse tensor of features (R, C) at cells (R, 4) int32."""
    return _import_spconv().SparseConvTensor(features, coords_bzyx, list(shape), batch_size)


def convolve(convolution: SparseConvolution, x):
    """Sparse tensor -> sparse tensor, through spconv's own kernels for the device."""
    # All submanifold convolutions of a level have the same sites: their shape names the rulebook that they share.
    key = f"submanifold {tuple(x.spatial_shape)}" if convolution.subm else None
    operator = _operator(
        tuple(convolution.weight.shape),
        convolution.stride,
        convolution.padding,
        key,
        convolution.weight.device.type,
    )
    # spconv's own forward would choose by the module's mode, and its evaluation path on CUDA has no gradient and
    # ignores autocast. The training path gives the same values.
    return operator._conv_forward(True, x, convolution.weight, None)


@cache
def _operator(
    weight_shape: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], key: str | None, device_type: str
) -> nn.Module:
    """A convolution of spconv as a function: it has no weight of its own, and an algorithm that the device has."""
    spconv = _import_spconv()
    out_channels, *kernel, in_channels = weight_shape
    settings = {
        "padding": list(padding),
        "bias": False,
        # Only Native has CPU kernels; implicit GEMM is the fast one.
        "algo": spconv.ConvAlgo.MaskImplicitGemm if device_type == "cuda" else spconv.ConvAlgo.Native,
    }
    with torch.device("meta"):
        if key is None:
            return spconv.SparseConv3d(in_channels, out_channels, kernel, stride=list(stride), **settings)
        return spconv.SubMConv3d(in_channels, out_channels, kernel, indice_key=key, **settings)


def dense_map(x) -> Tensor:
    """Sparse tensor -> grid (B, C * D, H, W), 0 elsewhere."""
    grid = x.features.new_zeros(x.batch_size, *x.spatial_shape, x.features.shape[1])
    return grid.index_put(x.indices.long().unbind(1), x.features).movedim(-1, 1).flatten(1, 2)
