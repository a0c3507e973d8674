"""One self-contained HTML page: frames to click through, tables of scores, charts; it loads nothing from anywhere.

Pictures are embedded as JPEG or PNG, so the file can be mailed or opened from a disk. Without JavaScript the frames
are shown below each other.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import cv2
import numpy as np

from cmt_aqr.files import atomic_path
from cmt_aqr.viz.pictures import PictureError

# Most frames in a page; of more, as many are taken, evenly spread. A page of 100 is about 30 MB.
MAX_FRAMES = 100
# JPEG quality of the pictures in a page; picture files have 92.
JPEG_QUALITY = 80


@dataclass(frozen=True)
class PageFrame:
    """One frame to click to.

    Attributes:
        name: in the list of frames.
        pictures: encoded JPEG or PNG files, shown below each other.
        note: a sentence above them.
    """

    name: str
    pictures: tuple[bytes, ...]
    note: str = ""


@dataclass(frozen=True)
class PageTable:
    """A table: its title, header and rows; all columns but the first hold numbers, aligned right."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class PageChart:
    """A chart below the frames: its title and its encoded PNG or JPEG file."""

    title: str
    picture: bytes


def page_jpeg(picture: np.ndarray) -> bytes:
    """An RGB picture (H, W, 3) as a JPEG of the quality of a page."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def picture_file(path: Path) -> bytes:
    """A picture from a file, as :func:`page_jpeg` makes it.

    Raises:
        PictureError: the file cannot be read or is no picture.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"{path}: the picture cannot be read: {error.strerror}") from error
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if bgr is None:
        raise PictureError(f"{path}: not a picture that can be decoded; remove the file")
    return page_jpeg(bgr[..., ::-1])


def chosen(count: int) -> list[int]:
    """Which of ``count`` frames a page holds: all, or ``MAX_FRAMES`` evenly spread over them."""
    kept = min(count, MAX_FRAMES)
    return [(2 * i + 1) * count // (2 * kept) for i in range(kept)]


def write_page(
    path: Path,
    title: str,
    frames: Sequence[PageFrame],
    *,
    tables: Sequence[PageTable] = (),
    charts: Sequence[PageChart] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page, at most ``MAX_FRAMES`` of the frames.

    Args:
        path: of the file; its folder is made.
        title: of the page.
        notes: sentences below the title.

    Raises:
        PictureError: the file cannot be written.
    """
    kept = [frames[i] for i in chosen(len(frames))]
    pictures = [picture for frame in kept for picture in frame.pictures] + [chart.picture for chart in charts]
    megabytes = sum(map(len, pictures)) * 4 / 3 / 1e6
    size = f"{len(kept)} of {len(frames)} frames" if len(kept) < len(frames) else f"{len(kept)} frames"
    text = _PAGE.substitute(
        title=html.escape(title),
        notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        tables="".join(map(_table, tables)),
        options="".join(f"<option>{html.escape(frame.name)}</option>" for frame in kept),
        frames="".join(map(_frame, kept)),
        charts="".join(f"<h2>{html.escape(chart.title)}</h2>{_image(chart.picture, chart.title)}" for chart in charts),
        size=f"{size}, {len(pictures)} pictures, {megabytes:.1f} MB, all in this file; it loads nothing else.",
    )
    try:
        with atomic_path(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PictureError(f"{path}: the page cannot be written: {error.strerror}") from error
    return path


def _frame(frame: PageFrame) -> str:
    note = f"<p>{html.escape(frame.note)}</p>" if frame.note else ""
    pictures = "".join(_image(picture, frame.name) for picture in frame.pictures)
    return f"<section><h2>{html.escape(frame.name)}</h2>{note}{pictures}</section>"


def _image(picture: bytes, about: str) -> str:
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{html.escape(about)}" src="data:image/{kind};base64,{data}">'


def _table(table: PageTable) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f"<h2>{html.escape(table.title)}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


# The policy in the head keeps a browser from loading anything that is not in the file.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0 1rem 3rem; background: #111318; color: #eceef2; font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0.8rem 0; }
h2 { font-size: 1.05rem; margin: 1.2rem 0 0.4rem; }
nav { position: sticky; top: 0; background: #111318; padding: 0.5rem 0; display: flex; gap: 0.6rem; flex-wrap: wrap; }
nav { align-items: center; z-index: 1; }
button, select { font: inherit; color: inherit; background: #2a2f3a; border: 1px solid #596070; border-radius: 4px; }
button, select { padding: 0.35rem 0.8rem; max-width: 100%; }
button:focus-visible, select:focus-visible { outline: 2px solid #56b4e9; }
img { max-width: 100%; display: block; margin: 0.4rem 0; cursor: zoom-in; }
img.full { max-width: none; cursor: zoom-out; }
section { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.15rem 0.8rem; text-align: right; border-bottom: 1px solid #333946; }
th:first-child, td:first-child { text-align: left; }
.hidden { display: none; }
.quiet { color: #aab0bc; }
</style>
</head>
<body>
<h1>$title</h1>
$notes
<nav class="hidden" id="bar">
<button id="previous" type="button">&#9664; previous</button>
<button id="next" type="button">next &#9654;</button>
<select id="list" aria-label="frame">$options</select>
<span id="place" aria-live="polite"></span>
<span class="quiet">arrow keys, Home and End; click a picture for its full size</span>
</nav>
<main id="frames">$frames</main>
$tables
<div id="charts">$charts</div>
<p class="quiet">$size</p>
<script>
"use strict";
const sections = document.querySelectorAll("#frames section");
const list = document.getElementById("list");
let current = 0;
function show(number) {
  current = Math.max(0, Math.min(number, sections.length - 1));
  sections.forEach((section, i) => section.classList.toggle("hidden", i !== current));
  list.selectedIndex = current;
  document.getElementById("place").textContent = (current + 1) + " of " + sections.length;
  document.getElementById("previous").disabled = current === 0;
  document.getElementById("next").disabled = current === sections.length - 1;
}
if (sections.length > 0) {
  document.getElementById("bar").classList.remove("hidden");
  document.getElementById("previous").addEventListener("click", () => show(current - 1));
  document.getElementById("next").addEventListener("click", () => show(current + 1));
  list.addEventListener("change", () => show(list.selectedIndex));
  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target === list) return;
    const target = {ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: sections.length - 1}[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(target);
  });
  show(0);
}
document.querySelectorAll("img").forEach((image) => image.addEventListener("click", () => {
  image.classList.toggle("full");
}));
</script>
</body>
</html>
""")
