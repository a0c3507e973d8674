"""Shapes of the attention benches, and how growth is told."""

import pytest
import torch

from cmt_aqr.tools import bench
from cmt_aqr.tools.attention_cases import fusion_layout, make_windows
from cmt_aqr.tools.bench_frames import random_points
from cmt_aqr.tools.bench_scaling import Cost, growth, table
from cmt_aqr.tools.bench_shapes import ATTENTION_SHAPES, R50, SCALING


@pytest.mark.parametrize(
    "shape", [*ATTENTION_SHAPES, *(s for shapes in SCALING.values() for s in shapes.values())], ids=str
)
def test_tokens_are_those_of_the_grids(shape):
    layout = fusion_layout(shape.bev, shape.cameras, cell_size=shape.cell_size)
    assert layout.num_tokens == shape.num_tokens and f"K{shape.num_tokens}" in str(shape)


def test_each_axis_changes_its_size_alone():
    for axis, shapes in SCALING.items():
        for size, shape in shapes.items():
            values = {
                "queries": shape.num_queries,
                "tokens": shape.num_tokens,
                "batch": shape.batch_size,
                "cameras": shape.cameras[0],
                "window": shape.windows[0],
            }
            assert values[axis] == size
            others = {"queries": R50.num_queries, "batch": R50.batch_size, "window": R50.windows[0]}
            assert all(values[name] == value for name, value in others.items() if name != axis)


def test_clustered_queries_share_their_windows():
    layout = fusion_layout(R50.bev, R50.cameras, cell_size=R50.cell_size)
    counts = [
        len(make_windows(layout, 1, 900, device="cpu", num_clusters=clusters).cells[0][0, :, 0].unique(dim=0))
        for clusters in (0, 12)
    ]
    assert counts[0] > 700 and counts[1] < 350


def test_twelve_cameras_repeat_six():
    shape = SCALING["cameras"][12]
    windows = make_windows(fusion_layout(None, shape.cameras), 2, 50, device="cpu")
    assert windows.cells[0].shape[:2] == (2, 50) and (windows.cells[0][..., 0] < 6).all()


def test_growth_is_the_exponent():
    assert growth(100, 400, 10, 20) == pytest.approx(0.5)
    rows = list(table("queries", [Cost(300, 100, 200, 3, (50, 100)), Cost(600, 400, 400, 6, (80, 100))]))
    assert rows[2:] == [
        "| 300 | 100 | - | 2.00 | 200 | - | 2.00 | 3 |",
        "| 600 | 400 | 2.00 | 5.00 | 400 | 1.00 | 4.00 | 6 |",
    ]


def test_any_number_of_points():
    points = random_points(100_000, (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0))
    assert points.shape == (100_000, 5) and points.isfinite().all()
    assert torch.equal(points[:50_000], random_points(50_000, (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["attention"], ["scaling", "cmt_aqr_r50_800x320"]])
def test_without_a_gpu_one_sentence(command, capsys):
    assert bench.main(command) == 2
    assert "needs a CUDA GPU, and there is none" in capsys.readouterr().err
