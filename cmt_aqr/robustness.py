"""Testing a detector under failing sensors: every frame under every failure in one run, one table at the end.

The workers of the loader read each file once and hand out the frame clean and under one failure after another. The main
process then scores all failures side by side, each in a process of its own.
"""

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from cmt_aqr.boxes import Detections
from cmt_aqr.build import failure_dataset, open_split
from cmt_aqr.config import Config, ConfigError
from cmt_aqr.data.failures import (
    Failure,
    FailureSampler,
    SensorData,
    affects_nothing,
    failed_panels,
    keep_applicable,
    parse_failures,
)
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.loader import explain_killed_worker, make_loader
from cmt_aqr.data.sample import Batch, DataError
from cmt_aqr.evaluation.nuscenes_eval import Metrics
from cmt_aqr.evaluation.run import FrameResult, evaluate, predict
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.failure_report import BARS_FILE, CLEAN, REPORT_FILE, FailureTest, Row, format_failures, write_report
from cmt_aqr.jobs import make_detect, raise_together, spread
from cmt_aqr.memory import evaluation_advice, explain_out_of_memory
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.training.distributed import RankInfo, gather
from cmt_aqr.training.logs import RunLog
from cmt_aqr.viz.box_groups import Style
from cmt_aqr.viz.pictures import PictureError, draw_detections, write_picture

# Frames times failures whose detections are held in memory at once: about a gigabyte.
MAX_RESULTS = 100_000


# Keys that make sensors fail in training, and what to write in a test.
TRAINING_KEYS = {
    "data.drop_cameras": "use --failure camera_drop",
    "data.drop_lidar": "use --failure lidar_drop",
    "data.failures": "use --failure NAME[:LEVEL]",
}


def check_training_keys(overrides: Sequence[str]) -> None:
    """Refuse ``--set`` entries that make sensors fail in training only: a test would print clean numbers.

    Raises:
        ConfigError: names the option that does what was meant.
    """
    for entry in overrides:
        key = entry.partition("=")[0].strip()
        if key in TRAINING_KEYS:
            raise ConfigError(
                [f"--set {entry}: acts in training only, test.py would test clean frames; {TRAINING_KEYS[key]}"]
            )


def choose_failures(names: Sequence[str], suite: str | None, sensors: Sequence[str]) -> tuple[Failure, ...]:
    """The failures of the command line that affect a sensor of the model; prints which of a suite do not.

    Raises:
        DataError: an unknown name, level, camera or suite, or a failure given by name that does not affect the model.
    """
    named, without = keep_applicable(parse_failures(names), sensors)
    if without:
        raise DataError(f"--failure {without[0].name!r}: {affects_nothing(sensors)}")
    return tuple(dict.fromkeys([*named, *keep_applicable(parse_failures([], suite), sensors)[0]]))


def report_failures(rows: Sequence[Row] | None, test: FailureTest, folder: Path, log: RunLog, checkpoint: str) -> None:
    """Log and print what :func:`evaluate_failures` found; nothing where it is None."""
    if rows is None:
        return
    for row in rows:
        log.record("test", 0, checkpoint=checkpoint, split=test.split, failure=row.name, **row.metrics.scalars())
    log.print(format_failures(rows, test))
    log.print(f"{REPORT_FILE}, {BARS_FILE} and a folder for each failure in {folder}")


