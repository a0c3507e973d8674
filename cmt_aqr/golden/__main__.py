"""Reference numerics for ports: write every stage of a detector, and compare it with what a port computes.

python -m cmt_aqr.golden export configs/cmt_aqr_r50_800x320.yaml out --data /data/nuscenes --token TOKEN
python -m cmt_aqr.golden compare out port.npz
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmt_aqr.command_line import number_above_0, whole_number
from cmt_aqr.golden.catalogue import GRADIENTS, PRECISIONS, STAGES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_export(commands)
    add_compare(commands)
    return parser


def add_export(commands: argparse._SubParsersAction) -> None:
    """The arguments of ``export``."""
    parser = commands.add_parser(
        "export",
        help="write every stage of a detector on one frame",
        description="Write inputs, weights and every stage of a detector on one frame, with a manifest.",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; must not exist")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", help="weights of train.py, or .safetensors")
    weights.add_argument(
        "--seed", type=int, help="random weights of this seed, no norm or bias trivial (default: the seed of CONFIG)"
    )
    frame = parser.add_mutually_exclusive_group()
    frame.add_argument("--data", type=Path, metavar="ROOT", help="data set in nuScenes format")
    frame.add_argument("--random", action="store_true", help="a made-up frame (the default)")
    parser.add_argument("--token", help="sample of --data (default: the first one of data.val_split)")
    parser.add_argument(
        "--points", type=whole_number(0), default=100_000, help="points of the made-up frame (default: 100000)"
    )
    parser.add_argument("--boxes", type=whole_number(0), default=20, help="boxes of the made-up frame (default: 20)")
    parser.add_argument(
        "--dtype", nargs="+", choices=PRECISIONS, default=["float64", "float32"],
        help="bf16 is autocast as in evaluation; limits are measured where there is float64 (default: float64 float32)",
    )  # fmt: skip
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument("--train", action="store_true", help="also denoising queries, losses and gradients")
    parser.add_argument(
        "--gradients", nargs="+", default=GRADIENTS, metavar="PREFIX", help="parameters whose gradients are written"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is a bundle")


def add_compare(commands: argparse._SubParsersAction) -> None:
    """The arguments of ``compare``."""
    parser = commands.add_parser(
        "compare",
        help="compare a port's tensors with a bundle",
        description="Compare tensors stage by stage. Exit status 0: within the limits, 1: past one, 2: bad input.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="the reference: a folder that export wrote, or a file")
    parser.add_argument("b", type=Path, metavar="B", help="folder, .safetensors or .npz file of the same names")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="precision of B: it decides which limits apply, and which file is read if B is a folder",
    )
    parser.add_argument(
        "--reference", choices=PRECISIONS, help="precision that is read if A is a folder (default: the most exact one)"
    )
    parser.add_argument(
        "--transpose", nargs="+", action="extend", default=[], metavar="NAME=AXES",
        help="B's axes in the order that gives A's, such as lidar/bev_map=0,3,1,2; NAME may hold *",
    )  # fmt: skip
    parser.add_argument("--factor", type=number_above_0, default=1.0, help="multiply all limits (default: 1)")
    parser.add_argument("--markdown", action="store_true", help="print one line for each stage, as a Markdown table")


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

from cmt_aqr.errors import report_errors
from cmt_aqr.golden.bundle import Source
from cmt_aqr.golden.compare import Comparison, compare
from cmt_aqr.golden.report import format_report, markdown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return report_errors(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run a command; ``export`` is imported late, because the packages that it alone needs take seconds."""
    if options.command == "compare":
        return run_compare(options)
    from cmt_aqr.golden.run_export import run_export

    return run_export(options)


def run_compare(options: argparse.Namespace) -> int:
    """Compare and print; returns 0 within the limits, 1 past one."""
    a = Source(options.a, precision=options.reference)
    b = Source(options.b, precision=options.precision, transpose=options.transpose)
    comparison = compare(a, b, factor=options.factor)
    if options.markdown:
        print(markdown(comparison, a, b))
    else:
        print(format_report(comparison, a, b, find_causes(comparison, a, b)))
    return 0 if comparison.first_stage is None else 1


def find_causes(comparison: Comparison, a: Source, b: Source) -> dict[str, list[str]]:
    """Likely causes of what is past its limit; imported late, because the model's code takes seconds to load."""
    if comparison.first_stage is None:
        return {}
    from cmt_aqr.golden.patterns import likely_causes

    return likely_causes(comparison, a, b)


if __name__ == "__main__":
    sys.exit(main())
