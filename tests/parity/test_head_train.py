"""Denoising queries, matching, losses and gradients against one training step of the original."""

import copy

import pytest
import torch

from cmt_aqr.boxes import encode_boxes
from cmt_aqr.geometry import inverse_sigmoid
from cmt_aqr.losses.criterion import Criterion, total_loss
from cmt_aqr.losses.matcher import class_table, encode_targets
from cmt_aqr.models.denoising import DenoisingSettings, make_denoising
from cmt_aqr.models.queries import ray_query_positions
from cmt_aqr.predictions import BOX_BRANCHES, CLASS_BRANCH, task_classes
from cmt_aqr.tools.official_names import rename_official
from tests.parity.golden import load_golden
from tests.parity.head_case import FORWARD_TOLERANCE, OFFICIAL_PREFIX, HeadCase

# Losses sum thousands of terms and gradients pass six layers: three orders above rounding in float64. The original's
# own float32 run departs from its float64 run by up to 2e-6; ours sums in another order, so five times that.
FILES = ("head_train", "head_train_6task", "head_train_small")
BACKWARD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class Step:
    """One forward and backward pass of our code on a golden training case; `autocast`: dtype of the forward pass."""

    def __init__(self, golden, dtype, *, device="cpu", autocast=None):
        self.case = case = HeadCase(golden, dtype, device=device)
        meta = case.meta
        self.targets = case.targets()
        self.num_dn = int(golden["out/dn/pad_size"])
        self.rows = golden.tensor("out/dn/map_known_indice")
        counts = torch.tensor(meta["ns"])
        self.samples = torch.repeat_interleave(torch.arange(len(counts)), counts).repeat(meta["groups"])
        noise = torch.zeros(meta["bs"], self.num_dn, 3, dtype=dtype)
        noise[self.samples, self.rows] = golden.tensor("in/dn_rand", dtype)
        assert meta["noise_trans"] == 0  # what noised_centres leaves out
        self.denoising = make_denoising(
            self.targets,
            num_queries=meta["num_query"],
            num_dn=self.num_dn,
            point_range=meta["pc_range"],
            settings=DenoisingSettings(meta["scalar"], meta["noise_scale"], meta["split"]),
            noise=noise.to(case.device),
        )
        self.criterion = Criterion(
            classes=task_classes(meta["tasks"]),
            code_weights=meta["code_weights"],
            cls_weight=meta["loss_cls_weight"],
            box_weight=meta["loss_bbox_weight"],
            dn_weight=meta["dn_weight"],
            cls_cost=meta["cost_cls_weight"],
            box_cost=meta["cost_reg_weight"],
            positive_threshold=meta["split"],
        )
        case.detector.train()
        case.bev_map.requires_grad_()
        case.pv_maps.requires_grad_()
        with torch.autocast(case.device.type, dtype=autocast, enabled=autocast is not None):
            self.predictions = case.predict(self.denoising)
        self.terms = self.criterion(self.predictions, self.targets, self.denoising)
        total_loss(self.terms).backward()


@pytest.fixture(
    params=[(name, dtype) for name in FILES for dtype in (torch.float64, torch.float32)],
    ids=lambda p: f"{p[0]}-{'f64' if p[1] == torch.float64 else 'f32'}",
    scope="module",
)
def step(request):
    name, dtype = request.param
    return Step(load_golden(name), dtype)


def test_denoising_queries_equal_the_original(step):
    golden, denoising = step.case.golden, step.denoising
    points = torch.cat(
        (
            denoising.reference_points,
            step.case.detector.reference_points.weight.detach().expand(len(step.targets), -1, -1),
        ),
        dim=1,
    )
    step.case.check("denoising, reference points", points, "dn/padded_reference_points")
    golden.check_equal("denoising, mask", denoising.attention_mask, ~golden.tensor("out/dn/attn_mask"))
    assert denoising.is_valid.all()
    assert denoising.is_known.sum() == len(step.rows)
    chosen = (step.samples, step.rows)
    assert denoising.is_known[chosen].all()
    for labels, name in ((denoising.labels, "known_labels"), (denoising.clean_labels, "known_labels_raw")):
        golden.check_equal("denoising, labels", labels[chosen], golden.tensor(f"out/dn/{name}"))
    step.case.check("denoising, boxes", denoising.boxes[chosen], "dn/known_bboxs")


def test_labels_of_denoising_queries_per_task_equal_the_original(step):
    golden, denoising = step.case.golden, step.denoising
    task_of, local_of = class_table(step.criterion.classes, device=step.case.device)
    for labels, name in ((denoising.labels, "dn_known_labels"), (denoising.clean_labels, "dn_known_labels_raw")):
        chosen = labels[step.samples, step.rows]
        for task, members in enumerate(step.criterion.classes):
            ours = torch.where(task_of[chosen] == task, local_of[chosen], len(members))
            golden.check_equal("denoising, labels per task", ours, golden.tensor(f"out/task{task}/{name}"))