def evaluate_failures(
    model: nn.Module, config: Config, test: FailureTest, rank_info: RankInfo, folder: Path, log: RunLog, tables: Tables
) -> list[Row] | None:
    """Predict and score a split clean and under all failures; writes failures.json, failures.png and a folder each.

    Returns:
        The rows, clean first, in the main process; None in the others.
    """
    index = open_split(config.data, test.split)
    variants: list[Failure | None] = [None, *test.failures]
    at_once = max(1, MAX_RESULTS // len(index))
    rows: list[Row] = []
    for first in range(0, len(variants), at_once):
        part = variants[first : first + at_once]
        results = _predict(model, config, index, part, test, rank_info, folder, log)
        if rank_info.is_main:
            rows += _score(config, test.split, part, results, folder, log, tables)
    if not rank_info.is_main:
        return None
    write_report(rows, test, config, folder)
    return rows


def _predict(
    model: nn.Module,
    config: Config,
    index: FrameIndex,
    variants: Sequence[Failure | None],
    test: FailureTest,
    rank_info: RankInfo,
    folder: Path,
    log: RunLog,
) -> list[list[FrameResult]]:
    """Results of every variant, of all frames and processes, in the order of the frames."""
    workers = min(config.data.workers, len(index))
    sampler = FailureSampler(
        num_frames=len(index),
        num_failures=len(variants),
        batch_size=config.evaluation.batch_size,
        num_workers=workers,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
    )
    loader = make_loader(
        failure_dataset(config, index, variants, test.seed),
        sampler=sampler,
        batch_size=config.evaluation.batch_size,
        num_workers=workers,
    )
    own: list[list[FrameResult]] = [[] for _ in variants]
    problem, advice = None, partial(evaluation_advice, config)
    with log.progress(f"{test.split}, {len(variants)} variants", len(loader)) as progress:
        pictures = _Pictures(config, index, variants, sampler.keys, rank_info, folder, log)

        def after_batch(batch: Batch, detections: list[Detections]) -> None:
            pictures.draw(batch, detections)
            progress.advance()

        try:
            with explain_killed_worker("evaluation.batch_size"), explain_out_of_memory(advice):
                results = predict(make_detect(model, config, rank_info.device), loader, on_batch=after_batch)
            for key, result in zip(sampler.keys, results, strict=True):
                own[key % len(variants)].append(result)
        except Exception as error:  # raised below: the other processes wait for this one
            problem = error
    raise_together(problem, rank_info)
    position = {token: i for i, token in enumerate(index.tokens)}
    return [sorted(gather(results), key=lambda result: position[result.token]) for results in own]


class _Pictures:
    """Draws one frame under every variant, in the main process: the same, so that they can be compared."""

    def __init__(
        self,
        config: Config,
        index: FrameIndex,
        variants: Sequence[Failure | None],
        keys: Sequence[int],
        rank_info: RankInfo,
        folder: Path,
        log: RunLog,
    ):
        count = min(1, config.evaluation.num_pictures) if rank_info.is_main else 0
        self._tokens = spread(index.tokens[rank_info.rank :: rank_info.world_size], count)
        self._variants = variants
        self._keys: Iterator[int] = iter(keys)
        self._threshold = config.evaluation.picture_score
        # The chosen frame comes clean first; where there are too many failures for one go, the later ones lack it.
        self._clean: SensorData | None = None
        self._folder = folder
        self._log = log

    def draw(self, batch: Batch, detections: list[Detections]) -> None:
        """Draw the chosen frame where the batch holds it; where that fails, print so and draw no more."""
        for i, token in enumerate(batch.tokens):
            failure = self._variants[next(self._keys) % len(self._variants)]
            if token not in self._tokens:
                continue
            about = CLEAN if failure is None else f"{failure.name}: {failure.definition.about}"
            data = SensorData(
                None if batch.images is None else batch.images[i],
                None if batch.points is None else batch.points[i],
                batch.lidar2img[i],
            )
            if failure is None:
                self._clean = data
            failed = {} if failure is None else failed_panels(failure, data, self._clean)
            picture = draw_detections(
                *data,
                detections=detections[i],
                targets=batch.targets[i],
                title=f"{about}   {token[:16]}",
                style=Style(score_threshold=self._threshold, failed=failed),
            )
            name = CLEAN if failure is None else failure.file_name
            try:
                write_picture(self._folder / name / f"{token[:16]}.jpg", picture)
            except PictureError as error:
                self._tokens = ()
                self._log.print(f"no more pictures of this test: {error}")


@dataclass(frozen=True)
class _Scoring:
    """What a scoring process works on; it inherits all this, nothing is sent to it."""

    config: Config
    split: str
    names: Sequence[str]
    results: Sequence[list[FrameResult]]
    folder: Path
    tables: Tables

    def metrics(self, number: int) -> Metrics:
        """Of one variant; writes its submission and metrics."""
        velocities = self.config.data.velocity_file
        return evaluate(
            self.results[number],
            folder=self.folder / self.names[number],
            tables=self.tables,
            split=self.split,
            velocity_file=None if velocities is None else str(Path(self.config.data.root) / velocities),
            use_camera=self.config.model.camera is not None,
            use_lidar=self.config.model.lidar is not None,
        )


# In a scoring process, its work.
_scoring: _Scoring | None = None


def _begin_scoring(scoring: _Scoring) -> None:
    global _scoring
    _scoring = scoring
    torch.set_num_threads(1)  # the threads of the main process do not exist here
    tqdm.set_lock(threading.RLock())  # nor does the thread that may hold its lock


def _metrics(number: int) -> Metrics:
    return _scoring.metrics(number)


def _score(
    config: Config,
    split: str,
    variants: Sequence[Failure | None],
    results: Sequence[list[FrameResult]],
    folder: Path,
    log: RunLog,
    tables: Tables,
) -> list[Row]:
    """Metrics of all variants, in as many processes as load the data."""
    names = [CLEAN if failure is None else failure.file_name for failure in variants]
    scoring = _Scoring(config, split, names, results, folder, tables)
    _ = tables.nusc  # loaded here once, the processes share it
    processes = min(config.data.workers, len(variants))
    metrics = []
    with log.progress("score", len(variants)) as progress:
        if processes < 2:
            for number in range(len(variants)):
                metrics.append(scoring.metrics(number))
                progress.advance()
            return [Row(*pair) for pair in zip(variants, metrics, strict=True)]
        context = multiprocessing.get_context("fork")
        try:
            with ProcessPoolExecutor(processes, context, initializer=_begin_scoring, initargs=(scoring,)) as pool:
                for result in pool.map(_metrics, range(len(variants))):
                    metrics.append(result)
                    progress.advance()
        except BrokenProcessPool:
            raise EvaluationError(
                f"{folder}: a process that scored the failures was killed, most likely by lack of memory; lower "
                f"data.workers"
            ) from None
    return [Row(*pair) for pair in zip(variants, metrics, strict=True)]
