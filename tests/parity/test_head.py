"""Positions, queries, decoder, heads and decoding against the original: fusion, LiDAR-only, camera-only, six tasks."""

import json

import pytest
import torch

from cmt_aqr.evaluation.postprocess import postprocess
from cmt_aqr.geometry import inverse_sigmoid
from cmt_aqr.models.position import bev_positions, pv_positions
from cmt_aqr.models.queries import ray_query_positions
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH
from tests.parity.golden import load_golden
from tests.parity.head_case import FORWARD_TOLERANCE, HeadCase

CASES = (
    ("head_eval", ""),
    ("head_eval_6task", ""),
    ("transformer_vs_lidar_image", "lidar/"),
    ("transformer_vs_lidar_image", "image/"),
    ("head_eval_small", ""),
    ("lidar_image_small", "lidar/"),
    ("lidar_image_small", "image/"),
)


@pytest.fixture(params=CASES, ids=lambda case: case[0] + ("-" + case[1][:-1] if case[1] else ""), scope="module")
def golden_part(request):
    name, prefix = request.param
    golden = load_golden(name)
    return golden, prefix, json.loads(str(golden[prefix + "meta_json"]))


@pytest.fixture(params=(torch.float64, torch.float32), ids=("f64", "f32"), scope="module")
def case(request, golden_part):
    golden, prefix, meta = golden_part
    case = HeadCase(golden, request.param, prefix=prefix, meta=meta)
    case.detector.eval()
    return case


@torch.no_grad()
def test_positions_of_tokens_equal_the_original(case):
    detector = case.detector
    if case.bev_map is not None:
        rows, cols = case.bev_map.shape[-2:]
        assert rows == case.meta["bev"]
        case.check("shared convolution", detector.shared_conv(case.bev_map), "x_shared")
        ours = bev_positions(detector.bev_embedding, rows, cols, like=case.bev_map)[0]
        case.check("positions of BEV tokens", ours, "bev_pos_embeds")
    if case.pv_maps is not None:
        cameras = detector.make_cameras(case.pv_maps, case.lidar2img, case.image_size)
        rows, cols = case.pv_maps.shape[-2:]
        ours = pv_positions(detector.ray_embedding, rows, cols, cameras)
        ours = ours.reshape(*case.pv_maps.flatten(0, 1).movedim(1, -1).shape)
        case.check("positions of camera tokens", ours, "rv_pos_embeds")


@torch.no_grad()
def test_positions_of_queries_equal_the_original(case):
    detector = case.detector
    cameras = detector.make_cameras(case.pv_maps, case.lidar2img, case.image_size)
    queries = detector.make_queries(case.meta["bs"], cameras, None)
    expected = case.reference("bev_query_embeds")
    if case.pv_maps is not None:
        expected = expected + case.reference("rv_query_embeds")
        points = inverse_sigmoid(queries.reference_points).sigmoid()
        ours = ray_query_positions(detector.ray_embedding, points, cameras)
        case.check("positions of queries, camera part", ours, "rv_query_embeds")
    stage = case.prefix + "positions of queries"
    ours = case.compared(queries.positions, "bev_query_embeds")
    case.golden.check(stage, ours, expected, FORWARD_TOLERANCE[case.dtype])


@torch.no_grad()
def test_decoder_and_heads_equal_the_original(case):
    detector = case.detector
    cameras = detector.make_cameras(case.pv_maps, case.lidar2img, case.image_size)
    tokens = detector.make_tokens(case.bev_map, case.pv_maps, cameras)
    queries = detector.make_queries(case.meta["bs"], cameras, None)
    case.check("decoder", detector.decoder(queries.positions, tokens.values, tokens.positions), "outs_dec")

    predictions = case.predict()
    for task, outputs in enumerate(predictions.tasks):
        for name in (*BOX_BRANCHES, CLASS_BRANCH):
            case.check(f"head, {name}", outputs[name], f"task{task}/{name}")


@torch.no_grad()
def test_detections_equal_the_original(case):
    detections = postprocess(
        case.predict(), max_detections=case.meta["max_num"], post_range=case.meta["post_center_range"]
    )
    # The original stores boxes as float32, with the bottom centre's z.
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}[case.dtype]
    for sample, found in enumerate(detections):
        boxes = found.boxes.clone()
        boxes[:, 2] -= boxes[:, 5] / 2
        case.golden.check_equal(case.prefix + "detections, labels", found.labels, case.reference(f"labels{sample}"))
        case.check("detections, scores", found.scores, f"scores{sample}")
        case.check("detections, boxes (float32 there)", boxes, f"boxes{sample}", tolerance)
