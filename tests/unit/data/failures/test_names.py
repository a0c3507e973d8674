"""What a user writes becomes a failure, or one sentence with what would have been right."""

import pytest

from cmt_aqr.data.failures import CASES, SUITES, Failure, keep_applicable, name_problems, parse_failure, parse_failures
from cmt_aqr.data.sample import DataError


def names(text: str) -> list[str]:
    return [failure.name for failure in parse_failure(text)]


def test_names_levels_and_views():
    assert names("beams:4") == ["beams:4"]
    assert names("beams") == ["beams:16", "beams:8", "beams:4"]
    assert names("lidar_drop") == ["lidar_drop"]
    assert names("stuck_lidar") == ["stuck_lidar:50"] and names("stuck_lidar:90") == ["stuck_lidar:90"]
    assert names("view_drop") == ["view_drop:all"]
    assert names("view_drop:back, cam_front") == ["view_drop:FRONT,BACK"]
    assert names("calibration_noise") == ["calibration_noise:single"]
    assert names("calibration_noise:all,FRONT") == ["calibration_noise:all,FRONT"]
    assert names("calibration_noise:FRONT") == ["calibration_noise:FRONT"]
    (failure,) = parse_failure("view_drop:FRONT,BACK")
    assert failure == Failure("view_drop", "all", ("CAM_FRONT", "CAM_BACK"))
    assert failure.file_name == "view_drop_FRONT-BACK"
    for case in CASES:
        for failure in parse_failure(case):
            assert parse_failure(failure.name) == [failure]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beam:4", "--failure 'beam:4': no failure is called 'beam', expected one of beams, brightness, darkness, "),
        ("beams:5", "--failure 'beams:5': beams takes one of the levels 16, 8, 4, got '5'"),
        ("beams:", "--failure 'beams:': beams takes one of the levels 16, 8, 4, got ''"),
        ("brightness:0.3", "--failure 'brightness:0.3': brightness takes one of the levels 1, 2, 3, got '0.3'"),
        ("points:20,40", "--failure 'points:20,40': points takes one of the levels 20, 40, 60, got '20,40'"),
        ("occlusion:2", "--failure 'occlusion:2': occlusion takes no level, expected the name alone, got '2'"),
        (
            "view_drop:FRNT",
            "--failure 'view_drop:FRNT': no camera or level is called 'FRNT', expected all, FRONT, FRONT_RIGHT, "
            "FRONT_LEFT, BACK, BACK_LEFT or BACK_RIGHT; did you mean 'FRONT'?",
        ),
        ("view_drop:", "--failure 'view_drop:': no camera or level is called '', expected all, FRONT, "),
        ("", "--failure '': no failure is called '', expected one of beams, "),
    ],
)
def test_wrong_names_get_one_sentence(text, sentence):
    with pytest.raises(DataError) as caught:
        parse_failure(text)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_a_near_name_is_suggested_at_the_end_of_the_sentence():
    with pytest.raises(DataError, match=r", calibration_noise; did you mean 'beams'\?$"):
        parse_failure("beam:4")


def test_suites():
    multicorrupt = [failure.name for failure in parse_failures([], "multicorrupt")]
    assert len(multicorrupt) == 30 and len(SUITES["multicorrupt"]) == 10
    assert multicorrupt[:3] == ["beams:16", "beams:8", "beams:4"]
    assert [failure.name for failure in parse_failures([], "mome")] == [
        "elevation_beams:4", "lidar_drop", "fov:60", "object_failure", "view_drop:all", "occlusion",
    ]  # fmt: skip
    everything = {failure.name for failure in parse_failures([], "all")}
    assert everything >= set(multicorrupt) | {"fov:90", "elevation_beams:1", "frozen_cameras:50"}
    both = parse_failures(["beams:4", "beams", "beams:4"], None)
    assert [failure.name for failure in both] == ["beams:4", "beams:16", "beams:8"]
    with pytest.raises(DataError, match=r"^--failures 'mom': unknown suite, expected one of .*; did you mean 'mome'"):
        parse_failures([], "mom")


def test_failures_that_a_model_cannot_notice():
    failures = parse_failures(["beams:4", "occlusion", "fog:1", "temporal:1", "calibration_noise"])
    assert [f.name for f in keep_applicable(failures, ("lidar",))[1]] == ["occlusion", "calibration_noise:single"]
    assert [f.name for f in keep_applicable(failures, ("camera",))[1]] == ["beams:4"]
    assert keep_applicable(failures, ("lidar", "camera")) == (failures, [])


def test_problems_of_a_configuration():
    assert name_problems(["beams:4", "view_drop"], ("lidar", "camera")) == []
    assert name_problems(["beams:4", "beams:7", "occlusion"], ("lidar",)) == [
        "data.failures[1].case 'beams:7': beams takes one of the levels 16, 8, 4, got '7'",
        "data.failures[2].case 'occlusion': it affects no sensor of this model, which has lidar only",
    ]


def test_every_case_says_what_it_is():
    for name, case in CASES.items():
        assert case.sensors and case.about, name
        parts = [case.image, case.sweep, case.points, case.calibration, case.delay]
        assert any(parts) and (case.delay is None) == (not case.delayed), name
        assert set(case.bare) <= set(case.levels), name
