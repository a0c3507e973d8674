"""The predictor gives what test.py gives on the same frame, and answers wrong arrays with one sentence."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from cmt_aqr import Predictor
from cmt_aqr.build import build_detector, evaluation_dataset, open_split
from cmt_aqr.classes import CAMERAS, CLASSES
from cmt_aqr.config import load_config, to_tree
from cmt_aqr.data.readers import read_views
from cmt_aqr.data.sample import collate
from cmt_aqr.errors import UserError
from cmt_aqr.evaluation.run import predict
from cmt_aqr.inference import InferencePipeline
from cmt_aqr.jobs import make_detect
from cmt_aqr.predictor import nuscenes_calibration
from cmt_aqr.synthetic import generate_world
from cmt_aqr.tools.import_checkpoint import write_weights
from cmt_aqr.training.checkpoint import save_checkpoint
from tests.e2e.conftest import CONFIG, SMALL, world_settings
from tests.parity.golden import REPOSITORY


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A world, a checkpoint with random weights in runs/synthetic_tiny, and one frame as a user would hold it."""
    folder = tmp_path_factory.mktemp("predictor")
    generate_world(folder / "world", world_settings(), progress=False)
    settings = (*SMALL, f"data.root={folder / 'world'}", f"data.index_dir={folder / 'index'}")
    config = load_config(CONFIG, settings)
    torch.manual_seed(1)
    model = build_detector(config.model)
    torch.nn.init.normal_(model.aqr.generator.linear.weight)  # else all weights begin near 0
    path = folder / "runs" / "synthetic_tiny" / "latest.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, {"config": to_tree(config), "model": model.state_dict()})
    index = open_split(config.data, "synthetic_val")
    dataset = evaluation_dataset(config, index)
    frames = []
    for i in range(2):
        frame = index.frame(i)
        views = [view.copy() for view in read_views(frame, index.dataroot)]
        lidar2img = torch.stack([camera.lidar2img() for camera in frame.cameras])
        frames.append({"images": views, "points": dataset[i].points, "lidar2img": lidar2img})
    predictor = Predictor.load(path, device="cpu")
    return SimpleNamespace(
        folder=folder, path=path, config=config, dataset=dataset, frames=frames, predictor=predictor, model=model
    )


def detections_of(case, samples, model=None):
    """What test.py finds in samples."""
    detect = make_detect(model or case.predictor.model, case.config, torch.device("cpu"))
    results = predict(detect, [collate(samples)])
    return [result.detections for result in results]


def assert_same(result, detections):
    assert len(result) == len(detections.boxes) > 0
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(result, name), getattr(detections, name)), name


def test_one_frame_and_a_batch_are_those_of_the_test_script(case):
    samples = [case.dataset[0], case.dataset[1]]
    (alone,) = detections_of(case, samples[:1])
    assert_same(case.predictor(**case.frames[0]), alone)
    for result, found in zip(case.predictor.batch(case.frames), detections_of(case, samples), strict=True):
        assert_same(result, found)
        assert result.names == [CLASSES[label] for label in found.labels.tolist()]


def test_weights_and_windows_belong_to_the_query_of_each_box(case):
    result = case.predictor(**case.frames[0])
    sample = case.dataset[0]
    predictions = case.predictor.model(sample.images[None], [sample.points], sample.lidar2img[None])
    logits = predictions.logits(0)[-1, 0].sigmoid()
    for i in (0, 7, 20):
        query = (logits[:, result.labels[i]] == result.scores[i]).nonzero()[0, 0]
        assert torch.allclose(result.aqr_weights[i], predictions.aqr_weights[0, query], atol=1e-6)
        unit = case.predictor.model.reference_points.weight[query].detach().double()
        low, high = (
            torch.tensor(case.config.model.point_range[s], dtype=torch.float64) for s in (slice(3), slice(3, 6))
        )
        point = low + unit * (high - low)
        x0, y0, x1, y1 = result.windows.bev[i].tolist()
        assert x0 <= point[0] <= x1 and y0 <= point[1] <= y1 and x1 - x0 <= 5 * 12.8
        view, u0, v0, u1, v1 = result.windows.cameras[i, 0].tolist()
        if view < 0:
            continue
        pixel = case.frames[0]["lidar2img"][int(view)] @ torch.cat((point, torch.ones(1, dtype=torch.float64)))
        assert u0 <= pixel[0] / pixel[2] <= u1 and v0 <= pixel[1] / pixel[2] <= v1
    assert (result.windows.cameras[:, 0, 0] >= 0).any()


