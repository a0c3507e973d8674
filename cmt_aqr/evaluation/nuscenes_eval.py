"""Official nuScenes detection metrics of a submission, through the devkit's ``DetectionEval``.

The devkit's functions load the ground truth, filter and match; this module adds what they leave out: user errors
as one sentence each, a submission without any detection, the mean AP of the classes that are in the data at all, and a
table.
"""

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.common.loaders import add_center_dist, filter_eval_boxes, load_gt_of_sample_tokens
from nuscenes.eval.detection.constants import ATTRIBUTE_NAMES
from nuscenes.eval.detection.data_classes import DetectionBox, DetectionConfig, DetectionMetrics
from nuscenes.eval.detection.evaluate import DetectionEval

from cmt_aqr.classes import CLASSES
from cmt_aqr.evaluation.submission import EvaluationError, read_submission
from cmt_aqr.nuscenes_tables import CheckedNuScenes, read_splits, read_velocities
from cmt_aqr.table_schema import TableError, show

CONFIGURATION = "detection_cvpr_2019"
METRICS_FILE = "metrics.json"

# Devkit's name of a true positive error -> ours; mean over classes is written with an m before it.
_ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}


@dataclass(frozen=True)
class Metrics:
    """Metrics of one submission; NaN where a metric is not defined.

    Attributes:
        split: evaluated split.
        num_samples: samples in it.
        mean_ap: mAP over all ten classes, in [0, 1].
        nds: nuScenes detection score, in [0, 1].
        mean_ap_in_range: mean AP of the classes that have ground truth in range.
        mean_errors: mATE (m), mASE (1 - IoU), mAOE (rad), mAVE (m/s), mAAE (1 - accuracy).
        ap: class -> AP, mean over the distances.
        ap_at: class -> distance in metres -> AP.
        errors: class -> ATE, ASE, AOE, AVE, AAE at 2 m.
        num_ground_truth: class -> boxes in range, with at least one LiDAR or radar point.
        num_detections: class -> submitted boxes in range.
    """

    split: str
    num_samples: int
    mean_ap: float
    nds: float
    mean_ap_in_range: float
    mean_errors: dict[str, float]
    ap: dict[str, float]
    ap_at: dict[str, dict[float, float]]
    errors: dict[str, dict[str, float]]
    num_ground_truth: dict[str, int]
    num_detections: dict[str, int]

    def to_json(self) -> str:
        """JSON text; NaN is written as null, distances are strings."""
        return json.dumps(_without_nan(asdict(self)), indent=2, allow_nan=False)

    def scalars(self) -> dict[str, float]:
        """The main metrics, flat, for a log: mAP, NDS, mATE ..., and AP/<class>."""
        headline = {"mAP": self.mean_ap, "NDS": self.nds, "mAP_in_range": self.mean_ap_in_range, **self.mean_errors}
        return headline | {f"AP/{name}": value for name, value in self.ap.items()}


def load_nuscenes(dataroot: str | os.PathLike, version: str, *, verbose: bool = False) -> NuScenes:
    """Load the tables of a nuScenes-format data set.

    Raises:
        EvaluationError: no such data set or version (available ones are listed), or a broken table.
    """
    try:
        with _quiet(verbose):
            return CheckedNuScenes(dataroot, version, verbose=verbose)
    except TableError as error:
        raise EvaluationError(str(error)) from None


def split_tokens(nusc: NuScenes, split: str) -> list[str]:
    """Sample tokens of a predefined split, or of one in the version's ``splits.json``.

    Raises:
        EvaluationError: unknown split (available ones are listed) or a split without samples in this data set.
    """
    scenes_of = _splits(nusc)
    names = {scene["token"]: scene["name"] for scene in nusc.scene}
    scenes = set(scenes_of.get(split, ()))
    tokens = [sample["token"] for sample in nusc.sample if names[sample["scene_token"]] in scenes]
    if not tokens:
        usable = [name for name, scenes in scenes_of.items() if set(scenes) & set(names.values())]
        problem = "has no sample in this data set" if split in scenes_of else "is unknown"
        raise EvaluationError(
            f"{nusc.table_root}: split {split!r} {problem}; available there: {', '.join(usable) or 'none'}"
        )
    return tokens


