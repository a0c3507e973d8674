"""Decoding against a plain loop, and its corner cases."""

import pytest
import torch

from cmt_aqr.boxes import decode_boxes
from cmt_aqr.evaluation.postprocess import inside, postprocess
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, Predictions

ONE_TASK = (tuple(range(10)),)
TWO_TASKS = ((3, 0, 5, 9), (1, 2, 4, 6, 7, 8))
EVERYWHERE = (-1e9, -1e9, -1e9, 1e9, 1e9, 1e9)


def make_predictions(classes, *, queries=8, num_dn=3, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for members in classes:
        widths = {**BOX_BRANCHES, CLASS_BRANCH: len(members)}
        tasks.append(
            {
                name: torch.randn(2, batch, queries + num_dn, width, generator=generator, dtype=torch.float64)
                for name, width in widths.items()
            }
        )
    return Predictions(tuple(tasks), classes, num_dn)


@pytest.mark.parametrize("classes", (ONE_TASK, TWO_TASKS))
def test_best_scores_with_the_box_of_the_task_that_owns_the_class(classes):
    predictions = make_predictions(classes)
    found = postprocess(predictions, post_range=EVERYWHERE, max_detections=20)
    for sample in range(2):
        candidates = []
        for task, members in enumerate(classes):
            logits, codes = predictions.logits(task)[-1, sample], predictions.codes(task)[-1, sample]
            for query in range(3, 11):  # behind the denoising rows
                box = decode_boxes(codes[query]).tolist()
                candidates += [(logits[query, i].sigmoid().item(), label, box) for i, label in enumerate(members)]
        candidates.sort(reverse=True)
        assert found[sample].labels.tolist() == [label for _, label, _ in candidates[:20]]
        assert found[sample].scores.tolist() == pytest.approx([score for score, _, _ in candidates[:20]])
        torch.testing.assert_close(found[sample].boxes, torch.tensor([box for _, _, box in candidates[:20]]).double())


def test_fewer_scores_than_detections_keeps_all():
    # The original fails here in torch.gather.
    (one, two) = postprocess(make_predictions(ONE_TASK, queries=4), post_range=EVERYWHERE)
    assert len(one.scores) == len(two.scores) == 40
    assert (one.scores.diff() <= 0).all()


def test_the_range_filter_includes_the_border_and_comes_after_the_selection():
    predictions = make_predictions(ONE_TASK, queries=5, num_dn=0, batch=1)
    outputs = predictions.tasks[0]
    outputs["center"][-1, 0, :, 0] = torch.tensor([0.0, 10.0, 10.001, -10.0, 50.0])
    outputs["center"][-1, 0, :, 1] = 0
    outputs["dim"][-1, 0, :, 1] = 1.0
    outputs["cls_logits"][-1] = -9
    outputs["cls_logits"][-1, 0, :, 2] = torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0])
    limits = (-10.0, -10.0, -1.0, 10.0, 10.0, 1.0)
    (found,) = postprocess(predictions, post_range=limits, max_detections=4)
    assert found.boxes[:, 0].tolist() == [-10.0, 10.0]  # the two best are out of range, the fifth was not selected
    assert found.labels.tolist() == [2, 2]


def test_threshold_is_strict_and_zero_or_none_switches_it_off():
    predictions = make_predictions(ONE_TASK, queries=5, num_dn=0, batch=1)
    (everything,) = postprocess(predictions, post_range=EVERYWHERE)
    middle = everything.scores[20].item()
    (above,) = postprocess(predictions, post_range=EVERYWHERE, score_threshold=middle)
    assert len(above.scores) == 20
    (zero,) = postprocess(predictions, post_range=EVERYWHERE, score_threshold=0.0)
    assert len(zero.scores) == 50


def test_inside_is_per_axis():
    points = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1.1], [-0.1, 0, 0]])
    assert inside(points, (0, 0, 0, 1, 1, 1)).tolist() == [True, True, False, False]
