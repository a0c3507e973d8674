"""What is shown of the attention, against sums written out token by token."""

import math
from pathlib import Path

import pytest
import torch

from cmt_aqr.attention import AttentionBias, QueryWindows, TokenLayout, WindowSettings
from cmt_aqr.attention.grids import Grid
from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.inspection import inspect, layer_attention, probe_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "synthetic_tiny.yaml"
SMALL = (
    "model.hidden_dim=16", "model.num_queries=80", "model.num_heads=2", "model.ffn_dim=32", "model.depth_bins=4",
    "model.head_channels=16", "model.lidar.voxel_size=[1.6,1.6,0.8]", "model.lidar.sparse_shape=[11,64,64]",
    "model.camera.input_size=[32,96]", "model.camera.base_channels=8", "model.attention.backend=dense",
    "training.lr_mult={}",
)  # fmt: skip


def small_case():
    """Two grids, 4 x 5 cells and 2 views of 2 x 3; three queries, one without a camera window."""
    layout = TokenLayout((Grid("lidar", 1, 4, 5, origin=(0.0, 0.0), cell_size=(1.0, 1.0)), Grid("camera", 2, 2, 3)))
    bev = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 0, 0]])
    camera = torch.tensor([[1, 0, 1], [-1, 0, 0], [0, 1, 2]])
    cells = tuple(part[None, :, None] for part in (bev, camera))
    windows = QueryWindows(layout, WindowSettings({"lidar": 3, "camera": 1}), cells)
    values = torch.tensor([[[2.0, -1.5], [-3.0, 4.0], [1.0, 2.5]]])
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 4, generator=generator)
    k = torch.randn(1, 2, layout.num_tokens, 4, generator=generator)
    return q, k, AttentionBias(windows, values)


def bias_by_hand() -> torch.Tensor:
    """(3 queries, 32 tokens): the windows of small_case, counted out."""
    bias = torch.zeros(3, 32)
    for query, (row, col), value in ((0, (1, 2), 2.0), (1, (3, 4), -3.0), (2, (0, 0), 1.0)):
        for r in range(max(row - 1, 0), min(row + 2, 4)):
            for c in range(max(col - 1, 0), min(col + 2, 5)):
                bias[query, r * 5 + c] = value
    bias[0, 20 + 1 * 6 + 0 * 3 + 1] = -1.5
    bias[2, 20 + 0 * 6 + 1 * 3 + 2] = 2.5
    return bias


def test_the_attention_of_a_layer_token_by_token():
    q, k, bias = small_case()
    by_hand = bias_by_hand()
    padded = torch.cat((k, torch.full((1, 2, 5, 4), 9.0)), dim=2)  # zeros or anything behind the tokens: not looked at
    found = layer_attention(q, padded, bias, bias.windows)
    for query in range(3):
        change, mass, plain_mass, inside, plain_inside = 0.0, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        for head in range(2):
            scores = [float(q[0, head, query] @ k[0, head, token]) / 2 for token in range(32)]
            plain = [math.exp(s) for s in scores]
            biased = [math.exp(s + float(b)) for s, b in zip(scores, by_hand[query], strict=True)]
            for token in range(32):
                p, b = plain[token] / sum(plain), biased[token] / sum(biased)
                grid = int(token >= 20)
                change += abs(b - p) / 2
                mass[grid] += b / 2
                plain_mass[grid] += p / 2
                if by_hand[query, token]:
                    inside[grid] += b / 2
                    plain_inside[grid] += p / 2
        assert found.change[0, query].item() == pytest.approx(change, abs=1e-5)
        for record, expected in (
            (found.mass, mass),
            (found.plain_mass, plain_mass),
            (found.window_mass, inside),
            (found.plain_window_mass, plain_inside),
        ):
            assert record[0, query].tolist() == pytest.approx(expected, abs=1e-5)
    without = layer_attention(q, k, None, bias.windows)
    assert not without.change.any() and torch.equal(without.mass, without.plain_mass)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return build_detector(load_config(CONFIG, SMALL).model).eval()


def frame():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (1, 6, 32, 96, 3), generator=generator, dtype=torch.uint8)
    points = [
        torch.rand(3000, 5, generator=generator) * torch.tensor([80, 80, 6, 255, 0]) - torch.tensor([40, 40, 3, 0, 0])
    ]
    lidar2img = torch.zeros(1, 6, 4, 4, dtype=torch.float64)
    for view in range(6):  # all look ahead: queries behind have no camera window
        lidar2img[0, view] = torch.tensor([[40, 48, 0, 0], [0, 16, -40, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    return images, points, lidar2img


def test_looking_changes_nothing(detector):
    images, points, lidar2img = frame()
    with torch.no_grad():
        plain = detector(images, points, lidar2img)
    found = inspect(detector, images, points, lidar2img)
    for name, value in plain.tasks[0].items():
        torch.testing.assert_close(found.predictions.tasks[0][name], value)
    assert torch.equal(found.predictions.aqr_weights, plain.aqr_weights)
    assert len(found.layers) == 2 and len(inspect(detector, *frame(), with_attention=False).layers) == 0
    has_camera = found.windows.cells[1][0, :, 0, 0] >= 0
    assert 0 < has_camera.sum() < 80
    assert torch.equal(found.weights[0, :, 1].isfinite(), has_camera)
    assert found.weights[0, has_camera].allclose(plain.aqr_weights[0, has_camera])
    scale = detector.aqr.scale().item()
    torch.testing.assert_close(found.bias, scale * found.weights, equal_nan=True)
    for layer in found.layers:
        torch.testing.assert_close(layer.mass.sum(dim=-1), torch.ones(1, 80))
        assert (layer.window_mass <= layer.mass + 1e-6).all()
        assert (layer.window_mass[0, ~has_camera, 1] == 0).all()


def test_the_metrics_of_the_probe(detector):
    found = inspect(detector, *frame())
    metrics = probe_metrics([found, found], 2.5)
    lidar, camera = (found.weights[..., g][found.weights[..., g].isfinite()] for g in (0, 1))
    assert metrics["weights_lidar"]["mean"] == pytest.approx(lidar.mean().item())
    assert metrics["weights_camera"]["std"] == pytest.approx(camera.std(correction=0).item(), rel=1e-4)
    assert metrics["bias_camera"]["max"] == pytest.approx(2.5 * camera.max().item())
    assert metrics["bias_lidar"]["min"] == pytest.approx(2.5 * lidar.min().item())
    assert metrics["scale"] == 2.5
    changes = [layer.change.mean().item() for layer in found.layers]
    assert list(metrics["attention_change_by_layer"].values()) == pytest.approx(changes)
    assert metrics["attention_change"] == pytest.approx(sum(changes) / 2)
    assert sum(metrics["attention_mass"].values()) == pytest.approx(1)


def test_a_model_without_aqr_has_nothing_to_look_at():
    config = load_config(CONFIG, (*SMALL, "model.aqr=null", "training.decay_mult={}"))
    with pytest.raises(ValueError, match="without AQR has no weights"):
        inspect(build_detector(config.model).eval(), *frame())
