"""The loss: normalisers, invariances, unknown velocities, several processes, bad input."""

import math

import pytest
import torch

from cmt_aqr.boxes import Targets, encode_boxes
from cmt_aqr.devices import HostCopy
from cmt_aqr.losses.criterion import DEFAULT_CODE_WEIGHTS, Criterion, total_loss
from cmt_aqr.losses.focal import focal_loss
from cmt_aqr.losses.matcher import NonFiniteError, encode_targets
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from tests.unit.losses.cases import (
    ONE_TASK,
    POINT_RANGE,
    TWO_TASKS,
    gradients,
    make_predictions,
    make_targets,
    slice_samples,
)


def denoise(targets, *, queries=6, num_dn=12, seed=0, **changes):
    sizes = {"num_queries": queries, "num_dn": num_dn, "point_range": POINT_RANGE}
    changes["settings"] = DenoisingSettings(max_groups=2)
    return make_denoising(targets, **sizes, generator=torch.Generator().manual_seed(seed), **changes)


def close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_names_of_the_terms():
    predictions, targets = make_predictions(batch=1, queries=6, layers=3, num_dn=12), make_targets((2,))
    names = set(Criterion(classes=ONE_TASK)(predictions, targets, denoise(targets)))
    kinds = {"loss_cls", "loss_bbox", "dn_loss_cls", "dn_loss_bbox"}
    assert names == kinds | {f"d{i}.{kind}" for i in range(2) for kind in kinds}


def test_one_box_by_hand():
    predictions, targets = make_predictions(batch=1, queries=3, layers=1), make_targets((1,))
    criterion = Criterion(classes=ONE_TASK)
    terms = criterion(predictions, targets)
    with torch.no_grad():
        padded_query = [
            focal_loss(predictions.logits(0)[0, 0], one_target(q, targets[0].labels[0])).sum() for q in range(3)
        ]
        distances = [
            ((predictions.codes(0)[0, 0, q] - encode_boxes(targets[0].boxes[0])).abs() * weights()).sum()
            for q in range(3)
        ]
    options = [(2.0 * c / 1.2, 0.25 * d) for c, d in zip(padded_query, distances, strict=True)]
    found = (terms["loss_cls"].item(), terms["loss_bbox"].item())
    assert any(found == (pytest.approx(c.item(), rel=1e-6), pytest.approx(d.item(), rel=1e-6)) for c, d in options)


def one_target(query, label):
    target = torch.zeros(3, 10, dtype=torch.bool)
    target[query, label] = True
    return target


def weights():
    return torch.tensor(DEFAULT_CODE_WEIGHTS, dtype=torch.float64)


def test_denoising_normalisers_count_the_boxes_of_all_tasks():
    # Quirk Q8: known rows * 3.14159 / 6 * threshold^3 for the class, known rows for the box; no padding or empty slots.
    targets = make_targets((3, 1))
    predictions = make_predictions(batch=2, queries=6, layers=1, classes=TWO_TASKS, num_dn=12)
    denoising = denoise(targets)
    terms = Criterion(classes=TWO_TASKS, dn_weight=0.5)(predictions, targets, denoising)
    known = 2 * (3 + 1)
    cls = box = 0.0
    codes = encode_boxes(denoising.boxes)
    with torch.no_grad():
        for b, row in denoising.is_known.nonzero().tolist():
            for task, members in enumerate(TWO_TASKS):
                label = denoising.labels[b, row].item()
                target = torch.tensor([member == label for member in members])
                cls += focal_loss(predictions.logits(task)[0, b, row], target).sum().item()
                if denoising.clean_labels[b, row].item() in members:
                    difference = predictions.codes(task)[0, b, row] - codes[b, row]
                    box += (difference.abs() * weights()).sum().item()
    expected = 0.5 * 2.0 * cls / (known * 3.14159 / 6 * 0.75**3)
    assert terms["dn_loss_cls"].item() == pytest.approx(expected, rel=1e-6)
    assert terms["dn_loss_bbox"].item() == pytest.approx(0.5 * 0.25 * box / known, rel=1e-6)


