"""An evaluation's pictures: the chosen frames, each with its own detections, numbered as they come."""

from types import SimpleNamespace

import torch

from cmt_aqr.viz import callback
from cmt_aqr.viz.callback import PictureWriter


def test_only_chosen_frames_are_drawn_with_what_belongs_to_them(tmp_path, monkeypatch):
    drawn = []

    def draw(images, points, lidar2img, **options):
        drawn.append((images, float(points[0]), float(lidar2img[0]), options["detections"], options["targets"]))
        return options["title"]

    monkeypatch.setattr(callback, "draw_detections", draw)
    monkeypatch.setattr(callback, "write_picture", lambda path, picture: path.write_text(picture))
    writer = PictureWriter(tmp_path, tokens=("b" * 32, "d" * 32), score_threshold=0.3, written=[])
    for first, tokens in ((0, ("a" * 32, "b" * 32)), (2, ("c" * 32, "d" * 32))):
        numbers = torch.arange(first, first + 2.0)[:, None]
        batch = SimpleNamespace(
            tokens=tokens, images=None, points=numbers, lidar2img=numbers + 10, targets=[f"t{first}", f"t{first + 1}"]
        )
        writer(batch, [f"d{first}", f"d{first + 1}"])
    assert drawn == [(None, 1.0, 11.0, "d1", "t1"), (None, 3.0, 13.0, "d3", "t3")]
    assert writer.written == [tmp_path / f"00_{'b' * 16}.jpg", tmp_path / f"01_{'d' * 16}.jpg"]
    assert [path.read_text() for path in writer.written] == ["b" * 32, "d" * 32]
