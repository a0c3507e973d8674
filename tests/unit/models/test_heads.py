"""Task heads: one independent network per decoder layer, box placement, padding rows."""

import pytest
import torch
from torch.nn import functional as F

from cmt_aqr.models.heads import LAYER_NORM_EPS, Branch, Heads, LayerwiseConv, place_boxes
from cmt_aqr.predictions import BOX_BRANCHES, Predictions, task_classes
from tests.unit.models.tiny_detector import ONE_TASK, POINT_RANGE, TWO_TASKS, gradients

LAYERS, DIM, HIDDEN = 3, 6, 5


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.double()


@pytest.fixture(params=(1, 3))
def branch(request):
    torch.manual_seed(0)
    return randomise(Branch(num_layers=LAYERS, dim=DIM, hidden=HIDDEN, width=2, kernel=request.param))


def test_a_branch_is_one_separate_network_per_layer(branch):
    hidden = torch.randn(LAYERS, 2, 7, DIM, dtype=torch.float64)
    actual = branch(hidden, None)
    assert actual.shape == (LAYERS, 2, 7, 2)
    pad = branch.kernel // 2
    for layer in range(LAYERS):
        rows = slice(layer * HIDDEN, (layer + 1) * HIDDEN)
        x = F.conv1d(hidden[layer].transpose(1, 2), branch.conv.weight[rows], padding=pad)
        x = F.layer_norm(
            x.transpose(1, 2), (HIDDEN,), branch.norm.weight[rows], branch.norm.bias[rows], eps=LAYER_NORM_EPS
        )
        last = slice(layer * 2, layer * 2 + 2)
        x = F.conv1d(x.relu().transpose(1, 2), branch.out.weight[last], branch.out.bias[last], padding=pad)
        torch.testing.assert_close(actual[layer], x.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_padding_rows_in_front_change_nothing_not_even_through_the_kernel(branch):
    x = torch.randn(LAYERS, 2, 7, DIM, dtype=torch.float64)
    padded = torch.cat((torch.randn(LAYERS, 2, 4, DIM, dtype=torch.float64), x), dim=2).requires_grad_()
    x.requires_grad_()
    weight = torch.randn(LAYERS, 2, 7, 2, dtype=torch.float64)
    results = []
    for features, is_valid in ((x, None), (padded, torch.arange(11) >= 4)):
        branch.zero_grad()
        output = branch(features, is_valid)[:, :, -7:]
        (output * weight).sum().backward()
        results.append({"output": output, "input": features.grad[:, :, -7:], **gradients(branch)})
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-12, atol=1e-12)
    assert not padded.grad[:, :, :4].any()


def test_layerwise_conv_is_a_grouped_convolution_in_values_and_initialisation():
    torch.manual_seed(0)
    ours = LayerwiseConv(num_layers=LAYERS, in_channels=64, width=32, kernel=3, has_bias=True)
    grouped = torch.nn.Conv1d(LAYERS * 64, LAYERS * 32, 3, padding=1, groups=LAYERS)
    for name, parameter in grouped.named_parameters():
        mine = ours.get_parameter(name)
        assert mine.shape == parameter.shape
        torch.testing.assert_close(mine.abs().max(), parameter.abs().max(), rtol=0.05, atol=0)
        torch.testing.assert_close(mine.std(), parameter.std(), rtol=0.15, atol=0)
    grouped.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(LAYERS, 2, 7, 64)
    expected = grouped(x.permute(1, 0, 3, 2).flatten(1, 2)).unflatten(1, (LAYERS, 32)).permute(1, 0, 3, 2)
    torch.testing.assert_close(ours(x), expected)


def test_boxes_are_placed_relative_to_the_reference_point():
    reference = torch.tensor([[[0.25, 0.5, 0.75], [0.0, 1.0, 0.5]]], dtype=torch.float64)
    raw = {name: torch.zeros(1, 1, 2, width, dtype=torch.float64) for name, width in BOX_BRANCHES.items()}
    raw["dim"] += 7
    placed = place_boxes(raw, reference, POINT_RANGE)
    torch.testing.assert_close(placed["center"][0, 0, 0], torch.tensor([-27.0, 0.0]).double())
    # Quirk Q1: squashed into the z range although it is a logarithm of the length.
    torch.testing.assert_close(placed["height"][0, 0, 0], torch.tensor([1.0]).double())
    torch.testing.assert_close(placed["center"][0, 0, 1], torch.tensor([-54.0, 54.0]).double(), rtol=1e-4, atol=1e-3)
    assert torch.equal(placed["dim"], raw["dim"])  # holds log width, z and log height as they are


def test_codes_are_the_branches_in_code_order():
    tasks = ({name: torch.full((1, 1, 1, width), float(i)) for i, (name, width) in enumerate(BOX_BRANCHES.items())},)
    codes = Predictions(tasks, ONE_TASK).codes(0)
    assert codes.flatten().tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 4]


def make_heads(**changes):
    torch.manual_seed(0)
    settings = {"classes": TWO_TASKS, "num_layers": LAYERS, "dim": DIM, "point_range": POINT_RANGE, "hidden": HIDDEN}
    return Heads(**(settings | changes))


def test_every_task_has_its_own_classes_and_boxes():
    heads = make_heads()
    predictions = heads(torch.randn(LAYERS, 2, 7, DIM), torch.rand(2, 7, 3), num_dn=3)
    assert predictions.classes == TWO_TASKS
    assert predictions.num_dn == 3
    for task, members in enumerate(TWO_TASKS):
        assert predictions.logits(task).shape == (LAYERS, 2, 7, len(members))
        assert predictions.codes(task).shape == (LAYERS, 2, 7, 10)
    assert not torch.equal(predictions.codes(0), predictions.codes(1))


def test_class_prior_sets_the_initial_scores():
    heads = make_heads(cls_prior=0.01)
    for task in heads.tasks:
        torch.testing.assert_close(
            task.branches["cls_logits"].out.bias.sigmoid(), torch.full_like(task.branches["cls_logits"].out.bias, 0.01)
        )
    # The original's init_bias is never applied (its golden file's fact 14).
    assert make_heads().tasks[0].branches["cls_logits"].out.bias.abs().max() < 1


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"cls_prior must lie between 0 and 1, got 1\.5"):
        make_heads(cls_prior=1.5)
    with pytest.raises(ValueError, match="kernel of the heads must be odd, got 2"):
        make_heads(kernel=2)


def test_task_classes_by_name():
    assert task_classes([["car"], ["pedestrian", "truck"]]) == ((0,), (8, 1))
    with pytest.raises(ValueError, match=r"unknown classes \['lorry'\]"):
        task_classes([["car", "lorry"]])
    with pytest.raises(ValueError, match="no class twice"):
        task_classes([["car"], ["car"]])
