"""Section 6 of docs/porting.md: windows, weights of the sensors, and the bias that they become."""

import math

import numpy as np
from numpy import ndarray

from .model import Model, sigmoid, softmax

MIN_DEPTH = 1e-5
NO_WINDOW = -1
QUERY, KEY, VALUE = range(3)


def find_windows(model: Model, made: dict) -> None:
    """windows/<grid> (B, Q, n, 3) view, row, col of every grid; of the matching queries alone in v1 and v2."""
    points = made["queries/reference_points"].astype(np.float64)
    if model.aqr["design"] != "bias":
        points = points[:, -model.constants["num_queries"] :]
    for grid in model.grids():
        find = bev_window if grid["name"] == "lidar" else camera_windows
        cells = find(model, points, grid)
        if model.mistake == "rows and columns of windows":
            cells = cells[..., [0, 2, 1]]
        made[f"windows/{grid['name']}"] = cells


def bev_window(model: Model, points: ndarray, grid: dict) -> ndarray:
    """(B, Q, 1, 3)."""
    low, high = model.range_in(np.float64)
    offset = (points * (high - low))[..., :2] + (low[:2] - np.array(grid["origin"]))
    size = np.array(grid["cell_size"])
    if model.mistake == "stretched windows":
        size = (high - low)[:2] / (grid["cols"], grid["rows"])
    place = offset / size
    shape = np.array([grid["cols"], grid["rows"]])
    is_on_grid = ((place >= 0) & (place <= shape)).all(-1)
    col, row = np.moveaxis(np.minimum(np.floor(place), shape - 1), -1, 0)
    cells = np.stack((np.zeros_like(row), row, col), -1)
    return np.where(is_on_grid[..., None], cells, (NO_WINDOW, 0, 0)).astype(np.int64)[:, :, None]


def camera_windows(model: Model, points: ndarray, grid: dict) -> ndarray:
    """(B, Q, 1 or V, 3)."""
    lidar2img = model.given("inputs/lidar2img")
    metres = model.to_metres(points)[:, None]
    camera = metres @ lidar2img[..., :3, :3].swapaxes(-1, -2) + lidar2img[:, :, None, :3, 3]
    camera = camera.swapaxes(1, 2)  # (B, Q, V, 3)
    depth = camera[..., 2]
    u, v = np.moveaxis(camera[..., :2] / np.maximum(depth, MIN_DEPTH)[..., None], -1, 0)
    height, width = model.constants["image_size"]
    is_seen = (depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    row, col = np.floor(v / height * grid["rows"]), np.floor(u / width * grid["cols"])
    row, col = np.clip(row, 0, grid["rows"] - 1), np.clip(col, 0, grid["cols"] - 1)
    cells = np.stack((np.broadcast_to(np.arange(grid["views"]), row.shape), row, col), -1)
    cells = np.where(is_seen[..., None], cells, (NO_WINDOW, 0, 0)).astype(np.int64)
    if model.constants["camera_assignment"] == "first":
        chosen = is_seen.argmax(-1)
        if model.mistake == "last camera":
            chosen = is_seen.shape[-1] - 1 - is_seen[..., ::-1].argmax(-1)
        cells = np.take_along_axis(cells, chosen[..., None, None], axis=2)
    if model.constants["unseen"] == "corner":
        cells[:, :, 0][~is_seen.any(-1)] = 0
    return cells


def radius(model: Model, grid: dict) -> int:
    """Cells that a window reaches to every side."""
    size = model.constants["windows"][grid["name"]]
    return (size - 1) // 2 if model.mistake == "even windows" else size // 2


def window_tokens(model: Model, grid: dict, cells: ndarray) -> tuple[ndarray, ndarray]:
    """Tokens (B, Q, T) in the windows of one grid, and which of them there are."""
    reach = radius(model, grid)
    down, right = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1), indexing="ij")
    view, row, col = np.moveaxis(cells[..., None, None, :], -1, 0)
    row, col = row + down, col + right
    is_there = (view >= 0) & (row >= 0) & (row < grid["rows"]) & (col >= 0) & (col < grid["cols"])
    tokens = grid["start"] + (view * grid["rows"] + row) * grid["cols"] + col
    shape = (*cells.shape[:2], -1)
    return np.where(is_there, tokens, 0).reshape(shape), is_there.reshape(shape)


