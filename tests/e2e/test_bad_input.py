"""What a user sees of his own mistakes and of broken files: exit status 2 and one sentence with file, key and values.

Everything runs inside this process, so it is fast enough to belong to the ordinary tests.
"""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.e2e.conftest import CONFIG
from tests.e2e.faults.checkpoint_damage import seal

VERSION = "v1.0-synthetic"


def sentence(result, *parts: str) -> str:
    """Check the form of an error and that its sentence names all parts; returns it."""
    assert result.status == 2
    assert "Traceback" not in result.out + result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for part in map(str, parts):
        assert part in lines[0], (part, lines[0])
    return lines[0]


@pytest.fixture
def train(world, call, tmp_path):
    """Start train.py in a fresh work dir on the session's world, with more settings."""

    def run(*settings: str, arguments: tuple = ()):
        return call("train", *world.arguments("--work-dir", tmp_path / "run", *arguments, settings=settings))

    return run


@pytest.fixture
def broken(world, call, tmp_path):
    """A copy of the world to break: ``broken.root``, and ``broken.train()`` to start train.py on it."""
    copy = world.copy(tmp_path)

    class Broken:
        root = copy.root
        table_folder = copy.root / VERSION

        @staticmethod
        def train(*settings: str):
            return call("train", *copy.arguments("--work-dir", tmp_path / "run", settings=settings))

        @classmethod
        def edit(cls, table: str, change):
            """Apply ``change(rows)`` to a table."""
            path = cls.table_folder / f"{table}.json"
            rows = json.loads(path.read_text())
            change(rows)
            path.write_text(json.dumps(rows))

        @classmethod
        def files(cls, channel: str) -> list[Path]:
            """Key frames' files of a sensor."""
            return sorted((cls.root / "samples" / channel).iterdir())

    return Broken


# The command line and the configuration


def test_unknown_key(train):
    sentence(train("training.epoch=3"), "--set training.epoch=3:", "training.epoch:", "epochs")


def test_mistyped_value(train):
    sentence(train("training.lr=fast"), "--set training.lr=fast:", "expected a number")


def test_missing_configuration(call, world):
    missing = CONFIG.with_name("synthetic_tinny.yaml")
    sentence(call("train", *world.arguments(config=missing)), missing, "synthetic_tiny.yaml")


def test_two_ways_to_start_exclude_each_other(call, world, capfd):
    with pytest.raises(SystemExit) as stop:
        call("train", *world.arguments("--resume", "--overwrite"))
    assert stop.value.code == 2
    assert "not allowed with" in capfd.readouterr().err


@pytest.mark.parametrize("script", ["train", "test"])
def test_help(call, capfd, script):
    with pytest.raises(SystemExit) as stop:
        call(script, "--help")
    assert stop.value.code == 0
    shown = capfd.readouterr().out
    assert "configs/synthetic_tiny.yaml" in shown and "KEY=VALUE" in shown and "torchrun" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(call, world, tmp_path):
    arguments = world.arguments("--work-dir", tmp_path / "run")
    arguments[arguments.index("cpu")] = "cuda"
    sentence(call("train", *arguments), "--device cuda", "--device cpu")


@pytest.mark.parametrize("key", ["freeze", "norm_eval"])
def test_a_prefix_that_fits_nothing(train, key):
    sentence(
        train(f"training.{key}=[image_branch.bakbone]"), f"training.{key}", "image_branch.bakbone", "image_branch,"
    )


def test_a_factor_that_fits_nothing(train):
    sentence(train("training.lr_mult={neck: 0.1}"), "training.lr_mult", "'neck'", "decoder")


def test_everything_frozen(train):
    sentence(train("training.freeze=['']"), "training.freeze", "nothing is left to train")


# The data set


def test_missing_data(train, tmp_path):
    root = tmp_path / "nowhere"
    sentence(train(f"data.root={root}", "data.synthetic=null"), "data.root", root, "does not exist")


def test_another_version(train):
    sentence(train("data.version=v1.0-mini", "data.synthetic=null"), "v1.0-mini", VERSION)


@pytest.mark.parametrize("key", ["train_split", "val_split"])
def test_wrong_split(train, key):
    # Also the evaluation's, before the first epoch and not after it.
    sentence(train(f"data.{key}=synthetic_tran"), f"data.{key}", "synthetic_tran", "synthetic_train", "synthetic_val")


