import pytest

from cmt_aqr.synthetic import WorldSettings, generate_world

SIZE = (320, 180)
SETTINGS = {
    "scenes": 2,
    "val_scenes": 1,
    "seed": 11,
    "samples_per_scene": 4,
    "image_size": SIZE,
    "sweeps_per_keyframe": 9,
    "lidar_columns": 1084,
}


@pytest.fixture(scope="session")
def world_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic") / "world"
    generate_world(root, WorldSettings(**SETTINGS), progress=False)
    return root


@pytest.fixture(scope="session")
def nusc(world_root):
    from nuscenes import NuScenes

    return NuScenes("v1.0-synthetic", str(world_root), verbose=False)
