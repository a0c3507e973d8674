"""training.compile: the same losses and weights as in eager mode, one graph a stage whatever the boxes and the mask."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cmt_aqr import run as run_module
from cmt_aqr.boxes import Targets
from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.models.compiled import CompiledDetector
from cmt_aqr.run import is_compiled
from cmt_aqr.tools.bench_frames import made_up_batch
from cmt_aqr.tools.bench_training import TrainingStep, make_run
from tests.unit.test_inference import SMALL

CONFIG = "configs/synthetic_tiny.yaml"
CHANGES = [*SMALL, "model.denoising.num_dn=20", "model.dropout=0", "training.precision=fp32"]
KINDS = {
    "fusion with AQR": [],
    "LiDAR": ["model.aqr=null", "model.camera=null", "model.init=official"],
    "cameras": ["model.aqr=null", "model.lidar=null", "model.init=official"],
}


def settings_of(kind, *changes):
    blocks = {change.split("=")[0] for change in KINDS[kind]}
    kept = [change for change in CHANGES if not change.startswith(tuple(f"{block}." for block in blocks))]
    return load_config(CONFIG, [*kept, *KINDS[kind], *changes])


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced and run as they are: inductor takes minutes on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(run_module, "CompiledDetector", partial(CompiledDetector, backend="eager"))
    compile_terms = Criterion.compile_terms
    monkeypatch.setattr(Criterion, "compile_terms", lambda self: compile_terms(self, backend="eager"))
    yield
    torch._dynamo.reset()


def with_boxes(batch, counts):
    targets = [
        Targets(target.boxes[:count], target.labels[:count])
        for target, count in zip(batch.targets, counts, strict=True)
    ]
    return replace(batch, targets=targets)


@pytest.mark.parametrize(
    "kind", ["fusion with AQR", *(pytest.param(kind, marks=pytest.mark.e2e) for kind in ("LiDAR", "cameras"))]
)
def test_steps_are_those_of_eager_mode(kind, traced, tmp_path):
    """Frames with many, few and no boxes, with and without a GridMask (drawn from the step)."""
    losses, models = {}, {}
    batch = made_up_batch(settings_of(kind), 2)
    for is_on in ("false", "true"):
        run = make_run(settings_of(kind, f"training.compile={is_on}"), torch.device("cpu"), tmp_path)
        assert isinstance(run.ddp_model, CompiledDetector) == (is_on == "true")
        step = TrainingStep(run, batch)
        losses[is_on] = []
        for counts in ((35, 20), (3, 0), (0, 0), (7, 30), (12, 1)):
            step.batch = with_boxes(batch, counts)
            step()
            losses[is_on].append(step.loss)
        models[is_on] = run.model.state_dict()
    torch.testing.assert_close(torch.tensor(losses["true"]), torch.tensor(losses["false"]), rtol=1e-4, atol=0)
    assert models["true"].keys() == models["false"].keys()
    for name, value in models["false"].items():
        torch.testing.assert_close(models["true"][name], value, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.e2e
def test_the_detector_compiles_each_stage_once(traced, tmp_path):
    config = settings_of("fusion with AQR", "training.compile=true")
    run = make_run(config, torch.device("cpu"), tmp_path)
    step = TrainingStep(run, made_up_batch(config, 2))
    run.criterion.forward = lambda predictions, *_, **__: {"loss": predictions.logits(0).sum()}
    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for counts in ((3, 0), (0, 0), (35, 35), (1, 1)):
            step.batch = with_boxes(step.batch, counts)
            step()


def test_auto_compiles_on_a_gpu_what_can_be_compiled():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    config = load_config(CONFIG, ["training.compile=auto"])
    assert is_compiled(config, gpu) and not is_compiled(config, cpu)
    assert not is_compiled(load_config(CONFIG, ["training.compile=auto", "model.attention.backend=score_mod"]), gpu)
    with pytest.raises(ConfigError, match=r"training.compile: true cannot hold model.attention.backend 'score_mod'"):
        load_config(CONFIG, ["training.compile=true", "model.attention.backend=score_mod"])
