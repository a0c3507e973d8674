"""Draw frames of a nuScenes-format data set, with ground truth and detections; or the curves and the page of a run.

    python -m cmt_aqr.tools.visualize --dataroot data/nuscenes --version v1.0-mini --split mini_val --out pictures
    python -m cmt_aqr.tools.visualize ... --submission work/eval/submission.json --score 0.4 --tokens 3e8750f3...
    python -m cmt_aqr.tools.visualize curves runs/a runs/b --out curves.png
    python -m cmt_aqr.tools.visualize page runs/a

Frames: one picture each, <number>_<token>.jpg, the camera views and the scene from above, and report.html with all of
them to click through. curves: loss, learning rate, scores and AQR's probe from the logs of one run or several. page:
report.html of a training or a test, which train.py and test.py write, too.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cmt_aqr.command_line import whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="'curves --help' and 'page --help' list the options of these two.",
    )
    parser.add_argument("--dataroot", required=True, help="folder with the version, samples, sweeps and maps")
    parser.add_argument("--version", required=True, help="such as v1.0-mini")
    parser.add_argument("--split", required=True, help="such as mini_val, or one of the version's splits.json")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    parser.add_argument("--tokens", nargs="+", metavar="TOKEN", help="sample tokens; default: the first frames")
    parser.add_argument("--count", type=whole_number(1), default=10, help="frames without --tokens (default 10)")
    parser.add_argument("--every", type=whole_number(1), default=1, help="take every n-th frame (default 1)")
    parser.add_argument("--submission", metavar="JSON", help="draw these detections; ground truth is then dashed white")
    parser.add_argument("--score", type=float, default=0.3, help="leave out detections below (default 0.3)")
    parser.add_argument("--no-ground-truth", action="store_true", help="leave out the ground truth")
    parser.add_argument("--sensors", choices=("both", "camera", "lidar"), default="both", help="default: both")
    parser.add_argument(
        "--sweeps", type=whole_number(0), default=0, help="previous LiDAR sweeps added to the key frame's (default 0)"
    )
    parser.add_argument("--velocity-file", metavar="JSON", help="velocities of annotations, for single frames")
    parser.add_argument("--index-dir", help="keep the index of the split here; default: build it anew")
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="default: jpg")
    return parser


def _run_parser(command: str) -> argparse.ArgumentParser:
    """Of ``curves`` and ``page``."""
    purpose = {
        "curves": "Draw loss, learning rate, scores and AQR's probe of one run or several in one picture.",
        "page": "Write report.html, a page with the pictures, scores and curves of a run, into its folder.",
    }
    parser = argparse.ArgumentParser(prog=f"python -m cmt_aqr.tools.visualize {command}", description=purpose[command])
    if command == "page":
        parser.add_argument("run", type=Path, help="work dir of train.py, or output folder of test.py")
        return parser
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="work dir of train.py, or a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG or SVG file (default: curves.png)")
    parser.add_argument("--title", default="", help="above the curves")
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``command`` is curves, page or frames."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in ("curves", "page"):
        return _run_parser(words[0]).parse_args(words[1:], argparse.Namespace(command=words[0]))
    return _parser().parse_args(words, argparse.Namespace(command="frames"))


if __name__ == "__main__":
    _parse(None)  # answers --help and mistakes before the imports below, which take seconds

from cmt_aqr.boxes import Detections
from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import image_size_of
from cmt_aqr.data.sample import Sample
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.submission import EvaluationError, read_submission, submission_to_detections
from cmt_aqr.run_page import write_run_page
from cmt_aqr.training.logs import LOG_FILE, LogError, read_log
from cmt_aqr.training.run_folder import PAGE_FILE
from cmt_aqr.viz.box_groups import Style
from cmt_aqr.viz.curves import draw_curves
from cmt_aqr.viz.page import PageFrame, page_jpeg, write_page
from cmt_aqr.viz.pictures import PictureError, draw_detections, write_picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)

    def run() -> int:
        if options.command == "curves":
            return print_paths([curves_of_runs(options.runs, options.out, options.title)])
        if options.command == "page":
            return print_paths([write_run_page(options.run, options.run.resolve().name)])
        with tempfile.TemporaryDirectory() as temporary:
            index = load_index(
                dataroot=options.dataroot,
                version=options.version,
                split=options.split,
                cache_dir=options.index_dir or temporary,
                velocity_file=options.velocity_file,
            )
            return print_paths(draw_frames(index, options))

    return report_errors(run)


def print_paths(paths: Sequence[Path]) -> int:
    """Print what was written; returns the exit status."""
    print(*paths, sep="\n")
    return 0


def curves_of_runs(runs: Sequence[Path], out: Path, title: str) -> Path:
    """Draw the curves of work dirs or log files, named by what tells their paths apart.

    Raises:
        LogError: a log is missing, damaged or has nothing to draw.
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
    """The folder of each log, with as many folders above it as tell all of them apart, and the file where it must."""
    parts = [file.parent.parts for file in files]
    depth = 1
    while depth < max(map(len, parts)) and len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(own[-depth:]) for own in parts]
    if len(set(names)) == len(names):
        return names
    return [f"{name}/{file.name}" if names.count(name) > 1 else name for name, file in zip(names, files, strict=True)]


def draw_frames(index: FrameIndex, options: argparse.Namespace) -> list[Path]:
    """Draw the chosen frames; returns the files.

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
    written, pages = [], []
    for number in frames:
        sample = dataset[number]
        picture = draw_detections(
            sample.images,
            sample.points,
            sample.lidar2img,
            detections=None if results is None else _detections(results, sample, options.submission),
            targets=None if options.no_ground_truth else sample.targets,
            title=f"{index.frame(number).scene}   {sample.token}",
            style=Style(score_threshold=options.score, cameras=index.cameras),
        )
        path = Path(options.out) / f"{number:05d}_{sample.token[:16]}.{options.format}"
        written.append(write_picture(path, picture))
        pages.append(PageFrame(f"{number}: {index.frame(number).scene}, sample {sample.token}", (page_jpeg(picture),)))
    page = write_page(Path(options.out) / PAGE_FILE, f"{index.version}, split {index.split}", pages)
    return [*written, page]


def _chosen_frames(index: FrameIndex, options: argparse.Namespace) -> list[int]:
    """Frame numbers of the tokens asked for, or every n-th of the split."""
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
