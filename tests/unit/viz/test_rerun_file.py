"""Files for the Rerun viewer: what is logged, with a stand-in for the package, and the real file where it is there."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmt_aqr.boxes import Detections, Targets, box_corners
from cmt_aqr.classes import CAMERAS
from cmt_aqr.viz.box_groups import HIT, Style
from cmt_aqr.viz.pictures import PictureError
from cmt_aqr.viz.rerun_file import MissingRerunError, Recording, split_projection
from cmt_aqr.viz.shown_frame import Answer, ShownFrame
from tests.unit.viz.test_pictures import six_views


def frame(number: int) -> ShownFrame:
    images, matrices = six_views(64, 36, (9, 9, 9))
    boxes = torch.tensor([[3.0, 12, -1, 4, 2, 1.5, 0.5, 1, 0], [0, -30, 0, 4, 2, 1.5, 0, 0, 0]])
    found = Detections(boxes, torch.tensor([0.9, 0.1]), torch.tensor([0, 0]))
    return ShownFrame(
        str(number), f"title {number}", torch.from_numpy(images), torch.tensor([[1.0, 2, 3, 0, 0]]),
        torch.from_numpy(matrices), {"A: runs/a b.pt": Answer(found, None)}, Targets(boxes[:1], torch.tensor([0])),
    )  # fmt: skip


class Stream:
    """Keeps what is logged: (frame number, place, kind, values)."""

    def __init__(self, name):
        self.rows, self.number = [], None

    def save(self, path):
        self.path = path

    def set_time(self, name, *, sequence):
        self.number = sequence

    def log(self, place, what, static=False):
        self.rows.append((self.number, place, *what))

    def flush(self):
        self.rows.append("flushed")

    def disconnect(self):
        pass


@pytest.fixture
def stand_in(monkeypatch):
    kinds = ("TextDocument", "Points3D", "Boxes3D", "Transform3D", "Pinhole", "EncodedImage")
    makers = {kind: lambda *values, kind=kind, **named: (kind, values, named) for kind in kinds}
    views = SimpleNamespace(RIGHT_HAND_Z_UP=("ViewCoordinates", (), {}))
    module = SimpleNamespace(RecordingStream=Stream, ViewCoordinates=views, **makers)
    monkeypatch.setitem(sys.modules, "rerun", module)


def test_points_boxes_and_cameras_of_every_frame(tmp_path, stand_in):
    recording = Recording(tmp_path / "deep" / "a.rrd")
    for number in range(2):
        recording.add(frame(number), Style(0.3, colour_by="outcome"))
    stream = recording._stream
    assert recording.finish() == tmp_path / "deep" / "a.rrd" == stream.path and stream.rows.pop() == "flushed"
    rows = {(row[1], row[2]): row for row in stream.rows if row[0] == 1}
    assert rows["title", "TextDocument"][3] == ("title 1",)
    assert rows["scene/lidar", "Points3D"][3][0].tolist() == [[1, 2, 3]]
    assert {place for place, kind in rows if kind == "Boxes3D"} == {"scene/ground_truth", "scene/A_runs_a_b.pt"}
    named = rows["scene/A_runs_a_b.pt", "Boxes3D"][4]
    assert named["labels"] == ["car 0.90"] and named["colors"] == [HIT]  # the other one has a low score
    x, y, z, w = named["quaternions"][0]
    turn = np.array([[1 - 2 * z * z, -2 * w * z, 0], [2 * w * z, 1 - 2 * z * z, 0], [0, 0, 1]])
    assert (x, y) == (0, 0)
    signs = np.array([[a, b, c] for c in (-1, 1) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    corners = named["centers"][0] + (signs * named["half_sizes"][0]) @ turn.T
    np.testing.assert_allclose(corners, box_corners(torch.tensor([3.0, 12, -1, 4, 2, 1.5, 0.5, 1, 0])), atol=1e-5)
    assert sum(kind == "EncodedImage" for _, kind in rows) == 6
    assert rows[f"scene/cameras/{CAMERAS[0]}", "Pinhole"][4]["width"] == 64


def test_a_projection_is_put_together_again():
    rng = np.random.default_rng(0)
    for _ in range(20):
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        rotation *= np.linalg.det(rotation)
        intrinsics = np.array([[rng.uniform(200, 900), 0, 320], [0, rng.uniform(200, 900), 180], [0, 0, 1]])
        centre = rng.normal(size=3) * 3
        matrix = np.eye(4)
        matrix[:3, :3] = 1.7 * intrinsics @ rotation  # a projection has no scale
        matrix[:3, 3] = -matrix[:3, :3] @ centre
        got = split_projection(matrix)
        for mine, wanted in zip(got, (intrinsics, rotation, centre), strict=True):
            np.testing.assert_allclose(mine, wanted, atol=1e-9)


def test_sentences(tmp_path, monkeypatch, stand_in):
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match=r"a\.rrd: the recording cannot be written: "):
        Recording(tmp_path / "file" / "a.rrd")
    with pytest.raises(PictureError, match=r"--rerun a\.json: the name must end in \.rrd"):
        Recording(Path("a.json"))
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(MissingRerunError, match=r"--rerun a\.rrd: the package .* cannot be imported .*\.\[rerun\]"):
        Recording(Path("a.rrd"))


def test_the_file_is_one_that_rerun_reads(tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed: pip install -e '.[rerun]'")
    recording = Recording(tmp_path / "a.rrd")
    for number in range(2):
        recording.add(frame(number), Style())
    command = [sys.executable, "-m", "rerun_cli", "rrd"]
    path = str(recording.finish())
    assert subprocess.run([*command, "verify", path], capture_output=True, text=True).returncode == 0
    done = subprocess.run([*command, "print", path], capture_output=True, text=True)
    places = {"/scene", "/scene/lidar", "/scene/ground_truth", "/scene/A_runs_a_b.pt"}
    places |= {f"/scene/cameras/{name}" for name in CAMERAS}
    assert set(re.findall(r" - (/scene\S*) - ", done.stdout + done.stderr)) == places
