"""Stages that stay in float32 under CUDA autocast: positions, windows, heads and losses give the same bits."""

import pytest
import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.losses.criterion import Criterion
from cmt_aqr.models.denoising import make_denoising
from tests.unit.models.tiny_detector import POINT_RANGE, TWO_TASKS, make_detector, make_features, make_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def stages(detector, features, targets, noise, hidden):
    """Everything that stays in float32, by name; the decoder's output is given."""
    denoising = make_denoising(targets, num_queries=12, num_dn=10, point_range=POINT_RANGE, noise=noise)
    cameras = detector.make_cameras(*features[1:])
    tokens = detector.make_tokens(*features[:2], cameras)
    queries = detector.make_queries(2, cameras, denoising)
    windows = detector.route(queries, tokens, cameras).windows
    predictions = detector.head(hidden, queries.reference_points, num_dn=queries.num_dn, is_valid=queries.is_valid)
    outputs = {f"{i} {name}": x for i, task in enumerate(predictions.tasks) for name, x in task.items()}
    outputs |= {"tokens": tokens.positions, "queries": queries.positions, "points": queries.reference_points}
    outputs |= Criterion(classes=TWO_TASKS)(predictions, targets, denoising)
    return outputs, windows.cells


@torch.no_grad()
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_autocast_rounds_no_stage_that_stays_in_float32(half):
    detector = make_detector(dtype=torch.float32, design="bias", classes=TWO_TASKS, kernel=3).cuda().eval()
    bev_map, pv_maps, lidar2img, size = make_features(2)
    features = (bev_map.float().cuda(), pv_maps.float().cuda(), lidar2img.cuda(), size)
    targets = [Targets(t.boxes.float().cuda(), t.labels.cuda()) for t in make_targets((3, 5))]
    noise = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0)).cuda()
    hidden = torch.randn(2, 2, 22, 16, generator=torch.Generator().manual_seed(1)).to(half).cuda()
    with torch.autocast("cuda", dtype=half):
        actual, windows = stages(detector, features, targets, noise, hidden)
    expected, expected_windows = stages(detector, features, targets, noise, hidden.float())
    for name, tensor in expected.items():
        assert actual[name].dtype == torch.float32, name
        assert torch.equal(actual[name], tensor), name
    for left, right in zip(windows, expected_windows, strict=True):
        assert torch.equal(left, right)
