"""Write a synthetic data set in nuScenes' format: python -m cmt_aqr.synthetic OUT."""

import argparse
import os
import signal
import sys

from cmt_aqr.errors import report_errors


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    # After the command line has been read: this takes longer than all of --help.
    from cmt_aqr.synthetic import WorldSettings, generate_world

    def run() -> int:
        # A scheduler's stop ends as Ctrl-C does: without partial folders. SIGKILL's are removed by the next run.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        generate_world(
            options.out,
            WorldSettings(
                scenes=options.scenes,
                val_scenes=options.val_scenes,
                seed=options.seed,
                samples_per_scene=options.samples_per_scene,
                image_size=options.image_size,
                sweeps_per_keyframe=options.sweeps,
                lidar_columns=options.lidar_columns,
                sensor_files=not options.tables_only,
            ),
            workers=options.workers,
        )
        return 0

    return report_errors(run)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One sentence instead of the usage text."""
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m cmt_aqr.synthetic",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Write a synthetic dataset in nuScenes' format (version v1.0-synthetic, splits synthetic_train and "
        "synthetic_val) that nuscenes-devkit loads and evaluates. The same options give the same bytes, "
        "whatever the number of workers.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--scenes", type=int, default=8, metavar="N", help="training scenes")
    parser.add_argument("--val-scenes", type=int, default=2, metavar="M", help="validation scenes")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of everything random")
    parser.add_argument("--image-size", type=_image_size, default="1600x900", metavar="WxH", help="pixels of an image")
    parser.add_argument("--samples-per-scene", type=int, default=20, metavar="K", help="key frames, 0.5 s apart")
    parser.add_argument(
        "--sweeps", type=int, default=9, metavar="K", help="LiDAR sweeps between two key frames; 9 is nuScenes' 20 Hz"
    )
    parser.add_argument(
        "--lidar-columns",
        type=int,
        default=1084,
        metavar="C",
        help="firings per LiDAR sweep; nuScenes has 1084, fewer are faster and give fewer points",
    )
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="no LiDAR and no image files, to try programs on as many frames as nuScenes has (34 000 in minutes)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, len(os.sched_getaffinity(0))),
        metavar="W",
        help="processes; 0 is this one alone",
    )
    return parser


def _image_size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1600x900, got {text!r}")
    return int(width), int(height)


if __name__ == "__main__":
    sys.exit(main())
