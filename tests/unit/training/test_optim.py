"""Optimizer groups, the cycle, freezing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cmt_aqr.config import load_config
from cmt_aqr.training.optim import (
    cyclic,
    freeze,
    longest_prefix,
    make_optimizer,
    prefix_problems,
    set_schedule,
    set_training_mode,
)


def small_model() -> nn.Module:
    model = nn.Module()
    model.image = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.head = nn.Linear(4, 2)
    return model


def test_the_more_specific_prefix_wins():
    factors = {"image": 0.1, "image.0": 0.5, "": 2.0}
    assert longest_prefix("image.0.weight", factors) == 0.5
    assert longest_prefix("image.1.weight", factors) == 0.1
    assert longest_prefix("head.weight", factors) == 2.0
    assert longest_prefix("head.weight", {"image": 0.1}) == 1.0


def test_groups_carry_their_factors():
    model = small_model()
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.01, lr_mult={"image": 0.1}, decay_mult={"image.1": 0.0})
    found = {(round(g["lr"], 9), g["weight_decay"]): len(g["params"]) for g in optimizer.param_groups}
    assert found == {(1e-4, 0.01): 2, (1e-4, 0.0): 2, (1e-3, 0.01): 2}
    set_schedule(optimizer, lr=2e-3, momentum=0.85)
    assert sorted({round(g["lr"], 9) for g in optimizer.param_groups}) == [2e-4, 2e-3]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.85, 0.999)}


def test_cycle_ends_where_the_original_does():
    def rate(step):
        return cyclic(step, 1000, pct_start=0.4, top=6.0, end=1e-4)

    assert rate(0) == 1.0
    assert rate(200) == pytest.approx(3.5)  # half-way up a cosine
    assert rate(400) == pytest.approx(6.0)
    assert rate(700) == pytest.approx((6 + 1e-4) / 2)
    assert 1e-4 < rate(999) < 2e-4
    assert max(range(1000), key=rate) == 400
    assert cyclic(0, 1, pct_start=0.4, top=6.0, end=1e-4) == 1.0


def test_freezing_leaves_the_rest():
    model = small_model()
    freeze(model, ["image"])
    assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 2
    freeze(model, ["head"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        make_optimizer(model, lr=1.0, weight_decay=0.0, lr_mult={}, decay_mult={})


def test_norm_stays_in_eval_mode_where_asked():
    model = small_model()
    before = model.image[1].running_mean.clone()
    set_training_mode(model, ["image"])
    model.image(torch.randn(2, 3, 5, 5))
    assert torch.equal(model.image[1].running_mean, before)
    assert model.head.training and model.image[0].training and not model.image[1].training
    set_training_mode(model, [])
    model.image(torch.randn(2, 3, 5, 5))
    assert not torch.equal(model.image[1].running_mean, before)


def test_prefixes_that_fit_nothing_are_all_reported_at_once():
    tiny = load_config(Path(__file__).parents[3] / "configs" / "synthetic_tiny.yaml").training
    training = replace(
        tiny,
        lr_mult={"imagee": 0.1, "image.1": 1.0},
        decay_mult={"norm.weight": 0.0},
        freeze=("head",),
        norm_eval=("head",),
    )
    assert prefix_problems(small_model(), training) == [
        "training.lr_mult: no parameter name begins with 'imagee'; they begin with head, image; did you mean 'image'?",
        "training.decay_mult: no parameter name begins with 'norm.weight'; they begin with head, image; did you mean "
        "'image.1.weight'?",
        "training.norm_eval: no batch norm's name begins with 'head'; they begin with image",
    ]
    training = replace(tiny, lr_mult={"1.weight": 1.0}, decay_mult={}, freeze=("head", "image"), norm_eval=())
    assert prefix_problems(small_model(), training) == [
        "training.lr_mult: no parameter name begins with '1.weight'; they begin with head, image; did you mean "
        "'image.1.weight'?",
        "training.freeze: every parameter is frozen, nothing is left to train",
    ]
