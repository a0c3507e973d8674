"""The command ``export``: configuration, weights and frame to a bundle."""

import argparse
import shutil
from pathlib import Path

from cmt_aqr.build import check_device
from cmt_aqr.config import load_config, naming_source
from cmt_aqr.devices import choose_device
from cmt_aqr.golden.bundle import read_manifest
from cmt_aqr.golden.case import draw_detector, load_detector, random_frame, read_frame
from cmt_aqr.golden.export import Choice, ExportError, export


def run_export(options: argparse.Namespace) -> int:
    """Export and print where to; returns 0."""
    config = load_config(options.config, options.set)
    device = choose_device(options.device)
    with naming_source(options.config, options.set):
        check_device(config.model, device)
    make_room(options.out, overwrite=options.overwrite)
    if options.token is not None and options.data is None:
        raise ExportError("--token names a sample of a data set: add --data ROOT")
    if options.data is None:
        frame = random_frame(config, num_points=options.points, num_boxes=options.boxes)
        origin = "made-up frame"
    else:
        frame, token = read_frame(config, options.data, options.token)
        origin = f"frame {token}"
    if options.checkpoint is None:
        seed = config.seed if options.seed is None else options.seed
        detector = draw_detector(config, seed, frame)
        origin = f"random weights of seed {seed}, {origin}"
    else:
        detector = load_detector(config, options.checkpoint)
        origin = f"weights of {Path(options.checkpoint).name}, {origin}"
    choice = Choice(options.dtype, options.stages, options.train, options.gradients, origin)
    export(config, detector.to(device), frame.to(device), choice, options.out)
    files = sorted(options.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"{options.out}: {', '.join(file.name for file in files)}, {size / 1e6:,.1f} MB")
    return 0


def make_room(folder: Path, *, overwrite: bool) -> None:
    """Make sure that nothing is at OUT: an existing bundle is removed if ``overwrite``.

    Raises:
        ExportError: OUT exists and ``overwrite`` is False.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise ExportError(f"{folder} exists; choose another folder, or add --overwrite")
    read_manifest(folder)
    shutil.rmtree(folder)
