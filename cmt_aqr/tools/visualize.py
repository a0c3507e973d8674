"""Draw frames of a nuScenes-format data set with ground truth and detections, or the curves and the page of a run.

    python -m cmt_aqr.tools.visualize --dataroot data/nuscenes --version v1.0-mini --split mini_val --out pictures
    python -m cmt_aqr.tools.visualize ... --submission work/eval/submission.json --score 0.4 --tokens 3e8750f3...
    python -m cmt_aqr.tools.visualize model CONFIG --checkpoint runs/a/latest.pt --compare runs/b/latest.pt --out a_b
    python -m cmt_aqr.tools.visualize curves runs/a runs/b --out curves.png
    python -m cmt_aqr.tools.visualize page runs/a

Frames: a picture of each, <number>_<token>.jpg, with the camera views and the scene from above, and report.html with
all of them to click through. model: the same with the detections of a checkpoint, or of two side by side, also under
sensor failures. curves: loss, learning rate, scores and AQR's probe from the logs of one or more runs. page:
report.html of a training or test, which train.py and test.py also write.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cmt_aqr.tools.visualize_options import parse

if __name__ == "__main__":
    parse(__doc__, None)  # answers --help and mistakes before the imports below, which take seconds

import numpy as np

from cmt_aqr.boxes import Detections
from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import image_size_of
from cmt_aqr.data.sample import Sample
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.submission import EvaluationError, read_submission, submission_to_detections
from cmt_aqr.run_page import write_run_page
from cmt_aqr.tools.model_frames import frames_of_models
from cmt_aqr.training.logs import LOG_FILE, LogError, read_log
from cmt_aqr.training.run_folder import PAGE_FILE
from cmt_aqr.viz.box_groups import HIT_DISTANCE, Style
from cmt_aqr.viz.curves import draw_curves
from cmt_aqr.viz.page import PageFrame, PageTable, page_jpeg, write_page
from cmt_aqr.viz.pictures import PictureError, write_picture
from cmt_aqr.viz.rerun_file import Recording
from cmt_aqr.viz.shown_frame import Answer, ShownFrame, count_outcomes, draw_attention, draw_frame


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parse(__doc__, arguments)

    def run() -> int:
        if options.command == "curves":
            return print_paths([curves_of_runs(options.runs, options.out, options.title)])
        if options.command == "page":
            return print_paths([write_run_page(options.run, options.run.resolve().name)])
        if options.command == "model":
            options.colour = options.colour or ("class" if options.compare is None else "outcome")
            style = Style(options.score, options.max_boxes, options.colour)
            return print_paths(write_frames(frames_of_models(options), style, options, options.config))
        with tempfile.TemporaryDirectory() as temporary:
            index = load_index(
                dataroot=options.dataroot,
                version=options.version,
                split=options.split,
                cache_dir=options.index_dir or temporary,
                velocity_file=options.velocity_file,
            )
            if options.colour == "outcome" and (options.submission is None or options.no_ground_truth):
                raise EvaluationError("--colour outcome: needs --submission, and ground truth to compare it with")
            style = Style(options.score, options.max_boxes, options.colour, index.cameras)
            title = f"{index.version}, split {index.split}"
            return print_paths(write_frames(frames_of_data(index, options), style, options, title))

    return report_errors(run)


def write_frames(frames: Iterable[ShownFrame], style: Style, options: argparse.Namespace, title: str) -> list[Path]:
    """Draw frames one after another, then the page of all; returns the files.

    Raises:
        UserError: a frame cannot be read, or a file cannot be written.
    """
    recording = None if options.rerun is None else Recording(options.rerun)
    written, pages, outcomes = [], [], {}
    for frame in frames:
        picture = draw_frame(frame, style)
        written.append(write_picture(options.out / f"{frame.name}.{options.format}", picture))
        attention = draw_attention(frame, style)
        for letter, extra in attention.items():
            written.append(write_picture(options.out / f"{frame.name}_attention_{letter}.{options.format}", extra))
        pages.append(PageFrame(frame.title, tuple(map(page_jpeg, (picture, *attention.values())))))
        if recording is not None:
            recording.add(frame, style)
        for name, answer in frame.answers.items() if frame.targets is not None else ():
            row = f"{name}, {frame.condition}"
            found = count_outcomes(answer.detections, frame.targets, style.score_threshold)
            outcomes[row] = outcomes.get(row, 0) + found
    page = write_page(options.out / PAGE_FILE, title, pages, tables=outcome_tables(outcomes, style))
    return [*written, page, *([] if recording is None else [recording.finish()])]


def outcome_tables(outcomes: dict[str, np.ndarray], style: Style) -> list[PageTable]:
    """Hits, false alarms and misses over the frames of a page, a row for every detector and condition."""
    rows = []
    for name, (hits, false_alarms, missed) in outcomes.items():
        shares = hits / max(hits + false_alarms, 1), hits / max(hits + missed, 1)
        rows.append([name, *map(str, (hits, false_alarms, missed)), *(f"{share:.3f}" for share in shares)])
    if not rows:
        return []
    limits = f"score from {style.score_threshold:g}, a hit is an object of the class within {HIT_DISTANCE:g} m"
    head = ("detections", "hits", "false alarms", "missed", "precision", "recall")
    return [PageTable(f"on these frames ({limits})", head, rows)]


def print_paths(paths: Sequence[Path]) -> int:
    """Print what was written; returns the exit status."""
    print(*paths, sep="\n")
    return 0


def curves_of_runs(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Draw the curves of work dirs or log files, each named by the part of its path that differs from the others.

    Raises:
        LogError: a log is missing, damaged or without a line that can be drawn.
        PictureError: the picture cannot be written.
    """
    if out.suffix.lower() not in (".png", ".svg"):
        raise PictureError(f"--out {out}: the name must end in .png or .svg")
    files = list(dict.fromkeys((run / LOG_FILE if run.is_dir() else run).resolve() for run in runs))
    lines = dict(zip(names_of_runs(files), map(read_log, files), strict=True))
    for (name, own), file in zip(lines.items(), files, strict=True):
        if not any(line["kind"] in ("train", "eval", "probe") for line in own):
            raise LogError(f"{file}: the log of {name} has no training, evaluation or probe to draw")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return draw_curves(lines, out, title=title)
    except OSError as error:
        raise PictureError(f"{out}: the curves cannot be written: {error.strerror}") from error


