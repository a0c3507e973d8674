import os
from pathlib import Path

import pytest
import torch

from cmt_aqr.data.index import FrameIndex
from cmt_aqr.data.nuscenes import load_index
from tests.unit.data.world import VERSION, World, write_world

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a loader's worker; on a busy machine the threads of small operations mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def real_frame() -> Path:
    root = Path(os.environ.get("CMT_AQR_REAL_FRAME") or REPOSITORY.parent / "shared" / "nuscenes-one")
    if not (root / "infos.json").is_file():
        pytest.skip(f"real nuScenes frame {root} does not exist (set CMT_AQR_REAL_FRAME)")
    return root


@pytest.fixture
def world(tmp_path) -> World:
    return write_world(tmp_path / "world")


@pytest.fixture
def index(world, tmp_path) -> FrameIndex:
    return index_of(world, tmp_path / "cache")


def index_of(world: World, cache: Path, **options) -> FrameIndex:
    return load_index(**{"dataroot": world.root, "version": VERSION, "split": "all", "cache_dir": cache} | options)
