"""Compiled training on CUDA: the losses of eager mode over several steps, and no compilation after the first ones."""

import pytest
import torch

from cmt_aqr.run import is_compiled
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_training import TrainingStep, make_run
from tests.unit.test_training_compile import KINDS, settings_of, with_boxes

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
