"""Evaluate a checkpoint with the official nuScenes metrics.

    python test.py configs/synthetic_tiny.yaml --checkpoint runs/synthetic_tiny/latest.pt
    torchrun --nproc_per_node=8 test.py configs/cmt_r50_800x320.yaml --checkpoint weights.safetensors --split val

Writes submission.json, metrics.json and pictures/ to the output folder (runs/<name>/test_<split>) and prints the table.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from cmt_aqr.build import build_detector, check_device, evaluation_dataset, open_split
from cmt_aqr.config import Config, load_config, to_tree
from cmt_aqr.data.loader import make_loader
from cmt_aqr.data.sampling import EvaluationSampler
from cmt_aqr.errors import report_errors
from cmt_aqr.evaluation.nuscenes_eval import Metrics, Tables, format_table
from cmt_aqr.evaluation.run import Decoding, Pictures, evaluate, predict
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.strict_yaml import differences
from cmt_aqr.synthetic import generate_world
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights, read_config
from cmt_aqr.training.distributed import Processes, gather, main_first, processes
from cmt_aqr.training.logs import RunLog


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = parse_arguments()

    def run() -> int:
        config = load_config(arguments.config, arguments.set)
        with processes(arguments.device) as place:
            return test(config, place, arguments)

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
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser.parse_args()


def test(config: Config, place: Processes, arguments: argparse.Namespace) -> int:
    """Load, predict, evaluate, print; returns the exit status."""
    check_device(config.model, place.device)
    model = build_detector(config.model)
    load_model(model, config, arguments.checkpoint)
    split = arguments.split or config.data.val_split
    folder = arguments.out or Path("runs") / config.name / f"test_{split}"
    with main_first(place):
        prepare_data(config, talk=place.is_main)
        open_split(config.data, split)
    with RunLog(folder, place.is_main, tensorboard=False) as log:
        if model.aqr is not None:
            log.say(model.aqr.describe(place.device))
        tables = Tables(config.data.root, config.data.version)
        metrics = evaluate_split(model.to(place.device), config, split, place, folder, log, tables)
        if metrics is not None:
            log.record("test", 0, checkpoint=arguments.checkpoint, split=split, **metrics.scalars())
            log.say(format_table(metrics))
            log.say(f"submission, metrics and pictures in {folder}")
    return 0


def load_model(model: nn.Module, config: Config, path: str) -> None:
    """Load weights strictly, after comparing the configuration they were trained with where the file has one."""
    trained = read_config(path)
    changed = [] if trained is None else differences(trained["model"], to_tree(config.model), "model")
    # The evaluator of the attention is a matter of speed, not of the model.
    changed = [change for change in changed if not change.startswith("model.attention")]
    if changed:
        raise CheckpointError(f"{path}: trained with another model: {'; '.join(changed[:3])} (checkpoint against now)")
    load_into(model, load_weights(path), path)


def prepare_data(config: Config, *, talk: bool) -> None:
    """Write the synthetic world of a configuration that has one, unless it is there."""
    world = config.data.synthetic
    if world is None:
        return
    root = Path(config.data.root)
    if talk and not root.exists():
        print(f"{root} does not exist: writing the synthetic world of this configuration", flush=True)
    generate_world(
        root,
        scenes=world.train_scenes,
        val_scenes=world.val_scenes,
        seed=world.seed,
        samples_per_scene=world.samples_per_scene,
        image_size=world.image_size,
        sweeps_per_keyframe=world.sweeps_per_keyframe,
        lidar_columns=world.lidar_columns,
        workers=world.workers,
        progress=talk and not root.exists(),
    )


def evaluate_split(
    model: nn.Module, config: Config, split: str, place: Processes, folder: Path, log: RunLog, tables: Tables
) -> Metrics | None:
    """Predict a split with all processes, then score and draw it in the main one; the others return None.

    ``tables`` are those of the configuration's data set; only the main process loads them.
    """
    index = open_split(config.data, split)
    loader = make_loader(
        evaluation_dataset(config, index),
        sampler=EvaluationSampler(num_frames=len(index), rank=place.rank, world_size=place.world_size),
        batch_size=config.evaluation.batch_size,
        num_workers=min(config.data.workers, len(index)),
    )
    count = config.evaluation.num_pictures if place.is_main else 0
    pictures = Pictures(
        folder / "pictures",
        tokens=spread(index.tokens[place.rank :: place.world_size], count),
        score_threshold=config.evaluation.picture_score,
        written=[],
    )
    with log.progress(f"evaluate {split}", len(loader)) as progress:

        def after_batch(batch, detections):
            pictures(batch, detections)
            progress.advance()

        results = predict(
            model,
            loader,
            device=place.device,
            precision=PRECISIONS[config.training.precision],
            decoding=Decoding(
                max_detections=config.evaluation.max_detections,
                post_range=config.evaluation.post_range,
                score_threshold=config.evaluation.score_threshold,
            ),
            on_batch=after_batch,
        )
    results = gather(results)
    if not place.is_main:
        return None
    rank_of = {token: i for i, token in enumerate(index.tokens)}
    results.sort(key=lambda result: rank_of[result.token])  # the same file however many processes
    velocities = config.data.velocity_file
    return evaluate(
        results,
        folder=folder,
        tables=tables,
        split=split,
        velocity_file=None if velocities is None else str(Path(config.data.root) / velocities),
        use_camera=config.model.camera is not None,
        use_lidar=config.model.lidar is not None,
    )


def spread(tokens: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` of the tokens, evenly spread over them; all when there are fewer."""
    count = min(count, len(tokens))
    return tuple(tokens[(2 * i + 1) * len(tokens) // (2 * count)] for i in range(count))


if __name__ == "__main__":
    sys.exit(main())