def evaluate_submission(
    dataroot: str | os.PathLike,
    version: str,
    split: str,
    submission_path: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    nusc: NuScenes | None = None,
    velocity_file: str | os.PathLike | None = None,
    verbose: bool = False,
) -> Metrics:
    """Score a submission with the official metrics and save them as ``output_dir/metrics.json``.

    Args:
        dataroot, version: the nuScenes-format data set; only read when ``nusc`` is not given.
        split: predefined or custom split; the submission must hold its samples, all of them and no others.
        submission_path: the JSON file.
        output_dir: made when absent.
        nusc: tables already loaded (:func:`load_nuscenes`), to evaluate often.
        velocity_file: JSON, annotation token -> {velocity_global_xy: [vx, vy] or null} in m/s; replaces the velocities
            that the devkit takes from neighbouring frames, for the annotations that it lists.
        verbose: let the devkit print.

    Raises:
        EvaluationError: one sentence on what is wrong with the data set, the split or the submission.

    *Source*: nuscenes-devkit ``DetectionEval``, configuration detection_cvpr_2019.
    """
    nusc = nusc or load_nuscenes(dataroot, version, verbose=verbose)
    config = config_factory(CONFIGURATION)
    tokens = split_tokens(nusc, split)
    predictions = _load_predictions(Path(submission_path), nusc, split, tokens, config)
    _check_attributes(nusc)
    with _quiet(verbose), _velocities(nusc, velocity_file):
        truth = load_gt_of_sample_tokens(nusc, tokens, DetectionBox, verbose=verbose)
    num_annotated = len(truth.all)
    with _quiet(verbose):
        truth = _in_range(nusc, truth, config, verbose)
        predictions = _in_range(nusc, predictions, config, verbose)
        if not truth.all:
            raise EvaluationError(
                f"{nusc.table_root}: split {split!r} has no ground truth to score against ({num_annotated} boxes of "
                f"the ten classes, none of them in range with a point inside)"
            )
        official, _ = _LoadedDetectionEval(config, truth, predictions, verbose).evaluate()
    metrics = _collect(official, split, truth, predictions)
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / METRICS_FILE).write_text(metrics.to_json() + "\n", encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{output_dir / METRICS_FILE}: cannot be written: {error.strerror}") from error
    return metrics


def format_table(metrics: Metrics) -> str:
    """Plain text table of everything in ``metrics``; a metric that is not defined is '-'."""
    distances = list(next(iter(metrics.ap_at.values())))
    present = sum(count > 0 for count in metrics.num_ground_truth.values())
    headline = {"mAP": metrics.mean_ap, "NDS": metrics.nds} | metrics.mean_errors
    lines = [
        f"split {metrics.split}, {metrics.num_samples} samples",
        "   ".join(f"{name} {_number(value, 4)}" for name, value in headline.items()),
        f"mean AP of the {present} classes in range {_number(metrics.mean_ap_in_range, 4)}",
        "",
        f"{'class':<20} {'GT':>7} {'boxes':>7} {'AP':>7}"
        + "".join(f" {f'@{d:g}m':>6}" for d in distances)
        + " "
        + "".join(f" {name:>6}" for name in _ERRORS.values()),
    ]
    lines.append("-" * len(lines[-1]))
    for name in CLASSES:
        lines.append(
            f"{name:<20} {metrics.num_ground_truth[name]:>7} {metrics.num_detections[name]:>7}"
            f" {_number(metrics.ap[name]):>7}"
            + "".join(f" {_number(metrics.ap_at[name][d]):>6}" for d in distances)
            + " "
            + "".join(f" {_number(metrics.errors[name][error]):>6}" for error in _ERRORS.values())
        )
    return "\n".join(lines)


class _LoadedDetectionEval(DetectionEval):
    """The official evaluation of boxes that are loaded and filtered already.

    The original constructor reads the submission a second time and fails when there is no detection at all.
    """

    def __init__(self, config: DetectionConfig, truth: EvalBoxes, predictions: EvalBoxes, verbose: bool):
        self.cfg = config
        self.gt_boxes = truth
        self.pred_boxes = predictions
        self.verbose = verbose


def _splits(nusc: NuScenes) -> dict[str, list[str]]:
    """Split name -> scene names: the official splits and those of the version's splits.json, which win."""
    try:
        return read_splits(Path(nusc.table_root))
    except TableError as error:
        raise EvaluationError(str(error)) from None


def _check_attributes(nusc: NuScenes) -> None:
    file = Path(nusc.table_root) / "attribute.json"
    used = set(chain.from_iterable(row["attribute_tokens"] for row in nusc.sample_annotation))
    for row in nusc.attribute:
        if row["token"] in used and row["name"] not in ATTRIBUTE_NAMES:
            raise EvaluationError(
                f"{file}: {row['token']} has name {show(row['name'])}, expected one of {', '.join(ATTRIBUTE_NAMES)}"
            )


def _load_predictions(path: Path, nusc: NuScenes, split: str, tokens: list[str], config: DetectionConfig) -> EvalBoxes:
    """Read and check a submission; its samples in the order of ``tokens``."""
    _, results = read_submission(path)
    known, wanted = {sample["token"] for sample in nusc.sample}, set(tokens)
    for what, wrong in (
        ("results for unknown tokens", [t for t in results if t not in known]),
        (f"results for samples outside split {split!r}", [t for t in results if t in known and t not in wanted]),
        (f"no results for samples of split {split!r}", [t for t in tokens if t not in results]),
    ):
        if wrong:
            raise EvaluationError(f"{path}: {what}: {len(wrong)}, the first is {wrong[0]!r}")
    boxes = EvalBoxes()
    for token in tokens:
        rows = results[token]
        if len(rows) > config.max_boxes_per_sample:
            raise EvaluationError(
                f"{path}: {len(rows)} boxes in sample {token}, the benchmark allows {config.max_boxes_per_sample}"
            )
        boxes.add_boxes(token, [_to_box(path, token, i, row) for i, row in enumerate(rows)])
    return boxes


def _to_box(path: Path, token: str, index: int, row: dict) -> DetectionBox:
    """One row as the devkit's box; its assertions become sentences."""
    where = f"{path}: row {index} of sample {token}"
    try:
        box = DetectionBox.deserialize(row)
        numbers = np.array([*box.translation, *box.size, *box.rotation, *box.velocity, box.detection_score], float)
    except KeyError as error:
        raise EvaluationError(f"{where}: the field {error} is missing") from error
    except (AssertionError, TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: {str(error).removeprefix('Error: ')}") from error
    if box.sample_token != token:
        raise EvaluationError(f"{where}: its sample_token is {box.sample_token!r}")
    if not np.isfinite(numbers).all() or min(box.size) <= 0 or not any(box.rotation):
        raise EvaluationError(f"{where}: numbers must be finite, sizes positive and the rotation not zero")
    return box


def _in_range(nusc: NuScenes, boxes: EvalBoxes, config: DetectionConfig, verbose: bool) -> EvalBoxes:
    """The boxes that the benchmark scores. The devkit's filter cannot be called without any box."""
    if not boxes.all:
        return boxes
    return filter_eval_boxes(nusc, add_center_dist(nusc, boxes), config.class_range, verbose=verbose)


def _collect(official: DetectionMetrics, split: str, truth: EvalBoxes, predictions: EvalBoxes) -> Metrics:
    """The devkit's metrics as plain Python numbers."""
    content = official.serialize()
    num_truth = Counter(box.detection_name for box in truth.all)
    num_detections = Counter(box.detection_name for box in predictions.all)
    ap = {name: float(content["mean_dist_aps"][name]) for name in CLASSES}
    errors = content["label_tp_errors"]
    return Metrics(
        split=split,
        num_samples=len(truth.sample_tokens),
        mean_ap=float(content["mean_ap"]),
        nds=float(content["nd_score"]),
        mean_ap_in_range=float(np.mean([ap[name] for name in CLASSES if num_truth[name]])),
        mean_errors={f"m{ours}": float(content["tp_errors"][theirs]) for theirs, ours in _ERRORS.items()},
        ap=ap,
        ap_at={n: {float(d): float(v) for d, v in content["label_aps"][n].items()} for n in CLASSES},
        errors={n: {ours: float(errors[n][theirs]) for theirs, ours in _ERRORS.items()} for n in CLASSES},
        num_ground_truth={name: num_truth[name] for name in CLASSES},
        num_detections={name: num_detections[name] for name in CLASSES},
    )


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Swallow what the devkit prints and its progress bars, unless verbose."""
    if verbose:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _velocities(nusc: NuScenes, path: str | os.PathLike | None) -> Iterator[None]:
    """Let ``nusc.box_velocity`` answer from a file for a while."""
    if path is None:
        yield
        return
    try:
        known = read_velocities(Path(path))
    except TableError as error:
        raise EvaluationError(str(error)) from None

    estimate = nusc.box_velocity

    def box_velocity(token: str, max_time_diff: float = 1.5) -> np.ndarray:
        if token not in known:
            return estimate(token, max_time_diff)
        return np.array([*(known[token] or (np.nan, np.nan)), np.nan])

    nusc.box_velocity = box_velocity
    try:
        yield
    finally:
        del nusc.box_velocity


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _without_nan(value: object) -> object:
    """The same nested dicts with None for NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
