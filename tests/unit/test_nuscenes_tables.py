"""What the tables must hold, one sentence at a time; tests/e2e/faults/tables.py tries what nobody thought of."""

import gc
import json
import math

import pytest

from cmt_aqr import table_schema as schema
from cmt_aqr.nuscenes_tables import CheckedNuScenes, read_splits, read_velocities
from cmt_aqr.table_schema import TableError
from tests.unit.data.world import VERSION, write_world


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path / "world", scenes={"scene-a": 2})


def refusal(world, table: str, change) -> str:
    """The sentence, without the folder."""
    world.edit(table, change)
    with pytest.raises(TableError) as error:
        CheckedNuScenes(world.root, VERSION)
    return str(error.value).replace(f"{world.root}/{VERSION}/", "").replace(str(world.root), "ROOT")


def put(row: int, **values):
    return lambda rows: rows[row].update(values)


def test_whole_tables_are_what_the_devkit_reads(world):
    checked = CheckedNuScenes(world.root, VERSION)
    assert [row["token"] for row in checked.sample] == ["scene-a-sample-0", "scene-a-sample-1"]
    assert checked.get("sample_annotation", "scene-a-sample-1-car")["category_name"] == "vehicle.car"
    assert len(checked.sample[0]["data"]) == 7 and len(checked.sample[0]["anns"]) == 3
    assert gc.isenabled()


def test_garbage_collection_stays_off_where_it_was_off(world):
    gc.disable()
    try:
        CheckedNuScenes(world.root, VERSION)
        assert not gc.isenabled()
    finally:
        gc.enable()


