"""Writing a whole world: all scenes, by several processes if wanted, then the tables, then the final name."""

import json
import logging
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2

from cmt_aqr.classes import CLASSES
from cmt_aqr.errors import UserError, describe_os_error
from cmt_aqr.files import atomic_path, write_bytes
from cmt_aqr.locks import exclusive_lock
from cmt_aqr.progress import make_bar, write_line
from cmt_aqr.synthetic.calibration import CAMERA_CHANNELS, LIDAR_CHANNEL, yaw_quaternion
from cmt_aqr.synthetic.objects import CATEGORIES
from cmt_aqr.synthetic.recording import Block, Sighting, WorldSettings, record_block, release, scene_name
from cmt_aqr.synthetic.tables import (
    LOG_NAME,
    MAP_FILE,
    TABLES,
    VERSION,
    blank_map,
    fixed_tables,
    token,
    visibility_level,
    write_table,
)
from cmt_aqr.synthetic.workers import run_jobs

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 2
"""Raised whenever the same parameters would give other bytes."""

MANIFEST = "synthetic.json"
_BLOCK = 10
"""Samples that one process records at a time."""


class WorldError(UserError):
    """A world that cannot be written: an argument out of range, a folder that holds something else, a full disk."""


def generate_world(out: str | Path, settings: WorldSettings, *, workers: int = 0, progress: bool = True) -> None:
    """Write a synthetic dataset in nuScenes' format that nuscenes-devkit loads and evaluates.

    out: folder to make; version "v1.0-synthetic". settings: equal ones give equal bytes, whatever the number of
    workers. workers: processes; 0 records in this one. progress: report on standard error.

    Nothing happens when out already holds a world of the same settings; where another process is writing it, that one
    is waited for. Raises WorldError when a setting is out of range, out holds anything else, the disk is full or a
    worker is killed; out then is as before. Several workers are started by "spawn": a script that calls this needs the
    usual ``if __name__ == "__main__":``.
    """
    out = Path(out)
    check_arguments(settings, workers)
    if _is_there_already(out, settings):
        _say(progress, f"{out} is there already, with the same parameters")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out.with_name(f".{out.name}.lock"), on_wait=lambda holder: _say_waiting(out, holder)):
            if _is_there_already(out, settings):
                _say(progress, f"{out} is there now, with the same parameters")
            else:
                _write(out, settings, workers, progress)
    except OSError as error:
        raise WorldError(f"{out}: the world cannot be written: {describe_os_error(error)}; nothing is kept") from None
    except BrokenProcessPool:
        raise WorldError(
            f"{out}: a process that recorded the world was killed, most likely by lack of memory; nothing is kept, use "
            f"fewer workers than {workers}"
        ) from None


def _say_waiting(out: Path, holder: str) -> None:
    logger.warning("%s is being written by %s: waiting for it", out, holder)


def _write(out: Path, world: WorldSettings, workers: int, progress: bool) -> None:
    """Write a world under another name beside out, then rename it."""
    started = time.perf_counter()
    with atomic_path(out) as partial:
        blocks = _record(world, partial, workers, progress)
        counts = _write_tables(world, partial, blocks)
        manifest = json.dumps({**_parameters(world), "counts": counts}, indent=1) + "\n"
        write_bytes(partial / MANIFEST, manifest.encode())
    seconds = time.perf_counter() - started
    _say(
        progress,
        f"{out}: {world.scenes} + {world.val_scenes} scenes, {counts['sample']} samples, "
        f"{counts['sample_annotation']} boxes in {seconds:.1f} s ({counts['sample'] / seconds:.1f} samples/s)",
    )


def check_arguments(world: WorldSettings, workers: int) -> None:
    """Raise WorldError, one sentence, when an argument is out of range."""
    if len(world.image_size) != 2:
        raise WorldError(f"image_size must be (width, height), got {world.image_size!r}")
    limits = {
        "scenes": (world.scenes, 0, 99_999),
        "val_scenes": (world.val_scenes, 0, 99_999),
        "seed": (world.seed, 0, 2**32 - 1),
        "samples_per_scene": (world.samples_per_scene, 1, 200),
        "image width": (world.image_size[0], 16, 4096),
        "image height": (world.image_size[1], 16, 4096),
        "sweeps_per_keyframe": (world.sweeps_per_keyframe, 0, 19),
        "lidar_columns": (world.lidar_columns, 16, 4096),
        "workers": (workers, 0, 1024),
    }
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int) or not low <= value <= high:
            raise WorldError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    if world.scenes + world.val_scenes == 0:
        raise WorldError("scenes and val_scenes are both 0: there is nothing to write")


def _parameters(world: WorldSettings) -> dict:
    parameters = {
        "generator": "cmt_aqr.synthetic",
        "generator_version": GENERATOR_VERSION,
        "version": VERSION,
        "scenes": world.scenes,
        "val_scenes": world.val_scenes,
        "seed": world.seed,
        "samples_per_scene": world.samples_per_scene,
        "image_size": list(world.image_size),
        "sweeps_per_keyframe": world.sweeps_per_keyframe,
        "lidar_columns": world.lidar_columns,
    }
    return parameters if world.sensor_files else parameters | {"sensor_files": False}


