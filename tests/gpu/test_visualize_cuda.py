"""What ``visualize model`` draws of queries, on a GPU as on the CPU."""

import numpy as np
import pytest
import torch

from cmt_aqr.attention_maps import query_maps
from tests.unit.test_attention_maps import maps_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_maps_of_queries_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, (images, points, lidar2img), found = maps_case()
    expected = query_maps(model, images, points, lidar2img, found, 2)
    moved = images.cuda(), [own.cuda() for own in points], lidar2img.cuda()
    for got, wanted in zip(query_maps(model.cuda(), *moved, found, 2), expected, strict=True):
        assert (got.view, got.bev.window, got.camera.window) == (wanted.view, wanted.bev.window, wanted.camera.window)
        for grid in ("bev", "camera"):
            for kind in ("plain", "biased"):
                mine, other = getattr(getattr(got, grid), kind), getattr(getattr(wanted, grid), kind)
                np.testing.assert_allclose(mine, other, atol=1e-3)
