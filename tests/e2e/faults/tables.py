"""python -m tests.e2e.faults.tables: random damages of a world's tables, through the index and the evaluation.

Every damage must be refused with one sentence that names a table or file, or do no harm: the frames and metrics are
identical, or at least valid. Damage number i depends on the seed and i alone.
"""

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cmt_aqr.boxes import Targets
from cmt_aqr.data.dataset import FrameDataset
from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.evaluation.nuscenes_eval import evaluate_submission
from cmt_aqr.evaluation.submission import write_submission
from cmt_aqr.synthetic import WorldSettings, generate_world
from tests.e2e.faults.outcomes import WORST_FIRST, Outcome, observe, report

VERSION = "v1.0-synthetic"
SPLITS = ("synthetic_train", "synthetic_val")
IMAGE_SIZE = (64, 36)
LIMIT = 20.0
Tables = dict[str, object]

# Values of every type that JSON has, in a JSON text or not.
WRONG_VALUES = {
    "null": (None,),
    "true or false": (True, False),
    "a text": ("text", "", "a/b", "../../up", "/etc/passwd", "a\nb", "\ud800", "x" * 5000),
    "a list": ([], [1], [[]], [None], ["text"], [[[1]]], [1, 2, 3, 4, 5]),
    "an object": ({}, {"token": "x"}),
    "a number": (0, 3, 2.5),
    "a negative number": (-1, -2.5, -(10**6)),
    "a huge number": (10**12, 2**63, 10**400, -(10**400), 1e308),
    "NaN or infinite": (float("nan"), float("inf"), float("-inf")),
}


@dataclass(frozen=True)
class Base:
    """A whole world, and what it gives.

    Attributes:
        root: its folder.
        tables: name -> content of every JSON file.
        frames: JSON of all frames.
        metrics: JSON of the metrics of `submission`.
        submission: results for the validation split that hit the ground truth.
    """

    root: Path
    tables: Tables
    frames: list[str]
    metrics: str
    submission: Path


def make_base(folder: Path) -> Base:
    """Write the world, and measure what it gives undamaged."""
    root = folder / "world"
    settings = WorldSettings(
        scenes=2, val_scenes=1, seed=5, samples_per_scene=3, image_size=IMAGE_SIZE, sweeps_per_keyframe=1,
        lidar_columns=40,
    )  # fmt: skip
    generate_world(root, settings, progress=False)
    tables = {path.stem: json.loads(path.read_text()) for path in sorted((root / VERSION).glob("*.json"))}
    submission = _perfect_submission(folder / "submission.json", tables)
    base = Base(root, tables, [], "", submission)
    return replace(base, frames=_frames(root, folder / "cache"), metrics=_metrics(base, root, folder))


def run(base: Base, folder: Path, *, count: int, seed: int, first: int = 0) -> list[Outcome]:
    """Damages number first ... first + count - 1."""
    outcomes = []
    for number in range(first, first + count):
        place = folder / f"{number:05d}"
        outcomes.append(_try_damage(base, place, random.Random(f"{seed}/{number}")))
        shutil.rmtree(place)
    return outcomes


def _try_damage(base: Base, place: Path, rng: random.Random) -> Outcome:
    root = place / "world"
    (root / VERSION).mkdir(parents=True)
    for name in ("samples", "sweeps", "maps"):
        (root / name).symlink_to(base.root / name)
    kind, damage, candidates = rng.choice(DAMAGES)
    tables = copy.copy(base.tables)
    name = rng.choice(candidates or sorted(tables))
    tables[name] = copy.deepcopy(tables[name])
    what = damage(rng, tables, name)
    for table, content in tables.items():
        if not isinstance(content, _InPlace):
            (root / VERSION / f"{table}.json").write_text(json.dumps(content))
    for table, content in tables.items():
        if isinstance(content, _InPlace):
            content.make(root / VERSION / f"{table}.json")

    named = [str(root), str(base.submission)]
    results = [
        observe(lambda: _frames(root, place / "cache") == base.frames, named=named, limit=LIMIT),
        observe(lambda: _metrics(base, root, place) == base.metrics, named=named, limit=LIMIT),
    ]
    result, text = min(results, key=lambda each: WORST_FIRST.index(each[0]))
    return Outcome(kind, f"{name}: {what}", result, text)


