"""Denoising queries: sizes, mask, noise, padding."""

import pytest
import torch

from cmt_aqr.boxes import Targets
from cmt_aqr.geometry import to_unit
from cmt_aqr.models.denoising import BACKGROUND, DenoisingSettings, denoising_mask, group_sizes, make_denoising
from tests.unit.models.tiny_detector import POINT_RANGE, make_targets

SETTINGS = {"num_queries": 30, "num_dn": 24, "point_range": POINT_RANGE}


@pytest.mark.parametrize(
    ("max_boxes", "num_dn", "expected"),
    (
        (3, 300, (10, 3)),  # the limit of ten groups
        (90, 900, (10, 90)),
        (200, 900, (4, 200)),  # 900 // 200 groups, as in the original
        (200, 500, (2, 200)),  # no more than fit
        (200, 120, (1, 120)),  # not one group fits: the first 120 boxes
        (901, 900, (0, 900)),  # more boxes than queries: none, as in the original
        (0, 900, (0, 0)),
        (5, 0, (0, 0)),
    ),
)
def test_number_of_groups(max_boxes, num_dn, expected):
    assert group_sizes(max_boxes, num_queries=900, num_dn=num_dn, max_groups=10) == expected


def test_mask_row_by_row():
    groups, slots, num_dn, num_queries = 3, 2, 8, 4
    first = num_dn - groups * slots
    mask = denoising_mask(groups, slots, num_dn=num_dn, num_queries=num_queries)
    for i in range(num_dn + num_queries):
        for j in range(num_dn + num_queries):
            if i < first or j < first:
                expected = i == j
            elif i >= num_dn:
                expected = j >= num_dn
            else:
                expected = j >= num_dn or (i - first) // slots == (j - first) // slots
            assert bool(mask[i, j]) == expected, (i, j)


def test_rows_are_dead_then_groups_of_slots():
    targets = make_targets((3, 1))
    denoising = make_denoising(targets, **SETTINGS, settings=DenoisingSettings(max_groups=5))
    assert denoising.num_dn == 24
    assert denoising.is_valid.tolist() == [False] * 9 + [True] * 15
    slots = denoising.boxes[:, 9:].unflatten(1, (5, 3))
    assert torch.equal(slots[0], targets[0].boxes.expand(5, 3, 9))
    assert torch.equal(slots[1, :, 0], targets[1].boxes.expand(5, 9))
    assert denoising.is_known.sum(1).tolist() == [15, 5]
    assert torch.equal(denoising.reference_points[~denoising.is_known], torch.zeros(24 - 15 + 24 - 5, 3).double())
    assert (denoising.clean_labels[~denoising.is_known] == BACKGROUND).all()
    assert (denoising.boxes[~denoising.is_known][:, 3:6] == 1).all()


def test_noise_moves_centres_by_at_most_half_the_size_and_is_reproducible():
    targets = make_targets((6, 4))
    first, second, other = (
        make_denoising(targets, **SETTINGS, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.reference_points, second.reference_points)
    assert not torch.equal(first.reference_points, other.reference_points)
    span = torch.tensor(POINT_RANGE).double()
    shift = (first.reference_points - to_unit(first.boxes[..., :3], POINT_RANGE)) * (span[3:] - span[:3])
    assert (shift.abs() <= first.boxes[..., 3:6] / 2 + 1e-9)[first.is_known].all()
    assert first.reference_points.min() >= 0
    assert first.reference_points.max() <= 1


def test_far_noise_makes_a_row_background_but_keeps_its_box():
    targets = make_targets((1,))
    noise = torch.full((1, 24, 3), 0.5)
    noise[0, 20] = torch.tensor([0.99, 0.5, 0.5])  # length 0.98 after 2 r - 1
    denoising = make_denoising(targets, **SETTINGS, noise=noise)
    labels = denoising.labels[0, denoising.is_known[0]]
    assert (labels == BACKGROUND).sum() == 1
    assert denoising.labels[0, 20] == BACKGROUND
    assert denoising.clean_labels[0, 20] == targets[0].labels[0]
    assert torch.equal(denoising.boxes[0, 20], targets[0].boxes[0])


def test_scale_zero_gives_the_clean_centres_in_unit_coordinates():
    targets = make_targets((2,))
    denoising = make_denoising(targets, **SETTINGS, settings=DenoisingSettings(noise_scale=0.0))
    expected = to_unit(targets[0].boxes[:, :3], POINT_RANGE)
    torch.testing.assert_close(denoising.reference_points[0, -2:], expected)


def test_a_frame_without_boxes_and_a_batch_without_boxes():
    mixed = make_denoising(make_targets((0, 2)), **SETTINGS)
    assert not mixed.is_known[0].any()
    assert mixed.is_valid.any()
    empty = make_denoising(make_targets((0, 0)), **SETTINGS)
    assert not empty.is_valid.any()
    assert not empty.is_known.any()
    assert torch.equal(empty.attention_mask[:24, :24], torch.eye(24, dtype=torch.bool))
    assert empty.reference_points.shape == mixed.reference_points.shape


def test_more_boxes_than_rows_keeps_the_first_ones():
    targets = make_targets((29,))
    denoising = make_denoising(targets, **SETTINGS)
    assert denoising.is_known.all()
    assert torch.equal(denoising.boxes[0], targets[0].boxes[:24])


def test_max_boxes_of_other_processes_decides_the_groups():
    targets = make_targets((3, 1))
    shared = make_denoising(targets, **SETTINGS, max_boxes=8)
    assert shared.is_valid.sum() == 24  # three groups of eight slots
    assert shared.is_known.sum(1).tolist() == [9, 3]
    with pytest.raises(ValueError, match="max_boxes is 2, but a frame of the batch has 3 boxes"):
        make_denoising(targets, **SETTINGS, max_boxes=2)


def test_noise_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise must have shape \(1, 24, 3\)"):
        make_denoising(make_targets((1,)), **SETTINGS, noise=torch.zeros(1, 5, 3))


def test_targets_are_not_changed():
    targets = make_targets((3,))
    before = Targets(targets[0].boxes.clone(), targets[0].labels.clone())
    make_denoising(targets, **SETTINGS)
    assert torch.equal(targets[0].boxes, before.boxes)
    assert torch.equal(targets[0].labels, before.labels)