def test_a_compiled_predictor_finds_the_same(case, monkeypatch):
    """aot_eager instead of inductor, which takes minutes on a CPU."""
    monkeypatch.setattr("cmt_aqr.jobs.InferencePipeline", partial(InferencePipeline, backend="aot_eager"))
    compiled = Predictor.load(case.path, device="cpu", compile=True)
    frames = [case.frames[0], case.frames[1] | {"images": None, "image_size": (225, 400)}]
    for found, expected in zip(compiled.batch(frames), case.predictor.batch(frames), strict=True):
        assert len(found) == len(expected) > 0
        is_same = found.labels == expected.labels
        assert is_same.float().mean() > 0.9  # scores that are nearly equal may change places
        for name, tolerance in (("boxes", 1e-3), ("scores", 1e-5), ("aqr_weights", 1e-4)):
            difference = (getattr(found, name) - getattr(expected, name))[is_same].abs()
            assert difference.median() <= tolerance, name
        torch.testing.assert_close(
            found.windows.cameras[is_same].nanmedian(), expected.windows.cameras[is_same].nanmedian()
        )
    torch._dynamo.reset()


def test_images_of_any_size_numpy_and_torch(case):
    frame = case.frames[0]
    larger = [cv2.resize(view, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST) for view in frame["images"]]
    scale = np.diag([2.0, 2.0, 1.0, 1.0])
    given = case.predictor(larger, frame["points"].numpy(), scale @ frame["lidar2img"].numpy())
    plain = case.predictor(**frame)
    assert len(given) == len(plain) and (given.scores - plain.scores).abs().max() < 0.05
    # Boxes with the same place on the ground are of the same query; its windows have twice as many pixels.
    pairs = (given.windows.bev[:, None] == plain.windows.bev[None]).all(-1).nonzero().unbind(1)
    assert len(pairs[0]) > len(given) // 2
    ours, theirs = given.windows.cameras[pairs[0]], plain.windows.cameras[pairs[1]]
    torch.testing.assert_close(ours[..., 1:], 2 * theirs[..., 1:], equal_nan=True)
    mixed = [larger[0], *frame["images"][1:]]
    matrices = [scale @ frame["lidar2img"][0].numpy(), *frame["lidar2img"][1:]]
    result = case.predictor([torch.from_numpy(view) for view in mixed], frame["points"], matrices)
    assert result.draw(case.folder / "mixed.jpg").stat().st_size > 10_000


def test_missing_sensors_are_those_of_training(case):
    frame, sample = case.frames[0], case.dataset[0]
    (dark,) = detections_of(case, [replace(sample, images=torch.zeros_like(sample.images))])
    size = frame["images"][0].shape[:2]
    for images in (None, [None] * 6):
        assert_same(case.predictor(images, frame["points"], frame["lidar2img"], image_size=size), dark)
    (blind,) = detections_of(case, [replace(sample, points=torch.zeros_like(sample.points))])
    assert_same(case.predictor(frame["images"], None, frame["lidar2img"]), blind)
    images = sample.images.clone()
    images[3] = 0
    (five,) = detections_of(case, [replace(sample, images=images)])
    views = [*frame["images"][:3], None, *frame["images"][4:]]
    assert_same(case.predictor(views, frame["points"], frame["lidar2img"]), five)
    four_columns = sample.points.clone()
    four_columns[:, 4] = 0
    (now,) = detections_of(case, [replace(sample, points=four_columns)])
    assert_same(case.predictor(frame["images"], frame["points"][:, :4], frame["lidar2img"]), now)
    alone = case.predictor(points=frame["points"])
    assert len(alone) > 0 and alone.draw(case.folder / "points.png").is_file()


def test_dark_cameras_without_calibration_look_as_on_nuscenes_car():
    matrices = nuscenes_calibration()
    ahead = matrices @ np.array([0.0, 20.0, -1.0, 1.0])  # 20 m in front of the LiDAR, whose y points ahead
    depth = ahead[:, 2]
    assert depth[0] > 15 and depth[3] < -15
    assert abs(ahead[0, 0] / depth[0] - 800) < 60 and 400 < ahead[0, 1] / depth[0] < 600


