"""Draw frames of a nuScenes-format data set, with ground truth and detections, to a folder.

    python -m cmt_aqr.tools.visualize --dataroot data/nuscenes --version v1.0-mini --split mini_val --out pictures
    python -m cmt_aqr.tools.visualize ... --submission work/eval/submission.json --score 0.4 --tokens 3e8750f3...

One picture a frame, ``<number>_<token>.jpg``: the camera views and the scene from above.
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
        description="Draw frames of a nuScenes-format data set: camera views and the scene from above.",
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


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

from cmt_aqr.boxes import Detections
from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import image_size_of
from cmt_aqr.data.sample import Sample
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.submission import EvaluationError, read_submission, submission_to_detections
from cmt_aqr.viz.pictures import draw_detections, write_picture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        with tempfile.TemporaryDirectory() as temporary:
            index = load_index(
                dataroot=options.dataroot,
                version=options.version,
                split=options.split,
                cache_dir=options.index_dir or temporary,
                velocity_file=options.velocity_file,
            )
            for path in draw_frames(index, options):
                print(path)
        return 0

    return report_errors(run)


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
    written = []
    for number in frames:
        sample = dataset[number]
        picture = draw_detections(
            sample.images,
            sample.points,
            sample.lidar2img,
            detections=None if results is None else _detections(results, sample, options.submission),
            targets=None if options.no_ground_truth else sample.targets,
            score_threshold=options.score,
            title=f"{index.frame(number).scene}   {sample.token}",
            cameras=index.cameras,
        )
        path = Path(options.out) / f"{number:05d}_{sample.token[:16]}.{options.format}"
        written.append(write_picture(path, picture))
    return written


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
