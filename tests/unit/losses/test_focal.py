"""Focal loss and cost against their formulas."""

import math

import pytest
import torch

from cmt_aqr.losses.focal import focal_cost, focal_loss, one_hot


@pytest.mark.parametrize("logit", (-3.0, 0.0, 1.5))
def test_loss_and_cost_equal_the_formula(logit):
    p, alpha, gamma = 1 / (1 + math.exp(-logit)), 0.3, 1.7
    positive = -alpha * (1 - p) ** gamma * math.log(p)
    negative = -(1 - alpha) * p**gamma * math.log(1 - p)
    logits = torch.tensor([logit, logit], dtype=torch.float64)
    loss = focal_loss(logits, torch.tensor([True, False]), alpha=alpha, gamma=gamma)
    assert loss.tolist() == pytest.approx([positive, negative], rel=1e-12)
    assert focal_cost(logits, alpha=alpha, gamma=gamma).tolist() == pytest.approx([positive - negative] * 2, rel=1e-9)


def test_extreme_logits_are_finite_with_finite_gradients():
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1, 1, 0, 0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()
    assert focal_cost(logits).isfinite().all()


def test_background_has_no_hot_column():
    assert one_hot(torch.tensor([0, 2, 3]), 3).tolist() == [
        [True, False, False],
        [False, False, True],
        [False, False, False],
    ]
