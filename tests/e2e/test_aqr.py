"""AQR as a user sees it: what a training logs and says, weights to start from, one step of every design."""

import pytest
import torch
from safetensors.torch import save_file

from cmt_aqr.build import build_detector
from cmt_aqr.config import load_config
from cmt_aqr.training.checkpoint import load_weights
from tests.e2e.conftest import CONFIG, PLAIN, SMALL, read_lines

V1 = ("model.aqr.design=v1", "model.aqr.activation=sigmoid", "training.decay_mult={}")


@pytest.fixture
def train(world, call, tmp_path):
    """Two steps of train.py; returns what it printed and the lines of its log."""

    def run(*settings: str):
        command = world.arguments("--work-dir", tmp_path / "run", "--max-steps", "2", settings=settings)
        result = call("train", *command)
        assert result.status == 0, result.err
        return result.out, read_lines(tmp_path / "run" / "log.jsonl", "train")

    return run


def test_the_log_has_scale_and_weights(train, tmp_path):
    """A line holds the scale that made its losses, the checkpoint the one after the step."""
    out, lines = train()
    assert out.count("AQR bias in the cross-attention, computed by dense\n") == 1
    assert len(lines) == 2
    saved = load_weights(tmp_path / "run" / "latest.pt")["aqr.scale.value"].item()
    scales = [lines[0]["aqr_scale"], lines[1]["aqr_scale"], saved]
    assert scales[0] == 2.5
    assert len(set(scales)) == 3 and all(abs(scale - 2.5) < 0.01 for scale in scales)
    for line in lines:
        assert 0 < line["aqr_weight_lidar"] < 0.2 and 0 < line["aqr_weight_camera"] < 0.2


def test_every_step_leaves_the_scale_inside_its_limits(train, tmp_path):
    """A step of Adam moves it by about 5e-4."""
    low, high = 2.49995, 2.50005
    train(f"model.aqr.scale_range=[{low},{high}]")
    scale = load_weights(tmp_path / "run" / "latest.pt")["aqr.scale.value"]
    assert any(torch.equal(scale, torch.tensor([limit])) for limit in (low, high))


def test_a_map_has_weights_and_no_scale(train):
    out, lines = train(*V1)
    assert "AQR v1: weights modulate the token features\n" in out
    assert 0.85 < lines[0]["aqr_weight_lidar"] < 1 and 0.85 < lines[0]["aqr_weight_camera"] < 1
    assert "aqr_scale" not in lines[0]


def test_without_aqr_nothing_is_said(train):
    out, lines = train(*PLAIN)
    assert "AQR" not in out and not any(key.startswith("aqr") for key in lines[0])


def test_training_starts_from_weights_without_aqr(train, tmp_path):
    plain = build_detector(load_config(CONFIG, (*SMALL, *PLAIN)).model).state_dict()
    path = tmp_path / "plain.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, path)
    out, _ = train(f"training.init_from={path}")
    assert f"init_from {path}: {len(plain)} of " in out


def test_training_through_an_approximation_without_gradient_is_refused(world, call, tmp_path):
    settings = ("model.attention.backend=lowrank",)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert result.status == 2
    sentence = "model.attention.backend: 'lowrank' gives AQR no gradient; it is for test.py only"
    assert result.err == f"error: --set {settings[0]}: {sentence}\n"


def test_weights_that_are_missing_are_named_before_anything_is_prepared(call, tmp_path):
    shipped = CONFIG.with_name("cmt_aqr_r50_800x320.yaml")
    command = [str(shipped), "--device", "cpu", "--work-dir", str(tmp_path / "run")]
    result = call("train", *command, "--set", f"data.root={tmp_path / 'nowhere'}")
    assert result.status == 2
    expected = "error: training.init_from data/weights/cmt_r50_800x320.safetensors: no such file\n"
    assert result.err == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.e2e
def test_the_probe_is_logged_after_every_epoch(world, call, tmp_path):
    """The same frames each time: the scale is the checkpoint's, and a run that was stopped logs the same figures."""
    whole = tmp_path / "whole"
    assert call("train", *world.arguments("--work-dir", whole)).status == 0
    lines = read_lines(whole / "log.jsonl", "probe")
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["scale"] == load_weights(whole / "latest.pt")["aqr.scale.value"].item()
    for line in lines:
        assert 0 < line["attention_change"] < 2 and len(line["attention_change_by_layer"]) == 2
        assert line["bias_lidar"]["min"] <= line["bias_lidar"]["mean"] <= line["bias_lidar"]["max"]
    parts = tmp_path / "parts"
    assert call("train", *world.arguments("--work-dir", parts, "--max-steps", "2")).status == 0
    assert read_lines(parts / "log.jsonl", "probe") == []  # in the middle of the first epoch
    assert call("train", *world.arguments("--work-dir", parts, "--resume")).status == 0
    found = read_lines(parts / "log.jsonl", "probe")
    assert [line | {"time": 0} for line in found] == [line | {"time": 0} for line in lines]


@pytest.mark.e2e
def test_without_aqr_there_is_no_probe(world, call, tmp_path):
    assert call("train", *world.arguments("--work-dir", tmp_path / "run", settings=PLAIN)).status == 0
    assert read_lines(tmp_path / "run" / "log.jsonl", "probe") == []