@pytest.mark.parametrize("key", ["train_split", "val_split"])
def test_wrong_split_of_written_data(train, tmp_path, key):
    """It is refused before an index or an object database is built."""
    index_dir = tmp_path / "fresh_index"
    sampling = "data.gt_sampling={per_class: {car: 2}, min_points: 5, mix: 0.5, stop_before_end: 0}"
    settings = (f"data.{key}=mini_val", "data.synthetic=null", f"data.index_dir={index_dir}", sampling)
    sentence(train(*settings), f"data.{key}: split 'mini_val' has no frame in ", "synthetic_train, synthetic_val")
    assert not index_dir.exists()


def test_test_script_knows_its_split_too(world, call, checkpoint, tmp_path):
    arguments = ("--checkpoint", checkpoint, "--split", "tset", "--out", tmp_path)
    sentence(call("test", *world.arguments(*arguments)), "'tset'", "synthetic_val")


def test_another_synthetic_world(train, world):
    sentence(train("data.synthetic.seed=4"), world.root, "seed is 3 there, 4 here")


def test_a_folder_that_is_no_world(train, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    sentence(train(f"data.root={tmp_path / 'mine'}"), tmp_path / "mine", "not a synthetic world")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_truncated_points(broken):
    for path in broken.files("LIDAR_TOP"):
        path.write_bytes(path.read_bytes()[:-7])
    line = sentence(broken.train(), "LiDAR file", broken.root, "truncated", "multiple of 20")
    assert any(f"{path.stat().st_size} bytes" in line for path in broken.files("LIDAR_TOP"))


def test_missing_points(broken):
    for path in broken.files("LIDAR_TOP"):
        path.unlink()
    sentence(broken.train(), "LiDAR file", broken.root / "samples" / "LIDAR_TOP", "does not exist")


def test_points_that_are_not_numbers(broken):
    for path in broken.files("LIDAR_TOP"):
        points = np.fromfile(path, dtype=np.float32).reshape(-1, 5)
        points[17, 2] = np.nan
        points.tofile(path)
    sentence(broken.train(), "LiDAR file", broken.root, "point 17 has z = nan")


def test_corrupt_image(broken):
    for path in broken.files("CAM_BACK"):
        path.write_bytes(b"GIF89a" + path.read_bytes()[6:200] + b"\xff\xd9")
    sentence(broken.train(), "image file", broken.root / "samples" / "CAM_BACK", "corrupt")


def test_truncated_image(broken):
    for path in broken.files("CAM_BACK"):
        path.write_bytes(path.read_bytes()[:-200])
    sentence(broken.train(), "image file", broken.root / "samples" / "CAM_BACK", "truncated")


def test_worker_processes_pass_the_sentence_on(broken):
    for path in broken.files("CAM_BACK"):
        path.unlink()
    sentence(broken.train("data.workers=1"), "image file", "CAM_BACK", "does not exist")


def test_singular_calibration(broken):
    def flatten(rows):
        for row in rows:
            if row["camera_intrinsic"]:
                row["camera_intrinsic"][1] = row["camera_intrinsic"][0]

    broken.edit("calibrated_sensor", flatten)
    sentence(broken.train(), broken.table_folder / "calibrated_sensor.json", "camera_intrinsic", "singular")


def test_calibration_that_is_no_rotation(broken):
    def shrink(rows):
        for row in rows:
            row["rotation"] = [0.5, 0.0, 0.0, 0.0]

    broken.edit("calibrated_sensor", shrink)
    sentence(broken.train(), broken.table_folder / "calibrated_sensor.json", "[0.5, 0.0, 0.0, 0.0]", "length 1")


def test_box_without_size(broken):
    def squash(rows):
        for row in rows:
            row["size"][1] = -4.5

    broken.edit("sample_annotation", squash)
    sentence(broken.train(), broken.table_folder / "sample_annotation.json", "-4.5", "from 0.001 to 1000")


# Checkpoints


def test_test_script_on_a_checkpoint_of_another_model(world, call, checkpoint, tmp_path):
    arguments = world.arguments("--checkpoint", checkpoint, "--out", tmp_path, settings=("model.ffn_dim=48",))
    sentence(call("test", *arguments), checkpoint, "model.ffn_dim: 32 against 48")


def test_missing_checkpoint(world, call, tmp_path):
    arguments = world.arguments("--checkpoint", tmp_path / "none.pt", "--out", tmp_path)
    sentence(call("test", *arguments), tmp_path / "none.pt", "no such file")


def test_truncated_checkpoint(world, call, checkpoint, tmp_path):
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    sentence(call("test", *world.arguments("--checkpoint", half, "--out", tmp_path)), half, "damaged")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(half, run / "latest.pt")
    sentence(call("train", *world.arguments("--work-dir", run, "--resume")), run / "latest.pt", "damaged")


def test_foreign_checkpoint(world, call, tmp_path):
    path = tmp_path / "latest.pt"
    torch.save({"state_dict": {"backbone.weight": torch.zeros(3)}, "config": "model = dict()"}, path)
    sentence(call("test", *world.arguments("--checkpoint", path, "--out", tmp_path)), path, "does not fit this model")
    result = call("train", *world.arguments("--work-dir", tmp_path, "--resume"))
    sentence(result, path, "not a checkpoint of this project", "import_checkpoint")


def test_weights_alone_are_no_run(world, call, checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "latest.pt")
    result = call("train", *world.arguments("--work-dir", tmp_path, "--resume"))
    sentence(result, tmp_path / "latest.pt", "without optimizer, scaler, step")


def test_a_checkpoint_that_is_a_program(world, call, tmp_path):
    path, proof = tmp_path / "evil.pt", tmp_path / "it_ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    torch.save({"model": Evil()}, path)
    sentence(call("test", *world.arguments("--checkpoint", path, "--out", tmp_path)), path, "needs code to be run")
    assert not proof.exists()


def test_missing_weights_to_start_from(train, tmp_path):
    sentence(train(f"training.init_from={tmp_path / 'resnet.pth'}"), tmp_path / "resnet.pth", "no such file")


def test_weights_to_start_from_that_fit_nothing(train, tmp_path):
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.pth")
    sentence(train(f"training.init_from={tmp_path / 'other.pth'}"), "training.init_from", tmp_path / "other.pth")


def test_weights_that_are_not_finite(world, call, train, checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    name = next(name for name, tensor in state["model"].items() if tensor.is_floating_point())
    state["model"][name].view(-1)[0] = float("nan")
    path = tmp_path / "diverged.pt"
    path.write_bytes(seal(state))
    expected = f"1 of {len(state['model'])} tensors hold values that are not finite, the first is {name}"
    line = sentence(call("test", *world.arguments("--checkpoint", path, "--out", tmp_path)), expected)
    assert line == f"error: {path}: {expected}"
    line = sentence(train(f"training.init_from={path}"), expected)
    assert line == f"error: training.init_from {path}: {expected}"


# The disk


def test_work_dir_that_cannot_be_written(world, call, tmp_path):
    (tmp_path / "file").write_text("")
    result = call("train", *world.arguments("--work-dir", tmp_path / "file" / "run"))
    sentence(result, "--work-dir", tmp_path / "file" / "run", "Not a directory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk_while_the_log_is_written(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to("/dev/full")
    # A log that exists is set aside; this one must be written.
    settings = ("training.epochs=1",)
    import train as script

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cmt_aqr.training.logs._set_aside", lambda path: None)
        result = train(*settings)
    assert script.LATEST not in os.listdir(tmp_path / "run")
    sentence(result, tmp_path / "run" / "log.jsonl", "No space left on device")


def test_full_disk_while_saving_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    arguments = ("--max-steps", "3")  # the first of two epochs
    assert train(arguments=arguments).status == 0
    before = (tmp_path / "run" / "latest.pt").read_bytes()

    def full(_, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    result = train(arguments=("--resume",))
    sentence(
        result, tmp_path / "run", "could not be saved: no space left on device; the previous checkpoint is untouched"
    )
    assert (tmp_path / "run" / "latest.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))
    monkeypatch.undo()


def test_out_of_memory_in_a_step_and_in_an_evaluation(train, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of ..."
        )

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["train"], "train_step", full)
        result = train(arguments=("--max-steps", "1"))
    expected = "the GPU is out of memory (2.25 GiB more were asked for); use --set with "
    line = sentence(result, expected, "nothing was saved yet, start again with the same command")
    assert line.startswith("error: ")
    monkeypatch.setattr("cmt_aqr.jobs.predict", full)
    result = train("training.epochs=1", "evaluation.batch_size=2", arguments=("--overwrite",))
    assert result.status == 0 and "Traceback" not in result.out
    assert "epoch 1 could not be evaluated: the GPU is out of memory" in result.out
    assert "use --set with evaluation.batch_size below 2" in result.out


def test_a_mistake_of_the_program_is_not_blamed_on_the_user(world, call, monkeypatch):
    def fail(*_):
        raise ValueError("an internal contradiction")

    monkeypatch.setattr(sys.modules["train"], "make_training_loader", fail)
    with pytest.raises(ValueError, match="contradiction"):
        call("train", *world.arguments("--work-dir", world.root.parent / "unused"))


def test_flex_without_a_gpu(train, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    expected = "model.attention.backend: 'flex' needs a CUDA GPU, this run is on cpu; use 'auto'"
    sentence(train("model.attention.backend=flex", "model.num_heads=1", "model.init=official"), expected)
    assert not (tmp_path / "run").exists()
