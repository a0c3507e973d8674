"""Which boxes are drawn and how: hits and misses by the devkit's rule, trust from weights, the cap, the marks."""

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.data.failures import SensorData, failed_panels, parse_failures
from cmt_aqr.viz.box_groups import (
    FALSE_ALARM,
    HIT,
    MISSED,
    TRUST_CAMERA,
    TRUST_LIDAR,
    Style,
    choose_boxes,
    match_outcomes,
    trust_colours,
)  # fmt: skip
from cmt_aqr.viz.paint import CLASS_COLOURS, FAILED, GREY, WHITE
from cmt_aqr.viz.pictures import GAP, TALL_TILE_WIDTH, draw_detections, side_by_side
from tests.unit.viz.test_pictures import TITLE_HEIGHT, six_views, tile

CAR, BUS = CLASSES.index("car"), CLASSES.index("bus")


def boxes(*places) -> torch.Tensor:
    return torch.tensor([[x, y, 0, 4, 2, 1.5, 0, 0, 0] for x, y in places], dtype=torch.float32).reshape(-1, 9)


def found(*rows) -> Detections:
    """Rows of x, y, score, label, best first."""
    return Detections(
        boxes(*(row[:2] for row in rows)),
        torch.tensor([row[2] for row in rows]),
        torch.tensor([row[3] for row in rows]),
    )


def truth(*rows) -> Targets:
    return Targets(boxes(*(row[:2] for row in rows)), torch.tensor([row[2] for row in rows], dtype=torch.int64))


def test_the_best_detection_takes_the_nearest_object_of_its_class_once():
    detections = found(
        (0, 10, 0.9, CAR), (0, 10.5, 0.8, CAR), (0, 10, 0.7, BUS), (0, 31.9, 0.6, CAR), (9, 52, 0.5, CAR)
    )
    targets = truth((0, 10.4, CAR), (0, 30, CAR), (9, 50, CAR), (0, 10, CLASSES.index("truck")))
    is_hit, is_found = match_outcomes(detections, targets)
    # The second is nearer to the first object, which the first has taken; 1.9 m is a hit, 2 m is none.
    assert is_hit.tolist() == [True, False, False, True, False]
    assert is_found.tolist() == [True, True, False, False]
    assert match_outcomes(detections, truth())[0].tolist() == [False] * 5


def test_the_rule_is_the_devkits():
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.algo import accumulate
    from nuscenes.eval.detection.data_classes import DetectionBox

    generator = torch.Generator().manual_seed(1)
    places = torch.rand(60, 2, generator=generator) * 20
    scores = torch.rand(40, generator=generator).sort(descending=True).values
    detections = Detections(boxes(*places[:40].tolist()), scores, torch.zeros(40, dtype=torch.int64))
    targets = Targets(boxes(*places[40:].tolist()), torch.zeros(20, dtype=torch.int64))
    evaluated = [EvalBoxes(), EvalBoxes()]
    for own, group, values in ((evaluated[0], targets, [-1.0] * 20), (evaluated[1], detections, scores.tolist())):
        rows = [
            DetectionBox(
                "t",
                tuple(box[:3].tolist()),
                (2, 4, 1.5),
                (1, 0, 0, 0),
                (0, 0),
                detection_name="car",
                detection_score=value,
            )
            for box, value in zip(group.boxes, values, strict=True)
        ]
        own.add_boxes("t", rows)
    metric = accumulate(*evaluated, "car", center_distance, 2.0)
    is_hit, is_found = match_outcomes(detections, targets)
    assert 5 < is_hit.sum() == is_found.sum() < 20
    assert float(is_hit.sum()) / 20 == pytest.approx(metric.max_recall, abs=0.011)  # it has 101 recalls


