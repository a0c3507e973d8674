"""List the sensor failures, write the page about them, and draw a frame before and after each.

    python -m cmt_aqr.tools.failures list
    python -m cmt_aqr.tools.failures page                # docs/failures.md from the functions' docstrings; also --check
    python -m cmt_aqr.tools.failures pictures --dataroot data/nuscenes --version v1.0-mini --split mini_val --out FOLDER

Pictures show the hardest level of each failure, in the front camera and from above, with a seed for which it occurs.
"""

import argparse
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

COMMAND = "python -m cmt_aqr.tools.failures"
PAGE, PICTURES = Path("docs/failures.md"), "failures"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="names, levels and suites")
    pictures = commands.add_parser("pictures", help="a frame before and after every failure")
    pictures.add_argument("--dataroot", required=True, help="folder with the version, samples, sweeps and maps")
    pictures.add_argument("--version", required=True, help="such as v1.0-mini")
    pictures.add_argument("--split", required=True, help="such as mini_val, or one of the version's splits.json")
    pictures.add_argument("--token", help="sample token (default: the frame in the middle of the split)")
    pictures.add_argument("--out", required=True, type=Path, help="folder for the pictures")
    text = commands.add_parser("page", help="write docs/failures.md")
    text.add_argument("--check", action="store_true", help="write nothing; exit status 2 where the page differs")
    text.add_argument("--page", type=Path, default=PAGE, help=f"default: {PAGE}")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import cv2
import numpy as np
import torch

from cmt_aqr.config import ConfigError
from cmt_aqr.data.failures import CASES, OUTSIDE_MRA, SUITES, Failure, FailureDataset, parse_failure
from cmt_aqr.data.failures.apply import SensorFiles
from cmt_aqr.data.failures.cases import Case
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import image_size_of
from cmt_aqr.data.sample import DataError, Sample
from cmt_aqr.errors import report_errors
from cmt_aqr.files import atomic_path, write_bytes
from cmt_aqr.viz.before_after import bev_panel, camera_panel, side_by_side

# Width of a panel in pixels, and the quality of the JPEG.
WIDTH, QUALITY = 400, 65
# Seeds that are tried until a random failure occurs.
MAX_SEEDS = 200


def levels(case: Case) -> str:
    """The levels in words."""
    names = [f"`{level}`" for level in case.levels if level]
    named = ", ".join(names if len(names) < 5 else [*names[:2], "..", names[-1]])
    if case.takes_views:
        named += ", or cameras such as `FRONT,BACK`"
    return named or "-"


def functions(case: Case) -> list[Callable]:
    """The functions that a case calls."""
    parts = (case.image, case.sweep, case.points, case.calibration, case.delay)
    return [part for part in parts if part is not None]


def page() -> str:
    """The text of docs/failures.md."""
    parts = [INTRODUCTION, "| failure | levels | what fails | defined by | suites |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        suites = [suite for suite, names in SUITES.items() if any(entry.split(":")[0] == name for entry in names)]
        parts.append(
            f"| [`{name}`](#{name}) | {levels(case)} | {case.about} | {case.source} | {', '.join(suites) or '-'} |"
        )
    for name, case in CASES.items():
        parts += ["", f"## {name}", "", f"![{name}, before and after]({PICTURES}/{name}.jpg)", ""]
        if any(case.levels.values()):
            rows = [f"`{failure.name}` {failure.parameter}" for failure in parse_all(name)]
            parts += [f"Parameters: {'; '.join(rows)}.", ""]
        for function in functions(case):
            where = f"`{function.__module__.removeprefix('cmt_aqr.')}.{function.__name__}`"
            parts += [f"{where}: {prose(function)}", ""]
        parts.pop()
    return "\n".join(parts) + "\n"


def parse_all(name: str) -> list[Failure]:
    """A failure at every level."""
    return [Failure(name, level) for level in CASES[name].levels]


def prose(function: Callable) -> str:
    """A docstring without its list of arguments, each paragraph on one line."""
    text = re.sub(r"\n\n(Args|Returns):\n(    .*\n?)+", "\n", inspect.getdoc(function) + "\n")
    text = re.sub(r":func:`([^`]+)`", r"`\1`", text)
    blocks = [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]
    return "\n\n".join(blocks)


def draw_failure(index: FrameIndex, number: int, name: str) -> np.ndarray:
    """One frame before and after the hardest usual level of a failure.

    Raises:
        DataError: the failure cannot occur in this frame.
    """
    failure = parse_failure(name)[-1]
    if failure.definition.delay and len(SensorFiles(index, num_sweeps=0).history(index.frame(number))) == 1:
        raise DataError(f"{name}: {index.tokens[number]} is the first frame of its scene, which is never late")
    clean = _sample(index, number, None, 0)
    for seed in range(MAX_SEEDS):
        failing = _sample(index, number, failure, seed)
        if _differs(clean, failing, failure):
            return _picture(clean, failing, failure)
    raise DataError(
        f"{name}: sample {index.tokens[number]} looks the same with {MAX_SEEDS} seeds; choose another with --token"
    )


def _sample(index: FrameIndex, number: int, failure: Failure | None, seed: int) -> Sample:
    size = image_size_of(index.frame(number))
    return FailureDataset(index, [failure], final_size=size, num_sweeps=0, seed=seed)[number]


def _differs(clean: Sample, failing: Sample, failure: Failure) -> bool:
    """Whether everything that a failure affects has changed, of the images the front one."""
    case = failure.definition
    shown = [torch.equal(clean.images[0], failing.images[0])] if case.image or "camera" in case.delayed else []
    if "lidar" in case.sensors:
        shown.append(torch.equal(clean.points, failing.points))
    if case.calibration:
        shown.append(torch.equal(clean.lidar2img, failing.lidar2img))
    return not any(shown)


def _picture(clean: Sample, failing: Sample, failure: Failure) -> np.ndarray:
    case, rows = failure.definition, []
    # Boxes are drawn where they show the failure: data and boxes do not match, or objects have vanished from boxes.
    shows_boxes = case.calibration or case.delay or failure.case in ("object_failure", "spatial")
    boxes = clean.targets.boxes if shows_boxes else None
    if "camera" in case.sensors:
        panels = [camera_panel(s.images[0].numpy(), boxes, s.lidar2img[0], width=WIDTH) for s in (clean, failing)]
        rows.append((*panels, failure.name))
    if "lidar" in case.sensors:
        panels = [bev_panel(s.points.numpy(), boxes, width=WIDTH) for s in (clean, failing)]
        rows.append((*panels, failure.name))
    return side_by_side(rows)


def draw_all(options: argparse.Namespace) -> None:
    """Write a picture of every failure; prints which of them cannot be shown with this frame."""
    with tempfile.TemporaryDirectory() as temporary:
        index = load_index(dataroot=options.dataroot, version=options.version, split=options.split, cache_dir=temporary)
        number = len(index) // 2
        if options.token is not None:
            if options.token not in index.tokens:
                raise DataError(f"--token: split {index.split!r} has no sample {options.token!r}")
            number = index.tokens.index(options.token)
        for name in CASES:
            try:
                picture = draw_failure(index, number, name)
            except DataError as error:
                if CASES[name].delay is None:
                    raise
                print(f"left out: {error}")
                continue
            print(_write_jpeg(picture, options.out / f"{name}.jpg"))


def _write_jpeg(picture: np.ndarray, path: Path) -> Path:
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())
    return path


