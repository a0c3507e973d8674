"""The command lines of ``tools.visualize``; a separate module, so that --help need not import PyTorch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmt_aqr.command_line import whole_number

COLOURS = ("class", "outcome", "trust")
_PURPOSES = {
    "model": "Run one checkpoint, or two to compare, on frames of a configuration's data and draw what they detect.",
    "curves": "Draw loss, learning rate, scores and AQR's probe of one run or several in one picture.",
    "page": "Write report.html, a page with the pictures, scores and curves of a run, into its folder.",
}


def parse(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``command`` is model, curves, page, or frames where the first word is none of them."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in _PURPOSES:
        return _PARSERS[words[0]]().parse_args(words[1:], argparse.Namespace(command=words[0]))
    return _frames_parser(description).parse_args(words, argparse.Namespace(command="frames"))


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    """Options of everything that draws frames."""
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures and report.html")
    parser.add_argument("--tokens", nargs="+", metavar="TOKEN", help="sample tokens to draw instead of --count frames")
    parser.add_argument(
        "--score", type=float, default=0.3, help="leave out detections with a lower score (default 0.3)"
    )
    parser.add_argument(
        "--max-boxes",
        type=whole_number(1),
        default=100,
        help="most detections (the best) and most ground-truth boxes (the nearest) of a frame (default 100)",
    )
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg", help="default: jpg")
    parser.add_argument(
        "--rerun", type=Path, metavar="FILE.rrd", help="also write a file for the Rerun viewer (extra: rerun)"
    )


def _frames_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.visualize",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="'model --help', 'curves --help' and 'page --help' list the options of these three.",
    )
    parser.add_argument("--dataroot", required=True, help="folder with the version, samples, sweeps and maps")
    parser.add_argument("--version", required=True, help="such as v1.0-mini")
    parser.add_argument("--split", required=True, help="such as mini_val, or one of the version's splits.json")
    _add_drawing(parser)
    parser.add_argument("--count", type=whole_number(1), default=10, help="frames without --tokens (default 10)")
    parser.add_argument("--every", type=whole_number(1), default=1, help="take every n-th frame (default 1)")
    parser.add_argument("--submission", metavar="JSON", help="draw these detections; ground truth is then dashed")
    parser.add_argument(
        "--colour", choices=COLOURS[:2], default="class", help="by class, or hits, false alarms and misses"
    )
    parser.add_argument("--no-ground-truth", action="store_true", help="leave out the ground truth")
    parser.add_argument("--sensors", choices=("both", "camera", "lidar"), default="both", help="default: both")
    parser.add_argument(
        "--sweeps", type=whole_number(0), default=0, help="previous LiDAR sweeps added to the key frame's (default 0)"
    )
    parser.add_argument(
        "--velocity-file",
        metavar="JSON",
        help="file with the velocities of the annotations, for data sets of single frames",
    )
    parser.add_argument("--index-dir", help="folder to keep the index of the split in (default: build it again)")
    return parser


def _model_parser() -> argparse.ArgumentParser:
    parser = _plain("model")
    parser.add_argument("config", help="YAML file of the checkpoint and the data, or its name in configs/")
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="checkpoint of train.py, or .safetensors weights"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="CHECKPOINT",
        help="a second checkpoint on the same frames, drawn beside the first; it may be of another model",
    )
    _add_drawing(parser)
    parser.add_argument("--count", type=whole_number(1), default=6, help="frames, spread over the split (default 6)")
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument(
        "--colour",
        choices=COLOURS,
        help="by class; outcome: hits, false alarms and misses; trust: by AQR's weights of LiDAR and cameras "
        "(default: class, with --compare outcome)",
    )
    parser.add_argument(
        "--queries",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="draw where the queries of the N best detections attend, with AQR's bias and without (default 3)",
    )
    parser.add_argument(
        "--failure", action="append", default=[], metavar="NAME[:LEVEL]", help="also draw each frame under this failure"
    )
    parser.add_argument("--failure-seed", type=int, default=0, help="seed of the failures' random numbers (default: 0)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser


def _curves_parser() -> argparse.ArgumentParser:
    parser = _plain("curves")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="work dir of train.py, or a log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG or SVG file (default: curves.png)")
    parser.add_argument("--title", default="", help="above the curves")
    return parser


def _page_parser() -> argparse.ArgumentParser:
    parser = _plain("page")
    parser.add_argument("run", type=Path, help="work dir of train.py, or output folder of test.py")
    return parser


def _plain(command: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m cmt_aqr.tools.visualize {command}", description=_PURPOSES[command])


_PARSERS = {"model": _model_parser, "curves": _curves_parser, "page": _page_parser}
