"""Sections 4 and 5 of docs/porting.md: tokens, queries, and where they are."""

import math

import numpy as np
from numpy import ndarray

from .model import Model, inverse_sigmoid, sigmoid

BATCH_NORM_EPS = 1e-5
FIRST_DEPTH = 1.0
DEPTH_EPS = 1e-6


def make_tokens(model: Model, made: dict) -> None:
    """Maps of the branches -> tokens/values, tokens/positions and what they are made from."""
    values, positions = [], []
    for grid in model.grids():
        if grid["name"] == "lidar":
            values.append(shared_conv(model, model.given("lidar/bev_map")))
            place = bev_positions(model, grid, made)
            positions.append(np.broadcast_to(place, (len(values[-1]), *place.shape)))
        else:
            maps = model.given("images/pv_maps")  # (B, V, C, h, w)
            values.append(maps.transpose(0, 1, 3, 4, 2).reshape(len(maps), -1, maps.shape[2]))
            positions.append(camera_positions(model, grid, made))
    made["tokens/values"] = np.concatenate(values, axis=1)
    made["tokens/positions"] = np.concatenate(positions, axis=1)


def shared_conv(model: Model, x: ndarray) -> ndarray:
    """3 x 3 convolution, batch norm, ReLU: (B, C', H, W) -> (B, H W, C)."""
    weight = model.weight("shared_conv.0.weight")
    rows, cols = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = sum(
        np.einsum("oi,bihw->bhwo", weight[:, :, r, c], padded[:, :, r : r + rows, c : c + cols])
        for r in range(3)
        for c in range(3)
    )
    mean, var, scale, shift = (
        model.weight(f"shared_conv.1.{name}") for name in ("running_mean", "running_var", "weight", "bias")
    )
    y = (y - mean) / np.sqrt(var + np.asarray(BATCH_NORM_EPS, y.dtype)) * scale + shift
    return np.maximum(y, 0).reshape(len(x), rows * cols, -1)


def sine_embedding(model: Model, xy: ndarray) -> ndarray:
    """(..., 2), x first -> (..., 2 C), y half first."""
    size = model.constants["hidden_dim"]
    divisor = 1 + 2 * np.arange(size // 2, dtype=xy.dtype) / size
    order = xy if model.mistake == "x before y in the sine embedding" else xy[..., ::-1]
    angle = 2 * math.pi * order[..., None] / divisor
    return np.stack((np.sin(angle), np.cos(angle)), -1).reshape(*xy.shape[:-1], -1)


def bev_positions(model: Model, grid: dict, made: dict) -> ndarray:
    """(K_bev, C)."""
    rows, cols = grid["rows"], grid["cols"]
    half = 0.0 if model.mistake == "corners of BEV cells" else 0.5
    y, x = np.meshgrid((np.arange(rows) + half) / rows, (np.arange(cols) + half) / cols, indexing="ij")
    made["positions/bev_xy"] = np.stack((x, y), -1).reshape(-1, 2).astype(model.dtype)
    made["positions/bev_sine"] = sine_embedding(model, made["positions/bev_xy"])
    return model.mlp("bev_embedding.mlp", made["positions/bev_sine"])


def camera_positions(model: Model, grid: dict, made: dict) -> ndarray:
    """(B, V h w, C)."""
    rows, cols = grid["rows"], grid["cols"]
    height, width = model.constants["image_size"]
    made["cameras/img2lidar"] = np.linalg.inv(model.given("inputs/lidar2img")).astype(model.dtype)
    half = 0.5 if model.mistake == "centres of camera cells" else 0.0
    v, u = np.meshgrid((np.arange(rows) + half) * height / rows, (np.arange(cols) + half) * width / cols, indexing="ij")
    pixels = np.stack((u, v, np.ones_like(u)), -1).reshape(-1, 3).astype(model.dtype)
    made["positions/pixels"] = pixels
    made["positions/rays"] = rays(model, pixels, made["cameras/img2lidar"])
    embedded = model.mlp("ray_embedding.mlp", made["positions/rays"])
    return embedded.reshape(len(embedded), -1, embedded.shape[-1])


def rays(model: Model, pixels: ndarray, img2lidar: ndarray) -> ndarray:
    """Pixels (..., P, 3), img2lidar (B, V, 4, 4) -> (B, V, P, 3 N), unit coordinates."""
    count = model.constants["depth_bins"]
    step = (model.constants["point_range"][3] - FIRST_DEPTH) / count
    depths = (FIRST_DEPTH + np.arange(count) * step).astype(model.dtype)
    directions = pixels @ img2lidar[..., :3, :3].swapaxes(-1, -2)
    points = directions[..., None, :] * depths[:, None] + img2lidar[:, :, None, None, :3, 3]
    unit = model.to_unit(points)
    return unit.reshape(*unit.shape[:-2], -1)


def make_queries(model: Model, made: dict) -> None:
    """Reference points and positions of the queries."""
    batch = len(made["tokens/values"])
    learned = model.weight("reference_points.weight")
    points = np.broadcast_to(learned, (batch, *learned.shape))
    if "denoising/reference_points" in model:
        noised = model.given("denoising/reference_points").astype(model.dtype)
        points = np.concatenate((noised, points), axis=1)
    made["queries/reference_points"] = points
    clamped = made["queries/clamped_points"] = sigmoid(inverse_sigmoid(points))
    made["queries/sine"] = sine_embedding(model, clamped[..., :2])
    positions = model.mlp("bev_embedding.mlp", made["queries/sine"])
    if model.has_weight("ray_embedding.mlp.0.weight"):
        pixels, is_seen = project(model, clamped)
        made["queries/pixels"], made["queries/is_seen"] = np.where(is_seen[..., None], pixels, 0), is_seen
        embedded = model.mlp("ray_embedding.mlp", rays(model, pixels, made["cameras/img2lidar"]))
        positions = positions + np.where(is_seen[..., None], embedded, 0).sum(1)
    made["queries/positions"] = positions


def project(model: Model, points: ndarray) -> tuple[ndarray, ndarray]:
    """Unit coordinates (B, Q, 3) -> pixels (B, V, Q, 3), is_seen (B, V, Q)."""
    lidar2img = model.given("inputs/lidar2img").astype(model.dtype)
    metres = model.to_metres(points)[:, None]
    camera = metres @ lidar2img[..., :3, :3].swapaxes(-1, -2) + lidar2img[:, :, None, :3, 3]
    depth = camera[..., 2]
    pixels = camera / (depth + np.where(depth > 0, DEPTH_EPS, -DEPTH_EPS).astype(model.dtype))[..., None]
    height, width = model.constants["image_size"]
    u, v = pixels[..., 0], pixels[..., 1]
    return pixels, (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
