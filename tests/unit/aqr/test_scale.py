"""The scale: its clamp, the gradient at the clamp's edges, parameter or constant."""

import pytest
import torch

from cmt_aqr.aqr.scale import Scale, clamp_inwards

LOW, HIGH = 0.5, 5.0


@pytest.mark.parametrize(
    ("x", "grad", "expected"),
    [
        (2.5, 3.0, 3.0),  # inside: the identity
        (2.5, -3.0, -3.0),
        (6.0, 3.0, 3.0),  # above: descent with a positive gradient leads back
        (6.0, -3.0, 0.0),
        (0.1, -3.0, -3.0),  # below: descent with a negative gradient leads back
        (0.1, 3.0, 0.0),
        (HIGH, 3.0, 3.0),  # on the border as beyond it
        (HIGH, -3.0, 0.0),
        (LOW, -3.0, -3.0),
        (LOW, 3.0, 0.0),
        (4.9999, -3.0, -3.0),
        (0.5001, 3.0, 3.0),
    ],
)
def test_the_gradient_passes_where_it_leads_inwards(x, grad, expected):
    leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    out = clamp_inwards(leaf, LOW, HIGH)
    assert out.item() == min(max(x, LOW), HIGH) and out.dtype == torch.float64
    (grad * out).sum().backward()
    assert leaf.grad.item() == expected


def test_every_element_for_itself():
    leaf = torch.tensor([0.1, 0.1, 1.0, 9.0, 9.0], requires_grad=True)
    clamp_inwards(leaf, LOW, HIGH).backward(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert leaf.grad.tolist() == [0.0, -1.0, 1.0, 1.0, 0.0]


def minimise(scale: Scale, target: float, steps: int) -> list[float]:
    """Parameter after every step of plain descent on (scale - target)^2."""
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.2)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        (scale() - target).square().sum().backward()
        optimizer.step()
        values.append(scale.value.item())
    return values


@pytest.mark.parametrize("thrown", (7.0, -2.0))
def test_a_scale_that_was_thrown_out_comes_back(thrown):
    scale = Scale(value=2.5, is_learned=True, limits=(LOW, HIGH))
    with torch.no_grad():
        scale.value.fill_(thrown)
    assert scale().item() == (HIGH if thrown > HIGH else LOW)
    values = minimise(scale, 3.0, 40)
    assert values[-1] == pytest.approx(3.0, abs=1e-3)
    with torch.no_grad():
        scale.value.fill_(thrown)
    plain = scale.value.clamp(LOW, HIGH)  # the ordinary clamp would leave it where it is
    (grad,) = torch.autograd.grad((plain - 3.0).square().sum(), scale.value)
    assert grad.item() == 0


@pytest.mark.parametrize(("target", "border"), ((9.0, HIGH), (0.0, LOW)))
def test_a_loss_that_pulls_outwards_leaves_the_scale_near_the_border(target, border):
    scale = Scale(value=2.5, is_learned=True, limits=(LOW, HIGH))
    values = minimise(scale, target, 100)
    assert scale().item() == border
    assert abs(values[-1] - border) < 2.5 and values[-1] == values[-50]  # at most one step too far, then no more


def test_a_learnt_scale_is_a_parameter_with_one_element():
    scale = Scale(value=2.5, is_learned=True, limits=(LOW, HIGH))
    assert [(name, tuple(p.shape)) for name, p in scale.named_parameters()] == [("value", (1,))]
    assert scale().shape == (1,) and scale().item() == 2.5


def test_a_fixed_scale_is_no_parameter_and_no_state():
    scale = Scale(value=2.5, is_learned=False, limits=(LOW, HIGH))
    assert not list(scale.parameters()) and not scale.state_dict()
    assert scale().shape == (1,) and scale().item() == 2.5 and not scale().requires_grad
    assert scale.double()().dtype == torch.float64


def test_one_graph():
    scale = Scale(value=2.5, is_learned=True, limits=(LOW, HIGH))
    with torch.no_grad():
        scale.value.fill_(7.0)
    torch._dynamo.reset()
    compiled = torch.compile(scale, fullgraph=True, backend="aot_eager")
    out = compiled()
    (2 * out).sum().backward()
    assert out.item() == HIGH and scale.value.grad.item() == 2.0
    torch._dynamo.reset()


@pytest.mark.parametrize(("value", "limits"), ((6.0, (0.5, 5.0)), (0.1, (0.5, 5.0)), (1.0, (2.0, 0.5))))
def test_a_value_outside_its_limits_is_refused(value, limits):
    with pytest.raises(ValueError, match=rf"a scale of {value:g} lies outside its limits {limits[0]:g} to"):
        Scale(value=value, is_learned=True, limits=limits)
