"""Facts of the original without a test elsewhere, and where this program departs from it on purpose.

docs/quirks.md lists all of them with the tests that pin them.
"""

import pytest
import torch

from cmt_aqr.attention import WindowSettings, query_windows
from cmt_aqr.config import load_config
from cmt_aqr.models.decoder import Decoder
from cmt_aqr.tools.attention_cases import fusion_layout
from tests.parity.golden import REPOSITORY
from tests.unit.tiny_run import make_batch, make_run

OFFICIAL = ("cmt_r50_800x320", "cmt_vov_1600x640", "cmt_lidar_0075", "cmt_camera_vov_1600x640")


@pytest.fixture(params=OFFICIAL)
def official(request):
    return load_config(REPOSITORY / "configs" / f"{request.param}.yaml")


def test_settings_of_the_official_configurations(official):
    model, loss = official.model, official.loss
    assert official.evaluation.max_detections == 300  # Q10
    data = official.data
    assert (data.train_boxes, data.balance_boxes, data.skip_empty_frames) == ("lidar", "all", True)  # F33
    assert model.dropout == 0.1  # Q15
    assert model.cls_prior is None and model.init == "official"  # fact 14
    assert model.head_kernel == (3 if model.camera is None else 1)  # fact 13
    assert (model.denoising.max_groups, model.denoising.noise_scale, model.denoising.positive_threshold) == (
        10,
        1.0,
        0.75,
    )
    assert model.denoising.num_dn == model.num_queries  # room for every row the original makes
    assert tuple(loss.code_weights) == (2.0, 2.0, *(1.0,) * 6, 0.2, 0.2)
    assert (loss.cls_weight, loss.box_weight, loss.cls_cost, loss.box_cost) == (2.0, 0.25, 2.0, 0.25)
    if model.camera is not None:  # Q16
        assert model.camera.channel_order == "bgr"
        assert tuple(model.camera.mean) == (103.530, 116.280, 123.675)
        assert tuple(model.camera.std) == (57.375, 57.120, 58.395)


def test_only_the_r50_preset_has_a_grid_smaller_than_its_range(official):
    # Q13
    lidar = official.model.lidar
    if lidar is not None:
        cells = round((official.model.point_range[3] - official.model.point_range[0]) / lidar.voxel_size[0])
        expected = 1024 if official.name == "cmt_r50_800x320" else cells
        assert tuple(lidar.sparse_shape[1:]) == (expected, expected)
        assert lidar.out_of_range == "drop"


def test_a_point_on_the_far_border_stays_in_its_row():
    # Q12: there column 180 of 180 is column 0 of the next row.
    layout = fusion_layout((180, 180), None, cell_size=(0.6, 0.6))
    points = torch.tensor([[[1.0, 0.25, 0.5], [1.0, 1.0, 0.5]]])
    windows = query_windows(
        points,
        None,
        layout=layout,
        point_range=(-54, -54, -5, 54, 54, 3),
        image_size=None,
        settings=WindowSettings({"lidar": 5}),
    )
    _, row, col = windows.cells[0][0, :, 0].unbind(-1)
    assert layout.index(0, 0, row, col).tolist() == [45 * 180 + 179, 180 * 180 - 1]


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_training_stops_at_a_loss_that_is_not_finite(bad, tmp_path):
    # Q14: the original continues with nan_to_num.
    from cmt_aqr.replay import TrainingStopped
    from train import train_step

    run = make_run(tmp_path, lambda output: output * bad)
    before = run.model.linear.weight.clone()
    with pytest.raises(
        TrainingStopped, match=r"^step 7: the loss is .*; samples a1; loss_cls .*, loss_bbox (nan|-?inf)"
    ):
        train_step(run, make_batch())
    weight = run.model.linear.weight
    assert torch.equal(weight, before) and not run.optimizer.state[weight]["exp_avg"].any()


def test_attention_has_biases_whatever_the_dropout():
    # Fact 1: there they disappear from the cross-attention when the dropout is 0.
    names = [set(Decoder(dim=8, num_heads=2, ffn_dim=8, num_layers=1, dropout=p).state_dict()) for p in (0.0, 0.1)]
    assert names[0] == names[1]
    assert {"layers.0.cross_attention.in_proj_bias", "layers.0.cross_attention.out_proj.bias"} <= names[0]


def test_the_first_self_attention_learns_only_its_output():
    # Fact 4: queries start at zero, so all values are the bias and it does not matter where anyone looks.
    torch.manual_seed(0)
    decoder = Decoder(dim=8, num_heads=2, ffn_dim=8, num_layers=2, dropout=0.0).double()
    positions, tokens = torch.randn(2, 5, 8).double(), torch.randn(2, 7, 8).double()
    out = decoder(positions, tokens, torch.zeros_like(tokens))[-1]
    (out * torch.randn_like(out)).sum().backward()
    first, second = (layer.self_attention.in_proj_weight.grad.chunk(3) for layer in decoder.layers)
    assert all(grad.abs().max() < 1e-15 for grad in first)
    assert all(grad.abs().max() > 1e-6 for grad in second)
    assert decoder.layers[0].self_attention.out_proj.weight.grad is not None
