"""Pictures: strokes lie where the projection says, cuts are exact, and every kind of frame can be drawn."""

import math
import time

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Detections, Targets, box_corners
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.viz.bev_panel import BevPanel, height_colours
from cmt_aqr.viz.box_groups import Style
from cmt_aqr.viz.camera_tiles import project_box_edges
from cmt_aqr.viz.legend import TITLE_HEIGHT
from cmt_aqr.viz.paint import CLASS_COLOURS, Text, clip_lines, dashes, text_box
from cmt_aqr.viz.pictures import GAP, PictureError, draw_detections, write_picture
from tests.unit.evaluation import frame

FOCAL = 300.0
TILE_HEIGHT = 360  # of views of 640 x 360
BLACK = (0, 0, 0)


def lidar2img(width: int, height: int, turn: float = 0.0) -> np.ndarray:
    """A camera at the LiDAR; it looks along +y, or ``turn`` radians to the left of it."""
    intrinsics = np.array([[FOCAL, 0, width / 2], [0, FOCAL, height / 2], [0, 0, 1]])
    cos, sin = math.cos(turn), math.sin(turn)
    lidar2cam = np.array([[cos, sin, 0], [0, 0, -1], [-sin, cos, 0]])
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics @ lidar2cam
    return matrix


def six_views(width: int, height: int, colour=BLACK) -> tuple[np.ndarray, np.ndarray]:
    images = np.full((6, height, width, 3), colour, np.uint8)
    turns = (0, -math.pi / 3, math.pi / 3, math.pi, 2 * math.pi / 3, -2 * math.pi / 3)
    return images, np.stack([lidar2img(width, height, turn) for turn in turns])


def one(name: str, *box: float) -> Detections:
    return Detections(
        torch.tensor([box], dtype=torch.float32), torch.tensor([0.9]), torch.tensor([CLASSES.index(name)])
    )


def tile(picture: np.ndarray, row: int, column: int, width: int) -> np.ndarray:
    top, left = TITLE_HEIGHT + row * (TILE_HEIGHT + GAP), column * (width + GAP)
    return picture[top : top + TILE_HEIGHT, left : left + width]


def is_colour(pixel: np.ndarray, name: str) -> bool:
    return bool(np.abs(pixel.astype(int) - CLASS_COLOURS[name]).max() < 60)


@pytest.mark.parametrize("zoom", [1, 2])
def test_corners_are_drawn_where_the_projection_says(zoom):
    width, height = 640 * zoom, 360 * zoom
    images, matrices = six_views(width, height)
    box = (0.4, 12.0, -0.5, 4.0, 2.0, 1.5, 0.3, 0.0, 0.0)
    matrix = lidar2img(640, 360)
    matrix[:2] *= zoom
    matrices[0] = matrix
    picture = draw_detections(images, None, matrices, detections=one("pedestrian", *box))
    front = tile(picture, 0, 1, 640)
    for corner in box_corners(torch.tensor(box)).numpy():
        u, v, depth = matrix[:3, :3] @ corner
        # Integer coordinates are pixel centres, also after zooming.
        column, row = ((np.array([u, v]) / depth + 0.5) / zoom - 0.5).round().astype(int)
        assert is_colour(front[row, column], "pedestrian")


