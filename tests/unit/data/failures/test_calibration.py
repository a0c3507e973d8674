"""Wrong calibration and late sensors, by hand."""

import math

import numpy as np
import pytest
import torch

from cmt_aqr.data.failures import calibration, timing
from cmt_aqr.data.failures.apply import fail_calibration
from cmt_aqr.data.failures.names import parse_failure
from cmt_aqr.data.frames import bare_sample


def test_a_disturbance_is_a_small_rigid_motion():
    angles, axes = [], []
    for seed in range(400):
        matrix = calibration.disturbance(np.random.default_rng(seed)).numpy()
        rotation, shift = matrix[:3, :3], matrix[:3, 3]
        assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12) and np.linalg.det(rotation) > 0
        angles.append(math.degrees(math.acos((np.trace(rotation) - 1) / 2)))
        axes.append([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
        assert (np.abs(shift) >= 0.005).all() and (np.abs(shift) <= 0.010).all()
    assert 0.5 <= min(angles) < 0.6 and 2.4 < max(angles) <= 2.5
    axes = np.array(axes) / np.linalg.norm(axes, axis=1, keepdims=True)
    assert np.abs(axes.mean(axis=0)).max() < 0.1 and (axes**2).mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.06)


def lidar2img_and_pose() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lidar2img = torch.rand(6, 4, 4, generator=generator, dtype=torch.float64)
    lidar2ego = torch.eye(4, dtype=torch.float64)
    lidar2ego[:3, 3] = torch.tensor([0.9, 0.0, 1.8])
    return lidar2img, lidar2ego


def test_each_camera_by_itself_or_all_alike(rng):
    lidar2img, lidar2ego = lidar2img_and_pose()

    def noises(kind: str, views: list[int]) -> list[torch.Tensor]:
        told = calibration.disturb(lidar2img, lidar2ego, views, kind, np.random.default_rng(3))
        return [lidar2ego @ torch.linalg.inv(told[v]) @ lidar2img[v] @ torch.linalg.inv(lidar2ego) for v in range(6)]

    alike = noises("all", [0, 1, 2, 3, 4, 5])
    assert all(torch.allclose(noise, alike[0], atol=1e-9) for noise in alike)
    assert not torch.allclose(alike[0], torch.eye(4, dtype=torch.float64), atol=1e-4)
    single = noises("single", [0, 1, 2, 3, 4, 5])
    assert not any(torch.allclose(a, b, atol=1e-4) for i, a in enumerate(single) for b in single[:i])
    some = noises("single", [1, 4])
    is_same = [torch.allclose(noise, torch.eye(4, dtype=torch.float64), atol=1e-9) for noise in some]
    assert is_same == [True, False, True, True, False, True]


def test_only_named_cameras_are_told_wrong():
    lidar2img, lidar2ego = lidar2img_and_pose()
    (failure,) = parse_failure("calibration_noise:BACK")
    told = fail_calibration(failure, lidar2img, lidar2ego, "token", 0)
    assert [torch.equal(told[v], lidar2img[v]) for v in range(6)] == [True, True, True, False, True, True]


@pytest.mark.data
def test_real_cameras_turn_by_half_the_nominal_degrees(real):
    """Rays through the same pixel, before and after, differ by the angle of the disturbance at most."""
    sample = bare_sample(real, "all")
    (failure,) = parse_failure("calibration_noise")
    for seed in range(5):
        told = fail_calibration(failure, sample.lidar2img, sample.lidar2ego, sample.token, seed)
        for before, after in zip(sample.lidar2img.numpy(), told.numpy(), strict=True):
            rays = [np.linalg.inv(m[:3, :3]) @ [800, 450, 1] for m in (before, after)]
            cos = rays[0] @ rays[1] / np.linalg.norm(rays[0]) / np.linalg.norm(rays[1])
            assert 0 < math.degrees(math.acos(min(cos, 1))) <= 2.5
            centres = [-np.linalg.inv(m[:3, :3]) @ m[:3, 3] for m in (before, after)]
            assert np.linalg.norm(centres[0] - centres[1]) < 0.0175 + 3 * math.radians(2.5)


TOKENS = list("hgfedcba")  # the newest first


def test_late_by_one_key_frame():
    assert timing.previous(TOKENS, 0.5, lambda token: 0.49) == 1
    assert timing.previous(TOKENS, 0.5, lambda token: 0.5) == 0
    assert timing.previous(["a"], 0.5, lambda token: 0.0) == 0  # nothing before a scene's first frame


def test_frozen_in_runs_of_four():
    """A run begins at d: d, e, f, g deliver c, and h is itself again."""

    def coin(token: str) -> float:
        return 0.0 if token == "d" else 0.99

    delivered = {TOKENS[i]: TOKENS[i:][timing.stuck_run(TOKENS[i:], 0.5, coin)] for i in range(len(TOKENS))}
    assert delivered == {"h": "h", "g": "c", "f": "c", "e": "c", "d": "c", "c": "c", "b": "b", "a": "a"}
    assert timing.stuck_run(TOKENS, 0.9, lambda token: 0.0) == len(TOKENS) - 1  # frozen from the first frame on


@pytest.mark.parametrize("share", (0.1, 0.5, 0.9))
def test_the_share_of_frozen_frames(share):
    coins = dict(enumerate(np.random.default_rng(0).random(4000)))
    stuck = [
        timing.stuck_run(list(range(i, max(i - 40, -1), -1)), share, coins.__getitem__) > 0 for i in range(40, 4000)
    ]
    assert np.mean(stuck) == pytest.approx(share, abs=0.03)
