"""Stages of ``python -m cmt_aqr.golden export`` in float64 are those of the original: rows of the large ones.

test_recorded.py compares whole stages; of the large ones the files of the repository hold some rows each.
"""

import json

import pytest
import torch

from cmt_aqr.evaluation.postprocess import Decoding
from cmt_aqr.golden.stages import Frame, run_boxes, run_head
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH
from tests.parity.golden import load_golden
from tests.parity.head_case import HeadCase

CASES = (("head_eval_small", ""), ("lidar_image_small", "lidar/"), ("lidar_image_small", "image/"))


@pytest.mark.parametrize(("name", "prefix"), CASES)
def test_positions_decoder_and_heads_of_a_bundle_equal_the_original(name, prefix):
    golden = load_golden(name)
    meta = json.loads(str(golden[prefix + "meta_json"]))
    case = HeadCase(golden, torch.float64, prefix=prefix, meta=meta)
    images = (
        None if case.pv_maps is None else torch.zeros(*case.pv_maps.shape[:2], *case.image_size, 3, dtype=torch.uint8)
    )
    points = None if images is not None else [torch.zeros(1, 5)] * meta["bs"]
    made = {}
    with torch.no_grad():
        frame = Frame(images, points, case.lidar2img)
        predictions = run_head(case.detector.eval(), (case.pv_maps, case.bev_map), frame, None, made)
        run_boxes(predictions, Decoding(meta["max_num"], tuple(meta["post_center_range"]), None), made)
    compared = {"decoder/hidden": "outs_dec"}
    compared |= {
        f"heads/task{task}.{branch}": f"task{task}/{branch}"
        for task in range(len(predictions.tasks))
        for branch in (*BOX_BRANCHES, CLASS_BRANCH)
    }
    for ours, theirs in compared.items():
        case.check(f"golden export, {ours.partition('/')[0]}", made[ours], theirs)
    num_bev = 0
    if case.bev_map is not None:
        num_bev = case.bev_map.shape[-2:].numel()
        for sample in made["tokens/positions"]:
            case.check("golden export, BEV positions", sample[:num_bev], "bev_pos_embeds")
    if case.pv_maps is not None:
        ours = made["tokens/positions"][:, num_bev:]
        ours = ours.reshape(*case.pv_maps.flatten(0, 1).movedim(1, -1).shape)
        case.check("golden export, camera positions", ours, "rv_pos_embeds")
    expected = case.reference("bev_query_embeds")  # of the ground, with or without LiDAR
    if case.pv_maps is not None:
        expected = expected + case.reference("rv_query_embeds")
    ours = case.compared(made["queries/positions"], "bev_query_embeds")
    case.golden.check("golden export, query positions", ours, expected, 1e-12)
    logits = [case.reference(f"task{task}/{CLASS_BRANCH}")[-1, 0] for task in range(len(predictions.tasks))]
    order = torch.tensor([label for members in predictions.classes for label in members]).argsort()
    scores = torch.cat(logits, dim=-1).sigmoid()[:, order]
    expected = scores[made["boxes/queries.0"], made["boxes/labels.0"]]
    assert len(expected) > 10
    case.golden.check("golden export, scores of boxes", made["boxes/scores.0"], expected, 1e-12)
