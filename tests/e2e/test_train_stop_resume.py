"""Training as a user sees it: stopped and resumed runs end where an uninterrupted one does."""

import json
import signal
import subprocess
import time

import cv2
import pytest
import torch

import train as train_script
from cmt_aqr import nuscenes_tables
from tests.e2e.conftest import one_thread, read_lines
from tests.unit.viz.test_page import Page

pytestmark = pytest.mark.e2e

ONE_AT_A_TIME = ("training.batch_size=1",)  # six steps an epoch, twelve in all
STEPS = list(range(1, 13))


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory):
    """Work dir of a run from the beginning to the end."""
    work_dir = tmp_path_factory.mktemp("whole") / "run"
    result = world.run("train.py", "--work-dir", work_dir, settings=ONE_AT_A_TIME)
    assert result.status == 0, result.err
    assert result.err == ""
    return work_dir


def weights(work_dir):
    return torch.load(work_dir / "latest.pt", weights_only=True)


def same(left, right) -> bool:
    """Whether two trees of tensors and values are equal to the last bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_a_stopped_run_ends_where_an_uninterrupted_one_does(world, whole_run, tmp_path):
    work_dir = tmp_path / "run"
    command = world.command("train.py", "--work-dir", str(work_dir), settings=ONE_AT_A_TIME)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=one_thread(), **pipes) as process:
        deadline = time.monotonic() + 120
        while not ((work_dir / "log.jsonl").exists() and '"train"' in (work_dir / "log.jsonl").read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == ""
    stopped_at = weights(work_dir)["step"]
    assert 1 <= stopped_at < 12
    assert f"stopped after step {stopped_at}; resume with --resume --work-dir {work_dir}" in out

    result = world.run("train.py", "--work-dir", work_dir, "--resume", "--max-steps", "9", settings=ONE_AT_A_TIME)
    assert result.status == 0, result.err
    assert "stopped after step 9 (--max-steps)" in result.out
    assert weights(work_dir)["step"] == 9
    result = world.run("train.py", "--work-dir", work_dir, "--resume", settings=ONE_AT_A_TIME)
    assert result.status == 0, result.err
    assert "resuming after step 9" in result.out

    ours, theirs = weights(work_dir), weights(whole_run)
    assert ours["step"] == 12
    for part in ("model", "optimizer", "step", "scaler"):
        assert same(ours[part], theirs[part]), part
    found, expected = (read_lines(folder / "log.jsonl", "train") for folder in (work_dir, whole_run))
    assert [line["step"] for line in found] == STEPS
    measured = ("time", "data_time", "step_time", "memory_gib")
    for one, other in zip(found, expected, strict=True):
        assert {k: v for k, v in one.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }
    submissions = [(folder / "eval/epoch_2/submission.json").read_text() for folder in (work_dir, whole_run)]
    assert submissions[0] == submissions[1]


def test_the_run_changed_the_weights_and_followed_the_schedule(whole_run):
    lines = read_lines(whole_run / "log.jsonl", "train")
    assert [line["step"] for line in lines] == STEPS
    rates = [line["lr"] for line in lines]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) > 2e-3 and rates[-1] < 5e-4
    assert all(line["loss"] == pytest.approx(sum(v for k, v in line.items() if "loss_" in k)) for line in lines)
    first, last = (torch.load(whole_run / f"epoch_{n}.pt", weights_only=True)["model"] for n in (1, 2))
    moved = [name for name in first if not torch.equal(first[name], last[name])]
    assert moved == list(first)  # every weight and every batch norm learns


def test_the_evaluation_wrote_everything(whole_run):
    folder = whole_run / "eval" / "epoch_2"
    submission = json.loads((folder / "submission.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert submission["meta"]["use_camera"] and submission["meta"]["use_lidar"]
    assert len(submission["results"]) == metrics["num_samples"] == 3
    assert all(len(rows) <= 40 for rows in submission["results"].values())
    assert sum(metrics["num_ground_truth"].values()) > 20
    (line,) = read_lines(whole_run / "log.jsonl", "eval")
    assert (line["step"], line["mAP"], line["NDS"]) == (12, metrics["mean_ap"], metrics["nds"])
    pictures = sorted((folder / "pictures").glob("*.jpg"))
    assert len(pictures) == 2
    for path in pictures:
        picture = cv2.imread(str(path))
        assert picture.std() > 10  # something is drawn
    page = Page((whole_run / "report.html").read_text())
    assert [[image.shape for image in section] for section in page.sections] == [[picture.shape]] * 2
    assert page.images[-1].shape[1] > 1600 and f"{metrics['nds']:.3f}" in page.cells  # curves, scores
    assert not (whole_run / "eval" / "epoch_1").exists()


def test_test_script_repeats_the_last_evaluation(world, whole_run, tmp_path):
    out = tmp_path / "out"
    result = world.run("test.py", "--checkpoint", whole_run / "latest.pt", "--out", out, settings=ONE_AT_A_TIME)
    assert result.status == 0, result.err
    assert result.err == ""
    trained = whole_run / "eval" / "epoch_2"
    for name in ("submission.json", "metrics.json"):
        assert (out / name).read_text() == (trained / name).read_text()
    assert f"pictures and scores on one page, for a browser: {out / 'report.html'}\n" in result.out
    assert len(Page((out / "report.html").read_text()).sections) == 2
    (line,) = read_lines(out / "log.jsonl", "test")
    assert line["mAP"] == json.loads((out / "metrics.json").read_text())["mean_ap"]
    assert "mAP" in result.out and str(out) in result.out


def test_a_second_start_is_refused(world, whole_run, call):
    before = (whole_run / "latest.pt").read_bytes()
    result = call("train", *world.arguments("--work-dir", whole_run, settings=ONE_AT_A_TIME))
    assert result.status == 2
    assert result.err == (
        f"error: {whole_run / 'latest.pt'}: this work dir holds a run at step 12; --resume continues it, "
        "--overwrite starts anew, --work-dir names another folder\n"
    )
    assert (whole_run / "latest.pt").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(world, whole_run, call):
    before = {
        path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file() and "tfevents" not in path.name
    }
    result = call("train", *world.arguments("--work-dir", whole_run, "--resume", settings=ONE_AT_A_TIME))
    assert (result.status, result.err) == (0, "")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("setting", "change"),
    [
        ("model.ffn_dim=64", "model.ffn_dim: 32 against 64"),
        ("training.epochs=5", "training.epochs: 2 against 5"),
        ("seed=7", "seed: 0 against 7"),
        ("loss.cls_weight=3.0", "loss.cls_weight: 2.0 against 3.0"),
    ],
)
def test_resuming_with_other_settings_is_refused(world, whole_run, call, setting, change):
    result = call("train", *world.arguments("--work-dir", whole_run, "--resume", settings=(*ONE_AT_A_TIME, setting)))
    assert result.status == 2
    assert result.err == (
        f"error: {whole_run / 'latest.pt'}: the run was started with other settings: {change} "
        "(checkpoint against now)\n"
    )


def test_overwriting_removes_the_old_run(world, tmp_path, call):
    work_dir = tmp_path / "run"
    long = call("train", *world.arguments("--work-dir", work_dir, settings=("training.epochs=2",)))
    assert long.status == 0, long.err
    assert sorted(path.name for path in work_dir.glob("epoch_*.pt")) == ["epoch_1.pt", "epoch_2.pt"]
    arguments = ("--work-dir", work_dir, "--overwrite")
    short = call("train", *world.arguments(*arguments, settings=("training.epochs=1", "training.keep_checkpoints=1")))
    assert short.status == 0, short.err
    assert [path.name for path in work_dir.glob("epoch_*.pt")] == ["epoch_1.pt"]
    assert [path.name for path in work_dir.glob("eval/*")] == ["epoch_1"]
    assert weights(work_dir)["step"] == 3
    assert [line["step"] for line in read_lines(work_dir / "log.jsonl", "train")] == [1, 2, 3]


def test_a_start_from_weights_is_said_and_two_indices_and_two_evaluations_load_the_tables_once(
    world, whole_run, tmp_path, call, monkeypatch
):
    load, loaded = nuscenes_tables.CheckedNuScenes, []

    def count(*arguments, **options):
        loaded.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(nuscenes_tables, "CheckedNuScenes", count)
    start = whole_run / "epoch_1.pt"
    settings = (f"training.init_from={start}", "training.eval_every=1", f"data.index_dir={tmp_path / 'index'}")
    result = call("train", *world.arguments("--work-dir", tmp_path / "run", settings=settings))
    assert (result.status, result.err) == (0, "")
    count_all = len(torch.load(start, weights_only=True)["model"])
    assert f"init_from {start}: {count_all} of {count_all} tensors of the model taken\n" in result.out
    assert [line["epoch"] for line in read_lines(tmp_path / "run" / "log.jsonl", "eval")] == [1, 2]
    assert len(loaded) == 1


def test_ctrl_c_in_an_evaluation_is_made_up_for(world, tmp_path, call, monkeypatch):
    work_dir = tmp_path / "run"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "evaluate_split", interrupt)
        result = call("train", *world.arguments("--work-dir", work_dir, settings=("training.epochs=1",)))
    assert (result.status, result.err) == (130, "interrupted\n")
    assert read_lines(work_dir / "log.jsonl", "eval") == []
    result = call("train", *world.arguments("--work-dir", work_dir, "--resume", settings=("training.epochs=1",)))
    assert (result.status, result.err) == (0, "")
    assert [line["step"] for line in read_lines(work_dir / "log.jsonl", "train")] == [1, 2, 3]
    assert [line["step"] for line in read_lines(work_dir / "log.jsonl", "eval")] == [3]


@pytest.mark.parametrize("place", ["prepare_data", "make_training_loader"])
def test_ctrl_c_while_data_are_prepared(world, tmp_path, call, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_script, place, interrupt)
    result = call("train", *world.arguments("--work-dir", tmp_path / "run"))
    assert (result.status, result.err) == (130, "interrupted\n")
