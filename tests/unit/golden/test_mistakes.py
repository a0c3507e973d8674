"""Every mistake in a port's tensors that the comparison looks for is named where it was made."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmt_aqr.golden.__main__ import main
from cmt_aqr.golden.bundle import Source
from cmt_aqr.models.position import sine_embedding
from tests.unit.golden.make_tiny import FOLDER

EXACT = load_file(FOLDER / "float64.safetensors")
BUNDLE = Source(FOLDER)
BEV, VIEWS, ROWS, COLS = 8 * 12, 6, 2, 4
MEAN = torch.tensor([103.53, 116.28, 123.675], dtype=torch.float64)[:, None, None]
STD = torch.tensor([57.375, 57.12, 58.395], dtype=torch.float64)[:, None, None]


def boxes_with(column, change):
    def run(boxes):
        boxes = boxes.clone()
        boxes[:, column] = change(boxes[:, column])
        return boxes

    return run


def codes_in(order):
    """Boxes that were decoded from a code in another order."""

    def run(boxes):
        x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
        # The heads' sine and cosine are not normalised; their angle is all that a box keeps.
        code = [x, y, length.log(), width.log(), z, height.log(), yaw.sin(), yaw.cos(), vx, vy]
        x, y, log_l, log_w, z, log_h, sin, cos, vx, vy = (code[i] for i in order)
        return torch.stack((x, y, z, log_l.exp(), log_w.exp(), log_h.exp(), torch.atan2(sin, cos), vx, vy), -1)

    return run


def bev_by_columns(x):
    x = x.clone()
    x[:, :BEV] = x[:, :BEV].unflatten(1, (8, 12)).transpose(1, 2).flatten(1, 2)
    return x


def cameras_by_columns(x):
    x = x.clone()
    x[:, BEV:] = x[:, BEV:].unflatten(1, (VIEWS, ROWS, COLS)).transpose(2, 3).flatten(1, 3)
    return x


def swapped_embedding(name):
    """A position embedding whose ground part was made from a sine embedding with x first."""

    def run(x):
        sine = EXACT[name]
        w0, b0, w2, b2 = (
            BUNDLE[f"weights/bev_embedding.mlp.{part}"].double()
            for part in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        x = x.clone()
        for sign, own in ((-1, sine), (1, sine.roll(16, -1))):
            x[:, : sine.shape[-2]] += sign * ((own @ w0.T + b0).relu() @ w2.T + b2)
        return x

    return run


def metric_cells(function):
    """BEV windows of the tiny bundle with another rule for the cell."""

    def run(cells):
        metres = EXACT["queries/reference_points"][..., :2] * 102.4
        place = function(metres / torch.tensor([8.192, 10.24], dtype=torch.float64)).long()
        col, row = place[..., 0].clamp(max=11), place[..., 1].clamp(max=7)
        found = torch.stack((torch.zeros_like(row), row, col), -1)[:, :, None]
        return torch.where(cells[..., :1] < 0, cells, found)

    return run


# Tensor, change, words of the cause.
MISTAKES = {
    "views": ("images/input", lambda x: x[[0, 2, 1, 3, 4, 5]], "A's views 0 to 5 are B's [0, 2, 1, 3, 4, 5]"),
    "map": ("lidar/second.1", lambda x: x.flip(0).transpose(-1, -2).contiguous(), "--transpose lidar/second.1=0,1,3,2"),
    "colours after the mean": (
        "images/input", lambda x: ((x * STD + MEAN).flip(1) - MEAN) / STD, "mean and std were in the right one",
    ),
    "voxels, z x y": ("voxels/coords", lambda x: x[:, [0, 1, 3, 2]], "z, x, y instead of z, y, x"),
    "BEV tokens": ("tokens/values", bev_by_columns, "lidar tokens come column by column"),
    "camera tokens": ("tokens/values", cameras_by_columns, "camera tokens come column by column"),
    "all tokens": (
        "tokens/positions",
        lambda x: cameras_by_columns(bev_by_columns(x)), "tokens of all grids come column by column",
    ),
    "order of the grids": (
        "tokens/values", lambda x: torch.cat((x[:, BEV:], x[:, :BEV]), 1), "the grids are in the opposite order",
    ),
    "y before x": ("positions/bev_xy", lambda x: x.flip(-1), "y comes before x: coordinates have x first"),
    "embedded y before x": ("queries/positions", swapped_embedding("queries/sine"), "it needs y before x (quirk Q3)"),
    "embedded tokens": ("tokens/positions", swapped_embedding("positions/bev_sine"), "it needs y before x (quirk Q3)"),
    "corners, embedded": (
        "positions/bev_sine",
        lambda x: sine_embedding(EXACT["positions/bev_xy"] - torch.tensor([0.5 / 12, 0.5 / 8]).double(), 16),
        "BEV cells are embedded at their centres",
    ),
    "pixel centres": (
        "positions/pixels",
        lambda x: x + torch.tensor([0.5, 0.5, 0]), "pixels are whole numbers here, not pixel centres",
    ),
    "rounded cells": ("windows/lidar", metric_cells(torch.round), "cells were rounded to the nearest"),
    "bias without scale": ("bias/values", lambda x: x / 2.5, "the scale of 2.5 is missing"),
    "lse to base 10": ("decoder/layer1.lse", lambda x: x / math.log(10), "this lse has base 10"),
    "sizes to base 10": (
        "boxes/boxes.0", boxes_with(slice(3, 6), lambda x: 10 ** x.log()), "sizes were raised from base 10",
    ),
    "centre twice": (
        "heads/task0.center",
        lambda x: ((x + 51.2) / 102.4).sigmoid() * 102.4 - 51.2, "sigmoid twice on the centre",
    ),
    "logits": ("boxes/scores.0", torch.logit, "sigmoid missing: these are logits"),
    "cosine first": ("boxes/boxes.0", codes_in([0, 1, 2, 3, 4, 5, 7, 6, 8, 9]), "cosine was read before sine"),
    "vy first": ("boxes/boxes.0", codes_in([0, 1, 2, 3, 4, 5, 6, 7, 9, 8]), "vy was read before vx"),
    "yaw from y": ("boxes/boxes.0", boxes_with(6, lambda yaw: math.pi / 2 - yaw), "yaw is measured from +y"),
    "half a turn": ("boxes/boxes.0", boxes_with(6, lambda yaw: yaw + math.pi), "yaw is off by half a turn"),
    "a quarter": ("boxes/boxes.0", boxes_with(6, lambda yaw: yaw - math.pi / 2), "yaw is off by a quarter turn"),
    "degrees": ("boxes/boxes.0", boxes_with(6, torch.rad2deg), "yaw is in degrees, expected radians"),
    "bfloat16": ("tokens/values", lambda x: x.bfloat16().double(), "B holds A's values rounded to bfloat16"),
    "float16": ("queries/positions", lambda x: x.half().double(), "B holds A's values rounded to float16"),
    "offset": ("decoder/hidden", lambda x: x + 0.25, "all values are those of A plus 0.25"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake, tmp_path, capsys):
    name, change, words = MISTAKES[mistake]
    save_file({**EXACT, name: change(EXACT[name]).contiguous()}, tmp_path / "port.safetensors")
    assert main(["compare", str(FOLDER), str(tmp_path / "port.safetensors"), "--precision", "float64"]) == 1
    text = capsys.readouterr().out.partition("first stage that differs: ")[2]
    assert text.startswith(f"{name.partition('/')[0]}\n") and words in text, text


@pytest.mark.parametrize("stage", sorted({name.partition("/")[0] for name in EXACT} - {"losses", "gradients"}))
def test_a_bundle_of_one_stage_is_compared(stage, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("manifest.json", "weights.safetensors", "inputs.safetensors"):
        (bundle / name).symlink_to(FOLDER / name)
    own = {name: x for name, x in EXACT.items() if name.startswith(f"{stage}/")}
    save_file(own, bundle / "float64.safetensors")
    generator = torch.Generator().manual_seed(0)
    wrong = {}
    for name, x in own.items():
        noise = 0.1 * torch.randn(x.shape, generator=generator)
        wrong[name] = x + noise if x.is_floating_point() else x.flip(*range(x.ndim))
    save_file({name: x.contiguous() for name, x in wrong.items()}, tmp_path / "port.safetensors")
    assert main(["compare", str(bundle), str(tmp_path / "port.safetensors"), "--precision", "float64"]) == 1
    assert f"first stage that differs: {stage}\n" in capsys.readouterr().out


def test_a_small_difference_is_not_called_a_factor_of_nearly_one(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    noise = 1e-6 * torch.randn(EXACT["aqr/weights"].shape, generator=generator, dtype=torch.float64)
    save_file({"aqr/weights": EXACT["aqr/weights"] + noise}, tmp_path / "port.safetensors")
    assert main(["compare", str(FOLDER), str(tmp_path / "port.safetensors"), "--precision", "float64"]) == 1
    assert "likely cause: none of the known mistakes explains it" in capsys.readouterr().out