@pytest.mark.parametrize("classes", (ONE_TASK, TWO_TASKS))
def test_the_order_of_the_boxes_does_not_matter(classes):
    targets = make_targets((5, 3))
    shuffled = [Targets(t.boxes.flip(0), t.labels.flip(0)) for t in targets]
    criterion = Criterion(classes=classes)
    first = make_predictions(batch=2, queries=6, classes=classes)
    second = slice_samples(first, [0, 1])
    terms, again = criterion(first, targets), criterion(second, shuffled)
    close(again, terms)
    total_loss(terms).backward()
    total_loss(again).backward()
    close(gradients(second), gradients(first))


def test_frames_without_boxes():
    predictions, targets = make_predictions(batch=2, queries=6, num_dn=12), make_targets((0, 0))
    terms = Criterion(classes=ONE_TASK)(predictions, targets, denoise(targets))
    assert terms["loss_bbox"].item() == 0
    assert terms["loss_cls"].item() > 0
    assert terms["dn_loss_cls"].item() == terms["dn_loss_bbox"].item() == 0
    total_loss(terms).backward()
    for name, grad in gradients(predictions).items():
        assert not grad[:, :, :12].any()
        assert name.endswith("cls_logits") or not grad.any()


def test_an_unknown_velocity_has_no_weight_and_the_rest_of_the_box_has():
    predictions, targets = make_predictions(batch=1, queries=6, num_dn=12), make_targets((3,))
    denoising = denoise(targets)
    targets[0].boxes[:, 7:] = torch.nan
    blind = denoise(targets)
    criterion = Criterion(classes=ONE_TASK)
    terms = criterion(predictions, targets, blind)
    total_loss(terms).backward()
    assert total_loss(terms).isfinite()
    for name, grad in gradients(predictions).items():
        assert grad.isfinite().all()
        assert grad.any() != name.endswith("vel")
    weightless = Criterion(classes=ONE_TASK, code_weights=(*DEFAULT_CODE_WEIGHTS[:8], 0.0, 0.0))
    targets[0].boxes[:, 7:] = 1.0
    close(terms, weightless(predictions, targets, denoising))


@pytest.mark.parametrize("counts", ((4, 0, 2, 5), (0, 0, 1, 0), (0, 0, 0, 0)))
def test_two_processes_give_the_loss_and_gradient_of_one(counts):
    targets = make_targets(counts)
    noise = torch.rand(4, 12, 3, generator=torch.Generator().manual_seed(3)).double()
    whole = make_predictions(batch=4, queries=6, classes=TWO_TASKS, num_dn=12)
    terms = Criterion(classes=TWO_TASKS)(whole, targets, denoise(targets, noise=noise))
    total_loss(terms).backward()

    parts = ([0, 1], [2, 3])
    halves = [slice_samples(whole, part) for part in parts]

    def run(reduce_mean):
        results = []
        for half, part in zip(halves, parts, strict=True):
            mine = [targets[i] for i in part]
            denoising = denoise(mine, noise=noise[part], max_boxes=max(counts))
            criterion = Criterion(classes=TWO_TASKS, reduce_mean=reduce_mean, num_processes=2)
            results.append(criterion(half, mine, denoising))
        return results

    local = []
    run(lambda own: local.append(own) or own)  # counts, and whether all is finite
    results = run(lambda own: torch.stack([each for each in local if each.shape == own.shape]).mean(0))
    close({name: (results[0][name] + results[1][name]) / 2 for name in terms}, terms)
    for result in results:
        (total_loss(result) / 2).backward()  # DDP averages gradients
    for name, grad in gradients(whole).items():
        joined = torch.cat([gradients(half)[name] for half in halves], dim=1)
        torch.testing.assert_close(joined, grad, rtol=1e-12, atol=1e-14)


