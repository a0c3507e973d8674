"""Evaluate a checkpoint with the official nuScenes metrics.

    python test.py configs/synthetic_tiny.yaml --checkpoint runs/synthetic_tiny/latest.pt
    torchrun --nproc_per_node=8 test.py configs/cmt_r50_800x320.yaml --checkpoint weights.safetensors --split val

Writes submission.json, metrics.json and pictures/ to the output folder (runs/<name>/test_<split>) and prints the table.

    python test.py CONFIG --checkpoint C --failure beams:4 --failure view_drop:FRONT,BACK
    python test.py CONFIG --checkpoint C --failures multicorrupt

Failing sensors, all in one run: a table of the scores clean and under each, failures.json, failures.png and a folder a
failure in runs/<name>/failures_<split>. A name without a level means all its levels; docs/failures.md lists them.
"""

import argparse
import sys
from pathlib import Path

from torch import nn

from cmt_aqr.build import build_detector, check_device, open_split, sensors_of
from cmt_aqr.config import Config, load_config, naming_source, to_tree
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.nuscenes_eval import Tables, format_table
from cmt_aqr.failure_report import FailureTest
from cmt_aqr.jobs import evaluate_split, prepare_data
from cmt_aqr.robustness import check_training_keys, choose_failures, evaluate_failures, report_failures
from cmt_aqr.strict_yaml import differences
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights_and_config
from cmt_aqr.training.distributed import RankInfo, main_first, process_group
from cmt_aqr.training.logs import RunLog
from cmt_aqr.training.run_folder import SPEED


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments()

    def run() -> int:
        check_training_keys(arguments.set)
        config = load_config(arguments.config, arguments.set)
        with process_group(arguments.device) as rank_info:
            return test(config, rank_info, arguments)

    return report_errors(run)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", help="YAML file that the checkpoint was trained with")
    parser.add_argument("--checkpoint", required=True, help="checkpoint of train.py, or .safetensors weights")
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys, e.g. data.root=/data"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: runs/<name>/test_<split>)")
    parser.add_argument(
        "--failure", action="append", default=[], metavar="NAME[:LEVEL]", help="also test with this sensor failure"
    )
    parser.add_argument("--failures", metavar="SUITE", help="also test with all of multicorrupt, mome or all")
    parser.add_argument("--failure-seed", type=int, default=0, help="of the failures' random numbers (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser.parse_args()


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
        prepare_data(config, talk=rank_info.is_main)
        open_split(config.data, split)
    with RunLog(folder, rank_info.is_main, tensorboard=False) as log:
        if model.lidar_branch is not None:
            log.print(model.lidar_branch.encoder.describe(rank_info.device))
        if model.aqr is not None:
            log.print(model.aqr.describe(rank_info.device))
        tables = Tables(config.data.root, config.data.version)
        if failures:
            chosen = FailureTest(split, failures, arguments.failure_seed)
            rows = evaluate_failures(model.to(rank_info.device), config, chosen, rank_info, folder, log, tables)
            report_failures(rows, chosen, folder, log, arguments.checkpoint)
            return 0
        metrics = evaluate_split(model.to(rank_info.device), config, split, rank_info, folder, log, tables)
        if metrics is not None:
            log.record("test", 0, checkpoint=arguments.checkpoint, split=split, **metrics.scalars())
            log.print(format_table(metrics))
            log.print(f"submission, metrics and pictures in {folder}")
    return 0


def load_model(model: nn.Module, config: Config, path: str) -> None:
    """Load weights strictly, after comparing the configuration they were trained with where the file has one."""
    weights, trained = load_weights_and_config(path)
    changed = [] if trained is None else differences(trained["model"], to_tree(config.model), "model")
    changed = [change for change in changed if not change.startswith(SPEED)]
    if changed:
        raise CheckpointError(f"{path}: trained with another model: {'; '.join(changed[:3])} (checkpoint against now)")
    load_into(model, weights, path)


if __name__ == "__main__":
    sys.exit(main())
