"""Measure the error of reduced precision in every stage of a detector, as a Markdown table.

    python -m cmt_aqr.tools.precision_report configs/cmt_aqr_r50_800x320.yaml

A detector with random weights computes one made-up frame in float32 (IEEE arithmetic) and again under autocast. "tf32"
is float32 with TF32 convolutions, which is PyTorch's default on a GPU. The error of a stage in the whole detector
contains that of all stages before it; "alone", the stage is given their float32 results.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

CHOICES = ("tf32", "bf16", "fp16")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.precision_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    parser.add_argument("--precisions", nargs="+", choices=CHOICES, help="default: all that the device has")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_aqr.build import build_detector
from cmt_aqr.config import Config, load_config
from cmt_aqr.devices import choose_device
from cmt_aqr.errors import report_errors
from cmt_aqr.models.detector import Detector
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.tools.attention_cases import nuscenes_lidar2img

NUM_POINTS = 100_000
GROUND_Z, GROUND_STD, MEAN_DISTANCE = -1.8, 0.8, 20.0  # metres
IMAGE_PATCH = 16  # pixels between independent colours
NUM_VIEWS = 6


@dataclass(frozen=True)
class Frame:
    """One made-up frame, B = 1: images (1, V, H, W, 3) uint8 or None, points [(P, 5)] or None, lidar2img or None."""

    images: Tensor | None
    points: list[Tensor] | None
    lidar2img: Tensor | None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height, width in pixels."""
        return None if self.images is None else tuple(self.images.shape[2:4])


@dataclass(frozen=True)
class Error:
    """Errors of one stage against float32; ``relative`` and ``alone`` are largest error / largest value."""

    stage: str
    largest: float
    mean: float
    relative: float
    alone: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        config, device = load_config(options.config, options.set), choose_device(options.device)
        precisions = options.precisions or CHOICES[device.type == "cpu" :]
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{config.name}, {where}, torch {torch.__version__}, {date.today()}\n")
        print(format_tables(measure(config, device, precisions)))
        return 0

    return report_errors(run)


