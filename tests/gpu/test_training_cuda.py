"""Training on CUDA: compiled steps have the losses of eager ones and compile once, no step waits for its check."""

import math

import pytest
import torch

from cmt_aqr.replay import TrainingStopped
from cmt_aqr.run import is_compiled
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_training import TrainingStep, make_run
from cmt_aqr.training.optim import make_optimizer, step_if_finite
from tests.unit.test_training_compile import KINDS, settings_of, with_boxes
from train import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Heads of 32 channels, as in the official sizes.
CHANGES = ("model.hidden_dim=64", "model.num_heads=2")
COUNTS = ((35, 20), (3, 0), (0, 0), (7, 30), (12, 1))


@pytest.fixture(autouse=True)
def fresh_ieee_arithmetic():
    convolution, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, matmul


def train(kind, folder, *, compiled, precision="fp32"):
    """Losses of steps on a batch with other boxes each time, and the run."""
    value = "auto" if compiled else "false"
    config = settings_of(kind, *CHANGES, f"training.compile={value}", f"training.precision={precision}")
    run = make_run(config, torch.device("cuda"), folder)
    assert is_compiled(config, run.rank_info.device) == compiled
    step, losses = TrainingStep(run, made_up_batch(config, 2).pin_memory()), []
    for counts in COUNTS:
        step.batch = with_boxes(step.batch, counts)
        step()
        losses.append(step.loss)
    return torch.tensor(losses), step


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_eager_mode(kind, tmp_path):
    """1e-3 after a few steps of AdamW: a weight whose gradient is nearly 0 moves by a whole step either way."""
    expected, _ = train(kind, tmp_path, compiled=False)
    found, step = train(kind, tmp_path, compiled=True)
    torch.testing.assert_close(found[:1], expected[:1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ((20, 3), (2, 2), (33, 0)):
            step.batch = with_boxes(made_up_batch(step.run.config, 2, seed=1).pin_memory(), counts)
            step()
            assert 0 < step.loss < float("inf")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near(precision, tmp_path):
    expected, _ = train("fusion with AQR", tmp_path, compiled=False)
    found, _ = train("fusion with AQR", tmp_path, compiled=True, precision=precision)
    torch.testing.assert_close(found[:1], expected[:1], rtol=2e-2, atol=0)
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_device_decides_whether_a_step_is_applied(scale):
    model = torch.nn.Linear(8, 8, device="cuda")
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.01, lr_mult={}, decay_mult={})
    scaler = torch.amp.GradScaler("cuda", init_scale=scale or 1.0, enabled=scale is not None)
    states = []
    for factor in (1.0, math.nan, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(2, 8, device="cuda")) * factor).sum()).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 35)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step_if_finite(optimizer, scaler, norm)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state = optimizer.state[model.weight]
        states.append(
            [x.clone() for x in (model.weight.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])]
        )
    assert all(map(torch.equal, states[0], states[1]))
    assert not any(map(torch.equal, states[1], states[2])) and states[2][3] == 2


def camera_run(tmp_path):
    """A run without LiDAR: the sparse encoder waits for its numbers of voxels."""
    config = settings_of("cameras", *CHANGES, "training.compile=false")
    run = make_run(config, torch.device("cuda"), tmp_path)
    assert run.checks_late
    return run, with_boxes(made_up_batch(config, 2), (7, 3)).pin_memory()


def test_a_step_waits_for_its_matching_alone(tmp_path):
    run, batch = camera_run(tmp_path)
    for _ in range(3):
        train_step(run, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # knows all waits but that for an event, which is the matching's
    try:
        for _ in range(3):
            train_step(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == 6 and 0 < run.loss < math.inf


def test_a_failed_step_is_found_in_the_next_one(tmp_path, monkeypatch):
    run, batch = camera_run(tmp_path)
    train_step(run, batch)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    criterion = run.criterion.forward

    def failing(*arguments, **options):
        terms = criterion(*arguments, **options)
        return terms | {"loss_cls": terms["loss_cls"] * math.inf} if run.step == 1 else terms

    monkeypatch.setattr(run.criterion, "forward", failing)
    train_step(run, batch)
    with pytest.raises(TrainingStopped, match=r"^step 1: the loss is inf; .*the step was not applied; "):
        train_step(run, batch)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert (tmp_path / "failed_step_1.pt").exists()
