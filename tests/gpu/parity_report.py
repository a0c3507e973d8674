"""The errors of the golden stages on a GPU, in float32 and under bfloat16 autocast, as a Markdown page.

    python -m tests.gpu.parity_report --out FILE.md

Runs the stages that the parity tests compare on the CPU, on `--device`, and writes one row per golden file and stage:
the largest relative error of all comparisons against the original's float64 run. float32 is IEEE arithmetic (no TF32)
and has a limit; bfloat16 has none. A golden file that is missing is reported as absent. `CMT_AQR_GOLDEN` names another
golden folder. Exit status: 0; 1 where a float32 stage exceeds its limit or a case breaks; 2 where the device or all
golden files are missing.
"""

import argparse
import contextlib
import json
import math
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest
import torch

from tests.parity import test_head, test_head_train, test_image_branch
from tests.parity.golden import Golden, golden_dir
from tests.parity.head_case import HeadCase
from tests.parity.report import versions

COMMAND = "python -m tests.gpu.parity_report"
FORWARD_LIMIT = 1e-5
# A ReLU or L1 kink near zero may fall to the other side on another device and moves a few gradients.
GRADIENT_LIMIT = 1e-4
PRECISIONS = (None, torch.bfloat16)  # autocast dtype; None: float32
NOTES = {
    "sparse encoder": "runs in float32 under autocast too",
    "sparse encoder, voxels outside dropped": "runs in float32 under autocast too",
}


