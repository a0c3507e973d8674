"""Run a file that tools.export wrote on the inputs of a bundle, and write its results under the bundle's names.

    python -m cmt_aqr.golden export configs/cmt_aqr_r50_800x320.yaml bundle --checkpoint latest.pt
    python -m cmt_aqr.tools.export configs/cmt_aqr_r50_800x320.yaml --checkpoint latest.pt --to onnx --stages
    python -m cmt_aqr.tools.run_export cmt_aqr_r50_800x320.onnx bundle onnx.npz
    python -m cmt_aqr.golden compare bundle onnx.npz

--time N also calls a program or package N times, and the compiled pipeline of evaluation with the weights of the
bundle as often, and prints both latencies.

ONNX runs in onnxruntime on the CPU; programs and packages run in torch, on the device they were written for.
"""

import argparse
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from cmt_aqr.command_line import whole_number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.run_export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help=".pt2 or .onnx file of tools.export")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of python -m cmt_aqr.golden export")
    parser.add_argument("out", type=Path, metavar="OUT", help=".npz file to write")
    parser.add_argument(
        "--time",
        type=whole_number(1),
        metavar="N",
        help="also measure N calls, beside the compiled pipeline of evaluation",
    )
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor

from cmt_aqr.deployment import OUTPUTS
from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.files import atomic_path
from cmt_aqr.golden.bundle import Source
from cmt_aqr.models.voxels import pad_points
from cmt_aqr.tools.time_export import latency_table

# Input of a program -> tensor of a bundle.
NAMES = {
    "images": "inputs/images",
    "points": "inputs/points.0",
    "lidar2img": "inputs/lidar2img",
    "encoder_map": "lidar/encoder",
}
PACKAGE_FOLDER = "/aotinductor/"
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class RunError(UserError):
    """A file that cannot be run, or a bundle that does not fit it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return report_errors(lambda: run(options.model, options.bundle, options.out, options.time))


def run(path: Path, folder: Path, out: Path, repeats: int | None) -> int:
    """Run the file, write its results and print the number of boxes; with ``repeats`` also measure; returns 0."""
    if out.suffix != ".npz":
        raise RunError(f"{out}: the name must end with .npz, which golden compare reads")
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    model, about = load(path)
    if repeats is not None and "points" not in about["inputs"] and "encoder_map" in about["inputs"]:
        raise RunError(f"--time: {path} begins after the sparse encoder, the pipeline with the points; use a .pt2 file")
    bundle = Source(folder, precision="float32")
    inputs = read_inputs(bundle, about, path)
    found = {name: x.cpu() for name, x in model(inputs).items()}
    named = name_outputs(found)
    with atomic_path(out) as partial, open(partial, "wb") as file:
        np.savez(file, **named)
    print(f"{out}: {len(named)} tensors, {int(found['is_kept'].sum())} boxes, by the {about['form']}")
    if repeats is not None:
        for line in latency_table(model, about, inputs, bundle, repeats=repeats):
            print(line, flush=True)
    return 0


def read_inputs(bundle: Source, about: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The inputs of the model, in the sizes and on the device that it was written for.

    Raises:
        RunError: the bundle lacks one, or has it in another size.
    """
    inputs = {}
    for name in about["inputs"].split():
        if NAMES[name] not in bundle:
            raise RunError(f"{bundle.path}: has no tensor {NAMES[name]}, which {path} takes as {name}")
        x = bundle[NAMES[name]]
        dtype, *sizes = about[f"input {name}"].partition(":")[0].replace(" x ", " ").split()
        shape = tuple(map(int, sizes))
        if name == "points":
            if len(x) > shape[1]:
                raise RunError(f"{bundle.path}: {NAMES[name]} has {len(x)} points, {path} has rows for {shape[1]}")
            cloud, x = x, x.new_empty(shape)
            pad_points([cloud], x)
        if tuple(x.shape) != shape:
            raise RunError(f"{bundle.path}: {NAMES[name]} has shape {tuple(x.shape)}, {path} takes {shape}")
        inputs[name] = x.to(about["device"], getattr(torch, dtype))
    return inputs


def name_outputs(found: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs under the names of a bundle; of the fixed number of boxes only the valid ones."""
    kept = found["is_kept"][0]
    named = {f"boxes/{name}.0": found[name][0][kept] for name in ("queries", "labels", "scores", "boxes")}
    named |= {name: x for name, x in found.items() if name not in OUTPUTS}
    return {name: x.numpy() for name, x in named.items()}


def load(path: Path) -> tuple[Run, dict[str, str]]:
    """The model as a function of named tensors, and its metadata.

    Raises:
        RunError: the file is of another program or damaged, or onnxruntime is missing.
    """
    try:
        if path.suffix == ".onnx":
            model, about = load_onnx(path)
        elif zipfile.is_zipfile(path):
            is_package = any(PACKAGE_FOLDER in name for name in zipfile.ZipFile(path).namelist())
            model, about = (load_package if is_package else load_program)(path)
        else:
            raise RunError(f"{path}: expected a .pt2 or .onnx file of tools.export")
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise RunError(f"{path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    if "inputs" not in about:
        raise RunError(f"{path}: has no metadata of tools.export; write it with that program")
    return model, about


def load_onnx(path: Path) -> tuple[Run, dict[str, str]]:
    """An ONNX model in onnxruntime, on the CPU."""
    if find_spec("onnxruntime") is None:
        raise RunError(f"{path}: running it needs the package onnxruntime: pip install 'cmt_aqr[onnx]'")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        raise RunError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from None
    names = [output.name for output in session.get_outputs()]

    def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        made = session.run(names, {name: x.numpy() for name, x in inputs.items()})
        return {name: torch.from_numpy(x) for name, x in zip(names, made, strict=True)}

    return call, session.get_modelmeta().custom_metadata_map


def load_program(path: Path) -> tuple[Run, dict[str, str]]:
    """A torch.export program."""
    about = {"form": ""}  # torch fills in all entries, but not into an empty dictionary
    program = torch.export.load(path, extra_files=about).module()
    return lambda inputs: program(**inputs), about


def load_package(path: Path) -> tuple[Run, dict[str, str]]:
    """A package of AOTInductor."""
    package = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: package(**inputs), package.loader.get_metadata()


if __name__ == "__main__":
    sys.exit(main())
