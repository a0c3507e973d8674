"""SparseEncoder over a dense grid: plain conv3d and explicit masks of active cells, any dtype, differentiable.

It reads the parameters of the encoder under test and nothing else of it, so sparse and dense runs share weights but
no code.
"""

import torch
from torch.nn import functional as F


def dense_encoder(encoder, voxels):
    """Output of `encoder` for `voxels`, (B, C * D, H, W), with batch norm in the encoder's own mode."""
    x, is_active = dense_voxels(encoder, voxels)
    x, is_active = conv_norm(encoder.conv_input, x, is_active)
    for stage in encoder.encoder_layers.values():
        for layer in stage:
            if hasattr(layer, "conv1"):
                out, _ = conv(layer.conv1, x, is_active)
                out, _ = conv(layer.conv2, relu(norm(layer.bn1, out, is_active)), is_active)
                x = relu(norm(layer.bn2, out, is_active) + x)
            else:
                x, is_active = conv_norm(layer, x, is_active)
    x, is_active = conv_norm(encoder.conv_out, x, is_active)
    return x.flatten(1, 2)


def dense_voxels(encoder, voxels):
    """Grid (B, F, D, H, W) of the voxels inside the sparse shape and its active cells (B, 1, D, H, W)."""
    inside = (voxels.coords_bzyx[:, 1:] < torch.tensor(encoder.sparse_shape)).all(dim=1)
    b, z, y, x = voxels.coords_bzyx[inside].long().T
    is_active = torch.zeros(voxels.batch_size, 1, *encoder.sparse_shape, dtype=torch.bool)
    is_active[b, :, z, y, x] = True
    grid = voxels.features.new_zeros(voxels.batch_size, voxels.features.shape[1], *encoder.sparse_shape)
    grid = grid.movedim(1, -1).index_put((b, z, y, x), voxels.features[inside]).movedim(-1, 1)
    return grid, is_active


def conv(layer, x, is_active):
    weight = layer.weight.movedim(-1, 1)
    out = F.conv3d(x, weight, stride=tuple(layer.stride), padding=tuple(layer.padding))
    if not layer.subm:
        window = torch.ones(1, 1, *weight.shape[2:])
        reached = F.conv3d(is_active.float(), window, stride=tuple(layer.stride), padding=tuple(layer.padding))
        is_active = reached > 0
    return out * is_active, is_active


def conv_norm(layer, x, is_active):
    x, is_active = conv(layer[0], x, is_active)
    return relu(norm(layer[1], x, is_active)), is_active


def norm(layer, x, is_active):
    """Batch norm whose statistics are those of the active cells alone."""
    mean, var = layer.running_mean, layer.running_var
    count = is_active.sum()
    if layer.training and count > 1:
        mean = x.sum(dim=(0, 2, 3, 4)) / count
        var = ((x - channels(mean)).square() * is_active).sum(dim=(0, 2, 3, 4)) / count
    x = (x - channels(mean)) / channels(var + layer.eps).sqrt()
    return (x * channels(layer.weight) + channels(layer.bias)) * is_active


def relu(x):
    return x.clamp(min=0)


def channels(vector):
    return vector[:, None, None, None]
