"""Measure what the documentation claims.

    python -m cmt_aqr.tools.bench data --dataroot data/nuscenes --version v1.0-mini --split mini_val
    python -m cmt_aqr.tools.bench attention
    python -m cmt_aqr.tools.bench sparse --cloud LIDAR_FILE.bin
    python -m cmt_aqr.tools.bench end2end cmt_aqr_r50_800x320 --cloud LIDAR_FILE.bin --precision fp16
    python -m cmt_aqr.tools.bench train cmt_aqr_r50_800x320 --batch-sizes 4
    python -m cmt_aqr.tools.bench loader synthetic_small --workers 4 8 16
    python -m cmt_aqr.tools.bench scaling cmt_aqr_r50_800x320 --axes queries tokens

``data`` measures, on one thread and after a warm-up, the parts of a sample: the images of one frame to the network's
input for both official sizes, beside a plain pipeline with the original's steps (decode, float32, resize, crop,
normalise, pad, transpose); ten LiDAR sweeps read and brought into one frame; voxelisation. Times are of the CPU and the
best of the repeats: on a shared machine slower ones measure what else runs there.

``attention`` times, on a GPU, the cross-attention with the bias, with gradients of the weights and the scale, beside
attention without a bias and beside other ways to add one, with peak memory and the error against float64.

``sparse`` times, on a GPU where there is one, the sparse encoder of the r50 preset by spconv and by PyTorch.

``end2end`` times a detector from images and points to boxes, as a whole and stage by stage, beside the same weights
computed in the original's manner: eager, spconv, a dense float mask, or unbiased attention without AQR. ``--frames``
measures on the validation split; the differences of the boxes are meaningful with ``--checkpoint`` only.

``train`` times training steps on one made-up batch, beside the original's manner; ``loader`` times the data loader.

``scaling`` times, on a GPU, the attention while one size grows, and the LiDAR branch against the number of points.

Every line of a table is printed once it is known; stderr shows what is being compiled or measured. In a limited time
``--ways`` chooses the lines of ``end2end`` and ``train``, ``--no-stages`` and ``--no-profile`` shorten them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from cmt_aqr.tools.bench_shapes import ATTENTION_SHAPES, INFERENCE_WAYS, SCALING, TRAINING_WAYS

AXES = (*SCALING, "points")


def _add_configured(commands: argparse._SubParsersAction) -> None:
    """The commands that take a configuration."""
    end2end = commands.add_parser("end2end", help="a detector from images and points to boxes")
    train = commands.add_parser("train", help="training steps")
    loader = commands.add_parser("loader", help="loading batches of the training split")
    scaling = commands.add_parser("scaling", help="cost against queries, tokens, batch, ..., on a GPU")
    for command in (end2end, train, loader, scaling):
        command.add_argument("config", help="YAML file, or the name of one in configs/")
        command.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    for command, repeats, ways in ((end2end, 200, INFERENCE_WAYS), (train, 20, TRAINING_WAYS)):
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
        command.add_argument("--cloud", help="a LiDAR file of nuScenes, .bin (default: a made-up scanner)")
        command.add_argument(
            "--batch-sizes", nargs="+", type=int, default=[1], metavar="N", help="frames a batch (default: %(default)s)"
        )
        command.add_argument("--repeats", type=int, default=repeats, help="timed calls (default: %(default)s)")
        command.add_argument("--ways", nargs="+", choices=ways, help="lines of the table (default: all that apply)")
        command.add_argument("--no-stages", dest="stages", action="store_false", help="do not time single stages")
        command.add_argument(
            "--no-profile", dest="profiled", action="store_false", help="do not measure how long the GPU is busy"
        )
    end2end.add_argument("--checkpoint", help="weights (default: random ones)")
    end2end.add_argument(
        "--frames",
        type=int,
        default=0,
        metavar="N",
        help="measure on N frames of the validation split (default: one made-up batch)",
    )
    end2end.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp16", help="default: %(default)s")
    end2end.add_argument("--no-compile", dest="compile", action="store_false", help="do not compile our stages")
    scaling.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="default: all")
    loader.add_argument("--workers", nargs="+", type=int, default=[0, 4, 16], help="default: %(default)s")
    loader.add_argument("--batches", type=int, default=20, help="timed batches (default: %(default)s)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="loading and transforming one frame")
    data.add_argument("--dataroot", required=True, help="nuScenes-format folder")
    data.add_argument("--version", required=True, help="such as v1.0-mini")
    data.add_argument("--split", required=True, help="such as mini_val; the last frame is measured")
    attention = commands.add_parser("attention", help="the cross-attention, on a GPU")
    choices = range(len(ATTENTION_SHAPES))
    shown = ", ".join(f"{i}: {shape}" for i, shape in enumerate(ATTENTION_SHAPES))
    attention.add_argument(
        "--shapes", nargs="+", type=int, choices=choices, default=list(choices), help=f"{shown} (default: all)"
    )
    sparse = commands.add_parser("sparse", help="the sparse encoder by spconv and by PyTorch")
    sparse.add_argument("--cloud", help="a LiDAR file of nuScenes, .bin (default: a random cloud)")
    sparse.add_argument("--batch-size", type=int, default=1, help="frames a batch (default: %(default)s)")
    sparse.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    sparse.add_argument("--repeats", type=int, default=5, help="runs of each part (default: %(default)s)")
    _add_configured(commands)
    data.add_argument("--repeats", type=int, default=15, help="runs of each part (default: %(default)s)")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import cv2
import numpy as np
import torch
import torchvision

from cmt_aqr.config import load_config
from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import load_points
from cmt_aqr.devices import choose_device
from cmt_aqr.errors import report_errors
from cmt_aqr.jobs import prepare_data
from cmt_aqr.models.voxels import voxelize
from cmt_aqr.tools.bench_attention import attention_lines
from cmt_aqr.tools.bench_inference import Options, inference_lines
from cmt_aqr.tools.bench_scaling import scaling_lines
from cmt_aqr.tools.bench_sparse import sparse_lines
from cmt_aqr.tools.bench_training import TrainingOptions, loader_lines, training_lines

IMAGE_SIZES = {"r50_800x320": (320, 800), "vov_1600x640": (640, 1600)}
NUM_SWEEPS = 9  # with the key frame ten
VOXELS = {"voxel_size": (0.1, 0.1, 0.2), "point_range": (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0), "max_voxels": 120_000}
MEAN = np.array([103.530, 116.280, 123.675], np.float32)
STD = np.array([57.375, 57.120, 58.395], np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        for line in table_lines(options):
            print(line, flush=True)
        return 0

    return report_errors(run)


def table_lines(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the tables of a command."""
    if options.command == "data":
        where = {"dataroot": options.dataroot, "version": options.version, "split": options.split}
        with tempfile.TemporaryDirectory() as temporary:
            yield data_table(load_index(**where, cache_dir=temporary), repeats=options.repeats)
    elif options.command == "attention":
        yield from attention_lines(tuple(options.shapes))
    elif options.command == "sparse":
        sizes = {"batch_size": options.batch_size, "repeats": options.repeats, "threads": options.threads}
        yield from sparse_lines(options.cloud, **sizes)
    else:
        yield from configured_lines(options)


