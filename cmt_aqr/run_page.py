"""The page of a run: ``report.html``, from the files that a training or a test has left in its folder.

Frames to click through, tables of scores, and for a training the curves of its log.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cmt_aqr.classes import CLASSES
from cmt_aqr.data.failures import parse_failures
from cmt_aqr.errors import UserError
from cmt_aqr.evaluation.nuscenes_eval import METRICS_FILE
from cmt_aqr.failure_report import BARS_FILE, CLEAN
from cmt_aqr.training.logs import LOG_FILE, LogError, RunLog, read_log
from cmt_aqr.training.run_folder import EVALUATIONS, PAGE_FILE, PICTURE_FILES, PICTURES
from cmt_aqr.viz.curves import curves_figure
from cmt_aqr.viz.page import PageChart, PageFrame, PageTable, picture_file, write_page

_HEADLINE = ("NDS", "mAP", "mATE", "mASE", "mAOE", "mAVE", "mAAE")
_UNITS = "ATE in metres, ASE 1 - IoU, AOE in radians, AVE in m/s, AAE 1 - accuracy; of the errors less is better"


def keep_page(folder: Path, title: str, log: RunLog) -> Path | None:
    """Write the page in the main process; where that fails, print why. None where there is none."""
    if not log.is_main:
        return None
    try:
        return write_run_page(folder, title)
    except (UserError, OSError) as error:
        log.print(f"no {PAGE_FILE} of this run: {error}")
        return None


def write_run_page(folder: Path, title: str) -> Path:
    """Write the page of a training (a work dir) or of a test (its output folder).

    Raises:
        LogError: the folder holds no log of a run.
        PictureError: a picture cannot be read, or the page not be written.
    """
    lines = read_log(folder / LOG_FILE)
    evaluations = [line for line in lines if line["kind"] == "eval" and "error" not in line]
    tests = [line for line in lines if line["kind"] == "test"]
    if not any(line["kind"] in ("train", "eval", "test") for line in lines):
        raise LogError(f"{folder / LOG_FILE}: holds no training and no test to make a page of")
    charts, notes = [], []
    if any(line["kind"] in ("train", "eval") for line in lines):
        picture = io.BytesIO()
        curves_figure({folder.name: lines}).savefig(picture)
        charts.append(PageChart("curves", picture.getvalue()))
    if (folder / BARS_FILE).is_file() and any("failure" in line for line in tests):
        charts.append(PageChart("scores under failing sensors", (folder / BARS_FILE).read_bytes()))
    scored = folder
    if evaluations:
        scored = folder / EVALUATIONS / f"epoch_{evaluations[-1]['epoch']}"
        notes.append(f"Frames and scores by class are those after epoch {evaluations[-1]['epoch']}.")
    failures = [line["failure"] for line in tests if "failure" in line]
    frames = _failure_frames(folder, failures) if failures else _frames(scored / PICTURES)
    if not frames:
        notes.append("There are no pictures (evaluation.num_pictures says how many frames are drawn).")
    tables = _score_tables(evaluations, tests) + _class_tables(
        (scored / CLEAN if failures else scored) / METRICS_FILE, ", without failure" if failures else ""
    )
    return write_page(folder / PAGE_FILE, title, frames, tables=tables, charts=charts, notes=notes)


def _frames(folder: Path) -> list[PageFrame]:
    """The pictures of one evaluation, in their order."""
    paths = [path for path in sorted(folder.glob("*.jpg")) if PICTURE_FILES.fullmatch(path.name)]
    numbered = [(path, *path.stem.split("_", 1)) for path in paths]
    return [PageFrame(f"{int(number)}: sample {token}", (picture_file(path),)) for path, number, token in numbered]


def _failure_frames(folder: Path, names: Sequence[str]) -> list[PageFrame]:
    """One frame, clean and under every failure."""
    frames = []
    for name in names:
        own = CLEAN if name == CLEAN else parse_failures([name])[0].file_name
        paths = sorted((folder / own).glob("*.jpg"))
        frames += [PageFrame(f"{name}, sample {path.stem}", (picture_file(path),)) for path in paths]
    return frames


def _score_tables(evaluations: Sequence[Mapping], tests: Sequence[Mapping]) -> list[PageTable]:
    """One row an evaluation of a training, or a tested variant."""
    tables = []
    for title, first, lines in (("scores by epoch", "epoch", evaluations), ("scores", "failure", tests)):
        scored = [line for line in lines if "NDS" in line]
        rows = [[str(line.get(first, line.get("split"))), *_numbers(line, _HEADLINE)] for line in scored]
        if rows:
            tables.append(PageTable(title, (first if first in scored[0] else "split", *_HEADLINE), rows))
    return tables


def _class_tables(path: Path, of: str) -> list[PageTable]:
    """Average precision, errors and counts of every class from a metrics.json; none where there is no such file.

    Args:
        of: which scores, behind the title.
    """
    if not path.is_file():
        return []
    metrics = json.loads(path.read_text(encoding="utf-8"))
    errors = list(next(iter(metrics["errors"].values())))
    rows = []
    for name in CLASSES:
        counts = metrics["num_ground_truth"][name], metrics["num_detections"][name]
        numbers = _numbers({"AP": metrics["ap"][name]} | metrics["errors"][name], ("AP", *errors))
        rows.append([name.replace("_", " "), *map(str, counts), *numbers])
    return [PageTable(f"scores by class{of} ({_UNITS})", ("class", "ground truth", "boxes", "AP", *errors), rows)]


def _numbers(values: Mapping, keys: Sequence[str]) -> list[str]:
    return ["-" if values.get(key) is None else f"{values[key]:.3f}" for key in keys]
