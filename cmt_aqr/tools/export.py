"""Write a detector for deployment: a torch.export program, an AOTInductor package for C++, or ONNX.

    python -m cmt_aqr.tools.export configs/cmt_aqr_r50_800x320.yaml --checkpoint latest.pt --to pt2
    python -m cmt_aqr.tools.export configs/cmt_aqr_r50_800x320.yaml --checkpoint latest.pt --to pt2 --package
    python -m cmt_aqr.tools.export configs/cmt_aqr_r50_800x320.yaml --checkpoint latest.pt --to onnx

pt2 is the whole detector, points and images to boxes, with the sparse encoder in PyTorch. onnx is everything after the
sparse encoder, in float32 with the dense attention. All sizes are fixed, and a call takes one frame. The frame of
--data, or a made-up one, decides how many rows are reserved for points, voxels and cells: a quarter more than it needs.

Inputs, outputs and sizes are in the metadata of the file; cmt_aqr/deployment.py explains them. examples/cpp loads a
package. python -m cmt_aqr.tools.run_export runs a file on the inputs of a bundle of python -m cmt_aqr.golden, and that
program's compare shows how far the results are from the detector's.
"""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cmt_aqr.command_line import whole_number


def _parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the model")
    parser.add_argument("--checkpoint", required=True, help="weights of train.py, or .safetensors")
    parser.add_argument("--to", required=True, choices=("pt2", "onnx"), help="what to write")
    parser.add_argument("--package", action="store_true", help="pt2: compile it with AOTInductor, for C++ and Python")
    parser.add_argument(
        "--output", type=Path, metavar="PATH", help="file to write (default: the name of CONFIG, in this folder)"
    )
    parser.add_argument("--stages", action="store_true", help="also return positions, windows, weights and heads")
    frame = parser.add_mutually_exclusive_group()
    frame.add_argument(
        "--data", type=Path, metavar="ROOT", help="data set in nuScenes format, whose frame decides the sizes"
    )
    frame.add_argument(
        "--points", type=whole_number(1), default=300_000, help="points of the made-up frame (default: 300000)"
    )
    parser.add_argument("--token", help="sample of --data (default: the first one of data.val_split)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where pt2 will run (default: cpu)")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import torch
from torch import Tensor

import cmt_aqr
from cmt_aqr.build import build_detector, check_device
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.config import Config, load_config, naming_source
from cmt_aqr.deployment import INPUTS, OUTPUTS, DetectionProgram, choose_sizes, example_inputs, trace
from cmt_aqr.devices import choose_device
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.files import atomic_path
from cmt_aqr.golden.case import random_frame, read_frame
from cmt_aqr.golden.stages import Frame
from cmt_aqr.jobs import decoding_of, load_model
from cmt_aqr.precision import PRECISIONS

OPSET = 20
ONNX_PACKAGES = ("onnx", "onnxscript")


class DeploymentError(UserError):
    """A detector that cannot be written in the requested format."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return report_errors(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Write the file and print what it holds; returns 0."""
    config = load_config(options.config, options.set)
    check(config, options)
    device = choose_device(options.device)
    with naming_source(options.config, options.set):
        check_device(config.model, device)
    output = options.output or Path(default_name(config, options))
    detector = build_detector(config.model)
    load_model(detector, config, options.checkpoint)
    detector.to(device).eval()
    if options.to == "onnx" and detector.aqr is not None:
        detector.aqr.backend = "dense"
    frame = choose_frame(config, options)
    inputs = example_inputs(detector, frame.to(device), has_encoder=options.to == "pt2")
    sizes = choose_sizes(detector.lidar_branch, inputs["points"]) if "points" in inputs else None
    program = DetectionProgram(
        detector,
        decoding=decoding_of(config),
        sizes=sizes,
        precision=torch.float32 if options.to == "onnx" else PRECISIONS[config.evaluation.precision],
        has_stages=options.stages,
    )
    with torch.no_grad():
        outputs = program(**inputs)
    about = describe(config, options, inputs, outputs, sizes)
    graph = trace(program, inputs)
    with atomic_path(output) as partial:
        if options.to == "onnx":
            write_onnx(graph, list(outputs), about, partial)
        elif options.package:
            write_package(graph, about, partial)
        else:
            with open(partial, "wb") as file:
                torch.export.save(graph, file, extra_files=about)
    print(f"{output}: {about['form']} of {config.name}, {output.stat().st_size / 1e6:,.1f} MB, for {options.device}")
    for name in about["inputs"].split():
        print(f"  {name}: {about[f'input {name}']}")
    if sizes is not None:
        print(f"  rows kept for voxels and cells: {about['sizes']}; a frame that needs more has no boxes, see needed")
    return 0


