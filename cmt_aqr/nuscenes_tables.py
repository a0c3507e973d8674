"""The tables of a nuScenes-format data set, checked against the schema while the devkit loads them.

What has passed here can be used without further checks, by this package and by the devkit's evaluation: every key that
either reads is there and of its kind, and every token refers to a row.
"""

import gc
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path

from nuscenes.nuscenes import NuScenes
from nuscenes.utils.splits import create_splits_scenes

from cmt_aqr import table_schema as schema
from cmt_aqr.progress import phase
from cmt_aqr.table_schema import TableError, check_column, name_of, show

LIDAR_CHANNEL = "LIDAR_TOP"
SPLITS_FILE = "splits.json"


class CheckedNuScenes(NuScenes):
    """The devkit's `NuScenes` of one version folder.

    Raises:
        TableError: a table is missing or broken; see :mod:`cmt_aqr.table_schema`.
    """

    def __init__(self, dataroot: str | os.PathLike, version: str, *, verbose: bool = False):
        self._folder = Path(dataroot) / version
        if not self._folder.is_dir():
            found = sorted(path.parent.name for path in Path(dataroot).glob("*/sample.json"))
            raise TableError(f"dataroot {dataroot} has no version {version!r}; it has {', '.join(found) or 'none'}")
        self._tokens: dict[str, set[str]] = {}
        with _garbage_collection_off():
            try:
                super().__init__(version=version, dataroot=str(dataroot), verbose=verbose)
            except (AssertionError, OSError) as error:  # the devkit's own checks of further tables, such as lidarseg
                raise TableError(f"{self._folder}: the devkit refuses the tables: {error}") from None

    def __load_table__(self, table_name: str) -> list[dict]:
        file = self._file(table_name)
        if table_name not in schema.SCHEMA:
            return read_json(file)
        rows = read_table(file)
        self._tokens[table_name] = {row["token"] for row in rows}
        if table_name == "map":
            _check_maps(file, rows, Path(self.dataroot))
        return rows

    def __make_reverse_index__(self, verbose: bool) -> None:
        for table, key, target in schema.REFERENCES:
            self._check_reference(table, getattr(self, table), key, target)
        self._check_used_rows()
        self._check_logs()
        self._check_tracks()
        if self.instance and not self.sample_annotation:
            raise TableError(
                f"{self._file('sample_annotation')} is empty, expected the annotations of the {len(self.instance)} "
                f"rows of {self._file('instance')}"
            )
        self._tokens.clear()  # the devkit makes its own
        super().__make_reverse_index__(verbose)

    def _file(self, table: str) -> Path:
        return self._folder / f"{table}.json"

    def _check_reference(self, table: str, rows: Sequence[dict], key: str, target: str) -> None:
        def refers_to(row: dict) -> list[str]:
            return row[key] if isinstance(row[key], list) else [row[key]]

        is_list = bool(rows) and isinstance(rows[0][key], list)
        values = (row[key] for row in rows)
        lost = set(chain.from_iterable(values) if is_list else values) - self._tokens[target] - {""}
        if lost:
            row = next(row for row in rows if not lost.isdisjoint(refers_to(row)))
            raise TableError(
                f"{self._file(table)}: {name_of(row)} has {key} {show(row[key])}, expected a token of {target}.json"
            )

    def _check_used_rows(self) -> None:
        """Check what only the recordings of frames need, and the poses and calibrations that they lead to."""
        sensors = {row["token"]: row for row in self.sensor}
        sensor_of = {row["token"]: sensors[row["sensor_token"]] for row in self.calibrated_sensor}
        cameras = {token for token, sensor in sensor_of.items() if sensor["modality"] == "camera"}
        lidars = {token for token, sensor in sensor_of.items() if sensor["channel"] == LIDAR_CHANNEL}
        keys = [row for row in self.sample_data if row["is_key_frame"]]
        images = [row for row in keys if row["calibrated_sensor_token"] in cameras]
        used = images + [row for row in self.sample_data if row["calibrated_sensor_token"] in lidars]
        self._check_rows("calibrated_sensor", cameras, schema.CAMERA_CALIBRATION)
        for rows, kinds in (
            (keys, schema.KEY_RECORDING), (used, schema.USED_RECORDING), (images, schema.IMAGE),
        ):  # fmt: skip
            for key, kind in kinds.items():
                check_column(self._file("sample_data"), rows, key, kind)
        for rows, key, target in (
            (keys, "sample_token", "sample"), (used, "ego_pose_token", "ego_pose"), (used, "prev", "sample_data"),
        ):  # fmt: skip
            self._check_reference("sample_data", rows, key, target)
        self._check_key_frames({row["sample_token"] for row in keys if row["calibrated_sensor_token"] in lidars})
        self._check_rows("ego_pose", {row["ego_pose_token"] for row in used}, schema.USED_POSE)

    def _check_key_frames(self, with_lidar: set[str]) -> None:
        lost = next((row for row in self.sample if row["token"] not in with_lidar), None)
        if lost is not None:
            raise TableError(
                f"{self._file('sample_data')}: no key frame of {LIDAR_CHANNEL} has sample_token {name_of(lost)}, which "
                f"is a row of sample.json, expected one"
            )

    def _check_rows(self, table: str, tokens: set[str], kinds: dict[str, schema.Kind]) -> None:
        rows = [row for row in getattr(self, table) if row["token"] in tokens]
        for key, kind in kinds.items():
            check_column(self._file(table), rows, key, kind)

    def _check_logs(self) -> None:
        mapped = set(chain.from_iterable(row["log_tokens"] for row in self.map))
        lost = [row["token"] for row in self.log if row["token"] not in mapped]
        if lost:
            raise TableError(
                f"{self._file('map')}: no row lists {show(lost[0])} of {self._file('log')} in log_tokens, expected one"
            )

    def _check_tracks(self) -> None:
        """Check that prev and next lead to the same object, earlier and later: velocities are taken from them."""
        times = {row["token"]: row["timestamp"] for row in self.sample}
        tracks = {row["token"]: (row["instance_token"], times[row["sample_token"]]) for row in self.sample_annotation}
        for row in self.sample_annotation:
            instance, time = tracks[row["token"]]
            for key, sign in (("prev", 1), ("next", -1)):
                if row[key]:
                    other_instance, other_time = tracks[row[key]]
                    if other_instance != instance or sign * (time - other_time) <= 0:
                        raise TableError(
                            f"{self._file('sample_annotation')}: {name_of(row)} has {key} {row[key]} of instance "
                            f"{other_instance} at {other_time} us, expected instance {instance} "
                            f"{'before' if key == 'prev' else 'after'} {time} us"
                        )