def test_forward_in_training_equals_the_original(step):
    case, detector = step.case, step.case.detector
    with torch.no_grad():
        cameras = detector.make_cameras(case.pv_maps, case.lidar2img, case.image_size)
        queries = detector.make_queries(case.meta["bs"], cameras, step.denoising)
        points = inverse_sigmoid(queries.reference_points).sigmoid()
        ray = ray_query_positions(detector.ray_embedding, points, cameras)
    case.check("positions of queries, camera part", ray, "rv_query_embeds")
    expected = case.reference("bev_query_embeds") + case.reference("rv_query_embeds")
    ours = case.compared(queries.positions, "bev_query_embeds")
    case.golden.check("positions of queries", ours, expected, FORWARD_TOLERANCE[case.dtype])
    for task, outputs in enumerate(step.predictions.tasks):
        for name in (*BOX_BRANCHES, CLASS_BRANCH):
            denoised, matching = outputs[name][:, :, : step.num_dn], outputs[name][:, :, step.num_dn :]
            case.check(f"head, {name}", matching, f"task{task}/{name}")
            case.check(f"head, denoising rows, {name}", denoised, f"task{task}/dn_{name}")


@torch.no_grad()
def test_parts_in_training_equal_the_original(step):
    case = step.case
    detector = copy.deepcopy(case.detector)  # batch norm in training keeps statistics
    cameras = detector.make_cameras(case.pv_maps, case.lidar2img, case.image_size)
    tokens = detector.make_tokens(case.bev_map, case.pv_maps, cameras)
    queries = detector.make_queries(case.meta["bs"], cameras, step.denoising)
    num_bev = case.bev_map.shape[-2:].numel()
    shared = tokens.values[:, :num_bev].mT.unflatten(2, (case.meta["bev"], -1))
    case.check("shared convolution", shared, "x_shared")
    case.check("positions of BEV tokens", tokens.positions[0, :num_bev], "bev_pos_embeds")
    ours = tokens.positions[:, num_bev:].reshape(*case.pv_maps.flatten(0, 1).movedim(1, -1).shape)
    limit = FORWARD_TOLERANCE[torch.float32]
    case.check("positions of camera tokens (float32 there)", ours, "rv_pos_embeds", limit)
    hidden = detector.decoder(queries.positions, tokens.values, tokens.positions, attention_mask=queries.attention_mask)
    case.check("decoder", hidden, "outs_dec")


def test_assignments_equal_the_original(step):
    padded = encode_targets(step.targets, dtype=step.case.dtype)
    assigned = step.criterion.assign(step.predictions, padded)
    golden = step.case.golden
    golden.check_equal("assignment", assigned.permute(1, 2, 0, 3), golden.tensor("out/assign/orig_gt"))
    assert torch.equal(padded.codes[0, : len(step.targets[0].boxes)], encode_boxes(step.targets[0].boxes))


def test_every_loss_term_equals_the_original(step):
    golden, tolerance = step.case.golden, BACKWARD_TOLERANCE[step.case.dtype]
    expected = {n.removeprefix("out64/loss/") for n in golden.names if n.startswith("out64/loss/")} - {"total"}
    assert set(step.terms) == expected
    for name, value in step.terms.items():
        step.case.check(f"loss, {name.rpartition('.')[2]}", value, f"loss/{name}", tolerance)
    step.case.check("loss, total", total_loss(step.terms), "loss/total", tolerance)


def test_gradients_equal_the_original(step):
    golden, tolerance = step.case.golden, BACKWARD_TOLERANCE[step.case.dtype]
    parameters = dict(step.case.detector.named_parameters())
    stored = [n for n in golden.names if n.startswith("out64/grad/")]
    assert stored
    for name in stored:
        official = name.removeprefix("out64/grad/")
        ours = parameters[rename_official(OFFICIAL_PREFIX + official)].grad
        golden.check("gradients of parameters", ours, name, tolerance)
    step.case.check("gradient of the BEV map", step.case.bev_map.grad, "grad_in/x", tolerance)
    ours = step.case.pv_maps.grad.flatten(0, 1)
    step.case.check("gradient of the camera maps", ours, "grad_in/x_img", tolerance)


def test_gradient_norms_of_all_parameters_equal_the_original(step):
    golden, tolerance = step.case.golden, BACKWARD_TOLERANCE[step.case.dtype]
    parameters = dict(step.case.detector.named_parameters())
    names = golden["gradnorm_names"].tolist()
    norms = step.case.reference("gradnorm")
    assert {rename_official(OFFICIAL_PREFIX + name) for name in names} == set(parameters)
    largest = norms.max().item()
    for name, norm in zip(names, norms.tolist(), strict=True):
        grad = parameters[rename_official(OFFICIAL_PREFIX + name)].grad
        assert grad is not None
        # Norms that are pure rounding (a bias in front of a softmax) are compared on the scale of the whole gradient.
        error = abs(grad.norm().item() - max(norm, 0.0)) / max(norm, 1e-3 * largest)
        golden.record("gradient norms", grad.dtype, error, tolerance)


def test_running_statistics_equal_the_original(step):
    norm = step.case.detector.shared_conv[1]
    for name in ("running_mean", "running_var"):
        step.case.check("running statistics after the step", getattr(norm, name), f"bn_after/{name}")
