"""Frames without boxes, without points or without an image train and evaluate, with every choice of sensors."""

import json
import math
import struct

import pytest

from tests.e2e.conftest import PLAIN, read_lines

VERSION = "v1.0-synthetic"
SENSORS = {"fusion": (), "lidar": ("model.camera=null", *PLAIN), "camera": ("model.lidar=null", *PLAIN)}
FROZEN = ("training.epochs=1", "training.batch_size=2", "evaluation.batch_size=2")


def edit(root, table, change):
    """Replace a table's rows by ``change(rows)``."""
    path = root / VERSION / f"{table}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def samples_of(root, split: str) -> list[str]:
    """Sample tokens of a split, in the order of the table."""
    read = {name: json.loads((root / VERSION / f"{name}.json").read_text()) for name in ("scene", "sample", "splits")}
    scenes = {row["token"] for row in read["scene"] if row["name"] in read["splits"][split]}
    return [row["token"] for row in read["sample"] if row["scene_token"] in scenes]


def remove_boxes(root, samples):
    """Let these samples have no annotation; the chains of the instances are closed over the gap."""

    def keep(rows):
        by_token = {row["token"]: row for row in rows}
        for row in rows:
            if row["sample_token"] in samples:
                if row["prev"]:
                    by_token[row["prev"]]["next"] = row["next"]
                if row["next"]:
                    by_token[row["next"]]["prev"] = row["prev"]
        return [row for row in rows if row["sample_token"] not in samples]

    edit(root, "sample_annotation", keep)


def key_frames(root, samples, channel: str) -> list[dict]:
    """sample_data rows of the key frames of these samples from one sensor."""
    rows = json.loads((root / VERSION / "sample_data.json").read_text())
    wanted = f"samples/{channel}/"
    return [row for row in rows if row["sample_token"] in samples and row["filename"].startswith(wanted)]


def remove_points(root, samples):
    """Leave one point in the LiDAR files of these samples, far out of range; an empty file would be refused."""
    for row in key_frames(root, samples, "LIDAR_TOP"):
        (root / row["filename"]).write_bytes(struct.pack("<5f", 900, 0, 0, 1, 0))


def remove_images(root, samples, channel: str):
    """Let these samples have no image of one camera."""
    gone = {row["token"] for row in key_frames(root, samples, channel)}
    assert len(gone) == len(samples)
    edit(root, "sample_data", lambda rows: [row for row in rows if row["token"] not in gone])


