"""An evaluation's pictures: the chosen frames, each with its own detections, numbered in the order of the split."""

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
    writer = PictureWriter(tmp_path, tokens=("b" * 32, "d" * 32), score_threshold=0.3)
    for first, tokens in ((0, ("a" * 32, "b" * 32)), (2, ("c" * 32, "d" * 32))):
        numbers = torch.arange(first, first + 2.0)[:, None]
        batch = SimpleNamespace(
            tokens=tokens, images=None, points=numbers, lidar2img=numbers + 10, targets=[f"t{first}", f"t{first + 1}"]
        )
        writer(batch, [f"d{first}", f"d{first + 1}"])
    assert drawn == [(None, 1.0, 11.0, "d1", "t1"), (None, 3.0, 13.0, "d3", "t3")]
    files = [tmp_path / f"00_{'b' * 16}.jpg", tmp_path / f"01_{'d' * 16}.jpg"]
    assert sorted(tmp_path.iterdir()) == files
    assert [path.read_text() for path in files] == ["b" * 32, "d" * 32]


def test_processes_number_their_shares_as_one_process_does_and_draw_no_truth_where_there_is_none(tmp_path, monkeypatch):
    targets = []
    monkeypatch.setattr(callback, "draw_detections", lambda *_, **options: targets.append(options["targets"]))
    monkeypatch.setattr(callback, "write_picture", lambda path, picture: path.write_text(""))
    tokens = tuple(letter * 32 for letter in "abc")
    for has_truth, share in ((True, "b"), (False, "ca")):
        writer = PictureWriter(tmp_path, tokens=tokens, score_threshold=0.3, has_truth=has_truth)
        for letter in share:
            batch = SimpleNamespace(
                tokens=(letter * 32,), images=None, points=None, lidar2img=[None], targets=[f"truth of {letter}"]
            )
            writer(batch, [None])
    assert [path.name[:4] for path in sorted(tmp_path.iterdir())] == ["00_a", "01_b", "02_c"]
    assert targets == ["truth of b", None, None]
