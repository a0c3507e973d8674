"""Convert official CMT weights, or weights of an image backbone, to a .safetensors file of this package.

    python -m cmt_aqr.tools.import_checkpoint official.pth weights.safetensors --config configs/cmt_r50_800x320.yaml
    python -m cmt_aqr.tools.import_checkpoint resnet50.pth start.safetensors --config ... --backbone

The first form converts every tensor of a detector, for test.py --checkpoint. The second form converts the image
backbone only, from files of torchvision, of mmdet (nuImages) or of FCOS3D (VoVNet), for training.init_from. If tensors
are missing, left over or of another shape, they are listed, nothing is written and the exit status is 2. Files that
would have to run code to be loaded are refused.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.import_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="official .pth file (or .safetensors with the official names)")
    parser.add_argument("out", type=Path, help=".safetensors file to write; an older one is replaced")
    parser.add_argument("--config", required=True, help="YAML file of the detector that the weights are for")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change keys, e.g. model.head_kernel=3",
    )
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="take the image backbone only, to start a training; neck, heads and fc are skipped. The channel order and "
        "normalisation the file was trained with must be those of model.camera",
    )
    parser.add_argument(
        "--sparse-layout",
        choices=("auto", "spconv1", "spconv2"),
        default="auto",
        help="layout of the sparse weights: spconv1 (z, y, x, in, out), spconv2 (out, z, y, x, in), or auto (default): "
        "found from the shapes or, where these fit both, from the version that the file records",
    )
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import torch
from safetensors.torch import save
from torch import Tensor

from cmt_aqr.build import build_detector
from cmt_aqr.config import ModelConfig, load_config
from cmt_aqr.errors import describe_os_error, report_errors
from cmt_aqr.files import atomic_path
from cmt_aqr.tools.official_names import rename_official
from cmt_aqr.tools.recognise import recognise
from cmt_aqr.training.checkpoint import load_weights
from cmt_aqr.training.checkpoint_checks import CheckpointError, check_dtype, check_finite
from cmt_aqr.training.checksum import METADATA, add_checksum

ENCODER = "lidar_branch.encoder."
BACKBONE = "image_branch.backbone."
# Prefixes of a backbone's names: in files of CMT and FCOS3D, of mmdet, of torchvision.
BACKBONE_PREFIXES = ("img_backbone.", "backbone.", "")
# Counters of batch norm: nothing reads them here, and older files lack them.
COUNTER = ".num_batches_tracked"


@dataclass
class Imported:
    """What became of the tensors of a file.

    Attributes:
        weights: tensors under our names, with our shapes and dtypes.
        missing: our names without a tensor in the file.
        unexpected: the file's names without a counterpart in the model.
        misshapen: our names of tensors of another shape, with the file's shape and ours, as text.
        skipped: the file's names that are left out on purpose.
        notes: sentences for the report.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def misfits(self) -> dict[str, list[str]]:
        """The three kinds of misfits, each a possibly empty list."""
        return {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.misshapen}

    def place(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """Keep a tensor in the dtype of ``like`` if it has its shape."""
        if tensor.shape == like.shape:
            check_dtype(tensor, like, name)
            self.weights[name] = tensor.to(like.dtype)
        else:
            self.misshapen.append(f"{name}: {tuple(tensor.shape)} in the file, {tuple(like.shape)} in the model")


def import_detector(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, sparse_layout: str = "auto") -> Imported:
    """All tensors of an official detector.

    Args:
        state: official names; its ``_metadata``, where it has any, may give the sparse layout.
        own: state dict of our detector, for names, shapes and dtypes; it may be on the meta device.
        sparse_layout: "spconv1", "spconv2", or "auto" for :func:`find_sparse_layout`.

    Raises:
        CheckpointError: two names become one, or the sparse layout cannot be found out.
    """
    result = Imported()
    official: dict[str, str] = {}
    for name in state:
        try:
            ours = rename_official(name)
        except ValueError:
            ours = ""
        if ours in official:
            raise CheckpointError(f"'{name}' and '{official[ours]}' both become '{ours}'")
        if ours in own:
            official[ours] = name
        else:
            result.unexpected.append(name)
    sparse = {ours for ours, name in official.items() if ours.startswith(ENCODER) and state[name].dim() == 5}
    if sparse:
        if sparse_layout == "auto":
            sparse_layout = find_sparse_layout(state, {official[ours]: own[ours].shape for ours in sparse})
        done = "permuted to" if sparse_layout == "spconv1" else "already"
        result.notes.append(f"{len(sparse)} sparse weights in the layout of {sparse_layout}, {done} (out, z, y, x, in)")
    for ours, name in official.items():
        is_permuted = ours in sparse and sparse_layout == "spconv1"
        result.place(ours, to_spconv2(state[name]) if is_permuted else state[name], own[ours])
    result.missing.extend(name for name in own if name not in official)
    return result


def to_spconv2(weight: Tensor) -> Tensor:
    """Sparse convolution weight (z, y, x, in, out) of spconv 1 -> (out, z, y, x, in) of spconv 2."""
    return weight.permute(4, 0, 1, 2, 3)


def find_sparse_layout(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> str:
    """Layout of the sparse weights of a file: "spconv1" or "spconv2".

    The shapes decide, because hardly any convolution has as many channels as its kernel has cells. Where all weights
    fit both layouts, the version in the state dict's ``_metadata`` decides, as in the original: 2 is spconv 2.

    Args:
        state: official names.
        expected: official name of every sparse weight -> our shape (out, z, y, x, in).

    Raises:
        CheckpointError: one file has weights of both layouts, or nothing in it tells the layout.
    """
    fits_1 = {name for name, shape in expected.items() if to_spconv2(state[name]).shape == shape}
    fits_2 = {name for name, shape in expected.items() if state[name].shape == shape}
    only_1, only_2 = fits_1 - fits_2, fits_2 - fits_1
    if only_1 and only_2:
        raise CheckpointError(
            f"'{min(only_1)}' has the layout of spconv 1 and '{min(only_2)}' that of spconv 2; --sparse-layout decides"
        )
    if only_1 or only_2:
        return "spconv1" if only_1 else "spconv2"
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        versions = {metadata.get(name.rpartition(".")[0], {}).get("version") for name in expected}
        return "spconv2" if versions == {2} else "spconv1"
    if fits_1:
        raise CheckpointError("the sparse weights fit in two layouts and the file names none; --sparse-layout decides")
    return "spconv2"


def import_backbone(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Imported:
    """The tensors of an image backbone; everything else in the file is skipped.

    Args:
        state: names of torchvision, of mmdet (``backbone.``), or of CMT and FCOS3D (``img_backbone.``).
        own: state dict of our detector, for names, shapes and dtypes.

    Raises:
        CheckpointError: the detector has no image backbone.
    """
    wanted = {name for name in own if name.startswith(BACKBONE)}
    if not wanted:
        raise CheckpointError("model.camera is null: there is no image backbone to start")
    result = Imported()
    prefix = next((p for p in BACKBONE_PREFIXES if any(_in_backbone(name, p) in wanted for name in state)), "")
    found = set()
    for name, tensor in state.items():
        ours = _in_backbone(name, prefix)
        if ours in wanted:
            found.add(ours)
            result.place(ours, tensor, own[ours])
        else:
            result.skipped.append(name)
    absent = [name for name in own if name in wanted - found]
    result.missing.extend(name for name in absent if not name.endswith(COUNTER))
    if len(result.missing) < len(absent):
        result.notes.append(f"{len(absent) - len(result.missing)} counters of batch norm are not in the file: left out")
    return result


def _in_backbone(name: str, prefix: str) -> str | None:
    """Our name of a backbone's tensor; None for a name of something else."""
    if not name.startswith(prefix):
        return None
    try:
        return rename_official("img_backbone." + name.removeprefix(prefix))
    except ValueError:
        return None


def empty_state(config: ModelConfig) -> dict[str, Tensor]:
    """State dict of a configuration's detector on the meta device: names, shapes and dtypes without memory.

    AQR is left out, because no official file has it.
    """
    with torch.device("meta"):
        return build_detector(replace(config, init="official", aqr=None)).state_dict()


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file atomically: ``path`` is always either the old file or the complete new one.

    Its metadata hold a checksum of the whole file.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    try:
        with atomic_path(path) as partial:
            partial.write_bytes(add_checksum(save(own, metadata={**metadata, **METADATA})))
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be saved: {describe_os_error(OSError(error.errno, error.strerror))}"
        ) from None


def format_report(result: Imported) -> str:
    """What was converted, and every misfit by name."""
    lines = [f"{len(result.weights)} tensors fit"]
    lines += result.notes
    if result.skipped:
        groups = Counter(name.partition(".")[0] for name in result.skipped)
        parts = ", ".join(f"{group}.* ({count})" for group, count in groups.items())
        lines.append(f"{len(result.skipped)} skipped: {parts}")
    for kind, names in result.misfits().items():
        lines.append(f"{len(names)} {kind}")
        lines += [f"  {name}" for name in names]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Read, convert, report, write; returns the exit status.

    Raises:
        CheckpointError: the file cannot be read or does not fit; nothing is written then.
        ConfigError: the configuration is wrong.
    """
    if options.out.suffix != ".safetensors":
        raise CheckpointError(f"{options.out}: the name of the result must end in .safetensors")
    config = load_config(options.config, options.set)
    state = load_weights(options.source)
    own = empty_state(config.model)
    kind, looks = recognise(state)
    if kind == "own":
        raise CheckpointError(
            f"{options.source}: {looks}: nothing to import, give it to test.py --checkpoint or training.init_from"
        )
    if kind == "backbone" and not options.backbone:
        raise CheckpointError(f"{options.source}: looks like {looks}: add --backbone to start a training from it")
    try:
        if options.backbone:
            result = import_backbone(state, own)
        else:
            result = import_detector(state, own, sparse_layout=options.sparse_layout)
    except CheckpointError as error:
        raise CheckpointError(f"{options.source}: {error}") from None
    print(f"{options.source} -> {config.name}{', image backbone' if options.backbone else ''}")
    print(f"looks like {looks}")
    print(format_report(result), flush=True)
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in result.misfits().items() if names)
    if counts:
        raise CheckpointError(f"{options.source}: does not fit {config.name}: {counts} (listed above); nothing written")
    check_finite(result.weights, str(options.source))
    content = "image backbone" if options.backbone else "detector"
    metadata = {"format": "pt", "source": options.source.name, "config": config.name, "content": content}
    write_weights(options.out, result.weights, metadata)
    is_start = options.backbone or config.model.aqr is not None
    use = f"training.init_from={options.out}" if is_start else f"test.py --checkpoint {options.out}"
    print(f"written: {options.out}, for {use}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return report_errors(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