def test_views_are_laid_out_as_they_look_from_above():
    images, matrices = six_views(640, 360)
    for i in range(6):
        images[i] = 20 * (i + 1)
    picture = draw_detections(images, None, matrices)
    layout = [["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT"], ["CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]]
    for row, names in enumerate(layout):
        for column, name in enumerate(names):
            assert (tile(picture, row, column, 640)[200, 300] == 20 * (CAMERAS.index(name) + 1)).all()


def test_box_behind_the_camera_is_not_drawn_in_it():
    images, matrices = six_views(640, 360)
    picture = draw_detections(images, None, matrices, detections=one("car", 0, -12, 0, 4, 2, 1.5, 0, 0, 0))
    amber = (np.abs(picture.astype(int) - CLASS_COLOURS["car"]).max(-1) < 30).astype(np.uint8)
    assert tile(amber[..., None], 0, 1, 640).sum() == 0
    assert tile(amber[..., None], 1, 1, 640).sum() > 50


def test_edges_are_cut_at_the_near_plane():
    # A box around the camera, 10 m long ahead and behind: cut edges start exactly 0.5 m ahead of the camera.
    boxes = np.array([[0.0, 0.0, -1.0, 20.0, 2.0, 1.0, math.pi / 2, 0, 0]])
    matrix = lidar2img(640, 360)
    lines, owner = project_box_edges(boxes, matrix, near=0.5)
    assert np.isfinite(lines).all()
    assert (owner == 0).all()
    # Four long edges are cut and the four of the far face are whole; the four of the near face are gone.
    assert len(lines) == 8
    points = lines.reshape(-1, 2)
    expected = {(x * FOCAL / d + 320, z * FOCAL / d + 180) for x in (-1, 1) for z in (0.5, 1.5) for d in (0.5, 10)}
    for want in expected:
        assert np.abs(points - want).max(axis=1).min() < 1e-6
    for got in points:
        assert np.abs(np.array(list(expected)) - got).max(axis=1).min() < 1e-6


def test_lines_are_clipped_to_the_image():
    lines = np.array([
        [[-100, 50], [300, 50]], [[50, 1e9], [50, -1e9]], [[10, 10], [20, 30]], [[-50, -1], [-40, 500]],
        [[-20, 90], [10, 120]], [[30, 30], [30, 30]],
    ], float)  # fmt: skip
    got = clip_lines(lines, 101, 101, margin=0)
    np.testing.assert_allclose(got[:3], [[[0, 50], [100, 50]], [[50, 100], [50, 0]], [[10, 10], [20, 30]]], atol=1e-5)
    # The last but two is outside, the next passes by the corner, the last is a point: it stays or goes, but not as NaN.
    assert len(got) <= 4
    assert np.isfinite(got).all()


def test_dashes_cover_both_ends():
    got = dashes(np.array([[[0, 0], [100, 0]], [[5, 5], [5, 7]]], float), 7, 5)
    assert got[0, 0].tolist() == [0, 0]
    assert got[-2, 1] == pytest.approx([100, 0])
    lengths = (got[:-1, 1] - got[:-1, 0])[:, 0]
    assert lengths == pytest.approx([lengths[0]] * len(lengths))
    assert lengths[0] == pytest.approx(7, rel=0.3)
    assert got[-1] == pytest.approx(np.array([[5, 5], [5, 7]]))


def test_bev_panel_directions_and_scale():
    panel = BevPanel(201, 50.0)
    panel.draw_points(np.array([[20.0, 0, 0, 9], [0, 20, -9, 9], [-51, 0, 0, 9]]))
    painted = np.argwhere((panel.image != panel.image[0, 0]).any(axis=-1))
    # 2 pixels a metre about pixel 100; forward (+y) is up, right (+x) is right; a point is a square of 2 x 2 pixels.
    assert {tuple(p) for p in painted} == {
        (row, column) for v, u in ((100, 140), (60, 100)) for row in (v - 1, v) for column in (u - 1, u)
    }
    assert (panel.image[60, 100] == height_colours(np.array([-3.0]))[0]).all()


def test_bev_velocity_arrow_and_unknown_velocity():
    boxes = np.array([[0, 0, 0, 4, 2, 1, 0, 20, 0], [0, 20, 0, 4, 2, 1, 0, np.nan, np.nan]])
    panel = BevPanel(401, 50.0)
    panel.draw_boxes(boxes, [(255, 0, 0), (0, 255, 0)], dashed=False)
    red, green = panel.image[..., 0] > 150, panel.image[..., 1] > 150
    # 20 m/s to the right from the front of the box, 2 m ahead of its centre; 4 pixels a metre about pixel 200.
    assert red[200, 200 + 4 * np.arange(3, 21)].all()
    assert not red[:, 200 + 4 * 23 + 1 :].any()
    assert green.any()
    assert not green[:, 200 + 4 * 3 :].any()


def test_score_threshold_and_counts():
    images, matrices = six_views(640, 360)
    low = one("car", 0, 12, 0, 4, 2, 1.5, 0, 0, 0)
    shown = draw_detections(images, None, matrices, detections=low, style=Style(score_threshold=0.9))
    hidden = draw_detections(images, None, matrices, detections=low, style=Style(score_threshold=0.91))
    assert (tile(shown, 0, 1, 640) > 100).any(axis=-1).sum() > (tile(hidden, 0, 1, 640) > 100).any(axis=-1).sum()


@pytest.mark.parametrize("kind", ["camera", "lidar", "both", "empty"])
def test_frames_without_a_sensor_or_boxes(kind):
    images, matrices = six_views(400, 225)
    points = torch.rand(1000, 5) * 40 - 20
    found, truth = one("bus", 5, 9, 0, 9, 3, 3, 1, 2, 0), Targets(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64))
    if kind == "camera":
        picture = draw_detections(torch.from_numpy(images), None, torch.from_numpy(matrices), detections=found)
    elif kind == "lidar":
        picture = draw_detections(None, points, None, detections=found, targets=truth)
    elif kind == "both":
        picture = draw_detections(images, points, matrices, detections=found, targets=truth, title="a title")
    else:
        picture = draw_detections(images, points[:0], matrices, targets=truth)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3


def test_inputs_are_not_painted_on():
    images, matrices = six_views(640, 360, (9, 9, 9))
    draw_detections(images, None, matrices, detections=one("car", 0, 12, 0, 4, 2, 1.5, 0, 0, 0))
    assert (images == 9).all()


@pytest.mark.parametrize(
    ("images", "matrices", "sentence"),
    [
        (np.zeros((5, 9, 16, 3), np.uint8), np.zeros((6, 4, 4)), r"images must be \(6, H, W, 3\) uint8, got \(5, 9,"),
        (np.zeros((6, 9, 16, 3), np.float32), np.zeros((6, 4, 4)), "uint8, got .* float32"),
        (np.zeros((6, 9, 16, 3), np.uint8), np.zeros((6, 3, 4)), r"lidar2img must be \(6, 4, 4\), got \(6, 3, 4\)"),
        (np.zeros((6, 9, 16, 3), np.uint8), None, r"lidar2img must be \(6, 4, 4\), got \(0, 4, 4\)"),
    ],
)
def test_shapes_that_do_not_fit(images, matrices, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw_detections(images, None, matrices)


def test_written_colours_are_rgb(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[..., 0] = 200
    for name in ("a.png", "deep/a.JPG"):
        path = write_picture(tmp_path / name, picture)
        assert np.abs(cv2.imread(str(path))[4, 4].astype(int) - (0, 0, 200)).max() < 6
    with pytest.raises(ValueError, match=r"a\.gif: a picture must end in"):
        write_picture(tmp_path / "a.gif", picture)
    with pytest.raises(PictureError, match="the picture cannot be written"):
        write_picture(tmp_path / "a.png" / "b.png", picture)


def test_text_boxes_grow_left_when_aligned_right():
    left, top, right, bottom = text_box(Text("12 m", 100, 10, align="right"))
    assert right == 100
    assert left < 75
    assert (top, bottom) == (10, 30)


@pytest.mark.data
@frame.needs_frame
def test_real_frame_edges_reproduce_the_recorded_2d_boxes():
    info = frame.info()
    camera = info["cameras"]["CAM_FRONT"]
    intrinsics = np.eye(4)
    intrinsics[:3, :3] = camera["cam2img"]
    matrix = intrinsics @ np.array(camera["lidar2cam"])
    checked = 0
    for item in info["objects"]:
        view = item["camera_views"].get("CAM_FRONT", {"bbox_2d": (0, 0, 0, 0)})
        left, top, right, bottom = view["bbox_2d"]
        # Recorded boxes are those of the visible part, so only whole ones can be compared.
        if not (left > 0 and top > 0 and right < 1600 and bottom < 900):
            continue
        box = np.array([[*item["center_lidar"], *item["size_lwh"], item["yaw_lidar"], 0, 0]])
        points = project_box_edges(box, matrix)[0].reshape(-1, 2)
        # The recorded boxes stand upright in the world; ours are upright in a LiDAR frame that leans 2.2 degrees.
        radius = np.linalg.norm(item["size_lwh"]) / 2
        tolerance = math.sin(math.radians(2.2)) * radius / (view["depth"] - radius) * camera["cam2img"][0][0] + 1
        assert [*points.min(axis=0), *points.max(axis=0)] == pytest.approx([left, top, right, bottom], abs=tolerance)
        checked += 1
    assert checked > 20


@pytest.mark.data
@frame.needs_frame
def test_real_frame_is_drawn_in_a_second():
    cameras = frame.info()["cameras"]
    images = np.stack([cv2.imread(str(frame.ROOT / cameras[name]["path"]))[..., ::-1] for name in CAMERAS])
    matrices = np.stack([np.eye(4)] * 6)
    for matrix, name in zip(matrices, CAMERAS, strict=True):
        matrix[:3] = np.array(cameras[name]["cam2img"]) @ np.array(cameras[name]["lidar2cam"])[:3]
    points = np.fromfile(frame.ROOT / frame.info()["lidar"]["path"], np.float32).reshape(-1, 5)
    start = time.process_time()
    picture = draw_detections(
        images, points, matrices, detections=frame.perfect_detections(), targets=frame.targets(), title="real"
    )
    assert time.process_time() - start < 3, "about 0.3 s of one core"
    side = 2 * 360 + GAP + 42  # the views and one line of legend
    assert picture.shape == (TITLE_HEIGHT + side, 3 * 640 + 3 * GAP + side, 3)
