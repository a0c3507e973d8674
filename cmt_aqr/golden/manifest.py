"""The manifest of a bundle: meaning, hash and tolerance of each tensor, and the settings of the model."""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import cmt_aqr
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.config import Config
from cmt_aqr.golden.bundle import INPUTS, MANIFEST, WEIGHTS, Source
from cmt_aqr.golden.catalogue import describe, stage_of
from cmt_aqr.golden.compare import Row, compare, largest
from cmt_aqr.golden.stages import Frame, Tensors
from cmt_aqr.models.detector import Detector
from cmt_aqr.predictions import task_classes

# A limit is this many times the error of a precision against float64, or this many units in the last place of float32.
TOLERANCE_FACTOR = 10
FLOAT32_EPS = 2.0**-23
# The rounding unit of float64 is 2^-29 of float32's; the rest is headroom.
FLOAT64_SHARE = 2.0**-26
# Largest error / largest value of float32 against float64, used for bundles without float64. Measured, and rounded up,
# for cmt_aqr_r50_800x320 on a real frame; losses and gradients for synthetic_tiny (docs/numerics.md).
TYPICAL = {
    "cameras": 1e-6, "positions": 1e-6, "voxels": 1e-7, "lidar": 1e-5, "images": 3e-5, "tokens": 2e-5,
    "denoising": 1e-6, "queries": 1e-6, "aqr": 3e-5, "bias": 3e-5, "decoder": 2e-4, "heads": 2e-4, "boxes": 5e-5,
    "losses": 1e-6, "gradients": 2e-4,
}  # fmt: skip
MAY_DIFFER = (
    "Repeated on one machine with the same versions, number of threads and command, all files are the same bits.",
    "Another version of torch, number of threads, processor or device may round float tensors differently (sums are "
    "taken in another order); the tolerances hold for that.",
    "Integers are the same everywhere, but for ties: equal scores at the end of the boxes, equal costs in matching, "
    "and cells of points that lie within rounding of a border.",
    "The random weights and frames are drawn on the CPU; they are part of the bundle and need not be drawn again.",
)


def describe_tensor(name: str, x: Tensor) -> dict[str, Any]:
    """The manifest's entry of a tensor, without what depends on the precision."""
    entry = describe(name)
    return {
        "stage": stage_of(name), "shape": list(x.shape), "axes": entry.axes, "unit": entry.unit, "frame": entry.frame,
        "meaning": entry.meaning, "source": entry.source, "dtype": {}, "sha256": {},
    }  # fmt: skip


def write(path: Path, tensors: Tensors, about: dict[str, dict], precision: str, *, prefix: str = "") -> None:
    """Write one file, and add dtype and content hash of every tensor to its entry in ``about``."""
    stored = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    for name, x in stored.items():
        entry = about[prefix + name]
        entry["dtype"][precision] = str(x.dtype).removeprefix("torch.")
        entry["sha256"][precision] = hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy()).hexdigest()
    save_file(stored, path)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write or replace the manifest."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def add_tolerances(folder: Path, manifest: dict[str, Any]) -> None:
    """Add the largest value, the measured errors against float64, and the limits that follow from them."""
    there, tensors = manifest["precisions"], manifest["tensors"]
    exact = Source(folder)
    for name, entry in tensors.items():
        entry |= {"largest": largest(exact[name]), "error": {}, "mismatches": {}, "tolerance": {}}
    for precision in there:
        if precision == "float64" or "float64" not in there:
            continue
        for row in compare(exact, Source(folder, precision=precision)).rows:
            add_error(tensors[row.name], row, precision)
    for name, entry in tensors.items():
        if stage_of(name) not in (INPUTS, WEIGHTS) and "float" in next(iter(entry["dtype"].values()), ""):
            error = entry["error"].get("float32", TYPICAL[stage_of(name)] * entry["largest"])
            limit = TOLERANCE_FACTOR * max(error, FLOAT32_EPS * entry["largest"])
            entry["tolerance"] |= {"float32": limit, "float64": FLOAT64_SHARE * limit}
            if "bf16" in entry["error"]:
                entry["tolerance"]["bf16"] = max(limit, TOLERANCE_FACTOR * entry["error"]["bf16"])
    source = "measured" if {"float64", "float32"} <= set(there) else "typical errors of float32, not of this model"
    manifest |= {"tolerance_factor": TOLERANCE_FACTOR, "tolerance_source": source}


def add_error(entry: dict[str, Any], row: Row, precision: str) -> None:
    """The measured error of one tensor."""
    if row.is_exact:
        entry["mismatches"][precision] = max(row.unpaired, row.difference.past)
    else:
        entry["error"][precision] = row.difference.max_abs


def constants(config: Config, detector: Detector, frame: Frame) -> dict[str, Any]:
    """Sizes and settings that a port needs, and that the comparison uses to try mistakes."""
    model, aqr, camera = config.model, config.model.aqr, config.model.camera
    found: dict[str, Any] = {
        "point_range": list(model.point_range), "num_queries": model.num_queries, "num_heads": model.num_heads,
        "num_layers": model.num_layers, "hidden_dim": model.hidden_dim, "depth_bins": model.depth_bins,
        "head_kernel": model.head_kernel, "classes": list(CLASSES), "cameras": list(CAMERAS),
        "tasks": [list(task) for task in task_classes(model.tasks)], "grids": grids(config, detector, frame),
        "post_range": list(config.evaluation.post_range), "max_detections": config.evaluation.max_detections,
        "score_threshold": config.evaluation.score_threshold,
    }  # fmt: skip
    if camera is not None:
        found |= {"image_size": list(frame.image_size), "mean": list(camera.mean), "std": list(camera.std)}
        found["channel_order"] = camera.channel_order
    if aqr is not None:
        found |= {
            "windows": {"lidar": aqr.bev_window, "camera": aqr.camera_window}, "activation": aqr.activation,
            "camera_assignment": aqr.camera_assignment, "unseen": aqr.unseen, "max_bias": aqr.max_bias,
            "scale": None if detector.aqr is None or aqr.design != "bias" else detector.aqr.scale().item(),
        }  # fmt: skip
    return found


@torch.no_grad()
def grids(config: Config, detector: Detector, frame: Frame) -> list[dict[str, Any]]:
    """The token grids in order."""
    found, size = [], config.model.camera and config.model.camera.input_size
    if config.model.lidar is not None:
        _, rows, cols = detector.lidar_branch.encoder.output_shape
        place = {"origin": list(detector.bev_origin), "cell_size": list(detector.bev_cell_size)}
        found.append({"name": "lidar", "views": 1, "rows": rows, "cols": cols, **place})
    if size is not None:
        rows, cols = (-(-length // 32) * 2 for length in size)
        views = {"name": "camera", "views": frame.images.shape[1], "rows": rows, "cols": cols}
        found.append({**views, "origin": None, "cell_size": None})
    return found


def circumstances(origin: str, device: torch.device, *, is_training: bool) -> dict[str, Any]:
    """How and where the numbers were computed, and what may differ elsewhere."""
    return {
        "origin": origin,
        "mode": "training: denoising queries, losses and gradients; dropout and GridMask off, batch norm with its "
        "running statistics" if is_training else "evaluation",
        "versions": {"cmt_aqr": cmt_aqr.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        },
        "may_differ": list(MAY_DIFFER),
    }  # fmt: skip