def _frames(root: Path, cache: Path) -> list[str]:
    """All frames as JSON; asserts that they and their samples are valid."""
    frames = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for split in SPLITS:
            index = load_index(dataroot=root, version=VERSION, split=split, cache_dir=cache)
            frames += [index.frame(i).to_json() for i in range(len(index))]
            _check_samples(index)
    return frames


def _metrics(base: Base, root: Path, folder: Path) -> str:
    """JSON of the metrics of the base's submission."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return evaluate_submission(root, VERSION, SPLITS[1], base.submission, folder).to_json()


def _check_samples(index: FrameIndex) -> None:
    for sample in FrameDataset(index, final_size=(32, 64), num_sweeps=1):
        targets: Targets = sample.targets
        assert sample.images.shape == (6, 32, 64, 3)
        assert sample.points.isfinite().all() and sample.lidar2img.isfinite().all()
        assert sample.lidar2global.isfinite().all()
        assert targets.boxes[:, :7].isfinite().all() and (targets.boxes[:, 3:6] > 0).all()
        assert "/" not in sample.token


def _perfect_submission(path: Path, tables: Tables) -> Path:
    """Results that are the ground truth of the validation split, all of them called cars."""
    scenes = {row["token"] for row in tables["scene"] if row["name"] in tables["splits"][SPLITS[1]]}
    results = {row["token"]: [] for row in tables["sample"] if row["scene_token"] in scenes}
    for row in tables["sample_annotation"]:
        if row["sample_token"] in results:
            results[row["sample_token"]].append({
                "sample_token": row["sample_token"], "translation": row["translation"], "size": row["size"],
                "rotation": row["rotation"], "velocity": [0.0, 0.0], "detection_name": "car", "detection_score": 0.5,
                "attribute_name": "vehicle.parked",
            })  # fmt: skip
    return write_submission(path, results, use_camera=True, use_lidar=True)


# Damages: change the tables in place, and say what they did.


@dataclass(frozen=True)
class _InPlace:
    """A table that is no JSON text; `make` writes whatever it is."""

    make: Callable[[Path], object]


def _wrong_value(words: str) -> Callable[[random.Random, Tables, str], str]:
    def damage(rng: random.Random, tables: Tables, name: str) -> str:
        row = rng.choice(tables[name])
        key, value = rng.choice(sorted(row)), rng.choice(WRONG_VALUES[words])
        row[key] = value
        return f"{key} = {str(value)[:20]!r}"

    return damage


def _wrong_item(rng: random.Random, tables: Tables, name: str) -> str:
    """A list in which one item, or one of a list in it, is something else."""
    row = rng.choice(tables[name])
    key = rng.choice([key for key, value in row.items() if isinstance(value, list) and value])
    items = row[key]
    if isinstance(items[0], list) and rng.random() < 0.7:
        items = rng.choice(items)
    items[rng.randrange(len(items))] = rng.choice(WRONG_VALUES[rng.choice(sorted(WRONG_VALUES))])
    return f"an item of {key}"


def _wrong_length(rng: random.Random, tables: Tables, name: str) -> str:
    row = rng.choice(tables[name])
    key = rng.choice([key for key, value in row.items() if isinstance(value, list)])
    items = row[key]
    if items and rng.random() < 0.5:
        items.pop()
    else:
        items.append(copy.deepcopy(items[-1]) if items else 1.0)
    return f"length of {key}"


def _missing_key(rng: random.Random, tables: Tables, name: str) -> str:
    row = rng.choice(tables[name])
    key = rng.choice(sorted(row))
    del row[key]
    return f"no {key}"


def _dangling(rng: random.Random, tables: Tables, name: str) -> str:
    row = rng.choice(tables[name])
    keys = [key for key in row if key.endswith(("_token", "_tokens")) or key in ("prev", "next")]
    key = rng.choice(keys)
    row[key] = ["f" * 32] if isinstance(row[key], list) else "f" * 32
    return f"dangling {key}"


def _duplicate(rng: random.Random, tables: Tables, name: str) -> str:
    rows = tables[name]
    rows.insert(rng.randrange(len(rows) + 1), copy.deepcopy(rng.choice(rows)))
    return "a row twice"


def _removed(rng: random.Random, tables: Tables, name: str) -> str:
    tables[name].pop(rng.randrange(len(tables[name])))
    return "a row removed"


def _swapped(rng: random.Random, tables: Tables, name: str) -> str:
    a, b = rng.choice(tables[name]), rng.choice(tables[name])
    key = rng.choice(sorted(a))
    a[key], b[key] = b[key], a[key]
    return f"{key} of two rows swapped"


def _no_table(rng: random.Random, tables: Tables, name: str) -> str:
    tables[name] = rng.choice(([], {}, None, 3, "text", [[]], [None], [3], [[[]]], [{}], [*tables[name], "row"]))
    return f"the table is {str(tables[name])[:20]}"


def _token_with_slash(rng: random.Random, tables: Tables, name: str) -> str:
    """One token renamed wherever it stands, so that everything still fits together."""
    token = rng.choice(tables[rng.choice(("sample", "sample_annotation", "instance"))])["token"]
    bad = rng.choice(("../../../" + token, "/tmp/" + token, token + "/x", "", token + "\n", "a b", "\u00e9", "x" * 300))
    for table in list(tables):
        tables[table] = json.loads(json.dumps(tables[table]).replace(json.dumps(token), json.dumps(bad)))
    return f"a token is {bad[:20]!r}"


def _file_outside(rng: random.Random, tables: Tables, name: str) -> str:
    """A file name that leads elsewhere, in a recording that a frame uses or in the map."""
    row = rng.choice(tables[name])
    old = row["filename"]
    row["filename"] = rng.choice((
        f"../world/{old}", f"/tmp/{old}", f"samples/../../{old}", "..", ".", "samples", "", "a\0b", "a\nb", "\udc80",
        old.replace("/", "\\"), "samples/none.jpg", "x" * 400, "maps/" + "y" * 300,
    ))  # fmt: skip
    return f"filename = {row['filename'][:30]!r}"


def _text_of(change: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, Tables, str], str]:
    def damage(rng: random.Random, tables: Tables, name: str) -> str:
        data = change(rng, json.dumps(tables[name]).encode())
        tables[name] = _InPlace(lambda path: path.write_bytes(data))
        return "the bytes"

    return damage


def _flip(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 50))):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def _other_text(rng: random.Random, data: bytes) -> bytes:
    return rng.choice(
        (b"", b"\0" * 100, b"\xff\xfe" + data, b"[" * 100_000, b'{"a":' * 100_000, b"[1" + b"0" * 5000 + b"]")
    )


def _special_file(rng: random.Random, tables: Tables, name: str) -> str:
    make = rng.choice((Path.mkdir, os.mkfifo, lambda path: None, lambda path: path.symlink_to(path)))
    tables[name] = _InPlace(make)
    return "a folder, a pipe, nothing or a loop"


LISTS = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
         "sample", "sample_data", "sample_annotation", "map")  # fmt: skip
# Kind, what does it, and the tables that it can be done to; () for all, splits.json among them.
DAMAGES = [
    *[(f"value: {words}", _wrong_value(words), LISTS) for words in WRONG_VALUES] * 2,
    *[("value: an item of a list", _wrong_item, ("sample_annotation", "ego_pose", "calibrated_sensor", "map"))] * 2,
    ("value: length of a list", _wrong_length, ("sample_annotation", "ego_pose", "calibrated_sensor")),
    *[("row: a missing key", _missing_key, LISTS)] * 2,
    *[("row: a dangling token", _dangling, (
        "instance", "calibrated_sensor", "sample", "sample_data", "sample_annotation", "scene",
    ))] * 2,
    ("row: twice", _duplicate, LISTS),
    ("row: removed", _removed, LISTS),
    ("row: values of two swapped", _swapped, LISTS),
    ("table: empty or no table", _no_table, LISTS),
    ("token: not of 0-9 A-Z a-z _ -", _token_with_slash, LISTS),
    ("filename: outside the data root or no file", _file_outside, ("sample_data", "sample_data", "map")),
    ("file: cut short", _text_of(lambda rng, data: data[: rng.randrange(len(data))]), ()),
    ("file: bytes changed", _text_of(_flip), ()),
    ("file: no JSON at all", _text_of(_other_text), ()),
    ("file: a folder, a pipe, nothing", _special_file, ()),
]  # fmt: skip


def main() -> int:
    """Run the command line; exit status 1 when a damage led to a traceback, a hang or a bad sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first damage, to repeat one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base")
        outcomes = run(base, Path(folder), count=options.count, seed=options.seed, first=options.first)
        return report(outcomes, Path(folder), first=options.first)


if __name__ == "__main__":
    sys.exit(main())