def check(config: Config, options: argparse.Namespace) -> None:
    """Check that the detector can be written as requested.

    Raises:
        DeploymentError: it cannot; one sentence with the reason.
    """
    if options.token is not None and options.data is None:
        raise DeploymentError("--token names a sample of a data set: add --data ROOT")
    aqr, backend = config.model.aqr, config.model.attention.backend
    if aqr is not None and aqr.design == "bias":
        reasons = {"lowrank": "its sizes depend on values"}
        if options.to == "onnx":
            reasons |= dict.fromkeys(("flex", "score_mod"), "ONNX has no operator for FlexAttention")
        else:
            reasons["score_mod"] = "torch cannot compile its tables inside a larger graph"
        if backend in reasons:
            raise DeploymentError(
                f"model.attention.backend is {backend!r}, and {reasons[backend]}; use "
                "--set model.attention.backend=dense"
            )
    (check_onnx if options.to == "onnx" else check_program)(config, options)


def check_onnx(config: Config, options: argparse.Namespace) -> None:
    """The checks of --to onnx alone."""
    if options.package or options.device != "cpu":
        other = "--package" if options.package else f"--device {options.device}"
        raise DeploymentError(f"{other} belongs to --to pt2; an ONNX file is the same for every device")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise DeploymentError(f"--to onnx needs the package {missing[0]}: pip install 'cmt_aqr[onnx]'")


def check_program(config: Config, options: argparse.Namespace) -> None:
    """The checks of --to pt2 alone."""
    for key, value, instead in (("sparse_backend", "spconv", "torch"), ("out_of_range", "alias", "drop")):
        if config.model.lidar is not None and getattr(config.model.lidar, key) == value:
            raise DeploymentError(
                f"model.lidar.{key} is {value!r}, which needs spconv, and a program holds operators of PyTorch alone; "
                f"use --set model.lidar.{key}={instead}"
            )
    if options.package:
        find_compiler()
    if options.output is not None and options.output.suffix != ".pt2":
        raise DeploymentError(f"--output {options.output}: the name must end with .pt2, as torch wants it")


def find_compiler() -> None:
    """Raise DeploymentError where AOTInductor would find no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise DeploymentError(
            "--package compiles C++, and there is no compiler: install g++, set CXX, or leave --package out"
        ) from None


def default_name(config: Config, options: argparse.Namespace) -> str:
    """File name for a configuration: name.pt2, name.package.pt2 or name.onnx."""
    return f"{Path(config.name).name}.{'package.' if options.package else ''}{options.to}"


def choose_frame(config: Config, options: argparse.Namespace) -> Frame:
    """The frame that the sizes come from."""
    if options.data is None:
        return random_frame(config, num_points=options.points, num_boxes=1)
    return read_frame(config, options.data, options.token)[0]


def describe(
    config: Config,
    options: argparse.Namespace,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    sizes: Sequence[int] | None,
) -> dict[str, str]:
    """The metadata of the file: text by name."""
    form = {
        "pt2": "AOTInductor package" if options.package else "torch.export program",
        "onnx": f"ONNX model (opset {OPSET})",
    }
    about = {
        "form": form[options.to],
        "config": config.name,
        "device": options.device,
        "precision": "fp32" if options.to == "onnx" else config.evaluation.precision,
        "versions": f"cmt_aqr {cmt_aqr.__version__}, torch {torch.__version__}",
        "classes": " ".join(CLASSES),
        "cameras": " ".join(CAMERAS),
        "inputs": " ".join(inputs),
        "outputs": " ".join(outputs),
        "sizes": " ".join(map(str, sizes or ())),
    }
    about |= {f"input {name}": f"{kind_of(x)}: {INPUTS[name]}" for name, x in inputs.items()}
    return about | {f"output {name}": f"{kind_of(x)}{explain(name)}" for name, x in outputs.items()}


def kind_of(x: Tensor) -> str:
    """Such as ``float32 1 x 6 x 4 x 4``."""
    return f"{str(x.dtype).removeprefix('torch.')} {' x '.join(map(str, x.shape))}"


def explain(name: str) -> str:
    """The meaning of an output; outputs of --stages are explained in golden/catalogue.py."""
    return f": {OUTPUTS[name]}" if name in OUTPUTS else ""


def write_onnx(graph: torch.export.ExportedProgram, outputs: list[str], about: dict[str, str], path: Path) -> None:
    """Translate to ONNX, without the exporter's own messages, which concern its internals."""
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        made = torch.onnx.export(graph, output_names=outputs, opset_version=OPSET, verbose=False)
    made.model.metadata_props.update(about)
    made.save(path)


def write_package(graph: torch.export.ExportedProgram, about: dict[str, str], path: Path) -> None:
    """Compile to a shared library inside an archive."""
    packed = io.BytesIO()
    torch._inductor.aoti_compile_and_package(
        graph, package_path=packed, inductor_configs={"aot_inductor.metadata": about}
    )
    path.write_bytes(packed.getbuffer())


if __name__ == "__main__":
    sys.exit(main())
