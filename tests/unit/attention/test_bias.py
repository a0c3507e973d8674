"""The bias: its values, and the plain test whether a token lies in a window, against loops over all cells."""

import pytest
import torch

from cmt_aqr.aqr.window_tokens import window_tokens
from cmt_aqr.attention import AttentionBias, bias_values
from cmt_aqr.attention.bias import is_inside
from tests.unit.attention.cases import BOTH, LAYOUTS, inside_by_loops, random_windows, sized, windows_at_every_cell


def inside_all(windows):
    """The plain test in all grids, (B, Q, K) bool."""
    return torch.cat([is_inside(windows, number) for number in range(len(windows.cells))], dim=-1)


@pytest.mark.parametrize("sizes", ((1, 1), (2, 1), (3, 4), (5, 8), (5, 15)), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_plain_test_equals_loops_for_a_window_at_every_cell(layout, sizes):
    windows = windows_at_every_cell(layout, sized(*sizes))
    assert torch.equal(inside_all(windows), inside_by_loops(windows))
    assert torch.equal(is_inside(windows, 0, slice(2, 5)), is_inside(windows, 0)[:, 2:5])


def test_values_are_scaled_and_clamped():
    weights = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]])
    assert bias_values(weights, 4.0, 3.0).tolist() == [[-3.0, -2.0, 0.0, 2.0, 3.0]]
    assert bias_values(weights, 4.0, None).tolist() == [[-4.0, -2.0, 0.0, 2.0, 4.0]]
    assert bias_values(weights, torch.tensor([4.0]), 3.0).shape == weights.shape


@pytest.mark.parametrize("compiler", (None, "aot_eager"))
def test_a_bias_exactly_at_its_limit_keeps_its_gradient(compiler):
    # torch.clamp gives 1 up to PyTorch 2.11 and 0 later: training would depend on the version.
    function = bias_values if compiler is None else torch.compile(bias_values, backend=compiler)
    weights = torch.tensor([1.25, -1.25, 1.2500001, -1.2500001, 1.0, 0.0, float("nan")], requires_grad=True)
    bias = function(weights, 4.0, 5.0)
    assert bias[:6].tolist() == [5.0, -5.0, 5.0, -5.0, 4.0, 0.0] and bias[6].isnan()
    (grad,) = torch.autograd.grad(bias.sum(), weights)
    assert grad[:6].tolist() == [4.0, 4.0, 0.0, 0.0, 4.0, 4.0]


def test_gradients_of_the_values():
    weights = torch.tensor([-1.0, -0.5, 0.25, 0.75], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    bias_values(weights, scale, 2.5).sum().backward()
    # Nothing where it is clamped; else d/dw = scale, d/dscale = w.
    assert weights.grad.tolist() == [0.0, 4.0, 4.0, 0.0]
    assert scale.grad.item() == -0.25
    weights.grad = scale.grad = None
    bias_values(weights, scale, None).sum().backward()
    assert weights.grad.tolist() == [4.0] * 4 and scale.grad.item() == -0.5


@pytest.mark.parametrize("shape", ((2, 9), (2, 9, 1), (2, 8, 2), (1, 9, 2), (2, 9, 2, 1)))
def test_values_of_another_shape_is_refused(shape):
    message = rf"^the values of a bias must have shape \(2, 9, 2\), got \({', '.join(map(str, shape))}\)$"
    with pytest.raises(ValueError, match=message):
        AttentionBias(random_windows(BOTH), torch.zeros(shape))


@pytest.mark.parametrize("settings", [sized(5, 8), sized(3, 5, camera_assignment="all")])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_window_has_one_shape(layout, settings):
    """What the weights are read off and what the bias acts on are the same cells; so are those of flex: its tests."""
    windows = random_windows(layout, settings)
    found = torch.zeros(*windows.batch_and_queries, layout.num_tokens + 1, dtype=torch.bool)
    for number in range(len(layout.grids)):
        tokens, is_valid = window_tokens(windows, number)
        found.scatter_(2, torch.where(is_valid, tokens, layout.num_tokens), True)
    assert torch.equal(found[..., :-1], inside_all(windows))
