"""What AQR does: weights of the sensors by class, distance, condition and failure; attention with and without the bias.

    python -m cmt_aqr.tools.analyze configs/synthetic_tiny.yaml --checkpoint runs/synthetic_tiny/latest.pt
    python -m cmt_aqr.tools.analyze CONFIG --checkpoint C --failure lidar_drop --failure view_drop:FRONT --frames 40

Writes analysis.json, weights.png and attention.png to the output folder (runs/<name>/analysis). "Objects" are queries
whose best class scores at least --score; a query without a window of a sensor has no weight for it.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cmt_aqr.tools.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file that the checkpoint was trained with")
    parser.add_argument("--checkpoint", required=True, help="checkpoint of train.py, or .safetensors weights")
    parser.add_argument(
        "--failure", action="append", default=[], metavar="NAME[:LEVEL]", help="also under this failure"
    )
    parser.add_argument("--failures", metavar="SUITE", help="also under all of multicorrupt, mome or all")
    parser.add_argument("--failure-seed", type=int, default=0, help="seed of the failures' random numbers (default: 0)")
    parser.add_argument("--frames", type=int, default=20, help="frames, evenly spread over the split (default: 20)")
    parser.add_argument(
        "--score", type=float, default=0.1, help="queries with a lower score are left out (default: 0.1)"
    )
    parser.add_argument("--split", help="default: data.val_split")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change keys")
    parser.add_argument("--out", type=Path, help="output folder (default: runs/<name>/analysis)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is a GPU")
    return parser


if __name__ == "__main__":
    _parser().parse_args()  # answers --help and mistakes before the imports below, which take seconds

import numpy as np
import torch
from tqdm import tqdm

from cmt_aqr.boxes import decode_boxes
from cmt_aqr.build import build_detector, check_device, failure_dataset, open_split, sensors_of
from cmt_aqr.classes import CLASSES
from cmt_aqr.config import ConfigError, load_config, naming_source
from cmt_aqr.data.failures import Failure
from cmt_aqr.data.sample import collate
from cmt_aqr.devices import choose_device
from cmt_aqr.errors import report_errors
from cmt_aqr.files import atomic_path
from cmt_aqr.inspection import Inspection, inspect
from cmt_aqr.jobs import prepare_data
from cmt_aqr.models.detector import Detector
from cmt_aqr.nuscenes_tables import Tables
from cmt_aqr.robustness import choose_failures
from cmt_aqr.training.checkpoint import load_into, load_weights
from cmt_aqr.viz.analysis_figures import draw_attention, draw_weights

SENSORS = ("lidar", "camera")
# Limits of the groups by distance from the LiDAR, metres.
DISTANCES = (0, 10, 20, 30, 40, 55)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def query_rows(inspection: Inspection) -> dict[str, np.ndarray]:
    """Of each query of one frame: its best class and the score of it, distance of its box (m), weights (Q, 2)."""
    predictions = inspection.predictions
    logits = torch.cat([predictions.logits(task)[-1, 0] for task in range(len(predictions.tasks))], dim=-1)
    classes = torch.tensor([label for members in predictions.classes for label in members], device=logits.device)
    owners = [task for task, members in enumerate(predictions.classes) for _ in members]
    score, column = logits.sigmoid().max(dim=-1)
    codes = torch.stack([predictions.codes(task)[-1, 0] for task in range(len(predictions.tasks))])
    own = codes[torch.tensor(owners, device=logits.device)[column], torch.arange(len(score), device=logits.device)]
    distance = decode_boxes(own)[:, :2].norm(dim=-1)
    columns = {"label": classes[column], "score": score, "distance": distance, "weights": inspection.weights[0]}
    return {name: value.float().cpu().numpy() for name, value in columns.items()}


def attention_rows(inspection: Inspection, is_object: np.ndarray) -> list[dict[str, list[float]]]:
    """For each layer the means over the objects of one frame, sensors in the order of the tokens."""
    chosen = torch.from_numpy(is_object).to(inspection.weights.device)
    rows = []
    for layer in inspection.layers:
        parts = {name: getattr(layer, name)[0, chosen] for name in (
            "change", "mass", "plain_mass", "window_mass", "plain_window_mass")}  # fmt: skip
        rows.append({name: np.atleast_1d(part.mean(dim=0).cpu().numpy()).tolist() for name, part in parts.items()})
    return rows


def summary(values: np.ndarray) -> dict[str, float | int | None]:
    """Count, mean and quantiles of the finite values; None where there are no finite values."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"count": 0, "mean": None} | {f"q{round(100 * q):02d}": None for q in QUANTILES}
    found = {f"q{round(100 * q):02d}": float(x) for q, x in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
    return {"count": len(values), "mean": float(values.mean())} | found


def grouped(rows: dict[str, np.ndarray], conditions: np.ndarray) -> dict[str, dict]:
    """Summaries of the weights of both sensors: all, by class, by distance, by condition."""
    result = {}
    for number, sensor in enumerate(SENSORS):
        weights = rows["weights"][:, number]
        bins = list(pairwise(DISTANCES))
        result[sensor] = {
            "all": summary(weights),
            "by_class": {name: summary(weights[rows["label"] == i]) for i, name in enumerate(CLASSES)},
            "by_distance": {
                f"{a}-{b} m": summary(weights[(rows["distance"] >= a) & (rows["distance"] < b)]) for a, b in bins
            },
            "by_condition": {str(name): summary(weights[conditions == name]) for name in np.unique(conditions)},
        }
    return result


def condition_of(description: str) -> str:
    """Night, rain, both or neither, from a scene's description as nuScenes and the synthetic world write it."""
    # Whole words: a train does not mean rain.
    patterns = {"night": r"\bnight\b", "rain": r"\brain(y|ing)?\b"}
    found = [name for name, pattern in patterns.items() if re.search(pattern, description, re.IGNORECASE)]
    return " and ".join(found) or "day, dry"


def analyze(
    model: Detector, dataset, tables: Tables, names: Sequence[str], frames: Sequence[int], score: float
) -> dict[str, dict]:
    """Summaries of every variant (clean and failures, by name) over the frames."""
    device = next(model.parameters()).device
    scenes = {scene["token"]: scene["description"] for scene in tables.nusc.scene}
    result = {}
    for which, name in enumerate(names):
        parts, conditions, attention = [], [], []
        for number in tqdm(frames, desc=name, unit="frame", disable=None):
            sample = dataset[number * len(names) + which]
            batch = collate([sample]).to(device)
            found = inspect(model, batch.images, batch.points, batch.lidar2img)
            rows = query_rows(found)
            is_object = rows["score"] >= score
            parts.append({key: value[is_object] for key, value in rows.items()})
            scene = tables.nusc.get("sample", sample.token)["scene_token"]
            conditions += [condition_of(scenes[scene])] * int(is_object.sum())
            if is_object.any():
                attention.append(attention_rows(found, is_object))
        rows = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        layers = [
            {key: np.mean([frame[i][key] for frame in attention], axis=0).tolist() for key in attention[0][i]}
            for i in range(len(attention[0]) if attention else 0)
        ]
        result[name] = {
            "objects": len(rows["score"]),
            "weights": grouped(rows, np.array(conditions, dtype=object)),
            "attention_by_layer": layers,
        }
    return result


def run(options: argparse.Namespace) -> int:
    """Load the model, analyse the frames, write the results; returns the exit status."""
    if options.frames < 1:
        raise ConfigError([f"--frames: must be at least 1, got {options.frames}"])
    config = load_config(options.config, options.set)
    device = choose_device(options.device)
    with naming_source(options.config, options.set):
        if config.model.aqr is None:
            raise ConfigError(["model.aqr: is null: a model without AQR has no weights to analyze"])
        check_device(config.model, device)
    failures: list[Failure | None] = [
        None,
        *choose_failures(options.failure, options.failures, sensors_of(config.model)),
    ]
    model = build_detector(config.model)
    load_into(model, load_weights(options.checkpoint), options.checkpoint)
    prepare_data(config, verbose=True)
    index = open_split(config.data, options.split or config.data.val_split)
    count = min(options.frames, len(index))
    frames = [(2 * i + 1) * len(index) // (2 * count) for i in range(count)]
    names = ["clean" if failure is None else failure.name for failure in failures]
    dataset = failure_dataset(config, index, failures, options.failure_seed)
    tables = Tables(config.data.root, config.data.version)
    result = analyze(model.to(device).eval(), dataset, tables, names, frames, options.score)
    report = {
        "configuration": config.name,
        "checkpoint": str(options.checkpoint),
        "frames": count,
        "score": options.score,
    }
    report["scale"] = model.aqr.scale().item() if config.model.aqr.design == "bias" else None
    report["variants"] = result
    folder = options.out or Path("runs") / config.name / "analysis"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "analysis.json") as part:
        part.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draw_weights(result, folder / "weights.png", title=config.name)
    draw_attention(result, folder / "attention.png", title=config.name)
    for name, variant in result.items():
        means = [variant["weights"][sensor]["all"]["mean"] for sensor in SENSORS]
        shown = ", ".join(f"w_{s} {'-' if m is None else f'{m:+.3f}'}" for s, m in zip(SENSORS, means, strict=True))
        print(f"{name:<24} {variant['objects']:>6} objects   mean {shown}")
    print(f"analysis.json, weights.png and attention.png in {folder}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    return report_errors(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