WRONG = [
    ({"images": lambda f: f["images"][:5]}, "images holds 5 views; expected 6 in the order CAM_FRONT, CAM_FRONT_RIGHT"),
    ({"images": lambda f: f["images"][0]}, "expected a list of 6 views"),
    (
        {"images": lambda f: [v.transpose(2, 0, 1) for v in f["images"]]},
        "has shape (3, 72, 128), channels first",
    ),
    (
        {"images": lambda f: [v / np.float32(255) for v in f["images"]]},
        "goes from 0 to 1: multiply it by 255",
    ),
    (
        {"images": lambda f: [v.astype(np.float64) for v in f["images"]]},
        "has dtype float64: convert it to uint8",
    ),
    ({"images": lambda f: [torch.zeros(9, 9, 3, device="meta")] * 6}, "images[0] is on meta; expected the CPU"),
    (
        {"points": lambda f: f["points"][:, :3]},
        "expected (P, 4) x, y, z, intensity or (P, 5)",
    ),
    ({"points": lambda f: f["points"] * torch.nan}, "points[0, 0] is nan; expected a finite number"),
    ({"points": lambda f: ring(f["points"])}, "points[:, 4] goes from 0 to 31, whole numbers, which look like ring"),
    ({"points": lambda f: f["points"] - 1.0}, "which are no ages of sweeps"),
    ({"points": lambda f: torch.zeros(9, 5, device="meta")}, "points are on meta, the predictor is on cpu"),
    ({"points": lambda f: "cloud.bin"}, "points are no array of numbers"),
    (
        {"lidar2img": lambda f: f["lidar2img"][:, :3]},
        "pixels of each image: add the row 0 0 0 1",
    ),
    ({"lidar2img": lambda f: f["lidar2img"] * torch.inf}, "lidar2img[0] holds numbers that are not finite"),
    ({"lidar2img": lambda f: f["lidar2img"] * torch.tensor([1.0, 1, 0, 1])}, "lidar2img[0] is singular"),
    ({"lidar2img": lambda f: f["lidar2img"].transpose(1, 2)}, "expected 0, 0, 0, 1: is it transposed?"),
    ({"lidar2img": lambda f: None}, "lidar2img is missing"),
    ({"images": lambda f: None}, "give image_size=(height, width)"),
    ({"images": lambda f: None, "points": lambda f: None}, "images and points missing"),
]


def ring(points):
    points = points.clone()
    points[:, 4] = torch.arange(len(points)) % 32
    return points


@pytest.mark.parametrize(("changes", "part"), WRONG, ids=[part[:40] for _, part in WRONG])
def test_wrong_input_is_one_sentence(case, changes, part):
    wrong = {key: change(case.frames[0]) for key, change in changes.items()}
    with pytest.raises(UserError) as caught:
        case.predictor(**(case.frames[0] | wrong))
    assert part in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        case.predictor.batch([case.frames[0], case.frames[1] | wrong])
    assert str(caught.value).startswith("frame 1: ")


def test_a_batch_that_is_none(case):
    for wrong in ([], case.frames[0]):
        with pytest.raises(UserError, match="a list of at least one dictionary"):
            case.predictor.batch(wrong)
    with pytest.raises(UserError, match="unknown key 'image'; expected images, points, lidar2img"):
        case.predictor.batch([{"image": None}])


def test_weights_alone_need_their_configuration(case, tmp_path):
    path = tmp_path / "weights.safetensors"
    write_weights(path, case.model.state_dict(), {"config": "synthetic_tiny"})
    with pytest.raises(UserError, match=r"weights\.safetensors: weights alone, .*: give config='synthetic_tiny'"):
        Predictor.load(path)
    assert_same(Predictor.load(path, case.config)(**case.frames[0]), case.predictor(**case.frames[0]).detections)
    with pytest.raises(UserError, match=r"weights\.safetensors: does not fit this model"):
        Predictor.load(path, "synthetic_tiny")
    with pytest.raises(UserError, match=r"latest\.pt: trained with another model: model\."):
        Predictor.load(case.path, "synthetic_tiny")
    with pytest.raises(UserError, match="no such file"):
        Predictor.load(tmp_path / "none.pt")


def test_rows_of_a_submission(case):
    sample = case.dataset[0]
    result = case.predictor(**case.frames[0])
    rows = result.to_nuscenes("abc", lidar2ego=sample.lidar2ego, ego2global=sample.ego2global)
    assert rows and json.dumps(rows) and {row["sample_token"] for row in rows} == {"abc"}
    by_score = {row["detection_score"]: row for row in rows}
    kept = [i for i, score in enumerate(result.scores.tolist()) if score in by_score]
    centre = torch.cat((result.boxes[kept[0], :3].double(), torch.ones(1, dtype=torch.float64)))
    expected = (sample.ego2global @ sample.lidar2ego @ centre)[:3]
    found = by_score[result.scores[kept[0]].item()]["translation"]
    assert torch.allclose(torch.tensor(found, dtype=torch.float64), expected, atol=1e-4)


def test_the_example_of_the_readme_runs(case, monkeypatch):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    example = next(
        block
        for block in re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
        if "Predictor" in block
    )
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(case.folder)
    exec(example, {})
    assert (case.folder / "detections.jpg").stat().st_size > 10_000


def test_the_package_itself_stays_light():
    code = "import sys, cmt_aqr; print('torch' in sys.modules); cmt_aqr.Predictor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "False\nTrue\n"
    assert len(CAMERAS) == 6
