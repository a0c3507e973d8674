"""Decoding against the original: one task, six tasks, and with a score threshold."""

import pytest

from cmt_aqr.classes import CLASSES
from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, Predictions
from tests.parity.golden import load_golden

# Metres; of all official models.
POST_RANGE = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)


@pytest.mark.parametrize("part", ("single", "six", "thr"))
def test_detections_equal_the_original(part):
    golden = load_golden("decode")
    if f"{part}/max_num" not in golden:
        pytest.skip("only in the whole golden set (set CMT_AQR_GOLDEN)")
    tasks, classes = [], []
    while f"{part}/in/task{len(tasks)}/center" in golden:
        prefix = f"{part}/in/task{len(tasks)}/"
        # One layer in front: the files hold the last one.
        tasks.append({name: golden.tensor(prefix + name)[None] for name in (*BOX_BRANCHES, CLASS_BRANCH)})
        # Every grouping of the original keeps the order of the classes.
        first = sum(len(members) for members in classes)
        classes.append(tuple(range(first, first + tasks[-1][CLASS_BRANCH].shape[-1])))
    assert sum(len(members) for members in classes) == len(CLASSES)

    threshold = float(golden[f"{part}/score_threshold"])
    detections = postprocess(
        Predictions(tuple(tasks), tuple(classes)),
        max_detections=int(golden[f"{part}/max_num"]),
        post_range=POST_RANGE,
        score_threshold=None if threshold < 0 else threshold,
    )
    for sample, found in enumerate(detections):
        golden.check_equal(f"{part}, labels", found.labels, golden.tensor(f"{part}/out/labels{sample}"))
        golden.check(f"{part}, scores", found.scores, f"{part}/out/scores{sample}", 1e-6)
        golden.check(f"{part}, boxes", found.boxes, f"{part}/out/boxes_gravity{sample}", 1e-6)
        bottom = found.boxes.clone()
        bottom[:, 2] -= bottom[:, 5] / 2
        golden.check(f"{part}, boxes", bottom, f"{part}/out/boxes_bottom{sample}", 1e-6)