def test_a_process_that_cannot_match_lets_the_other_one_count():
    targets, reduced = make_targets((3, 2)), []
    predictions = make_predictions(batch=2, queries=6, classes=TWO_TASKS)
    criterion = Criterion(classes=TWO_TASKS, reduce_mean=lambda own: reduced.append(own) or own)
    criterion(predictions, targets)
    targets[1].boxes[0, 3] = torch.nan
    with pytest.raises(NonFiniteError):
        criterion(predictions, targets)
    healthy, is_finite, failed, is_failed = reduced  # the same reductions, of the same counts
    assert torch.equal(failed, healthy) and healthy[:2].sum() == 5
    assert (is_finite.tolist(), is_failed.tolist()) == ([1, 1], [1, 0])


def test_more_boxes_than_queries_counts_the_matched_ones():
    predictions, targets = make_predictions(batch=1, queries=3, layers=1), make_targets((8,))
    terms = Criterion(classes=ONE_TASK, background_weight=1e6)(predictions, targets)
    plain = Criterion(classes=ONE_TASK)(predictions, targets)
    torch.testing.assert_close(terms["loss_cls"], plain["loss_cls"])  # no background query is left


def test_float32_predictions_give_a_float32_loss_of_the_same_value():
    targets = make_targets((3, 2))
    exact = Criterion(classes=ONE_TASK)(make_predictions(batch=2, queries=6), targets)
    single = [Targets(t.boxes.float(), t.labels) for t in targets]
    predictions = make_predictions(batch=2, queries=6)
    rounded = tuple({name: tensor.detach().float() for name, tensor in task.items()} for task in predictions.tasks)
    terms = Criterion(classes=ONE_TASK)(type(predictions)(rounded, ONE_TASK), single)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert math.isclose(value.item(), exact[name].item(), rel_tol=1e-5)


@pytest.mark.parametrize("classes", (ONE_TASK, TWO_TASKS))
def test_terms_are_those_of_matching_first_and_denoising_after_it(classes):
    predictions, targets = make_predictions(batch=2, queries=9, classes=classes, num_dn=12), make_targets((3, 5))
    denoising, criterion = denoise(targets), Criterion(classes=classes)
    found = criterion(predictions, targets, denoising)
    padded = encode_targets(targets, dtype=torch.float64)
    counts = criterion.count(targets, denoising, num_queries=9)
    matched = criterion._matched_terms(predictions, padded, criterion.assign(predictions, padded), counts)
    expected = matched | criterion._denoising_terms(predictions, denoising, counts[-1])
    assert list(found) == [
        f"{'' if layer == 1 else 'd0.'}{name}" for name in expected for layer in range(len(expected[name]))
    ]
    assert all(map(torch.equal, found.values(), torch.cat(list(expected.values()))))


def test_the_denoising_terms_are_computed_while_the_costs_travel(monkeypatch):
    order = []

    def logged(owner, name):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: order.append(name) or function(*arguments))

    logged(HostCopy, "__init__")
    logged(HostCopy, "wait")
    criterion = Criterion(classes=ONE_TASK)
    for name in ("_denoising_terms", "_matched_terms"):
        logged(criterion, name)
    targets = make_targets((3, 2))
    criterion(make_predictions(batch=2, queries=6, num_dn=12), targets, denoise(targets))
    assert order == ["__init__", "_denoising_terms", "wait", "_matched_terms"]  # one transfer for all layers


def test_bad_input_is_refused():
    predictions, targets = make_predictions(batch=2, queries=6, num_dn=12), make_targets((1, 2))
    criterion = Criterion(classes=ONE_TASK)
    with pytest.raises(ValueError, match="predictions are for 2 samples, the targets for 1"):
        criterion(predictions, targets[:1], denoise(targets))
    with pytest.raises(ValueError, match="predictions have 12 denoising rows, the denoising queries have 0"):
        criterion(predictions, targets)
    with pytest.raises(ValueError, match="the criterion has"):
        Criterion(classes=TWO_TASKS)(predictions, targets, denoise(targets))
    with pytest.raises(ValueError, match="code_weights must have 10 values, got 8"):
        Criterion(classes=ONE_TASK, code_weights=(1.0,) * 8)
    with torch.no_grad():
        predictions.tasks[0]["cls_logits"][0, 1, 12] = torch.nan
    with pytest.raises(NonFiniteError, match="the output of the network is not finite"):
        criterion(predictions, targets, denoise(targets))
