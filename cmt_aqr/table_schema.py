"""What the nuScenes tables must hold: for every key that this package or the devkit reads, the kind of its values.

A kind checks a whole column at once, with a handful of calls that loop in C: the full data set has millions of rows.
Only where a column is wrong its values are tried one by one, to name the first bad one.
"""

import re
import reprlib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from cmt_aqr.errors import UserError

# Metres: further from the map's origin than any city is wide.
MAX_DISTANCE = 1e7
# Metres: no sensor is mounted, and no object is, larger than this.
MAX_LENGTH = 1e3
# Metres: no object is thinner.
MIN_LENGTH = 1e-3
# Metres per second.
MAX_SPEED = 1e3
# Pixels a side; twice what cameras of vehicles have.
MAX_PIXELS = 16_384
# Microseconds; larger numbers are not exact in float64.
MAX_TIME = 2**53
# A rotation whose quaternion is further from unit length than this was not written by a calibration.
QUATERNION_TOLERANCE = 1e-3
_MIN_DETERMINANT = 1e-9

_MAX_TOKEN = 128
_TOKEN_BYTES = (string.ascii_letters + string.digits + "_-").encode()
# Relative, no step named "..", no control character, backslash or half of a surrogate pair.
_FILE = re.compile(r"(?!/)(?!(?:.*/)?\.\.(?:/|$))[^\x00-\x1f\x7f\\\ud800-\udfff]{1,512}")


class TableError(UserError):
    """Tables that break the schema: one sentence with the file, the row's token, the key and both values."""


@dataclass(frozen=True)
class Kind:
    """What the values of a key must be.

    Attributes:
        expected: the words after "expected".
        all_valid: whether every value of a list is of this kind; takes whatever JSON can hold.
    """

    expected: str
    all_valid: Callable[[list], bool]