@dataclass
class Stage:
    """Worst error over the comparisons of one stage; `is_equality`: it is the fraction of elements that differ."""

    name: str
    limit: float
    is_equality: bool = False
    errors: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Largest error; NaN counts as infinite."""
        return max(math.inf if math.isnan(e) else e for e in self.errors)

    @property
    def passes(self) -> bool:
        """Whether the error is within the limit."""
        return self.error <= self.limit


class MeasuredGolden(Golden):
    """Golden file whose checks collect errors in `stages`, against the limits of this page, and never fail."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.stages: dict[str, Stage] = {}

    def check_equal(self, stage: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        """Collect the fraction of elements that differ."""
        actual, expected = actual.detach().cpu(), expected.cpu()
        is_comparable = actual.shape == expected.shape
        error = (actual != expected).double().mean().item() if is_comparable and actual.numel() else 0.0
        found = self.stages.setdefault(stage, Stage(stage, 0.0, is_equality=True))
        found.errors.append(error if is_comparable else math.inf)

    def record(self, stage: str, dtype: torch.dtype, error: float, limit: float, original: float | None = None) -> None:
        """Collect one error; the parity tests' own limits are for the CPU."""
        limit = GRADIENT_LIMIT if stage.startswith("gradient") else FORWARD_LIMIT
        self.stages.setdefault(stage, Stage(stage, limit)).errors.append(error)


@dataclass(frozen=True)
class Case:
    """A golden file, or the part of it under `prefix`, and the function that runs its checks."""

    golden: str
    title: str
    run: Callable[[MeasuredGolden, str, torch.device, torch.dtype | None], None]
    prefix: str = ""

    @property
    def name(self) -> str:
        """For headings and test names."""
        return f"{self.golden}, {self.prefix[:-1]}" if self.prefix else self.golden

    @property
    def path(self) -> Path:
        """Where the golden file should be."""
        return golden_dir() / f"{self.golden}.npz"


def run_image(golden: MeasuredGolden, prefix: str, device: torch.device, autocast: torch.dtype | None) -> None:
    """ResNet or VoVNet, and CP-FPN."""
    with autocast_to(device, autocast):
        test_image_branch.check_branch(golden, torch.float32, device=device)
        test_image_branch.check_channels_last(golden, device=device)


def run_lidar(golden: MeasuredGolden, prefix: str, device: torch.device, autocast: torch.dtype | None) -> None:
    """Sparse encoder, SECOND, SECONDFPN."""
    from tests.parity import test_lidar_branch

    with autocast_to(device, autocast):
        test_lidar_branch.check_branch(golden, torch.float32, device=device)
        test_lidar_branch.check_branch_from_points(golden, device=device)


def run_lidar_outside(golden: MeasuredGolden, prefix: str, device: torch.device, autocast: torch.dtype | None) -> None:
    """Sparse encoder with voxels outside its shape."""
    from tests.parity import test_lidar_branch

    with autocast_to(device, autocast):
        test_lidar_branch.check_voxels_outside_dropped(golden, torch.float32, device=device)


def run_head(golden: MeasuredGolden, prefix: str, device: torch.device, autocast: torch.dtype | None) -> None:
    """Shared convolution, positions, decoder, every branch of the heads."""
    meta = json.loads(str(golden[prefix + "meta_json"]))
    case = HeadCase(golden, torch.float32, prefix=prefix, meta=meta, device=device)
    case.detector.eval()
    with autocast_to(device, autocast):
        test_head.test_positions_of_tokens_equal_the_original(case)
        test_head.test_positions_of_queries_equal_the_original(case)
        test_head.test_decoder_and_heads_equal_the_original(case)


def run_head_train(golden: MeasuredGolden, prefix: str, device: torch.device, autocast: torch.dtype | None) -> None:
    """Denoising, forward in training, assignment, losses, gradients."""
    step = test_head_train.Step(golden, torch.float32, device=device, autocast=autocast)
    test_head_train.test_assignments_equal_the_original(step)
    test_head_train.test_every_loss_term_equals_the_original(step)
    test_head_train.test_gradients_equal_the_original(step)
    test_head_train.test_gradient_norms_of_all_parameters_equal_the_original(step)
    test_head_train.test_running_statistics_equal_the_original(step)
    # Parts that are computed again; the step itself has its autocast around the forward pass alone.
    with autocast_to(device, autocast):
        test_head_train.test_forward_in_training_equals_the_original(step)
        test_head_train.test_denoising_queries_equal_the_original(step)
        test_head_train.test_labels_of_denoising_queries_per_task_equal_the_original(step)
        test_head_train.test_parts_in_training_equal_the_original(step)


CASES = (
    Case("image_branch", "image branch: ResNet, CP-FPN", run_image),
    Case("image_branch_vov", "image branch: VoVNet, CP-FPN", run_image),
    Case("backbone3d", "LiDAR branch: sparse encoder, SECOND, SECONDFPN", run_lidar),
    Case("backbone3d_oob", "sparse encoder, voxels outside its shape", run_lidar_outside),
    Case("head_eval", "head, fusion", run_head),
    Case("head_eval_6task", "head, fusion, six tasks", run_head),
    Case("transformer_vs_lidar_image", "head, LiDAR only", run_head, prefix="lidar/"),
    Case("transformer_vs_lidar_image", "head, cameras only", run_head, prefix="image/"),
    Case("head_train", "training step: losses and gradients", run_head_train),
    Case("head_train_6task", "training step, six tasks", run_head_train),
)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast, off for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@contextlib.contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """float32 products and convolutions without TF32."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32
    # torch refuses to read the old switches while the new ones say something else, so both are set, the old ones first.
    torch.set_float32_matmul_precision("highest")
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    cuda.fp32_precision = cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before[1:]
        torch.set_float32_matmul_precision(before[0])


def measure(
    case: Case, device: torch.device, autocast: torch.dtype | None = None, golden: MeasuredGolden | None = None
) -> dict[str, Stage]:
    """Run one case in float32, or with float32 weights under autocast; stages by name, in the order of comparison.

    A `golden` that is passed in keeps the stages before an exception.
    """
    golden = golden or MeasuredGolden(case.path)
    with ieee_arithmetic():
        case.run(golden, case.prefix, device, autocast)
    return golden.stages


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md", help="page to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device (--device cpu runs the same stages on the CPU)", file=sys.stderr)
        return 2
    if not any(case.path.is_file() for case in CASES):
        print(f"error: no golden file in {golden_dir()} (set CMT_AQR_GOLDEN); nothing written", file=sys.stderr)
        return 2
    page, is_good = make_page(
        torch.device(options.device), f"{COMMAND} --device {options.device} --out {options.out.name}"
    )
    print(page)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    print(f"written: {options.out}")
    return 0 if is_good else 1


def make_page(device: torch.device, command: str) -> tuple[str, bool]:
    """The whole page, and whether every stage is within its limit."""
    counts: dict[str, int] = defaultdict(int)
    sections = []
    for case in CASES:
        sections += ["", f"## {case.name} ({case.title})", "", *make_section(case, device, counts)]
    summary = ", ".join(f"{count} {word}" for word, count in counts.items())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    header = [
        "# Parity with the original programs on a GPU",
        "",
        f"Written by `{command}` on {date.today()}; do not edit.",
        "",
        f"Device: {name}. Versions: {versions()}, CUDA {torch.version.cuda}.",
        "",
        f"Result: {summary}.",
        "",
        "An error is max |ours - reference| / max |reference| against the original's float64 run, the largest of all",
        'comparisons of a stage. *float32*: IEEE arithmetic (`fp32_precision = "ieee"` for CUDA products and cuDNN',
        f"convolutions); the limit is {FORWARD_LIMIT:.0e} for forward stages and losses, {GRADIENT_LIMIT:.0e} for",
        "gradients. *bfloat16*: the same float32 weights under autocast, no limit; where a rounded prediction changes",
        "the assignment, losses and gradients are those of another assignment. *equal*: every element is the same,",
        "otherwise the part that differs.",
    ]
    return "\n".join(header + sections) + "\n", not any(counts[word] for word in ("FAIL", "broken"))


def make_section(case: Case, device: torch.device, counts: dict[str, int]) -> list[str]:
    """Lines of one case; adds its verdicts to `counts`. An exception is a line of the page, not the end of it."""
    print(f"{case.name} ...", file=sys.stderr, flush=True)
    if not case.path.is_file():
        counts["absent"] += 1
        return [f"Absent: no golden file `{case.path.name}`."]
    results, problems = [], []
    for autocast in PRECISIONS:
        golden = None
        try:
            golden = MeasuredGolden(case.path)
            measure(case, device, autocast, golden)
        except pytest.skip.Exception as skipped:
            counts["skipped"] += 1
            return [f"Skipped: {skipped}"]
        except Exception as error:
            traceback.print_exc()
            counts["broken"] += 1
            message = " ".join(str(error).split())
            precision = "float32" if autocast is None else "bfloat16"
            problems.append(f"**Broken** in {precision}: {type(error).__name__}: {message[:300]}")
        results.append(golden.stages if golden else {})
    exact, rounded = results
    lines = ["| stage | float32 (limit) | pass | bfloat16 autocast |", "|---|---|---|---|"]
    for name in {**exact, **rounded}:
        stage = exact.get(name)
        verdict = "" if stage is None else "pass" if stage.passes else "FAIL"
        if verdict:
            counts[verdict] += 1
        limit = "" if stage is None or stage.is_equality else f" ({stage.limit:.0e})"
        low = format_error(rounded.get(name)) + (f" ({NOTES[name]})" if name in NOTES else "")
        verdict = f"**{verdict}**" if verdict == "FAIL" else verdict
        lines.append(f"| {name} | {format_error(stage)}{limit} | {verdict} | {low} |")
    return [*(line for problem in problems for line in (problem, "")), *lines]


def format_error(stage: Stage | None) -> str:
    """Worst error of a stage; words for an equality."""
    if stage is None:
        return ""
    if stage.is_equality:
        return f"{stage.error:.1%} differ" if stage.error else "equal"
    return f"{stage.error:.1e}" if stage.error else "0"


if __name__ == "__main__":
    sys.exit(main())