def _is_there_already(out: Path, world: WorldSettings) -> bool:
    """Whether out is this very world; an empty folder or none is not, and anything else is an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / MANIFEST).read_text())
        found.pop("counts")
    except (OSError, ValueError, KeyError, AttributeError):
        raise WorldError(f"{out} exists and is not a synthetic world: choose another folder") from None
    wanted = _parameters(world)
    for key in wanted | found:
        there, here = (parameters.get(key, True if key == "sensor_files" else None) for parameters in (found, wanted))
        if there != here:
            raise WorldError(
                f"{out} holds another synthetic world ({key} is {there!r} there, {here!r} here): "
                "choose another folder or delete it"
            )
    return True


def _record(world: WorldSettings, root: Path, workers: int, progress: bool) -> list[Block]:
    """Record all samples; the blocks come back in the order of scenes and samples, whoever made them."""
    for folder in [
        VERSION,
        "maps",
        f"sweeps/{LIDAR_CHANNEL}",
        *(f"samples/{channel}" for channel in (LIDAR_CHANNEL, *CAMERA_CHANNELS)),
    ]:
        (root / folder).mkdir(parents=True)
    indices = [index for split in world.scene_indices().values() for index in split]
    jobs = [
        (index, first, min(first + _BLOCK, world.samples_per_scene))
        for index in indices
        for first in range(0, world.samples_per_scene, _BLOCK)
    ]
    try:
        with make_bar("synthetic world", len(indices) * world.samples_per_scene, "sample", is_shown=progress) as bar:
            if workers == 0:
                return [record_block(world, *job, root, bar.update) for job in jobs]
            arguments = [(world, *job, root) for job in jobs]
            blocks = run_jobs(record_block, arguments, workers, on_done=lambda done: bar.update(done[3] - done[2]))
            return [blocks[each] for each in arguments]
    finally:
        release()


def _say(progress: bool, line: str) -> None:
    if progress:
        write_line(line)


def _write_tables(world: WorldSettings, root: Path, blocks: list[Block]) -> dict[str, int]:
    """Write all tables, the splits and the blank map; returns the number of rows of each table."""
    tables = {name: [] for name in TABLES} | fixed_tables(world.image_size)
    by_scene: dict[int, list[Block]] = {}
    for block in blocks:
        by_scene.setdefault(block.scene, []).append(block)
    for index, own in by_scene.items():
        for block in own:
            tables["sample"] += block.samples
            tables["sample_data"] += block.sample_data
            tables["ego_pose"] += block.ego_pose
        tables["scene"].append(_scene_row(world, index, own[0].description))
        instances, annotations = _annotation_rows(world, index, [s for block in own for s in block.sightings])
        tables["instance"] += instances
        tables["sample_annotation"] += annotations
    for name in TABLES:
        write_table(root / VERSION / f"{name}.json", tables[name])
    splits = {split: [scene_name(index) for index in indices] for split, indices in world.scene_indices().items()}
    write_bytes(root / VERSION / "splits.json", (json.dumps(splits, indent=1) + "\n").encode())
    write_bytes(root / MAP_FILE, cv2.imencode(".png", blank_map())[1].tobytes())
    return {name: len(tables[name]) for name in TABLES}


def _scene_row(world: WorldSettings, index: int, description: str) -> dict:
    count = world.samples_per_scene
    return {
        "token": world.token("scene", index),
        "log_token": token("log", LOG_NAME),
        "nbr_samples": count,
        "first_sample_token": world.token("sample", index, 0),
        "last_sample_token": world.token("sample", index, count - 1),
        "name": scene_name(index),
        "description": description,
    }


def _annotation_rows(world: WorldSettings, index: int, sightings: list[Sighting]) -> tuple[list[dict], list[dict]]:
    """Rows of instance and sample_annotation of one scene: sightings of an actor in order of time make a chain."""
    chains: dict[int, list[Sighting]] = {}
    for sighting in sightings:
        chains.setdefault(sighting.actor, []).append(sighting)
    instances, annotations = [], []
    for actor, chain in sorted(chains.items()):
        chain = seen_part(chain)
        if not chain:
            continue
        tokens = [world.token("annotation", index, actor, sighting.sample) for sighting in chain]
        instances.append(
            {
                "token": world.token("instance", index, actor),
                "nbr_annotations": len(chain),
                "category_token": token("category", CATEGORIES[CLASSES[chain[0].label]]),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
        for sighting, prev, own, after in zip(chain, ["", *tokens], tokens, [*tokens[1:], ""], strict=False):
            annotations.append(
                (
                    sighting.sample,
                    {
                        "token": own,
                        "sample_token": world.token("sample", index, sighting.sample),
                        "instance_token": instances[-1]["token"],
                        "visibility_token": visibility_level(sighting.visible),
                        "attribute_tokens": [token("attribute", sighting.attribute)] if sighting.attribute else [],
                        "translation": list(sighting.position),
                        "size": list(sighting.size),
                        "rotation": yaw_quaternion(sighting.yaw),
                        "prev": prev,
                        "next": after,
                        "num_lidar_pts": sighting.num_lidar_pts,
                        "num_radar_pts": 0,
                    },
                )
            )
    annotations.sort(key=lambda pair: pair[0])  # by sample; stable, so by actor within one
    return instances, [row for _, row in annotations]


def seen_part(chain: list[Sighting]) -> list[Sighting]:
    """A chain from its first to its last sighting by any sensor, with one more at each end for the velocity there.

    In between it stays annotated while hidden, as in nuScenes. What nothing ever sees is not annotated at all.
    """
    seen = [place for place, sighting in enumerate(chain) if sighting.num_lidar_pts > 0 or sighting.visible > 0]
    return chain[max(seen[0] - 1, 0) : seen[-1] + 2] if seen else []