def find_weights(model: Model, made: dict) -> None:
    """aqr/weights (B, Q, G) from the tokens in the windows."""
    found = [window_tokens(model, grid, made[f"windows/{grid['name']}"]) for grid in model.grids()]
    tokens, is_there = (np.concatenate(x, -1) for x in zip(*found, strict=True))
    positions, values = made["queries/positions"][:, -tokens.shape[1] :], made["tokens/values"]
    keys = values + made["tokens/positions"]
    x = np.zeros_like(positions)
    for layer in range(model.aqr["num_layers"]):
        name = f"aqr.generator.layers.{layer}"
        q, k, v = (
            model.project(f"{name}.attention", part, y)
            for part, y in ((QUERY, x + positions), (KEY, keys), (VALUE, values))
        )
        x = model.norm(f"{name}.norms.0", x + model.merge(f"{name}.attention", attend(q, k, v, tokens, is_there)))
        x = model.norm(f"{name}.norms.1", x + model.mlp(f"{name}.ffn", x))
    logits = model.linear("aqr.generator.linear", x)
    is_sigmoid = model.constants["activation"] == "sigmoid" or model.mistake == "sigmoid for tanh"
    made["aqr/weights"] = sigmoid(logits) if is_sigmoid else np.tanh(logits)


def attend(q: ndarray, k: ndarray, v: ndarray, tokens: ndarray, is_there: ndarray) -> ndarray:
    """(B, M, Q, D): every query attends to its own tokens (B, Q, T)."""
    out = np.zeros_like(q)
    for sample, query in np.argwhere(is_there.any(-1)):
        own = tokens[sample, query][is_there[sample, query]]
        scores = np.einsum("md,mtd->mt", q[sample, :, query], k[sample][:, own]) / np.asarray(
            math.sqrt(q.shape[-1]), q.dtype
        )
        out[sample, :, query] = np.einsum("mt,mtd->md", softmax(scores)[0], v[sample][:, own])
    return out


def find_bias(model: Model, made: dict) -> ndarray:
    """The bias (B, Q, K), and bias/indices, bias/values where it is local."""
    scale = np.asarray(model.constants["scale"], model.dtype)
    if model.mistake == "sign of the scale":
        scale = -scale
    values = scale * made["aqr/weights"]
    limit = model.constants["max_bias"]
    if limit is not None and model.mistake != "no clamp":
        values = np.clip(values, -limit, limit)
    batch, queries, num_tokens = *values.shape[:2], made["tokens/values"].shape[1]
    bias = np.zeros((batch, queries, num_tokens), model.dtype)
    is_inside = np.zeros(bias.shape, bool)
    for number, grid in enumerate(model.grids()):
        if not model.aqr["local"]:
            end = grid["start"] + grid["views"] * grid["rows"] * grid["cols"]
            bias[:, :, grid["start"] : end] = values[:, :, number, None]
            continue
        tokens, is_there = window_tokens(model, grid, made[f"windows/{grid['name']}"])
        sample, query, entry = np.nonzero(is_there)
        bias[sample, query, tokens[sample, query, entry]] = values[sample, query, number]
        is_inside[sample, query, tokens[sample, query, entry]] = True
    if model.aqr["local"]:
        where = np.nonzero(is_inside)
        made["bias/indices"] = np.stack(where, -1).astype(np.int32)
        made["bias/values"] = bias[where]
    return bias


def modulate(model: Model, made: dict) -> None:
    """Designs v1 and v2: aqr/tokens, tokens times the map of the weights."""
    weights, values = made["aqr/weights"], made["tokens/values"]
    total = np.zeros(values.shape[:2], model.dtype)
    cover = np.zeros_like(total)
    for number, grid in enumerate(model.grids()):
        cells = made[f"windows/{grid['name']}"]
        tokens, is_there = window_tokens(model, grid, cells)
        reach = radius(model, grid)
        line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * (0.5 * max(reach, 1)) ** 2))
        gauss = np.tile(np.outer(line, line).reshape(-1), cells.shape[2]).astype(model.dtype)
        sample, query, entry = np.nonzero(is_there)
        token = tokens[sample, query, entry]
        np.add.at(cover, (sample, token), gauss[entry])
        np.add.at(total, (sample, token), gauss[entry] * weights[sample, query, number])
    chart = np.where(cover > 0, total / np.where(cover > 0, cover, 1), 1)[..., None]
    factor = chart if model.aqr["design"] == "v1" else 1 + np.asarray(0.1, model.dtype) * (chart - 1)
    made["aqr/tokens"] = values * factor