@pytest.mark.parametrize("sensors", SENSORS)
def test_unusual_frames_train_and_evaluate(world, call, tmp_path, sensors):
    copy = world.copy(tmp_path)
    for split in ("synthetic_train", "synthetic_val"):
        samples = samples_of(copy.root, split)
        remove_boxes(copy.root, samples[:1])
        remove_points(copy.root, samples[1:2])
        remove_images(copy.root, samples[2:3], "CAM_FRONT")
    settings = (*FROZEN, *SENSORS[sensors], "training.batch_size=3", "training.epochs=2", "data.num_sweeps=0")
    result = call("train", *copy.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert (result.status, result.err) == (0, "")
    lines = read_lines(tmp_path / "run" / "log.jsonl", "train")
    assert len(lines) == 4
    for line in lines:
        terms = [value for name, value in line.items() if "loss" in name or name == "grad_norm"]
        assert len(terms) == 10
        assert all(value is not None and math.isfinite(value) for value in terms)
        assert line["dn_loss_cls"] > 0 and line["loss_bbox"] > 0
    metrics = json.loads((tmp_path / "run/eval/epoch_2/metrics.json").read_text())
    assert metrics["num_samples"] == 3 and sum(metrics["num_ground_truth"].values()) > 0
    submission = json.loads((tmp_path / "run/eval/epoch_2/submission.json").read_text())
    assert set(submission["results"]) == set(samples_of(copy.root, "synthetic_val"))
    used = {"fusion": (True, True), "lidar": (False, True), "camera": (True, False)}[sensors]
    assert (submission["meta"]["use_camera"], submission["meta"]["use_lidar"]) == used
    assert len(list((tmp_path / "run/eval/epoch_2/pictures").glob("*.jpg"))) == 2


def test_more_boxes_than_queries(world, call, tmp_path):
    settings = (*FROZEN, "model.num_queries=3")
    result = call("train", *world.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert (result.status, result.err) == (0, "")
    for line in read_lines(tmp_path / "run" / "log.jsonl", "train"):
        assert math.isfinite(line["loss"]) and line["loss_bbox"] > 0
        assert line["dn_loss_cls"] == line["dn_loss_bbox"] == 0  # as in the original: no group fits


@pytest.mark.parametrize("sensors", SENSORS)
def test_training_without_any_box(world, call, tmp_path, sensors):
    copy = world.copy(tmp_path)
    remove_boxes(copy.root, samples_of(copy.root, "synthetic_train"))
    settings = (*FROZEN, *SENSORS[sensors], "data.class_balanced=true")
    result = call("train", *copy.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert (result.status, result.err) == (0, "")
    lines = read_lines(tmp_path / "run" / "log.jsonl", "train")
    assert len(lines) == 3  # class balancing has no class to balance and takes every frame once
    for line in lines:
        assert math.isfinite(line["loss"]) and line["loss_cls"] > 0 and line["grad_norm"] > 0
        zero = [name for name in line if "loss_bbox" in name or "dn_loss" in name]
        assert len(zero) == 6 and all(line[name] == 0 for name in zero)
    assert (tmp_path / "run/eval/epoch_1/metrics.json").exists()


def test_an_evaluation_without_any_box_does_not_end_the_training(world, call, tmp_path):
    copy = world.copy(tmp_path)
    remove_boxes(copy.root, samples_of(copy.root, "synthetic_val"))
    work_dir = tmp_path / "run"
    settings = ("training.eval_every=1",)
    result = call("train", *copy.arguments("--work-dir", work_dir, settings=settings))
    assert (result.status, result.err) == (0, "")
    assert [line["step"] for line in read_lines(work_dir / "log.jsonl", "train")] == [1, 2, 3, 4, 5, 6]
    evaluations = read_lines(work_dir / "log.jsonl", "eval")
    assert [line["step"] for line in evaluations] == [3, 6]
    assert all("synthetic_val" in line["error"] and "no ground truth" in line["error"] for line in evaluations)
    assert result.out.count("could not be evaluated") == 2 and "finished" in result.out
    assert (work_dir / "eval/epoch_2/submission.json").exists()

    arguments = ("--checkpoint", work_dir / "latest.pt", "--out", tmp_path / "out")
    result = call("test", *copy.arguments(*arguments, settings=settings))
    assert (result.status, result.err) == (0, "")
    reason = "no frame of the split 'synthetic_val' of v1.0-synthetic is annotated"
    assert result.out.endswith(f"submission and pictures in {tmp_path / 'out'}; no metrics: {reason}\n")
    (line,) = read_lines(tmp_path / "out" / "log.jsonl", "test")
    assert line["no_metrics"] == reason and "mAP" not in line
    written = (tmp_path / "out" / "submission.json").read_text()
    assert written == (work_dir / "eval/epoch_2/submission.json").read_text() and '"translation"' in written
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_split_with_boxes_is_not_scored_where_that_is_asked_for(world, call, checkpoint, tmp_path):
    outputs = {}
    for name, extra in (("scored", ()), ("again", ("--no-metrics",))):
        arguments = world.arguments("--checkpoint", checkpoint, "--out", tmp_path, *extra)
        result = call("test", *arguments)
        assert (result.status, result.err) == (0, "")
        assert ("mAP" in result.out) == (not extra)
        outputs[name] = (tmp_path / "submission.json").read_text()
    assert outputs["again"] == outputs["scored"]
    assert result.out.endswith(f"submission and pictures in {tmp_path}; no metrics: --no-metrics\n")
    assert not (tmp_path / "metrics.json").exists()  # that of the first run would pass for this one's