def write_page(options: argparse.Namespace) -> None:
    """Write docs/failures.md; with --check raise an error where it differs."""
    is_same = options.page.is_file() and options.page.read_text(encoding="utf-8") == page()
    if options.check and not is_same:
        raise ConfigError([f"{options.page}: is not what the docstrings give; run {COMMAND} page"])
    if not is_same:
        with atomic_path(options.page) as temporary:
            write_bytes(temporary, page().encode())
        print(f"wrote {options.page}")


def write_list() -> None:
    """Print every failure with its levels."""
    for name, case in CASES.items():
        print(f"{name:<18} {levels(case).replace('`', ''):<55} {case.about}")
    print("\nsuites: " + "; ".join(f"{name} = {', '.join(names)}" for name, names in SUITES.items() if name != "all"))
    print(f"mRA leaves out {', '.join(OUTSIDE_MRA)}, which acts on the LiDAR, too, in the published definition")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        if options.command == "list":
            write_list()
        elif options.command == "page":
            write_page(options)
        else:
            draw_all(options)
        return 0

    return report_errors(run)


INTRODUCTION = """\
# Failing sensors

How a detector copes with failing sensors, as MultiCorrupt (Beemelmanns et al., 2402.11677) and nuScenes-R (Yu et al.,
2205.14951) define them; MoME (CVPR 2025) reports six cases of the latter:

```bash
python test.py CONFIG --checkpoint C --failure beams:4 --failure view_drop:FRONT,BACK
python test.py CONFIG --checkpoint C --failures multicorrupt        # or mome, or all
python -m cmt_aqr.tools.failures list
```

One run tests every frame clean and under all failures, and ends with one table: NDS, mAP, the resistance RA = NDS /
clean NDS and the drop against clean. `failures.json` has all metrics, `failures.png` the scores as bars, and a folder
for each failure its submission, metrics and the picture of one frame. A name without a level means all its levels
(`stuck_*` and `frozen_*`: 50 %).

MultiCorrupt's score mRA is the mean of RA over severities, then over corruptions. `snow` acts on cameras only here
(its LiDAR part needs labels of the ground's points), so mRA is over the nine others; CMT's published table gives
0.880 over the same nine.

- Corruptions of *files* act on images as on disk, before any resize, and on each LiDAR file (key frame and sweeps) in
  its own sensor frame, before sweeps are merged. Failures of *arrays* act where their definition says. Lengths in
  pixels are pixels of the file: 31 taps of motion blur are a smaller part of a nuScenes image (1600 x 900) than of a
  synthetic one.
- Random numbers depend on (seed, case, sample token, file) alone; the seed is `--failure-seed` (default 0). A frame
  fails in the same way whatever the batch, the order and the number of workers and processes, and the points that a
  milder level removes are among those that a harder one removes. The published programs use other random generators.
- Ground truth and calibration do not change, except under `calibration_noise`, which changes the calibration that the
  network is given.
- A late sensor shows the earlier frame as it was recorded, with its own sweeps; the first key frame of a scene is
  never late.
- In training: `data.failures`, a list of `{case: fog, probability: 0.2}`, each drawn independently for every sample,
  after objects are pasted and before augmentation. Pasted objects have no ring index, so `beams` uses the elevation of
  points there.

The pictures show the synthetic world under the hardest level of each failure. nuScenes' licence (CC BY-NC-SA) does not
allow its pictures here; `python -m cmt_aqr.tools.failures pictures --dataroot DATA --version v1.0-mini --split
mini_val --out FOLDER` makes them from your own copy.
"""


if __name__ == "__main__":
    sys.exit(main())
