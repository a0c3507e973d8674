"""The page and the pictures of the failures are those of the program."""

from pathlib import Path

import cv2
import numpy as np

from cmt_aqr.data.failures import CASES
from cmt_aqr.tools.failures import main, page, prose
from tests.unit.data.world import VERSION, write_world

REPOSITORY = Path(__file__).parents[3]
PICTURES = REPOSITORY / "docs" / "failures"


def test_the_page_is_what_the_docstrings_give(tmp_path, capsys):
    assert (REPOSITORY / "docs" / "failures.md").read_text(encoding="utf-8") == page()
    assert main(["page", "--check", "--page", str(tmp_path / "none.md")]) == 2
    assert "is not what the docstrings give; run python -m cmt_aqr.tools.failures page" in capsys.readouterr().err
    assert main(["page", "--page", str(tmp_path / "new.md")]) == 0 and (tmp_path / "new.md").read_text() == page()


def test_every_failure_has_a_row_a_text_and_a_small_picture():
    text = page()
    for name in CASES:
        assert f"| [`{name}`](#{name}) |" in text and f"](failures/{name}.jpg)" in text
        assert "*Source*: " in text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    sizes = {path.stem: path.stat().st_size for path in PICTURES.glob("*")}
    assert sizes.keys() == CASES.keys()
    assert max(sizes.values()) <= 60_000 and sum(sizes.values()) <= 1_200_000


def test_prose_leaves_out_the_arguments():
    def function():
        """First line.

        More of it.

        Args:
            image: left out.
                Also this.

        *Source*: :func:`elsewhere`.
        """

    assert prose(function) == "First line.\n\nMore of it.\n\n*Source*: `elsewhere`."


def test_pictures_of_a_world(tmp_path, capsys):
    world = write_world(tmp_path / "world")
    for path in (world.root / "samples").glob("CAM_*/*.jpg"):  # one colour a frame shows no difference when it is late
        frame = int(path.stem[-1])
        noise = np.random.default_rng(frame).integers(0, 256, (36, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(path), noise)
    arguments = ["--dataroot", str(world.root), "--version", VERSION, "--split", "all", "--out", str(tmp_path / "out")]
    assert main(["pictures", *arguments]) == 0, capsys.readouterr().err
    assert {path.stem for path in (tmp_path / "out").glob("*.jpg")} == CASES.keys()
    brightness = cv2.imread(str(tmp_path / "out" / "brightness.jpg"))
    assert brightness.shape == (225, 804, 3)
    assert brightness[:, 404:].mean() > brightness[:, :400].mean() + 30
    assert main(["pictures", *arguments, "--token", "nowhere"]) == 2
    assert "--token: split 'all' has no sample 'nowhere'" in capsys.readouterr().err


def test_the_list(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in CASES)
    assert "stuck_lidar        10, 20, .., 90" in out


def test_a_first_frame_is_never_late(tmp_path, capsys):
    world = write_world(tmp_path / "world", scenes={"scene-a": 1})
    arguments = ["--dataroot", str(world.root), "--version", VERSION, "--split", "all", "--out", str(tmp_path / "out")]
    assert main(["pictures", *arguments]) == 0
    late = [name for name, case in CASES.items() if case.delay is not None]
    assert {path.stem for path in (tmp_path / "out").glob("*.jpg")} == CASES.keys() - set(late)
    out = capsys.readouterr().out
    assert all(
        f"left out: {name}: scene-a-sample-0 is the first frame of its scene, which is never late" in out
        for name in late
    )