def show(value: object) -> str:
    """A value of JSON as a message quotes it: on one line, and not longer than a line."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlist, _REPR.maxdict, _REPR.maxlevel, _REPR.maxlong = 100, 10, 3, 3, 40


def check_column(file: Path, rows: Sequence[dict], key: str, kind: Kind) -> None:
    """Raise TableError unless every row has the key, with a value of the kind."""
    try:
        values = [row[key] for row in rows]
    except KeyError:
        i = next(i for i, row in enumerate(rows) if key not in row)
        where = f"row {i}" if key == "token" else name_of(rows[i])
        raise TableError(f"{file}: {where} has no {key}, expected {kind.expected}") from None
    if not kind.all_valid(values):
        i = next(i for i, value in enumerate(values) if not kind.all_valid([value]))
        where = f"row {i}" if key == "token" else name_of(rows[i])
        raise TableError(f"{file}: {where} has {key} {show(values[i])}, expected {kind.expected}")


def name_of(row: dict) -> str:
    """The token of a row, as a message names it."""
    return show(row["token"])


def _are(values: Sequence, *types: type) -> bool:
    # Not isinstance: True is no number here.
    return set(map(type, values)) <= set(types)


def _are_tokens(values: list) -> bool:
    if not (_are(values, str) and set(map(len, values)) <= set(range(1, _MAX_TOKEN + 1))):
        return False
    # One long text is looked through several times as fast as many short ones.
    return not "".join(values).encode("utf-8", "surrogatepass").translate(None, delete=_TOKEN_BYTES)


def _optional(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or ''", lambda values: kind.all_valid([value for value in values if value != ""]))


def _list_of(kind: Kind) -> Kind:
    def all_valid(values: list) -> bool:
        return _are(values, list) and kind.all_valid(list(chain.from_iterable(values)))

    return Kind(f"a list, every item {kind.expected}", all_valid)


def whole_number(low: int, high: int) -> Kind:
    """A JSON number without a decimal point in [low, high]."""

    def all_valid(values: list) -> bool:
        return _are(values, int) and (not values or (min(values) >= low and max(values) <= high))

    return Kind(f"a whole number from {low} to {high}", all_valid)


def numbers(count: int, low: float, high: float) -> Kind:
    """A list of so many finite numbers in [low, high]."""
    words = {2: "two", 3: "three", 4: "four"}[count]

    def all_valid(values: list) -> bool:
        if not (_are(values, list) and set(map(len, values)) <= {count}):
            return False
        flat = list(chain.from_iterable(values))
        if not _are(flat, int, float):
            return False
        try:
            array = np.array(flat, dtype=np.float64)
        except OverflowError:  # a whole number of more than 308 digits
            return False
        return bool(((array >= low) & (array <= high)).all())  # false for NaN

    return Kind(f"{words} finite numbers from {low:g} to {high:g}", all_valid)


def _quaternion() -> Kind:
    four = numbers(4, -2, 2)

    def all_valid(values: list) -> bool:
        if not four.all_valid(values):
            return False
        lengths = np.linalg.norm(np.array(values, dtype=np.float64).reshape(-1, 4), axis=1)
        return bool((abs(lengths - 1) < QUATERNION_TOLERANCE).all())

    return Kind("a quaternion of four numbers and length 1", all_valid)


def _intrinsic() -> Kind:
    rows = numbers(3, -1e6, 1e6)

    def is_intrinsic(matrix: list) -> bool:
        if not (isinstance(matrix, list) and len(matrix) == 3 and rows.all_valid(matrix)):
            return False
        # The code relies on the last row: pixels are [u * depth, v * depth, depth].
        return matrix[2] == [0, 0, 1] and abs(np.linalg.det(matrix)) > _MIN_DETERMINANT

    expected = "3 x 3 finite numbers with last row [0, 0, 1] and a determinant that is not 0 (else it is singular)"
    return Kind(expected, lambda values: all(map(is_intrinsic, values)))


TEXT = Kind("a text", lambda values: _are(values, str))
FLAG = Kind("true or false", lambda values: _are(values, bool))
TOKEN = Kind(f"a token of 1 to {_MAX_TOKEN} of the characters 0-9 A-Z a-z _ -", _are_tokens)
OPTIONAL_TOKEN = _optional(TOKEN)
TOKENS = _list_of(TOKEN)
AT_MOST_ONE_TOKEN = Kind(
    "a list of at most one token", lambda values: TOKENS.all_valid(values) and max(map(len, values), default=0) <= 1
)
FILE = Kind(
    "the name of a file below the data root: relative and without '..'",
    lambda values: _are(values, str) and all(map(_FILE.fullmatch, values)),
)
TIME = whole_number(0, MAX_TIME)
COUNT = whole_number(0, 2**31 - 1)
PIXELS = whole_number(1, MAX_PIXELS)
POSITION = numbers(3, -MAX_DISTANCE, MAX_DISTANCE)
MOUNT = numbers(3, -MAX_LENGTH, MAX_LENGTH)
SIZE = numbers(3, MIN_LENGTH, MAX_LENGTH)
VELOCITY = numbers(2, -MAX_SPEED, MAX_SPEED)
ROTATION = _quaternion()
INTRINSIC = _intrinsic()

# What every row of a table must hold. The tables of the nuScenes format, in the order in which the devkit reads them.
SCHEMA: dict[str, dict[str, Kind]] = {
    "category": {"token": TOKEN, "name": TEXT},
    "attribute": {"token": TOKEN, "name": TEXT},
    "visibility": {"token": TOKEN},
    "instance": {"token": TOKEN, "category_token": TOKEN},
    "sensor": {"token": TOKEN, "channel": TEXT, "modality": TEXT},
    "calibrated_sensor": {"token": TOKEN, "sensor_token": TOKEN, "translation": MOUNT, "rotation": ROTATION},
    "ego_pose": {"token": TOKEN},
    "log": {"token": TOKEN},
    "scene": {"token": TOKEN, "name": TEXT},
    "sample": {"token": TOKEN, "scene_token": TOKEN, "timestamp": TIME},
    "sample_data": {"token": TOKEN, "calibrated_sensor_token": TOKEN, "is_key_frame": FLAG},
    "sample_annotation": {
        "token": TOKEN, "sample_token": TOKEN, "instance_token": TOKEN, "prev": OPTIONAL_TOKEN, "next": OPTIONAL_TOKEN,
        "attribute_tokens": AT_MOST_ONE_TOKEN, "translation": POSITION, "size": SIZE, "rotation": ROTATION,
        "num_lidar_pts": COUNT, "num_radar_pts": COUNT,
    },
    "map": {"token": TOKEN, "log_tokens": TOKENS, "filename": FILE},
}  # fmt: skip
# What must also hold where a frame uses the row: of five million poses and recordings a frame reaches one in five.
CAMERA_CALIBRATION = {"camera_intrinsic": INTRINSIC}
KEY_RECORDING = {"sample_token": TOKEN}
USED_RECORDING = {"filename": FILE, "timestamp": TIME, "ego_pose_token": TOKEN, "prev": OPTIONAL_TOKEN}
IMAGE = {"width": PIXELS, "height": PIXELS}
USED_POSE = {"translation": POSITION, "rotation": ROTATION}

# (table, key, table whose tokens the key's values are); "" refers to nothing.
REFERENCES = (
    ("instance", "category_token", "category"),
    ("calibrated_sensor", "sensor_token", "sensor"),
    ("sample", "scene_token", "scene"),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ("sample_annotation", "sample_token", "sample"),
    ("sample_annotation", "instance_token", "instance"),
    ("sample_annotation", "prev", "sample_annotation"),
    ("sample_annotation", "next", "sample_annotation"),
    ("sample_annotation", "attribute_tokens", "attribute"),
)
