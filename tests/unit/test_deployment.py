"""A program of fixed sizes gives the detector's boxes, from the points and from the map of the sparse encoder."""

import pytest
import torch

from cmt_aqr.boxes import Detections
from cmt_aqr.deployment import INPUTS, OUTPUTS, DetectionProgram, affine_inverse, choose_sizes, example_inputs
from cmt_aqr.golden.stages import Frame
from tests.unit.models.tiny_detector import ring_of_cameras
from tests.unit.test_inference import KINDS, assert_same, expected_detections, make_detector, make_inputs


def make_program(kind, *, has_encoder=True, counts=(900,)):
    """Program, inputs by name, and what the detector finds."""
    detector, decoding = make_detector(KINDS[kind])
    given = make_inputs(counts, seed=0)
    inputs = example_inputs(detector, Frame(*given), has_encoder=has_encoder)
    sizes = choose_sizes(detector.lidar_branch, inputs["points"]) if "points" in inputs else None
    program = DetectionProgram(detector, decoding=decoding, sizes=sizes).eval()
    return program, inputs, expected_detections(detector, decoding, given)


def kept(found):
    """The outputs of a program as the records of an evaluation."""
    return [
        Detections(*(found[name][i][found["is_kept"][i]] for name in ("boxes", "scores", "labels")))
        for i in range(len(found["boxes"]))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_those_of_the_detector(kind):
    program, inputs, expected = make_program(kind)
    with torch.inference_mode():
        found = program(**inputs)
    assert_same(kept(found), expected)
    assert list(inputs) == [name for name in INPUTS if name in inputs]
    assert list(found) == [name for name in OUTPUTS if name in found]
    assert ("needed" in found) == ("points" in inputs)


def test_inputs_are_contiguous_whatever_the_frame_is():
    """A package of AOTInductor takes the strides of the traced inputs for those of all inputs."""
    detector, _ = make_detector()
    images, points, lidar2img = make_inputs((900,), seed=0)
    frame = Frame(images.movedim(-1, 2).contiguous().movedim(2, -1), points, lidar2img.mT.contiguous().mT)
    assert not frame.images.is_contiguous() and not frame.lidar2img.is_contiguous()
    assert all(x.is_contiguous() for x in example_inputs(detector, frame, has_encoder=True).values())


def test_boxes_from_the_map_of_the_sparse_encoder():
    program, inputs, expected = make_program("fusion with AQR", has_encoder=False)
    branch = program.detector.lidar_branch
    with torch.inference_mode():
        encoder_map = branch.encoder(branch.voxelize(make_inputs((900,), seed=0)[1]))
        assert encoder_map.shape == inputs["encoder_map"].shape and encoder_map.abs().max() > 0
        found = program(**inputs | {"encoder_map": encoder_map})
    assert_same(kept(found), expected)


def test_points_that_need_more_rows_leave_no_box_and_say_how_many_they_need():
    program, inputs, _ = make_program("fusion with AQR")
    small = program.sizes
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(3000, 5, generator=generator, dtype=torch.float64) * 20 - 46
    spread[:, 2:] = 0
    inputs["points"][0, :3000] = spread
    with torch.inference_mode():
        found = program(**inputs)
        assert not found["is_kept"].any()
        assert any(need > size for need, size in zip(found["needed"].tolist(), small, strict=True))
        for _ in small:  # at least one more number is right every time
            program.sizes = tuple(map(max, program.sizes, found["needed"].tolist()))
            found = program(**inputs)
    assert found["is_kept"].any()


def test_stages_have_the_names_and_values_of_a_bundle():
    program, inputs, _ = make_program("fusion with AQR")
    program.has_stages = True
    with torch.inference_mode():
        found = program(**inputs)
    logits = found["heads/task0.cls_logits"][-1, 0]
    best = logits.sigmoid().flatten().topk(found["scores"].shape[1])
    torch.testing.assert_close(best.values, found["scores"][0], rtol=0, atol=0)
    assert torch.equal(best.indices // logits.shape[1], found["queries"][0])
    assert found["aqr/weights"].shape == (1, 40, 2) and found["windows/camera"].dtype == torch.int64


def test_the_inverse_of_a_calibration():
    lidar2img = ring_of_cameras(2)
    lidar2img = lidar2img + 1e-3 * torch.randn(lidar2img.shape, dtype=torch.float64)
    lidar2img[..., 3, :] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    expected = torch.linalg.inv(lidar2img)
    torch.testing.assert_close(
        affine_inverse(lidar2img), expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item()
    )
    assert not affine_inverse(torch.diag(torch.tensor([1.0, 1.0, 0.0, 1.0]))).isfinite().all()