class Tables:
    """The tables of a nuScenes-format data set, loaded when first asked for and then kept.

    The full data set takes half a minute and gigabytes to load: who builds indices or evaluates holds one of these.
    """

    def __init__(self, dataroot: str | os.PathLike, version: str):
        self.dataroot = dataroot
        self.version = version

    @cached_property
    def nusc(self) -> CheckedNuScenes:
        """The devkit's object; raises TableError."""
        with phase(f"loading the tables of {Path(self.dataroot) / self.version}"):
            nusc = CheckedNuScenes(self.dataroot, self.version)
        gc.freeze()  # else the collector of every worker forked later would write to, and so copy, all of it
        return nusc


def read_table(file: Path) -> list[dict]:
    """The rows of a table that the schema lists, checked by themselves.

    Args:
        file: `<table>.json`.

    Raises:
        TableError: no such file, not JSON, a value of another kind than the schema's, or a token with two rows.
    """
    rows = read_json(file)
    _check_table(file, rows, schema.SCHEMA[file.stem])
    return rows


def read_json(path: Path) -> object:
    """The content of a JSON file.

    Raises:
        TableError: no such file, no regular file, or not JSON.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TableError(f"{path} is no regular file, expected JSON")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TableError(f"{path} does not exist") from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise TableError(f"{path} is not valid JSON: its lists are nested too deeply") from None
    except ValueError as error:
        raise TableError(f"{path} is not valid JSON: {error}") from None


def read_splits(folder: Path) -> dict[str, list[str]]:
    """Split name -> scene names: the devkit's splits and those of the folder's splits.json, which win.

    Raises:
        TableError: a splits.json of another form.
    """
    path, custom = folder / SPLITS_FILE, {}
    if path.exists():
        custom = read_json(path)
        if not isinstance(custom, dict):
            raise TableError(f"{path} holds {show(custom)}, expected an object: split -> list of scene names")
        for name, scenes in custom.items():
            if not (isinstance(scenes, list) and schema.TEXT.all_valid(scenes)):
                raise TableError(f"{path}: {show(name)} is {show(scenes)}, expected a list of scene names")
    return create_splits_scenes() | custom


def read_velocities(path: Path) -> dict[str, tuple[float, float] | None]:
    """Annotation token -> global vx, vy in m/s, None where unknown.

    Raises:
        TableError: a file of another form.
    """
    expected = 'annotation token -> {"velocity_global_xy": [vx, vy] or null}'
    content = read_json(path)
    if not isinstance(content, dict):
        raise TableError(f"velocity_file {path} holds {show(content)}, expected {expected}")
    for token, entry in content.items():
        if not (isinstance(entry, dict) and "velocity_global_xy" in entry):
            raise TableError(f"velocity_file {path}: {show(token)} has {show(entry)}, expected {expected}")
        velocity = entry["velocity_global_xy"]
        if velocity is not None and not schema.VELOCITY.all_valid([velocity]):
            raise TableError(
                f"velocity_file {path}: {show(token)} has velocity_global_xy {show(velocity)}, expected "
                f"{schema.VELOCITY.expected} or null"
            )
    velocities = {token: entry["velocity_global_xy"] for token, entry in content.items()}
    return {token: None if v is None else (float(v[0]), float(v[1])) for token, v in velocities.items()}


def _check_table(file: Path, rows: object, kinds: dict[str, schema.Kind]) -> None:
    if not isinstance(rows, list):
        raise TableError(f"{file} holds {show(rows)}, expected a list of rows")
    if not set(map(type, rows)) <= {dict}:
        i, row = next((i, row) for i, row in enumerate(rows) if not isinstance(row, dict))
        raise TableError(f"{file}: row {i} is {show(row)}, expected an object")
    for key, kind in kinds.items():
        check_column(file, rows, key, kind)
    if len({row["token"] for row in rows}) < len(rows):
        (double, count), *_ = Counter(row["token"] for row in rows).most_common(1)
        raise TableError(f"{file}: token {show(double)} has {count} rows, expected one")


def _check_maps(file: Path, rows: list[dict], root: Path) -> None:
    if not rows:
        raise TableError(f"{file} is empty, expected at least one map (the devkit needs it)")
    for row in rows:
        if not os.path.isfile(root / row["filename"]):
            raise TableError(
                f"{file}: map file {root / row['filename']} does not exist or is no regular file (the devkit needs it)"
            )


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Tables are trees of millions of objects; looking for cycles among them takes as long as reading them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
