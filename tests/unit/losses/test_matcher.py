"""Matching against exhaustive search, and its corner cases."""

from itertools import permutations

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Targets, encode_boxes
from cmt_aqr.losses.focal import focal_cost
from cmt_aqr.losses.matcher import (
    UNMATCHED,
    ElsewhereError,
    Matching,
    NonFiniteError,
    encode_targets,
    matching_costs,
    solve,
)
from tests.unit.losses.cases import ONE_TASK, TWO_TASKS, make_predictions, make_targets

WEIGHTS = (2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)


def match(predictions, targets):
    return Matching(predictions, encode_targets(targets, dtype=torch.float64), code_weights=WEIGHTS).solve()


def costs_of(predictions, targets):
    padded = encode_targets(targets, dtype=torch.float64)
    return matching_costs(predictions, padded, class_weight=2.0, box_weight=0.25, code_weights=WEIGHTS)


@pytest.mark.parametrize("classes", (ONE_TASK, TWO_TASKS))
def test_costs_pair_by_pair(classes):
    predictions, targets = make_predictions(batch=2, queries=4, classes=classes, num_dn=3), make_targets((3, 2))
    costs = costs_of(predictions, targets)
    weights = torch.tensor(WEIGHTS).double()
    for sample, target in enumerate(targets):
        for g, label in enumerate(target.labels.tolist()):
            task = next(t for t, members in enumerate(classes) if label in members)
            code = encode_boxes(target.boxes[g])
            for q in range(4):
                logit = predictions.logits(task)[1, sample, 3 + q, classes[task].index(label)]
                distance = ((predictions.codes(task)[1, sample, 3 + q] - code) * weights)[:8].abs().sum()
                expected = 2.0 * focal_cost(logit) + 0.25 * distance
                torch.testing.assert_close(costs[1, sample, g, q], expected.detach())


def test_velocity_is_not_in_the_cost():
    # Quirk Q9.
    predictions, targets = make_predictions(batch=1, queries=4), make_targets((3,))
    unknown = Targets(targets[0].boxes.clone(), targets[0].labels)
    unknown.boxes[:, 7:] = torch.nan
    assert torch.equal(costs_of(predictions, targets), costs_of(predictions, [unknown]))


def test_assignment_is_the_cheapest_of_all():
    predictions, targets = make_predictions(batch=2, queries=5), make_targets((3, 4))
    costs = costs_of(predictions, targets)
    assigned = match(predictions, targets)
    assert assigned.shape == (1, 2, 2, 5)
    for layer in range(2):
        for sample, count in enumerate((3, 4)):
            cheapest = min(
                sum(costs[layer, sample, g, q].item() for g, q in enumerate(queries))
                for queries in permutations(range(5), count)
            )
            found = assigned[0, layer, sample]
            assert sorted(found[found != UNMATCHED].tolist()) == list(range(count))
            total = sum(costs[layer, sample, g, q].item() for q, g in enumerate(found.tolist()) if g != UNMATCHED)
            assert total == pytest.approx(cheapest)


def test_boxes_are_matched_only_by_the_task_that_owns_them():
    predictions, targets = make_predictions(batch=1, queries=9, classes=TWO_TASKS), make_targets((7,))
    assigned = match(predictions, targets)
    for task, members in enumerate(TWO_TASKS):
        mine = [g for g, label in enumerate(targets[0].labels.tolist()) if label in members]
        found = assigned[task, 0, 0]
        assert sorted(found[found != UNMATCHED].tolist()) == mine


def test_more_boxes_than_queries():
    predictions, targets = make_predictions(batch=2, queries=3), make_targets((8, 0))
    assigned = match(predictions, targets)
    assert (assigned[0, :, 0] != UNMATCHED).all()
    assert all(len(set(row.tolist())) == 3 for row in assigned[0, :, 0])
    assert (assigned[0, :, 1] == UNMATCHED).all()


def test_no_boxes_at_all():
    predictions, targets = make_predictions(batch=2, queries=3), make_targets((0, 0))
    assigned = match(predictions, targets)
    assert (assigned == UNMATCHED).all()


@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("branch", ("center", "vel"))  # the velocity is not in the cost
def test_non_finite_predictions_are_refused(branch, value):
    predictions, targets = make_predictions(batch=2, queries=4), make_targets((0, 3))
    with torch.no_grad():
        predictions.tasks[0][branch][1, 1, 2] = value
    with pytest.raises(NonFiniteError, match=r"^the output of the network is not finite$"):
        match(predictions, targets)


def test_a_cost_that_is_not_finite_is_named():
    predictions, targets = make_predictions(batch=2, queries=4), make_targets((0, 3))
    targets[1].boxes[2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="decoder layer 0, sample 1, task 0 is not finite"):
        match(predictions, targets)


@pytest.mark.parametrize("what", ("output", "cost"))
def test_all_processes_learn_that_the_matching_of_one_failed(what):
    """Two processes: each gives its findings to ``reduce_mean`` and gets the mean with those of the other."""
    predictions, targets = make_predictions(batch=2, queries=4), make_targets((0, 3))
    padded = encode_targets(targets, dtype=torch.float64)
    given = []

    def with_other(other):
        return lambda own: given.append(own) or (own + torch.tensor(other).double()) / 2

    fine = [1.0, 1.0]
    Matching(predictions, padded, code_weights=WEIGHTS, reduce_mean=with_other(fine)).solve()
    bad = [0.0, 0.0] if what == "output" else [1.0, 0.0]
    with pytest.raises(ElsewhereError):
        Matching(predictions, padded, code_weights=WEIGHTS, reduce_mean=with_other(bad)).solve()
    if what == "output":
        predictions.tasks[0]["vel"].data[0, 0, 0] = torch.nan
        bad = [0.0, 1.0]
    else:
        padded.codes[1, 2, 0] = torch.inf
    with pytest.raises(NonFiniteError) as error:
        Matching(predictions, padded, code_weights=WEIGHTS, reduce_mean=with_other(fine)).solve()
    assert not isinstance(error.value, ElsewhereError)
    assert [each.tolist() for each in given] == [fine, fine, bad]


def test_padding_does_not_reach_the_solver():
    costs = np.full((1, 1, 3, 4), np.nan)
    costs[0, 0, 1] = [3.0, 1.0, 2.0, 5.0]
    assert solve(costs, np.array([[-1, 0, -1]]), 1).tolist() == [[[[-1, 1, -1, -1]]]]


def test_boxes_that_do_not_fit_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"sample 0: boxes must have shape \(2, 9\) to go with 2 labels, got \(3, 9\)"):
        encode_targets([Targets(torch.ones(3, 9), torch.zeros(2, dtype=torch.int64))], dtype=torch.float32)
