"""What both scripts do: prepare the data, load weights, predict and evaluate a split."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cmt_aqr.boxes import Detections
from cmt_aqr.build import evaluation_dataset, open_split
from cmt_aqr.config import Config, to_tree
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.loader import explain_killed_worker, make_loader
from cmt_aqr.data.sample import Batch
from cmt_aqr.data.sampling import EvaluationSampler
from cmt_aqr.evaluation.nuscenes_eval import METRICS_FILE, Metrics
from cmt_aqr.evaluation.run import (
    SUBMISSION_FILE,
    Decoding,
    Detect,
    FrameResult,
    detect_eagerly,
    evaluate,
    predict,
    save_submission,
)
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.inference import InferencePipeline
from cmt_aqr.memory import evaluation_advice, explain_out_of_memory
from cmt_aqr.models.detector import Detector
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.precision import PRECISIONS
from cmt_aqr.progress import phase
from cmt_aqr.strict_yaml import differences
from cmt_aqr.synthetic import WorldSettings, generate_world
from cmt_aqr.training.checkpoint import CheckpointError, load_into, load_weights_and_config
from cmt_aqr.training.distributed import RankInfo, gather, main_first
from cmt_aqr.training.logs import RunLog
from cmt_aqr.training.run_folder import PICTURES, SPEED, remove_pictures
from cmt_aqr.viz.callback import PictureWriter
from cmt_aqr.viz.pictures import PictureError


def prepare_data(config: Config, *, verbose: bool) -> None:
    """Write the synthetic world of a configuration that has one, unless it is there; ``verbose`` prints progress."""
    world = config.data.synthetic
    if world is None:
        return
    root = Path(config.data.root)
    if verbose and not root.exists():
        print(f"{root} does not exist: writing the synthetic world of this configuration", flush=True)
    generate_world(
        root,
        WorldSettings(
            scenes=world.train_scenes,
            val_scenes=world.val_scenes,
            seed=world.seed,
            samples_per_scene=world.samples_per_scene,
            image_size=world.image_size,
            sweeps_per_keyframe=world.sweeps_per_keyframe,
            lidar_columns=world.lidar_columns,
        ),
        workers=world.workers,
        progress=verbose and not root.exists(),
    )


def evaluate_split(
    model: nn.Module, config: Config, split: str, rank_info: RankInfo, folder: Path, log: RunLog, tables: Tables
) -> Metrics | None:
    """Predict a split with all processes, then score it in the main one; the others return None.

    ``tables`` are those of the configuration's data set; only the main process loads them.
    """
    results = predict_split(model, config, split, rank_info, folder, log)
    if results is None:
        return None
    velocities = config.data.velocity_file
    with phase(f"scoring {split} with the nuScenes devkit"):
        return evaluate(
            results,
            folder=folder,
            tables=tables,
            split=split,
            velocity_file=None if velocities is None else str(Path(config.data.root) / velocities),
            **used_sensors(config),
        )


def submit_split(model: nn.Module, config: Config, split: str, rank_info: RankInfo, folder: Path, log: RunLog) -> None:
    """Predict a split as :func:`evaluate_split` does and write the submission; scores of an earlier one go."""
    results = predict_split(model, config, split, rank_info, folder, log)
    if results is not None:
        (folder / METRICS_FILE).unlink(missing_ok=True)
        save_submission(results, folder / SUBMISSION_FILE, **used_sensors(config))


def predict_split(
    model: nn.Module, config: Config, split: str, rank_info: RankInfo, folder: Path, log: RunLog
) -> list[FrameResult] | None:
    """Predict a split with all processes, each of which draws its share of the pictures.

    Returns:
        One result a frame, in the order of the index, in the main process; None in the others.
    """
    index = open_split(config.data, split)
    loader = make_loader(
        evaluation_dataset(config, index),
        sampler=EvaluationSampler(num_frames=len(index), rank=rank_info.rank, world_size=rank_info.world_size),
        batch_size=config.evaluation.batch_size,
        num_workers=min(config.data.workers, len(index)),
    )
    with main_first(rank_info):
        if rank_info.is_main:
            with suppress(OSError):  # they are not worth an evaluation
                remove_pictures(folder)  # of an earlier evaluation, perhaps of other frames
    pictures = PictureWriter(
        folder / PICTURES,
        tokens=spread(index.tokens, config.evaluation.num_pictures),
        score_threshold=config.evaluation.picture_score,
        has_truth=has_boxes(index),
    )
    with log.progress(f"evaluate {split}", len(loader)) as progress:

        def after_batch(batch, detections):
            draw(pictures, batch, detections)
            progress.advance()

        failure, advice = None, partial(evaluation_advice, config)
        try:
            with explain_killed_worker("evaluation.batch_size"), explain_out_of_memory(advice):
                results = predict(make_detect(model, config, rank_info.device), loader, on_batch=after_batch)
        except Exception as error:  # raised below: the other processes wait for this one
            results, failure = [], error
    raise_together(failure, rank_info)
    for problem in gather([] if pictures.problem is None else [pictures.problem])[:1]:
        log.print(f"no more pictures of this evaluation: {problem}")
    results = gather(results)
    if not rank_info.is_main:
        return None
    rank_of = {token: i for i, token in enumerate(index.tokens)}
    results.sort(key=lambda result: rank_of[result.token])  # the same file however many processes
    return results


def raise_together(failure: Exception | None, rank_info: RankInfo) -> None:
    """Where one process failed, raise in all of them; to be called in all, with what failed in each."""
    failures = gather([] if failure is None else [f"process {rank_info.rank}: {failure}"])
    if failure is not None:
        raise failure
    if failures:
        raise EvaluationError(failures[0])


def draw(pictures: PictureWriter, batch: Batch, detections: list[Detections]) -> None:
    """Draw the chosen frames of a batch; where that fails, remember why and draw no more of them."""
    if pictures.problem is not None:
        return
    try:
        pictures(batch, detections)
    except (PictureError, OSError) as error:
        pictures.problem = str(error)


def has_boxes(index: FrameIndex) -> bool:
    """Whether any frame of a split is annotated."""
    return any(index.frame_labels("all"))


def used_sensors(config: Config) -> dict[str, bool]:
    """The sensors that a configuration uses, as a submission names them."""
    return {"use_camera": config.model.camera is not None, "use_lidar": config.model.lidar is not None}


def load_model(model: nn.Module, config: Config, path: str | Path) -> None:
    """Load weights strictly, after comparing the configuration they were trained with where the file has one."""
    weights, trained = load_weights_and_config(path)
    changed = [] if trained is None else differences(trained["model"], to_tree(config.model), "model")
    changed = [change for change in changed if not change.startswith(SPEED)]
    if changed:
        raise CheckpointError(f"{path}: trained with another model: {'; '.join(changed[:3])} (checkpoint against now)")
    load_into(model, weights, path)


def make_detect(model: nn.Module | InferencePipeline, config: Config, device: torch.device) -> Detect:
    """How a batch becomes detections: by the pipeline, or by the detector as it is."""
    if isinstance(model, InferencePipeline):
        return model
    return partial(
        detect_eagerly,
        model,
        device=device,
        precision=PRECISIONS[config.evaluation.precision],
        decoding=decoding_of(config),
    )


def model_for_test(
    model: nn.Module, config: Config, device: torch.device, log: RunLog
) -> nn.Module | InferencePipeline:
    """The detector as `evaluation.compile` wants it, on its device."""
    model = model.to(device)
    if not is_compiled(config, device):
        return model
    log.print(f"compiling the detector, a minute or more (evaluation.compile: {config.evaluation.compile})")
    return make_pipeline(model, config, config.evaluation.batch_size)


def is_compiled(config: Config, device: torch.device) -> bool:
    """What `evaluation.compile` means on a device: `auto` compiles on a GPU whatever can be compiled."""
    if config.evaluation.compile != "auto":
        return config.evaluation.compile
    lidar = config.model.lidar
    cannot = config.model.attention.backend == "lowrank" or (lidar is not None and lidar.sparse_backend == "spconv")
    return device.type == "cuda" and not cannot


def make_pipeline(model: Detector, config: Config, batch_size: int) -> InferencePipeline:
    """The compiled pipeline of a detector, with the configuration's precision and decoding."""
    return InferencePipeline(
        model, decoding=decoding_of(config), batch_size=batch_size, precision=PRECISIONS[config.evaluation.precision]
    )


def decoding_of(config: Config) -> Decoding:
    """How an evaluation of this configuration turns predictions into detections."""
    evaluation = config.evaluation
    return Decoding(evaluation.max_detections, evaluation.post_range, evaluation.score_threshold)


def spread(tokens: Sequence[str], count: int) -> tuple[str, ...]:
    """``count`` of the tokens, evenly spread over them; all when there are fewer."""
    count = min(count, len(tokens))
    return tuple(tokens[(2 * i + 1) * len(tokens) // (2 * count)] for i in range(count))
