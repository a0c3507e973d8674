"""Run a detector on one frame and write every stage of it: a folder of safetensors files and a manifest.

The files: inputs.safetensors, weights.safetensors, one for each precision (float64.safetensors ...), manifest.json.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_aqr.aqr.router import BiasRouter
from cmt_aqr.build import build_criterion
from cmt_aqr.config import Config, to_tree
from cmt_aqr.errors import UserError
from cmt_aqr.files import atomic_path
from cmt_aqr.golden.bundle import FORMAT, INPUTS, WEIGHTS
from cmt_aqr.golden.catalogue import GRADIENTS, STAGES, stage_of
from cmt_aqr.golden.compare import ordered
from cmt_aqr.golden.manifest import add_tolerances, circumstances, constants, describe_tensor, write, write_manifest
from cmt_aqr.golden.stages import Frame, Tensors, keep_gradients, run_boxes, run_branches, run_head, run_losses
from cmt_aqr.jobs import decoding_of
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from cmt_aqr.models.detector import Detector
from cmt_aqr.predictions import DenoisingQueries
from cmt_aqr.training.seeding import denoising_noise


class ExportError(UserError):
    """The model or frame cannot be exported; the message says why."""


@dataclass(frozen=True)
class Choice:
    """What to export.

    Attributes:
        precisions: some of catalogue.PRECISIONS.
        stages: those to write; all are computed.
        is_training: whether denoising queries, losses and gradients are computed, too.
        gradients: prefixes of the names of parameters whose gradients are written.
        origin: of weights and frame, in words, for the manifest.
    """

    precisions: Sequence[str]
    stages: Sequence[str] = STAGES
    is_training: bool = False
    gradients: Sequence[str] = GRADIENTS
    origin: str = ""


def export(config: Config, detector: Detector, frame: Frame, choice: Choice, folder: Path) -> None:
    """Write a bundle; the folder appears complete or not at all.

    Args:
        detector: float32, in evaluation mode.

    Raises:
        ExportError: the model cannot be exported.
    """
    device = detector.reference_points.weight.device
    check(config, device, is_training=choice.is_training)
    with atomic_path(folder) as partial:
        partial.mkdir()
        inputs = input_tensors(config, frame, choice)
        manifest: dict[str, Any] = {"format": FORMAT, "precisions": list(choice.precisions), "tensors": {}}
        manifest["evaluators"] = {}
        about = {name: describe_tensor(name, x) for name, x in inputs.items()}
        write(partial / f"{INPUTS}.safetensors", inputs, about, INPUTS)
        weights = {name: x.detach() for name, x in detector.state_dict().items()}
        about |= {f"{WEIGHTS}/{name}": describe_tensor(f"{WEIGHTS}/{name}", x) for name, x in weights.items()}
        write(partial / f"{WEIGHTS}.safetensors", weights, about, WEIGHTS, prefix=f"{WEIGHTS}/")
        for precision in choice.precisions:
            made, details = run(config, detector, frame, inputs, choice, precision)
            made = {name: made[name] for name in ordered(made) if stage_of(name) in choice.stages}
            for name, x in made.items():
                about.setdefault(name, describe_tensor(name, x))
            write(partial / f"{precision}.safetensors", made, about, precision)
            manifest["evaluators"][precision] = details.pop("evaluators")
            manifest |= details
        manifest["tensors"] = {name: about[name] for name in ordered(about)}
        manifest |= {
            "config": to_tree(config),
            "constants": constants(config, detector, frame),
            **circumstances(choice.origin, device, is_training=choice.is_training),
        }
        write_manifest(partial, manifest)
        add_tolerances(partial, manifest)
        write_manifest(partial, manifest)


def check(config: Config, device: torch.device, *, is_training: bool) -> None:
    """Raise ExportError for an attention backend that is not exact, or that cannot compute what is requested."""
    backend = config.model.attention.backend
    if config.model.aqr is None or config.model.aqr.design != "bias":
        return
    if backend == "lowrank":
        raise ExportError("model.attention.backend is 'lowrank', which approximates; export with 'dense'")
    if backend == "score_mod" and is_training and device.type == "cpu":
        raise ExportError(
            "model.attention.backend is 'score_mod', which has no backward pass on a CPU; with --train use "
            "--set model.attention.backend=dense, or --device cuda"
        )


def input_tensors(config: Config, frame: Frame, choice: Choice) -> Tensors:
    """The tensors that a port starts from."""
    inputs: Tensors = {}
    if config.model.camera is not None:
        inputs |= {"inputs/images": frame.images, "inputs/lidar2img": frame.lidar2img}
    if config.model.lidar is not None:
        inputs |= {f"inputs/points.{sample}": x for sample, x in enumerate(frame.points)}
    if choice.is_training:
        for sample, targets in enumerate(frame.targets):
            inputs[f"inputs/boxes.{sample}"], inputs[f"inputs/labels.{sample}"] = targets.boxes, targets.labels
        if config.model.denoising.num_dn:
            positions = range(frame.batch_size)
            inputs["inputs/noise"] = denoising_noise(config.seed, 0, positions, config.model.denoising.num_dn)
    return inputs


def run(
    config: Config, detector: Detector, frame: Frame, inputs: Tensors, choice: Choice, precision: str
) -> tuple[Tensors, dict[str, Any]]:
    """All stages in one precision, and the details of them for the manifest.

    bf16 is autocast, as in evaluation with that precision: what the detector keeps in float32 stays in float32.
    """
    model = in_precision(detector, precision)
    device = model.reference_points.weight.device
    made: Tensors = {}
    with (
        torch.set_grad_enabled(choice.is_training),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
    ):
        maps = run_branches(model, frame, made)
        denoising = None
        if "inputs/noise" in inputs:
            denoising = draw_denoising(config, frame, inputs["inputs/noise"])
        predictions = run_head(model, maps, frame, denoising, made)
        run_boxes(predictions, decoding_of(config), made)
        if not choice.is_training:
            return made, {"evaluators": evaluators(model)}
        criterion = build_criterion(config, reduce_mean=None, num_processes=1)
        model.zero_grad()
        run_losses(criterion, predictions, frame.targets, denoising, made).backward()
        names = keep_gradients(model, choice.gradients, made)
        model.zero_grad()
    return {name: x.detach() for name, x in made.items()}, {"evaluators": evaluators(model), "gradient_names": names}


def in_precision(detector: Detector, precision: str) -> Detector:
    """The detector; for float64 a copy, with evaluators that can compute in float64 whatever the configuration has."""
    if precision != "float64":
        return detector
    exact = copy.deepcopy(detector).double()
    if isinstance(exact.aqr, BiasRouter):
        exact.aqr.backend = "dense"
    if exact.lidar_branch is not None and exact.reference_points.weight.device.type == "cuda":
        exact.lidar_branch.encoder.backend = "torch"
    return exact


def evaluators(detector: Detector) -> dict[str, str]:
    """Which evaluators compute the cross-attention and the sparse encoder."""
    device = detector.reference_points.weight.device
    has_bias = isinstance(detector.aqr, BiasRouter)
    found = {"attention": detector.aqr.evaluator(device) if has_bias else "dense"}
    if detector.lidar_branch is not None:
        found["sparse encoder"] = detector.lidar_branch.encoder.choose_backend(device, is_training=False)
    return found


def draw_denoising(config: Config, frame: Frame, noise: Tensor) -> DenoisingQueries:
    """Denoising queries of the frame from the given random numbers."""
    settings = config.model.denoising
    return make_denoising(
        frame.targets,
        num_queries=config.model.num_queries,
        num_dn=settings.num_dn,
        point_range=config.model.point_range,
        settings=DenoisingSettings(settings.max_groups, settings.noise_scale, settings.positive_threshold),
        noise=noise,
    )