def test_outcomes_colour_the_boxes_and_ground_truth_keeps_its_class():
    detections = found((0, 10, 0.9, CAR), (9, 9, 0.8, BUS), (0, 10, 0.1, CAR))
    chosen = choose_boxes(detections, truth((0, 11, CAR), (0, 40, BUS)), None, Style(0.3, colour_by="outcome"))
    under, over = chosen.groups
    assert dict(zip(under.captions, under.colours, strict=True)) == {"missed bus": MISSED, "": WHITE}
    assert dict(zip(over.captions, over.colours, strict=True)) == {"car 0.90": HIT, "bus 0.80": FALSE_ALARM}
    assert under.is_dashed and not over.is_dashed
    assert chosen.counts == ("2 detections with score ≥ 0.3, 2 ground truth, 1 hits, 1 false alarms, 1 missed")
    by_class = choose_boxes(detections, truth((0, 11, CAR)), None, Style()).groups
    assert by_class[1].colours == [CLASS_COLOURS[name] for name in ("bus", "car")]  # the farther one first
    assert by_class[0].colours == [tuple((255 + c) // 2 for c in CLASS_COLOURS["car"])]


def test_a_cap_keeps_the_best_and_the_nearest_and_says_so():
    detections = found(*((0, i, 0.9 - i / 100, CAR) for i in range(30)))
    chosen = choose_boxes(detections, truth(*((0, i, CAR) for i in range(12))), None, Style(max_boxes=10))
    assert chosen.counts == "10 best of 30 detections with score ≥ 0.3, 10 nearest of 12 ground truth"
    for group in chosen.groups:
        assert group.boxes[:, 1].tolist() == list(range(9, -1, -1))  # far ones first


def test_colours_of_trust():
    weights = np.array([[1, -1], [-1, 1], [0.5, 0.5], [np.nan, 1], [0.5, -0.5]])
    lidar, camera, neither, unknown, half = trust_colours(weights)
    assert (lidar, camera, neither, unknown) == (TRUST_LIDAR, TRUST_CAMERA, WHITE, GREY)
    assert half == tuple(round((255 + c) / 2) for c in TRUST_LIDAR)
    detections = found((0, 10, 0.9, CAR), (0, 30, 0.8, CAR), (0, 20, 0.1, CAR))
    (group,) = choose_boxes(detections, None, torch.tensor(weights[:3]), Style(colour_by="trust")).groups
    assert group.colours == [TRUST_CAMERA, TRUST_LIDAR]


def test_what_cannot_be_coloured():
    with pytest.raises(ValueError, match="need detections and ground truth"):
        choose_boxes(found((0, 1, 0.9, CAR)), None, None, Style(colour_by="outcome"))
    with pytest.raises(ValueError, match="need detections and the weights"):
        choose_boxes(found((0, 1, 0.9, CAR)), None, None, Style(colour_by="trust"))


def test_a_failed_camera_and_a_failed_lidar_are_framed():
    images, matrices = six_views(640, 360, (9, 9, 9))
    points = torch.zeros(1, 5)
    style = Style(failed={"CAM_BACK": "view_drop", "lidar": "beams:4"})
    picture = draw_detections(images, points, matrices, style=style)
    back, front = tile(picture, 1, 1, 640), tile(picture, 0, 1, 640)
    assert (back[100, 2] == FAILED).all() and (back[-2, 300] == FAILED).all() and (back[0, 0] == FAILED).all()
    assert (front[100, 2] == 9).all()
    panel = picture[TITLE_HEIGHT:, 3 * (640 + GAP) :]
    assert (panel[300, 2] == FAILED).all() and (panel[-2, 300] == FAILED).all()
    assert not (draw_detections(images, points, matrices) == FAILED).all(axis=-1).any()


def test_two_checkpoints_side_by_side():
    images, matrices = six_views(640, 360, (9, 9, 9))
    halves = [
        draw_detections(
            images, torch.zeros(1, 5), matrices, detections=found((0, 12, score, CAR)), style=Style(is_tall=True)
        )
        for score in (0.9, 0.1)
    ]
    both = side_by_side(*halves)
    width = 3 * TALL_TILE_WIDTH + 2 * GAP
    assert both.shape[1] == 2 * width + 2 * GAP + 2
    for half, place in zip(halves, (0, width + 2 * GAP + 2), strict=True):
        assert (both[:, place : place + width] == half).all()
    assert (both[:, width + GAP] == 255).all()
    amber = [
        (np.abs(half.astype(int) - CLASS_COLOURS["car"]).max(-1) < 30)[: TITLE_HEIGHT + 250].sum() for half in halves
    ]
    assert amber[0] > 100 > amber[1] == 0


def data(level: float, count: int = 5) -> SensorData:
    return SensorData(torch.full((6, 2, 2, 3), level), torch.ones(count, 5), torch.eye(4).repeat(6, 1, 1))


def test_failed_panels_are_those_that_changed():
    clean = data(1)
    fewer, failure = data(1, 3), parse_failures(["beams:4"])[0]
    assert failed_panels(failure, fewer, clean) == {"lidar": "beams:4"}
    assert failed_panels(failure, clean, clean) == {}  # this frame was spared
    one = data(1)
    one.images[2] = 0
    assert failed_panels(parse_failures(["missing_camera:3"])[0], one, clean) == {CAMERAS[2]: "missing_camera:3"}
    assert set(failed_panels(parse_failures(["missing_camera:3"])[0], one, None)) == set(CAMERAS)
    views = parse_failures(["view_drop:BACK,FRONT"])[0]
    assert failed_panels(views, data(0), clean) == {"CAM_FRONT": "view_drop", "CAM_BACK": "view_drop"}
    moved = data(1)
    moved.lidar2img[4, 0, 3] = 1
    assert set(failed_panels(parse_failures(["calibration_noise:all"])[0], moved, clean)) == {CAMERAS[4]}
    without = SensorData(None, clean.points, None)
    assert failed_panels(views, without, without) == {}
