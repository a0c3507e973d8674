"""A step in several passes is the step of the whole batch."""

import numpy as np
import pytest
import torch
from torch import nn

from cmt_aqr.boxes import Targets
from cmt_aqr.config import ConfigError, load_config
from cmt_aqr.data.sample import Batch
from cmt_aqr.run import build_run, check_settings, split_batch
from cmt_aqr.tools.attention_cases import nuscenes_lidar2img
from cmt_aqr.training.distributed import RankInfo
from cmt_aqr.training.optim import set_training_mode
from tests.e2e.conftest import CONFIG, SMALL
from tests.unit.models.tiny_detector import make_targets
from train import forward_backward, train_step

CPU = RankInfo(rank=0, world_size=1, device=torch.device("cpu"))
# Batch norm sees one part at a time and would differ: it keeps its statistics here.
SETTINGS = (*SMALL, "model.camera.grid_mask=1.0", 'training.norm_eval=[""]', "training.batch_size=4")


def make_run(tmp_path, *changes):
    """A run before its first step; the weights are always the same."""
    torch.manual_seed(0)
    run = build_run(load_config(CONFIG, (*SETTINGS, *changes)), CPU, tmp_path)
    run.steps_per_epoch = run.last_step = 10
    set_training_mode(run.model, run.config.training.norm_eval)
    return run


def make_batch(counts=(3, 0, 7, 2)) -> Batch:
    """Four frames with different numbers of points and boxes."""
    rng = np.random.default_rng(0)
    size = len(counts)
    eye = torch.eye(4, dtype=torch.float64).expand(size, 4, 4)
    points = [torch.from_numpy(rng.normal(0, (20, 20, 1, 30, 0.1), (500 + 90 * i, 5))).float() for i in range(size)]
    return Batch(
        tokens=[f"frame {i}" for i in range(size)],
        images=torch.from_numpy(rng.integers(0, 256, (size, 6, 32, 96, 3), dtype=np.uint8)),
        points=points,
        lidar2img=nuscenes_lidar2img((32, 96)).expand(size, 6, 4, 4),
        targets=[Targets(t.boxes.float(), t.labels) for t in make_targets(counts)],
        lidar2global=eye,
        lidar2ego=eye,
        ego2global=eye,
        augmentation=eye,
    )


def gradient(run) -> torch.Tensor:
    """Of all parameters, one after the other."""
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [2, 4])
def test_several_passes_give_the_losses_and_the_gradient_of_one(tmp_path, parts):
    whole, split = make_run(tmp_path), make_run(tmp_path, f"training.accumulation={parts}")
    expected, found = forward_backward(whole, make_batch()), forward_backward(split, make_batch())
    assert found.keys() == expected.keys() and {"loss", "loss_cls", "dn_loss_bbox"} <= found.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-5), name
    assert gradient(whole).norm() > 0
    assert (gradient(split) - gradient(whole)).norm() < 1e-5 * gradient(whole).norm()


def test_passes_normalised_for_themselves_would_differ(tmp_path):
    run = make_run(tmp_path, "training.accumulation=2")
    reference = forward_backward(run, make_batch())["loss"].item()
    parts = split_batch(run, make_batch())
    own = [run.criterion.count(p.batch.targets, p.denoising, num_queries=80)[0].item() for p in parts]
    assert own == [3, 9] and parts[0].counts[0] == 6
    assert torch.equal(parts[0].counts, parts[1].counts)
    lone = forward_backward(make_run(tmp_path), make_batch((3, 0)))["loss"].item()
    assert abs(lone - reference) > 0.01 * reference


def test_a_part_has_its_own_frames_noise_and_dropout(tmp_path):
    run = make_run(tmp_path, "training.accumulation=2")
    parts = split_batch(run, make_batch())
    assert [part.batch.tokens for part in parts] == [["frame 0", "frame 1"], ["frame 2", "frame 3"]]
    assert [part.stream for part in parts] == [0, 1]
    whole = split_batch(make_run(tmp_path), make_batch())[0].denoising
    for name in ("reference_points", "labels", "is_known"):
        joined = torch.cat([getattr(part.denoising, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name


def test_the_frames_of_the_second_of_two_processes(tmp_path, monkeypatch):
    positions = []

    def record_positions(_seed, _step, frames, num_dn):
        positions.append(frames)
        return torch.zeros(len(frames), num_dn, 3)

    monkeypatch.setattr("cmt_aqr.run.denoising_noise", record_positions)
    monkeypatch.setattr("cmt_aqr.run.make_denoising", lambda *_, **__: None)
    run = make_run(tmp_path, "training.accumulation=2", "training.batch_size=8")
    run.rank_info = RankInfo(rank=1, world_size=2, device=CPU.device)
    parts = split_batch(run, make_batch())
    assert [list(each) for each in positions] == [[1, 3], [5, 7]]
    assert [part.stream for part in parts] == [1, 3]


def test_a_batch_smaller_than_its_parts(tmp_path):
    run = make_run(tmp_path, "training.accumulation=4")
    assert [len(part.batch) for part in split_batch(run, make_batch((1, 2, 3)))] == [1, 1, 1]


def test_parts_that_do_not_divide_the_frames_are_refused(tmp_path):
    config = load_config(CONFIG, (*SETTINGS, "training.accumulation=3"))
    with pytest.raises(ConfigError, match=r"training\.accumulation: 3 does not divide the 4 frames of a step in each"):
        check_settings(config, CPU)


def test_the_average_is_updated_by_a_step_and_evaluated(tmp_path):
    run = make_run(tmp_path, "training.ema_decay=0.5")
    assert run.evaluated is run.average.module is not run.model
    name, parameter = next(iter(run.model.named_parameters()))
    train_step(run, make_batch())
    first = parameter.detach().clone()
    assert torch.equal(dict(run.evaluated.named_parameters())[name], first)
    train_step(run, make_batch())
    assert not torch.equal(parameter, first)
    torch.testing.assert_close(dict(run.evaluated.named_parameters())[name].detach(), (first + parameter.detach()) / 2)
    assert make_run(tmp_path).average is None
    assert isinstance(run.evaluated, nn.Module) and run.evaluated.aqr is not run.model.aqr
