"""The scale: always inside its limits, with a gradient there that does not depend on how processes share a batch."""

import pytest
import torch

from cmt_aqr.aqr.scale import Scale

LOW, HIGH = 0.5, 5.0


def make_scale(value=2.5):
    """A learned scale whose parameter has this value, inside the limits or not."""
    scale = Scale(value=2.5, is_learned=True, limits=(LOW, HIGH))
    with torch.no_grad():
        scale.value.fill_(value)
    return scale


def gradient(scale, slope):
    """Gradient of slope * scale."""
    (grad,) = torch.autograd.grad((slope * scale()).sum(), scale.value)
    return grad


def take_steps(scale, optimizer, slopes):
    """One optimizer step for each slope, as a training step does it; the parameter after each."""
    values = []
    for slope in slopes:
        scale.value.grad = gradient(scale, slope)
        optimizer.step()
        scale.clamp_()
        values.append(scale.value.item())
    return values


@pytest.mark.parametrize("value", (LOW, 0.5001, 2.5, 4.9999, HIGH))
@pytest.mark.parametrize("slope", (3.0, -3.0))
def test_inside_and_at_a_limit_it_is_the_identity(value, slope):
    scale = make_scale(value)
    assert torch.equal(scale(), scale.value)
    assert gradient(scale, slope).item() == slope


@pytest.mark.parametrize(("value", "expected"), ((-1e9, LOW), (0.1, LOW), (5.0001, HIGH), (1e9, HIGH)))
def test_beyond_a_limit_it_is_the_limit(value, expected):
    scale = make_scale(value)
    assert scale().item() == expected and scale.double()().dtype == torch.float64
    scale.clamp_()
    assert scale.value.item() == expected


@pytest.mark.parametrize("edge", (LOW, HIGH))
def test_two_processes_act_like_one_at_a_limit(edge):
    """+1.0 in one process and -0.4 in the other are +0.3 in a process that has both halves of the batch."""
    slopes = (1.0, -0.4)
    for signs in ((1, 1), (-1, -1)):
        shared, alone = make_scale(edge), make_scale(edge)
        first, second = (gradient(shared, sign * slope) for sign, slope in zip(signs, slopes, strict=True))
        shared.value.grad = (first + second) / 2  # what DistributedDataParallel does
        alone.value.grad = gradient(alone, signs[0] * 0.3)
        for scale in (shared, alone):
            torch.optim.SGD(scale.parameters(), lr=0.5).step()
            scale.clamp_()
        assert shared.value.item() == pytest.approx(alone.value.item(), abs=1e-6)
        assert shared.value.item() == pytest.approx(min(max(edge - signs[0] * 0.15, LOW), HIGH), abs=1e-6)


@pytest.mark.parametrize(("edge", "inwards"), ((LOW, -1.0), (HIGH, 1.0)))
def test_it_leaves_a_limit_after_the_loss_pulled_outwards(edge, inwards):
    scale = make_scale(edge)
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.1)
    assert take_steps(scale, optimizer, [-inwards] * 5) == [edge] * 5
    assert take_steps(scale, optimizer, [inwards])[0] == pytest.approx(edge - 0.1 * inwards)


@pytest.mark.parametrize(("edge", "inwards"), ((LOW, -1.0), (HIGH, 1.0)))
def test_momentum_does_not_carry_it_beyond_a_limit(edge, inwards):
    scale = make_scale(edge - 0.2 * inwards)
    optimizer = torch.optim.AdamW(scale.parameters(), lr=0.3, weight_decay=0.0)
    values = take_steps(scale, optimizer, [-inwards] * 3 + [0.0] * 3)
    assert values[1:] == [edge] * 5  # without the clamp the first moment would move it for some more steps
    values = take_steps(scale, optimizer, [inwards] * 20)
    assert (edge - values[-1]) * inwards > 0.5 and all(LOW <= value <= HIGH for value in values)


@pytest.mark.parametrize("thrown", (7.0, -2.0))
def test_a_value_of_a_checkpoint_beyond_a_limit_comes_back(thrown):
    scale = make_scale(thrown)
    optimizer = torch.optim.SGD(scale.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        (scale() - 3.0).square().sum().backward()
        optimizer.step()
        scale.clamp_()
    assert scale().item() == pytest.approx(3.0, abs=1e-3)


def test_a_learned_scale_is_a_parameter_with_one_element():
    scale = make_scale()
    assert [(name, tuple(p.shape)) for name, p in scale.named_parameters()] == [("value", (1,))]
    assert scale().shape == (1,) and scale().item() == 2.5


def test_a_scale_that_is_not_a_number_is_not_hidden():
    scale = make_scale(float("nan"))
    scale.clamp_()
    assert scale().isnan().all()


def test_a_fixed_scale_is_no_parameter_and_no_state():
    scale = Scale(value=2.5, is_learned=False, limits=(LOW, HIGH))
    scale.clamp_()
    assert not list(scale.parameters()) and not scale.state_dict()
    assert scale().shape == (1,) and scale().item() == 2.5 and not scale().requires_grad
    assert scale.double()().dtype == torch.float64


def test_one_graph():
    scale = make_scale(HIGH)
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
