"""Optimizer groups, the cycle, freezing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cmt_aqr.config import load_config
from cmt_aqr.training.optim import (
    BETA1,
    BETA2,
    cyclic,
    freeze,
    longest_prefix,
    make_average,
    make_optimizer,
    prefix_problems,
    rates,
    set_schedule,
    set_training_mode,
)

CONFIGS = Path(__file__).parents[3] / "configs"
CONFIG = load_config(CONFIGS / "synthetic_tiny.yaml")


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


def rates_of_torch(training, total, make_scheduler, *schedule_options, **options):
    """Learning rates and first betas that a scheduler of PyTorch gives the steps."""
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=training.lr, betas=(BETA1, BETA2))
    scheduler = make_scheduler(optimizer, *schedule_options, **options)
    found = []
    for _ in range(total):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["betas"][0]))
        optimizer.step()
        if len(found) < total:
            scheduler.step()
    return found


def test_one_cycle_is_that_of_pytorch():
    training = replace(CONFIG.training, schedule="one_cycle", lr_peak=10.0, lr_end=1e-3, pct_start=0.3)
    expected = rates_of_torch(
        training,
        50,
        torch.optim.lr_scheduler.OneCycleLR,
        training.lr * 10,
        total_steps=50,
        pct_start=0.3,
        div_factor=10.0,
        final_div_factor=1e3,
        base_momentum=BETA1 * training.min_momentum_ratio,
        max_momentum=BETA1,
    )
    assert [rates(training, step, 50) for step in range(50)] == [pytest.approx(pair, rel=1e-9) for pair in expected]
    assert rates(training, 49, 50)[0] == pytest.approx(training.lr * 1e-3)


def test_warm_up_and_cosine_are_those_of_pytorch():
    training = replace(CONFIG.training, schedule="cosine", lr_peak=8.0, lr_end=1e-2, pct_start=0.2)

    def make(optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 8 * training.lr
        schedulers = torch.optim.lr_scheduler
        return schedulers.SequentialLR(
            optimizer,
            [
                schedulers.LinearLR(optimizer, start_factor=1 / 8, total_iters=10),
                schedulers.CosineAnnealingLR(optimizer, T_max=40, eta_min=training.lr * 1e-2),
            ],
            milestones=[10],
        )

    expected = rates_of_torch(training, 50, make)
    assert [rates(training, step, 50) for step in range(50)] == [pytest.approx(pair, rel=1e-9) for pair in expected]
    assert rates(training, 0, 50) == (training.lr, BETA1)
    assert rates(replace(training, pct_start=0.001), 0, 50)[0] == pytest.approx(8 * training.lr)  # no warm-up


def test_the_original_cycle_is_the_default():
    for file in sorted(CONFIGS.rglob("*.yaml")):
        if file.name == "patches.yml":
            continue
        training = load_config(file).training
        found = [rates(training, step, 30) for step in range(30)]
        assert found == [
            (
                training.lr * cyclic(step, 30, pct_start=training.pct_start, top=training.lr_peak, end=training.lr_end),
                BETA1 * cyclic(step, 30, pct_start=training.pct_start, top=training.min_momentum_ratio, end=1.0),
            )
            for step in range(30)
        ]


@pytest.mark.parametrize("schedule", ["cyclic", "one_cycle", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_runs_of_a_few_steps_have_finite_rates(schedule, total):
    training = replace(CONFIG.training, schedule=schedule)
    for pct_start in (0.01, 0.4, 0.5, 0.99):
        for step in range(total):
            lr, beta = rates(replace(training, pct_start=pct_start), step, total)
            assert 0 < lr <= training.lr * max(training.lr_peak, 1) and 0 < beta < 1


def test_the_learning_rate_follows_the_batch_on_request():
    training = replace(CONFIG.training, batch_size=32)
    plain = rates(training, 3, 10)
    scaled = rates(replace(training, lr_batch_size=8), 3, 10)
    assert scaled == (pytest.approx(4 * plain[0]), plain[1])
    assert rates(replace(training, lr_batch_size=32), 3, 10) == plain


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average, expected = make_average(model, 0.75), None
    for _ in range(4):
        with torch.no_grad():
            model[0].weight += torch.randn(2, 3)
        model(torch.randn(5, 3))  # moves the statistics of the batch norm
        average.update_parameters(model)
        weight = model[0].weight.detach()
        expected = weight.clone() if expected is None else 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(average.module[0].weight.detach(), expected)
    assert not torch.equal(average.module[0].weight, model[0].weight)
    assert torch.equal(average.module[1].running_mean, model[1].running_mean)
    assert average.module.state_dict().keys() == model.state_dict().keys()


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