def make_frame(config: Config, device: torch.device, *, num_points: int = NUM_POINTS) -> Frame:
    """Patches of colour, points around the ground, nuScenes' calibration."""
    generator = torch.Generator().manual_seed(config.seed)
    images = points = lidar2img = None
    if config.model.camera is not None:
        height, width = config.model.camera.input_size
        size = (-(-height // IMAGE_PATCH), -(-width // IMAGE_PATCH))
        colours = torch.rand(NUM_VIEWS, 3, *size, generator=generator)
        images = F.interpolate(colours, size=(height, width), mode="bilinear").mul(255).to(torch.uint8)
        images = images.permute(0, 2, 3, 1)[None].to(device)
        lidar2img = nuscenes_lidar2img((height, width))[None].to(device)
    if config.model.lidar is not None:
        # In float64, so that every processor draws the same points after rounding.
        exact = {"generator": generator, "dtype": torch.float64}
        angle = 2 * torch.pi * torch.rand(num_points, **exact)
        distance = -MEAN_DISTANCE * torch.rand(num_points, **exact).clamp(min=1e-6).log()
        z = GROUND_Z + GROUND_STD * torch.randn(num_points, **exact)
        rest = torch.rand(num_points, 2, **exact) * torch.tensor([255, 0.5])  # intensity, age in seconds
        points = [torch.column_stack((distance * angle.cos(), distance * angle.sin(), z, rest)).float().to(device)]
    return Frame(images, points, lidar2img)


@torch.no_grad()
def settle_norms(detector: Detector, frame: Frame) -> None:
    """Give batch norms the statistics of the frame, so that values are as large as when trained; sets eval mode."""
    norms = [module for module in detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    run_stages(detector.train(), frame)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    detector.eval()


def run_stages(detector: Detector, frame: Frame, given: dict | None = None) -> dict:
    """The detector's stages by name, as in ``Detector.forward``.

    Args:
        given: results of another run; every stage gets them instead of those of the stages before it.
    """
    made = {}

    def keep(name, result):
        made[name] = result
        return result if given is None else given[name]

    pv_maps = keep("camera maps", detector.encode_images(frame.images))
    bev_map = keep("BEV map", detector.encode_points(frame.points))
    cameras = detector.make_cameras(pv_maps, frame.lidar2img, frame.image_size)
    tokens = keep("tokens", detector.make_tokens(bev_map, pv_maps, cameras))
    queries = keep("queries", detector.make_queries(1, cameras, None))
    routed = keep("AQR", detector.route(queries, tokens, cameras))
    tokens = routed.tokens
    hidden = keep(
        "decoder output",
        detector.decoder(queries.positions, tokens.values, tokens.positions, attend=routed.attend),
    )
    keep("heads", detector.head(hidden, queries.reference_points))
    return made


def tensors(made: dict) -> dict[str, Tensor]:
    """The tensors that are compared, by the name of their row; of decoder and heads only the last layer."""
    predictions = made["heads"]
    tasks = range(len(predictions.tasks))
    codes = torch.cat([predictions.codes(task)[-1] for task in tasks])
    found = {
        "camera maps": made["camera maps"],
        "BEV map": made["BEV map"],
        "tokens": made["tokens"].values,
        "token positions": made["tokens"].positions,
        "query positions": made["queries"].positions,
        "AQR weights": made["AQR"].weights,
        "decoder output": made["decoder output"][-1],
        "class logits": torch.cat([predictions.logits(task)[-1].flatten() for task in tasks]),
        "box codes, centres left out": codes[..., 2:],
        "centres (m)": codes[..., :2],
    }
    return {name: tensor.double() for name, tensor in found.items() if tensor is not None}


@torch.no_grad()
def measure(config: Config, device: torch.device, precisions: Sequence[str]) -> dict[str, list[Error]]:
    """Errors of all stages for every precision."""
    torch.manual_seed(config.seed)
    detector = build_detector(config.model).to(device)
    frame = make_frame(config, device)
    settle_norms(detector, frame)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = run_stages(detector, frame)
    tables = {}
    for name in precisions:
        dtype = PRECISIONS.get(name, torch.float32)
        with (
            torch.backends.cudnn.flags(enabled=True, allow_tf32=name == "tf32"),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            whole, alone = run_stages(detector, frame), run_stages(detector, frame, reference)
        tables[name] = compare(*(tensors(made) for made in (reference, whole, alone)))
    return tables


def compare(exact: dict[str, Tensor], whole: dict[str, Tensor], alone: dict[str, Tensor]) -> list[Error]:
    """One line for each stage; for centres (..., 2) the error is a distance."""
    errors = []
    for name, expected in exact.items():
        difference, own = whole[name] - expected, alone[name] - expected
        if name.startswith("centres"):
            difference, own = difference.norm(dim=-1), own.norm(dim=-1)
        difference, own, size = difference.abs(), own.abs().max().item(), expected.abs().max().item()
        largest = difference.max().item()
        errors.append(Error(name, largest, difference.mean().item(), largest / size, own / size))
    return errors


def format_tables(tables: dict[str, list[Error]]) -> str:
    """Markdown tables; a sentence below each says what it means for the centres of boxes."""
    lines = []
    for name, errors in tables.items():
        lines += [
            f"| {name}: stage | largest error | mean error | largest / largest value | the same, stage alone |",
            "|---|---|---|---|---|",
        ]
        for error in errors:
            cells = " | ".join(f"{x:.1e}" for x in (error.largest, error.mean, error.relative, error.alone))
            lines.append(f"| {error.stage} | {cells} |")
        centres = errors[-1]
        lines += ["", f"Centres: mean {1000 * centres.mean:.1f} mm, worst {1000 * centres.largest:.1f} mm.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
