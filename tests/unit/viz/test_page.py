"""The HTML page: whole in one file, every frame with its pictures, nothing loaded from elsewhere."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from cmt_aqr.viz.page import MAX_FRAMES, PageChart, PageFrame, PageTable, chosen, page_jpeg, picture_file, write_page
from cmt_aqr.viz.pictures import PictureError


class Page(HTMLParser):
    """Sections with the sizes of their pictures, the list, the tables, and everything that could be loaded."""

    def __init__(self, text: str):
        super().__init__()
        self.sections, self.options, self.cells, self.images, self.sources = [], [], [], [], []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "section":
            self.sections.append([])
        if tag == "img":
            kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attributes["src"]).groups()
            data = base64.b64decode(data, validate=True)
            assert data.startswith({"png": b"\x89PNG", "jpeg": b"\xff\xd8"}[kind])
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            self.images.append(image)
            if "section" in self._open:
                self.sections[-1].append(image)
            self._open.pop()
        if tag in ("meta", "br"):
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag  # well formed

    def handle_data(self, data):
        if self._open and self._open[-1] == "option":
            self.options.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells.append(data)


def grey(level: int, height: int = 20, width: int = 30) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_one_section_a_frame_with_its_own_pictures(tmp_path):
    frames = [PageFrame(f"frame {i}", (page_jpeg(grey(40 * i)), page_jpeg(grey(255, 10, 12)))) for i in range(5)]
    table = PageTable("scores", ("class", "AP"), [("car <b>", "0.500")])
    chart = PageChart("curves", cv2.imencode(".png", grey(9, 4, 6))[1].tobytes())
    path = write_page(tmp_path / "deep" / "p.html", "a & b", frames, tables=[table], charts=[chart], notes=["a note"])
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.options == [f"frame {i}" for i in range(5)]
    assert [[image.shape for image in section] for section in page.sections] == [[(20, 30, 3), (10, 12, 3)]] * 5
    assert [int(section[0].mean()) for section in page.sections] == pytest.approx([0, 40, 80, 120, 160], abs=2)
    assert page.images[-1].shape == (4, 6, 3) and len(page.images) == 11
    assert page.cells == ["class", "AP", "car <b>", "0.500"]
    assert "<title>a &amp; b</title>" in text and "<p>a note</p>" in text
    assert "5 frames, 11 pictures, 0.0 MB, all in this file" in text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    text = write_page(tmp_path / "p.html", "t", [PageFrame("a", (page_jpeg(grey(0)),))]).read_text()
    assert all(source.startswith("data:image/") for source in Page(text).sources)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert "default-src 'none'; img-src data:" in text


def test_buttons_and_keys_are_bound(tmp_path):
    text = write_page(tmp_path / "p.html", "t", [PageFrame("a", ())]).read_text()
    ids = set(re.findall(r'id="(\w+)"', text))
    assert set(re.findall(r'getElementById\("(\w+)"\)', text)) <= ids
    for key in ("ArrowLeft: current - 1", "ArrowRight: current + 1", "Home: 0", "End: sections.length - 1"):
        assert key in text


def test_a_page_holds_so_many_frames_and_says_so(tmp_path):
    frames = [PageFrame(str(i), ()) for i in range(250)]
    page = write_page(tmp_path / "p.html", "t", frames)
    options = [int(name) for name in Page(page.read_text()).options]
    assert len(options) == MAX_FRAMES == 100 and options[0] == 1 and options[-1] == 248
    assert set(np.diff(options)) == {2, 3}
    assert "100 of 250 frames" in page.read_text()
    assert chosen(3) == [0, 1, 2] and chosen(0) == []


def test_sentences(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(PictureError, match=r"bad\.jpg: not a picture that can be decoded; remove the file"):
        picture_file(tmp_path / "bad.jpg")
    with pytest.raises(PictureError, match=r"none\.jpg: the picture cannot be read: No such file"):
        picture_file(tmp_path / "none.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(PictureError, match=r"p\.html: the page cannot be written: "):
        write_page(tmp_path / "file" / "p.html", "t", [])


def test_a_picture_keeps_its_colours(tmp_path):
    picture = grey(0)
    picture[..., 0] = 200  # red
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    for data in (page_jpeg(picture), picture_file(tmp_path / "a.png")):
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert found.reshape(-1, 3).mean(0) == pytest.approx([0, 0, 200], abs=4)  # blue, green, red