SIZE = "expected three finite numbers from 0.001 to 1000"
TOKEN = "expected a token of 1 to 128 of the characters 0-9 A-Z a-z _ -"
FILE = "expected the name of a file below the data root: relative and without '..'"
REFUSED = {
    "null": ("sample_annotation", put(0, size=None), f"'scene-a-sample-0-car' has size None, {SIZE}"),
    "bool": ("sample_annotation", put(0, size=[1, True, 1]), f"'scene-a-sample-0-car' has size [1, True, 1], {SIZE}"),
    "huge": (
        "sample_annotation", put(0, size=[1, 10**400, 1]), f"'scene-a-sample-0-car' has size [1, {'1' + '0' * 17}..."
    ),
    "text": (
        "sample", put(1, timestamp="now"),
        "'scene-a-sample-1' has timestamp 'now', expected a whole number from 0 to 9007199254740992",
    ),
    "fraction": ("sample", put(1, timestamp=1.5), "'scene-a-sample-1' has timestamp 1.5, expected a whole number"),
    "true for 1": ("sample_annotation", put(1, num_lidar_pts=True), "'scene-a-sample-1-car' has num_lidar_pts True"),
    "1 for true": ("sample_data", put(0, is_key_frame=1), "has is_key_frame 1, expected true or false"),
    "dict": ("calibrated_sensor", put(0, rotation={"w": 1}), "'calibration-CAM_FRONT' has rotation {'w': 1}, expected"),
    "missing": ("ego_pose", lambda rows: rows[0].pop("translation"), "has no translation, expected three finite"),
    "no row": ("scene", lambda rows: rows.append(7), "scene.json: row 1 is 7, expected an object"),
    "twice": ("scene", lambda rows: rows.append(rows[0]), "scene.json: token 'scene-a' has 2 rows, expected one"),
    "slash": ("scene", put(0, token="../../a"), f"scene.json: row 0 has token '../../a', {TOKEN}"),
    "newline": ("scene", put(0, token="a\n"), f"scene.json: row 0 has token 'a\\n', {TOKEN}"),
    "other letters": ("scene", put(0, token="é"), f"scene.json: row 0 has token 'é', {TOKEN}"),
    "surrogate": ("scene", put(0, token="\ud800"), f"scene.json: row 0 has token '\\ud800', {TOKEN}"),
    "empty token": ("scene", put(0, token=""), f"scene.json: row 0 has token '', {TOKEN}"),
    "upwards": ("sample_data", put(0, filename="samples/../../x.jpg"), f"has filename 'samples/../../x.jpg', {FILE}"),
    "absolute": ("map", put(0, filename="/etc/passwd"), f"map.json: 'map' has filename '/etc/passwd', {FILE}"),
    "map": (
        "map", put(0, filename="maps"),
        "map.json: map file ROOT/maps does not exist or is no regular file (the devkit needs it)",
    ),
    "maps": ("map", lambda rows: rows.clear(), "map.json is empty, expected at least one map"),
    "dangling": (
        "sample_annotation", put(0, next="lost"),
        "'scene-a-sample-0-car' has next 'lost', expected a token of sample_annotation.json",
    ),
    "dangling item": (
        "sample_annotation", put(0, attribute_tokens=["lost"]),
        "'scene-a-sample-0-car' has attribute_tokens ['lost'], expected a token of attribute.json",
    ),
    "two attributes": (
        "sample_annotation", put(0, attribute_tokens=["a", "b"]), "expected a list of at most one token"
    ),
    "other object": (
        "sample_annotation", put(1, prev="scene-a-sample-0-walker"),
        "'scene-a-sample-1-car' has prev scene-a-sample-0-walker of instance scene-a-walker at 1600000000000000 us, "
        "expected instance scene-a-car before 1600000000500000 us",
    ),
    "backwards": (
        "sample_annotation", put(0, next="scene-a-sample-0-car"),
        "'scene-a-sample-0-car' has next scene-a-sample-0-car of instance scene-a-car at 1600000000000000 us, "
        "expected instance scene-a-car after 1600000000000000 us",
    ),
    "no LiDAR": (
        "sample_data", lambda rows: rows.pop(),
        "sample_data.json: no key frame of LIDAR_TOP has sample_token 'scene-a-sample-1', which is a row of "
        "sample.json, expected one",
    ),
    "no log": ("log", put(0, token="other"), "map.json: no row lists 'other' of log.json in log_tokens, expected one"),
    "no boxes": (
        "sample_annotation", lambda rows: rows.clear(),
        "sample_annotation.json is empty, expected the annotations of the 3 rows of instance.json",
    ),
    "pixels": ("sample_data", put(0, width=40_000), "has width 40000, expected a whole number from 1 to 16384"),
    "last row": (
        "calibrated_sensor", put(0, camera_intrinsic=[[1, 0, 0], [0, 1, 0], [0, 0, 2]]),
        "'calibration-CAM_FRONT' has camera_intrinsic [[1, 0, 0], [0, 1, 0], [0, 0, 2]], expected 3 x 3 finite numbers "
        "with last row [0, 0, 1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(world, name):
    table, change, words = REFUSED[name]
    sentence = refusal(world, table, change)
    assert words in sentence and sentence.startswith("map" if name == "no log" else table), sentence
    assert "\n" not in sentence and len(sentence) < 400


def test_what_nothing_reads_may_be_anything(world):
    world.edit("sample_data", put(0, fileformat=None, next="lost"))
    world.edit("scene", put(0, description=[], nbr_samples=-1))
    world.edit("sample_annotation", put(0, visibility_token=math.nan))
    assert len(CheckedNuScenes(world.root, VERSION).sample_annotation) == 6


def test_further_tables_of_the_devkit_are_its_own_matter(world):
    world.table("lidarseg").write_text("[]")
    with pytest.raises(TableError, match=r"v1\.0-tiny: the devkit refuses the tables: .*"):
        CheckedNuScenes(world.root, VERSION)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "holds [1], expected an object: split -> list of scene names"),
        ('{"a": "scene-a"}', "'a' is 'scene-a', expected a list of scene names"),
        ('{"a": [3]}', "'a' is [3], expected a list of scene names"),
        ("[" * 100_000, "is not valid JSON: its lists are nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "is not valid JSON: Exceeds the limit"),
    ],
)
def test_splits(world, content, words):
    (world.root / VERSION / "splits.json").write_text(content)
    with pytest.raises(TableError) as error:
        read_splits(world.root / VERSION)
    assert f"{world.root}/{VERSION}/splits.json" in str(error.value) and words in str(error.value)
    (world.root / VERSION / "splits.json").unlink()
    assert len(read_splits(world.root / VERSION)["val"]) == 150


@pytest.mark.parametrize("velocity", [[1, 2, 3], [1], [True, 1], [math.nan, 0], [2000, 0], "fast", {}])
def test_velocities(tmp_path, velocity):
    path = tmp_path / "v.json"
    path.write_text(json.dumps({"good": {"velocity_global_xy": [1, -2.5]}, "none": {"velocity_global_xy": None}}))
    assert read_velocities(path) == {"good": (1.0, -2.5), "none": None}
    path.write_text(json.dumps({"bad": {"velocity_global_xy": velocity}}))
    with pytest.raises(TableError) as error:
        read_velocities(path)
    expected = f"'bad' has velocity_global_xy {schema.show(velocity)}, expected two finite numbers from -1000 to 1000"
    assert expected in str(error.value)


def test_file_names():
    good = ["samples/CAM_FRONT/n015-2018-07-24-11-22-45+0800__CAM_FRONT__15.jpg", "a", "a..b/..c", "ü/x y.bin"]
    assert schema.FILE.all_valid(good)
    bad = ["", "/a", "..", "../a", "a/..", "a/../b", "a\0", "a\nb", "a\\b", "\ud800", "x" * 513, 3, None, ["a"]]
    assert [name for name in bad if schema.FILE.all_valid([*good, name])] == []