def configured_lines(options: argparse.Namespace) -> Iterator[str]:
    """The lines of the commands that take a configuration."""
    config = load_config(options.config, options.set)
    if options.command == "loader":
        prepare_data(config, verbose=True)
        yield from loader_lines(config, workers=tuple(options.workers), num_batches=options.batches)
    elif options.command == "scaling":
        yield from scaling_lines(config, tuple(options.axes))
    elif options.command == "train":
        yield from training_lines(config, choose_device(options.device), training_options(options))
    else:
        device = choose_device(options.device)
        if options.frames:
            prepare_data(config, verbose=True)
        yield from inference_lines(config, device, inference_options(options))


def training_options(options: argparse.Namespace) -> TrainingOptions:
    """Options of ``train`` from the command line."""
    return TrainingOptions(
        cloud=options.cloud,
        batch_sizes=tuple(options.batch_sizes),
        repeats=options.repeats,
        ways=None if options.ways is None else tuple(options.ways),
        stages=options.stages,
        profiled=options.profiled,
    )


def inference_options(options: argparse.Namespace) -> Options:
    """Options of ``end2end`` from the command line."""
    return Options(
        checkpoint=options.checkpoint,
        cloud=options.cloud,
        frames=options.frames,
        batch_sizes=tuple(options.batch_sizes),
        precision=options.precision,
        repeats=options.repeats,
        compiled=options.compile,
        ways=tuple(options.ways or INFERENCE_WAYS),
        stages=options.stages,
        profiled=options.profiled,
    )


def data_table(index: FrameIndex, *, repeats: int) -> str:
    """Times of the split's last frame (the first of a scene has no sweeps) as a Markdown table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    frame = index.frame(len(index) - 1)
    rows = []
    for name, size in IMAGE_SIZES.items():
        dataset = FrameDataset(index, final_size=size, num_sweeps=None)
        ours = best_time(lambda dataset=dataset: dataset[len(dataset) - 1], repeats)
        plain = best_time(lambda size=size: plain_images(index, frame, size), repeats)
        rows.append((f"six images, {name}", ours, plain))
    points = load_points(frame, index.dataroot, num_sweeps=NUM_SWEEPS, close_radius=0.0)
    read = best_time(lambda: load_points(frame, index.dataroot, num_sweeps=NUM_SWEEPS, close_radius=0.0), repeats)
    rows.append((f"{1 + min(len(frame.sweeps), NUM_SWEEPS)} LiDAR sweeps, {len(points)} points", read, None))
    rows.append(("voxelise them at 0.1 m", best_time(lambda: voxelize(points, **VOXELS), repeats), None))
    lines = [
        f"CPU time of one thread, best of {repeats}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"OpenCV {cv2.__version__}, {os.uname().machine}",
        "",
        "| part of a sample | ms | plain pipeline, ms | ratio |",
        "|---|---|---|---|",
    ]
    for name, ours, plain in rows:
        other = ("-", "-") if plain is None else (f"{1e3 * plain:.1f}", f"{plain / ours:.1f}")
        lines.append(f"| {name} | {1e3 * ours:.1f} | {other[0]} | {other[1]} |")
    return "\n".join(lines)


def plain_images(index: FrameIndex, frame: Frame, size: tuple[int, int]) -> np.ndarray:
    """The same images, normalised: (V, 3, H, W) float32, every step on the whole image as the original does it."""
    height, width = size
    images = []
    for camera in frame.cameras:
        image = cv2.imread(str(index.dataroot / camera.file)).astype(np.float32)
        scale = max(height / image.shape[0], width / image.shape[1])
        image = cv2.resize(image.astype(np.uint8), (int(image.shape[1] * scale), int(image.shape[0] * scale)))
        image = image[image.shape[0] - height :, :width].astype(np.float32)
        image = (image - MEAN) / STD
        image = cv2.copyMakeBorder(image, 0, -height % 32, 0, -width % 32, cv2.BORDER_CONSTANT, value=0)
        images.append(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return np.stack(images)


def best_time(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of ``repeats`` runs, after one run to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    sys.exit(main())