def names_of_runs(files: Sequence[Path]) -> list[str]:
    """The folder of each log, with as many parent folders as make the names differ, and the file name if needed."""
    parts = [file.parent.parts for file in files]
    depth = 1
    while depth < max(map(len, parts)) and len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(own[-depth:]) for own in parts]
    if len(set(names)) == len(names):
        return names
    return [f"{name}/{file.name}" if names.count(name) > 1 else name for name, file in zip(names, files, strict=True)]


def frames_of_data(index: FrameIndex, options: argparse.Namespace) -> Iterator[ShownFrame]:
    """The chosen frames of a data set, with the detections of a submission where there is one.

    Raises:
        DataError: a frame cannot be read.
        EvaluationError: a token is not in the split, or the submission does not fit.
    """
    results = None if options.submission is None else read_submission(options.submission)[1]
    frames = _chosen_frames(index, options)
    dataset = FrameDataset(
        index,
        final_size=image_size_of(index.frame(frames[0])) if options.sensors != "lidar" else None,
        num_sweeps=options.sweeps if options.sensors != "camera" else None,
    )
    for number in frames:
        sample = dataset[number]
        answers = {}
        if results is not None:
            answers["submission"] = Answer(_detections(results, sample, options.submission), None)
        yield ShownFrame(
            f"{number:05d}_{sample.token[:16]}",
            f"{index.frame(number).scene}, sample {sample.token}",
            sample.images,
            sample.points,
            sample.lidar2img,
            answers,
            None if options.no_ground_truth else sample.targets,
        )


def _chosen_frames(index: FrameIndex, options: argparse.Namespace) -> list[int]:
    """Frame numbers of the given tokens, or of every n-th frame of the split."""
    if not options.tokens:
        return list(range(0, len(index), options.every))[: options.count]
    number_of = {token: number for number, token in enumerate(index.tokens)}
    unknown = [token for token in options.tokens if token not in number_of]
    if unknown:
        raise EvaluationError(f"{index.path.name}: split {index.split!r} has no sample {unknown[0]!r}")
    return [number_of[token] for token in options.tokens]


def _detections(results: dict[str, list[dict]], sample: Sample, path: str) -> Detections:
    """The frame's rows of the submission, in the LiDAR frame."""
    if sample.token not in results:
        raise EvaluationError(f"{path}: no results for sample {sample.token}")
    try:
        return submission_to_detections(results[sample.token], sample.lidar2ego.numpy(), sample.ego2global.numpy())
    except EvaluationError as error:
        raise EvaluationError(f"{path}: sample {sample.token}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
