"""Frames with the detections of one checkpoint, or of two: the work of ``tools.visualize model``."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.attention_maps import query_maps
from cmt_aqr.build import build_detector, check_device, failure_dataset, open_split, sensors_of
from cmt_aqr.config import Config, ConfigError, config_from_tree, load_config, naming_source
from cmt_aqr.data.failures import Failure, SensorData, failed_panels
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.sample import Sample, collate
from cmt_aqr.devices import choose_device
from cmt_aqr.evaluation.postprocess import class_tables, find_best
from cmt_aqr.evaluation.submission import EvaluationError
from cmt_aqr.found import find_kept, pack
from cmt_aqr.inspection import inspect
from cmt_aqr.jobs import decoding_of, has_boxes, load_model, prepare_data, spread
from cmt_aqr.models.detector import Detector
from cmt_aqr.robustness import choose_failures
from cmt_aqr.training.checkpoint import load_weights_and_config
from cmt_aqr.viz.shown_frame import Answer, ShownFrame


@dataclass(frozen=True)
class LoadedDetector:
    """The detector of a checkpoint, ready for inference."""

    name: str
    config: Config
    model: Detector

    @torch.no_grad()
    def answer(self, sample: Sample, num_queries: int = 0) -> Answer:
        """Detections of one frame with the weights of their queries, on the CPU, and the attention of the best ones."""
        device = next(self.model.parameters()).device
        batch = collate([sample]).to(device)
        weights = None
        if self.model.aqr is None:
            predictions = self.model(batch.images, batch.points, batch.lidar2img)
        else:
            seen = inspect(self.model, batch.images, batch.points, batch.lidar2img, with_attention=False)
            predictions, weights = seen.predictions, seen.weights
        best = find_best(predictions, decoding_of(self.config), class_tables(predictions.classes, device))
        (found,) = find_kept(pack(best, weights).cpu())
        maps = []
        if num_queries and isinstance(self.model.aqr, BiasRouter) and len(found.queries):
            maps = query_maps(self.model, batch.images, batch.points, batch.lidar2img, found, num_queries)
        return Answer(found.detections, found.aqr_weights, tuple(maps))


def frames_of_models(options: argparse.Namespace) -> Iterator[ShownFrame]:
    """The chosen frames, each clean and under every failure, with what the checkpoints found.

    Raises:
        UserError: a configuration, checkpoint, failure, token or frame that cannot be used.
    """
    config = load_config(options.config, options.set)
    device = choose_device(options.device)
    with naming_source(options.config, options.set):
        check_device(config.model, device)
    detectors = [load_detector(options.checkpoint, config, device)]
    if options.compare is not None:
        detectors.append(load_detector(options.compare, own_model(config, options.compare), device))
    if options.colour == "trust":
        for detector in detectors:
            if detector.config.model.aqr is None:
                raise ConfigError([f"--colour trust: {detector.name} has no AQR (model.aqr is null); use outcome"])
    detectors = named_apart(detectors)
    failures = [None, *choose_failures(options.failure, None, sensors_of(config.model))]
    prepare_data(config, verbose=True)
    index = open_split(config.data, options.split or config.data.val_split)
    has_truth = has_boxes(index)
    if options.colour == "outcome" and not has_truth:
        raise EvaluationError(f"--colour outcome: no frame of the split {index.split!r} is annotated; use class")
    datasets = [failure_dataset(detector.config, index, failures, options.failure_seed) for detector in detectors]
    for number in chosen_frames(index, options.tokens, options.count):
        clean: SensorData | None = None
        for which, failure in enumerate(failures):
            samples = [dataset[number * len(failures) + which] for dataset in datasets]
            data = SensorData(samples[0].images, samples[0].points, samples[0].lidar2img)
            clean = data if failure is None else clean
            answers = {d.name: d.answer(sample, options.queries) for d, sample in zip(detectors, samples, strict=True)}
            shown = shown_frame(index, number, samples[0], failure, answers, clean)
            yield shown if has_truth else replace(shown, targets=None)


def shown_frame(
    index: FrameIndex,
    number: int,
    sample: Sample,
    failure: Failure | None,
    answers: dict[str, Answer],
    clean: SensorData,
) -> ShownFrame:
    """One frame under one failure; ``clean``: its data without the failure."""
    data = SensorData(sample.images, sample.points, sample.lidar2img)
    token, about = sample.token, "" if failure is None else f"   {failure.name}: {failure.definition.about}"
    end = "" if failure is None else f"_{failure.file_name}"
    return ShownFrame(
        f"{number:05d}_{token[:16]}{end}",
        f"{index.frame(number).scene}, sample {token[:16]}{about}",
        *data,
        answers,
        sample.targets,
        {} if failure is None else failed_panels(failure, data, clean),
        "clean" if failure is None else failure.name,
    )


def load_detector(path: Path, config: Config, device: torch.device) -> LoadedDetector:
    """Load a checkpoint into the model of a configuration."""
    model = build_detector(config.model)
    load_model(model, config, path)
    return LoadedDetector(str(path), config, model.to(device).eval())


def own_model(config: Config, path: Path) -> Config:
    """The configuration with the model of a checkpoint that holds its own, such as a baseline beside AQR."""
    tree = load_weights_and_config(path)[1]
    if tree is None:
        return config
    own = config_from_tree(tree, str(path))
    return replace(config, model=own.model, data=replace(config.data, num_sweeps=own.data.num_sweeps))


def named_apart(detectors: Sequence[LoadedDetector]) -> list[LoadedDetector]:
    """Detectors named A and B with the end of their paths; a single one is named by its path."""
    if len(detectors) == 1:
        return list(detectors)
    ends = ["/".join(Path(detector.name).parts[-2:]) for detector in detectors]
    return [replace(d, name=f"{letter}: {end}") for d, letter, end in zip(detectors, "AB", ends, strict=True)]


def chosen_frames(index: FrameIndex, tokens: Sequence[str] | None, count: int) -> list[int]:
    """Frame numbers of the given tokens, or of ``count`` frames spread over the split.

    Raises:
        EvaluationError: a token is not in the split.
    """
    number_of = {token: number for number, token in enumerate(index.tokens)}
    wanted = tokens or spread(index.tokens, count)
    unknown = [token for token in wanted if token not in number_of]
    if unknown:
        raise EvaluationError(f"--tokens: split {index.split!r} of {index.version} has no sample {unknown[0]!r}")
    return [number_of[token] for token in wanted]
