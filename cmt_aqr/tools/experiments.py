"""Train and test many variants, side by side on all GPUs, and compare them in a table.

    python -m cmt_aqr.tools.experiments run PLAN.yml --out runs/ablation --limit 1500
    python -m cmt_aqr.tools.experiments report PLAN.yml --out runs/ablation

A plan names variants: a configuration, changed keys, seeds, and sensor failures to test under.
`configs/ablation/plan.yml` is one. ``run`` takes a free GPU for each variant and seed in turn, trains, tests, and keeps
everything in OUT/VARIANT/seed_N. Finished runs are not repeated and stopped ones are resumed, so a long plan can be
run in pieces with ``--limit``. ``report`` prints a Markdown table: the mean over seeds, and the difference
from the plan's reference over the seeds that both have, with its 95 % interval (Student's t).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train and test what is not finished")
    report = commands.add_parser("report", help="print the table of what is finished")
    for command in (run, report):
        command.add_argument("plan", type=Path, help="YAML file")
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
    run.add_argument("--gpus", type=int, help="how many GPUs to use (default: all; 0: the CPU)")
    run.add_argument("--runs-per-gpu", type=int, default=2, help="at a time (default: %(default)s)")
    run.add_argument(
        "--limit", type=float, metavar="SECONDS", help="stop all runs after this time; the same command resumes them"
    )
    report.add_argument("--metric", choices=("NDS", "mAP"), default="NDS", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import torch

from cmt_aqr.errors import UserError, report_errors
from cmt_aqr.tools.experiment_plan import read_plan
from cmt_aqr.tools.experiment_report import comparison_table
from cmt_aqr.tools.experiment_runner import run_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)

    def run() -> int:
        plan = read_plan(options.plan)
        if options.command == "report":
            print(comparison_table(plan, options.out, options.metric))
            return 0
        gpus = torch.cuda.device_count() if options.gpus is None else options.gpus
        if options.runs_per_gpu < 1 or gpus < 0:
            raise UserError(
                f"expected --gpus of at least 0 and --runs-per-gpu of at least 1, got {gpus} and {options.runs_per_gpu}"
            )
        slots = [gpu for _ in range(options.runs_per_gpu) for gpu in range(gpus)] or [None]
        return run_plan(plan, options.out, slots, limit=options.limit)

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
