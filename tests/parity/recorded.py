"""The recorded tensors of the original programs as bundles that ``python -m cmt_aqr.golden compare`` reads.

    python -m tests.parity.recorded OUT
    python -m cmt_aqr.golden compare OUT/head_eval port.npz --precision float32

One bundle a case, with the names, axes and order of ``python -m cmt_aqr.golden export``: what the case is given, its
weights under this project's names, and the stages of the original's float64 run. The limits are those of the parity
tests. `CMT_AQR_GOLDEN` names the folder of the golden files; without one, those of the repository are written.
docs/porting.md lists the cases, and what cannot be compared.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.files import atomic_path
from cmt_aqr.golden.bundle import FORMAT, INPUTS, WEIGHTS
from cmt_aqr.golden.catalogue import stage_of
from cmt_aqr.golden.compare import largest, ordered
from cmt_aqr.golden.manifest import describe_tensor, write, write_manifest
from tests.parity.golden import SMALL_FOLDER, Golden, golden_dir
from tests.parity.recorded_cases import FORWARD, Recorded, read_cases

LIMITS = (
    "1e-12 of the largest value in float64, 5e-6 in float32; losses and gradients 1e-9 and 1e-5; what the original "
    "keeps in float32 1e-6 and 1e-5"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.recorded", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the bundles; must not exist")
    options = parser.parse_args(arguments)
    return report_errors(lambda: write_all(options.out))


def write_all(out: Path) -> int:
    """Write a bundle for every case; returns 0.

    Raises:
        UserError: OUT exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another folder")
    with atomic_path(out) as partial:
        partial.mkdir()
        for case in all_cases():
            write_bundle(case, partial / case.name)
            start, made = (", ".join(dict.fromkeys(map(stage_of, names))) for names in (case.given, case.stages))
            print(f"{out / case.name}: from {start} to {made}", flush=True)
    return 0


def all_cases() -> Iterator[Recorded]:
    """Every case of the golden files, or of those of the repository."""
    folder = golden_dir() if golden_dir().is_dir() else SMALL_FOLDER
    for path in sorted(folder.glob("*.npz")):
        yield from read_cases(Golden(path))


def write_bundle(case: Recorded, folder: Path) -> None:
    """A folder as ``export`` writes it, with float64 as its only precision."""
    folder.mkdir()
    inputs = {name: x for name, x in case.given.items() if stage_of(name) == INPUTS}
    made = {name: x for name, x in case.given.items() if name not in inputs} | case.stages
    weights = {f"{WEIGHTS}/{name}": x for name, x in case.weights.items()}
    about = {name: describe_tensor(name, x) for name, x in (inputs | weights | made).items()}
    write(folder / f"{INPUTS}.safetensors", inputs, about, INPUTS)
    write(folder / f"{WEIGHTS}.safetensors", case.weights, about, WEIGHTS, prefix=f"{WEIGHTS}/")
    write(folder / "float64.safetensors", made, about, "float64")
    for name, x in case.stages.items():
        if x.is_floating_point():
            about[name]["tolerance"] = {precision: case.limit(name, precision) * largest(x) for precision in FORWARD}
    manifest = {
        "format": FORMAT, "precisions": ["float64"], "origin": f"{case.name}, recorded from the original programs",
        "given": list(case.given), "tolerance_source": LIMITS, "constants": case.constants, "settings": case.settings,
        "gradient_names": list(case.gradient_names), "tensors": {name: about[name] for name in ordered(about)},
    }  # fmt: skip
    write_manifest(folder, manifest)


if __name__ == "__main__":
    sys.exit(main())
