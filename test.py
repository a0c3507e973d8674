"""Evaluate a checkpoint with the official nuScenes metrics.

    python test.py configs/synthetic_tiny.yaml --checkpoint runs/synthetic_tiny/latest.pt
    torchrun --nproc_per_node=8 test.py configs/cmt_r50_800x320.yaml --checkpoint weights.safetensors --split val

Writes submission.json, metrics.json, pictures/ and report.html, a page of pictures and scores, to the output folder
(runs/<name>/test_<split>) and prints the table.
A split without ground truth, such as nuScenes' test, gets the submission and pictures only; so does --no-metrics.

    python test.py CONFIG --checkpoint C --failure beams:4 --failure view_drop:FRONT,BACK
    python test.py CONFIG --checkpoint C --failures multicorrupt

Failing sensors, all in one run: a table of the scores clean and under each, failures.json, failures.png and a folder a
failure in runs/<name>/failures_<split>. A name without a level means all its levels; docs/failures.md lists them.
"""

import sys

from cmt_aqr.command_line import parse_test_arguments

if __name__ == "__main__":
    parse_test_arguments(__doc__)  # answers --help and mistakes before the imports below, which take seconds

import argparse
from functools import partial
from pathlib import Path

from cmt_aqr.build import build_detector, check_device, open_split, sensors_of
from cmt_aqr.config import Config, load_config, naming_source
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.nuscenes_eval import format_table
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.failure_report import FailureTest
from cmt_aqr.jobs import evaluate_split, has_boxes, load_model, model_for_test, prepare_data, submit_split
from cmt_aqr.memory import evaluation_advice, explain_out_of_memory
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.robustness import check_training_keys, choose_failures, evaluate_failures, report_failures
from cmt_aqr.run_page import keep_page
from cmt_aqr.training.distributed import RankInfo, main_first, process_group
from cmt_aqr.training.logs import RunLog


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_test_arguments(__doc__)

    def run() -> int:
        check_training_keys(arguments.set)
        config = load_config(arguments.config, arguments.set)
        advice = partial(evaluation_advice, config)
        with process_group(arguments.device) as rank_info, explain_out_of_memory(advice):
            return test(config, rank_info, arguments)

    return report_errors(run)


def test(config: Config, rank_info: RankInfo, arguments: argparse.Namespace) -> int:
    """Load, predict, evaluate, print; returns the exit status."""
    with naming_source(arguments.config, arguments.set):
        check_device(config.model, rank_info.device)
    model = build_detector(config.model)
    load_model(model, config, arguments.checkpoint)
    split = arguments.split or config.data.val_split
    failures = choose_failures(arguments.failure, arguments.failures, sensors_of(config.model))
    folder = arguments.out or Path("runs") / config.name / f"{'failures' if failures else 'test'}_{split}"
    with main_first(rank_info):
        prepare_data(config, verbose=rank_info.is_main)
        tables = Tables(config.data.root, config.data.version)
        index = open_split(config.data, split, tables)
    reason = why_not_scored(index, arguments)
    if failures and reason is not None:
        raise EvaluationError(f"--failure and --failures compare scores, and there are none: {reason}")
    with RunLog(folder, rank_info.is_main, tensorboard=False) as log:
        if model.lidar_branch is not None:
            log.print(model.lidar_branch.encoder.describe(rank_info.device))
        if model.aqr is not None:
            log.print(model.aqr.describe(rank_info.device))
        model = model_for_test(model, config, rank_info.device, log)
        if reason is not None:
            submit_split(model, config, split, rank_info, folder, log)
            log.record("test", 0, checkpoint=arguments.checkpoint, split=split, no_metrics=reason)
            show_page(folder, config, split, log)
            log.print(f"submission and pictures in {folder}; no metrics: {reason}")
            return 0
        if failures:
            chosen = FailureTest(split, failures, arguments.failure_seed)
            rows = evaluate_failures(model, config, chosen, rank_info, folder, log, tables)
            report_failures(rows, chosen, folder, log, arguments.checkpoint)
            show_page(folder, config, split, log)
            return 0
        metrics = evaluate_split(model, config, split, rank_info, folder, log, tables)
        if metrics is not None:
            log.record("test", 0, checkpoint=arguments.checkpoint, split=split, **metrics.scalars())
            log.print(format_table(metrics))
            show_page(folder, config, split, log)
            log.print(f"submission, metrics and pictures in {folder}")
    return 0


def show_page(folder: Path, config: Config, split: str, log: RunLog) -> None:
    """Write report.html and print where it is."""
    page = keep_page(folder, f"{config.name}, split {split}", log)
    if page is not None:
        log.print(f"pictures and scores on one page, for a browser: {page}")


def why_not_scored(index: FrameIndex, arguments: argparse.Namespace) -> str | None:
    """The reason why only the submission is written; None where it can be scored."""
    if arguments.no_metrics:
        return "--no-metrics"
    if not has_boxes(index):
        return f"no frame of the split {index.split!r} of {index.version} is annotated"
    return None


if __name__ == "__main__":
    sys.exit(main())
