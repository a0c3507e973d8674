import numpy as np
import pytest

from cmt_aqr.data.index import Frame, FrameIndex
from cmt_aqr.data.nuscenes import load_index
from cmt_aqr.data.readers import read_points, read_view
from tests.unit.data.conftest import index, one_thread, real_frame, world

__all__ = ["index", "one_thread", "real_frame", "world"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def real_index(real_frame, tmp_path) -> FrameIndex:
    return load_index(dataroot=real_frame, version="v1.0-mini", split="one_frame", cache_dir=tmp_path)


@pytest.fixture
def real(real_index) -> Frame:
    return real_index.frame(0)


@pytest.fixture
def real_cloud(real_index, real) -> np.ndarray:
    return read_points(real_index.dataroot / real.lidar_file).numpy()


@pytest.fixture
def real_image(real_index, real) -> np.ndarray:
    return read_view(real.cameras[0], real_index.dataroot)
