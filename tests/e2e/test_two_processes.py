"""Two processes train and evaluate as one does with the same global batch."""

import json
import re

import pytest
import torch

from cmt_aqr.build import open_split
from cmt_aqr.config import load_config
from cmt_aqr.run import make_training_loader
from cmt_aqr.training.distributed import RankInfo
from tests.e2e.conftest import CONFIG, read_lines

pytestmark = pytest.mark.e2e

# Batch statistics are the one thing that processes do not share; every batch norm keeps its own here. An evaluation
# of one frame at a time adds its sums in one order, whoever does it.
SETTINGS = (
    "training.norm_eval=['']",
    "model.dropout=0.0",
    "data.class_balanced=true",
    "training.batch_size=16",
    "training.lr=1.0e-6",
    "evaluation.batch_size=1",
    "evaluation.num_pictures=3",
)
# Float32 sums in another order. Adam makes more of it with every step: where a gradient is about 0, rounding decides
# the sign of a whole step, hence the small rate and the few steps.
FIRST_LOSS_TOLERANCE = 1e-6
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Work dirs of the same run with one and with two processes."""
    folder = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        result = world.run("train.py", "--work-dir", folder / str(processes), settings=SETTINGS, processes=processes)
        assert result.status == 0, result.err
        assert f"{processes} x cpu" in result.out
    return {processes: folder / str(processes) for processes in (1, 2)}


def test_the_losses_are_those_of_one_process(runs):
    one, two = (read_lines(runs[n] / "log.jsonl", "train") for n in (1, 2))
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["lr"] == theirs["lr"] and ours["epoch"] == theirs["epoch"]
        terms = [name for name in theirs if "loss" in name]
        assert len(terms) == 9  # 2 layers x (class, box) x (matched, denoising), and the sum
        assert all(theirs[name] > 0 for name in terms)
        tolerance = FIRST_LOSS_TOLERANCE if ours["step"] == 1 else LOSS_TOLERANCE
        for name in terms:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (ours["step"], name)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=GRADIENT_TOLERANCE)


def test_the_gradients_and_weights_are_those_of_one_process(runs):
    one, two = (torch.load(runs[n] / "latest.pt", weights_only=True) for n in (1, 2))
    assert one["step"] == two["step"]
    assert one["model"].keys() == two["model"].keys()  # no prefix of a wrapper
    for moment in ("exp_avg", "exp_avg_sq"):
        mine, expected = (
            torch.cat([state[moment].flatten() for state in run["optimizer"]["state"].values()]) for run in (two, one)
        )
        assert (mine - expected).norm() < GRADIENT_TOLERANCE * expected.norm(), moment
    moved = []
    for n in (1, 2):
        first, last = (torch.load(runs[n] / f"epoch_{e}.pt", weights_only=True)["model"] for e in (1, 2))
        moved.append(torch.cat([(last[name] - first[name]).double().flatten() for name in first]))
    assert moved[0].norm() > 0
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


def test_an_odd_number_of_frames_is_evaluated_once(runs):
    one, two = (json.loads((runs[n] / "eval/epoch_2/submission.json").read_text())["results"] for n in (1, 2))
    assert len(one) == 3
    assert list(two) == list(one)
    assert all(len(two[token]) == len(one[token]) for token in one)


def test_the_test_script_gives_one_submission(world, runs, tmp_path):
    for processes in (1, 2):
        result = world.run(
            "test.py",
            "--checkpoint",
            runs[2] / "latest.pt",
            "--out",
            tmp_path / str(processes),
            settings=SETTINGS,
            processes=processes,
        )
        assert result.status == 0, result.err
        assert len(re.findall("^mAP", result.out, re.MULTILINE)) == 1  # one process talks
    for name in ("submission.json", "metrics.json"):
        one, two = ((tmp_path / str(n) / name).read_text() for n in (1, 2))
        assert one == two, name
    # Two frames of the first process and one of the second, under the names that one process gives them.
    pictures = [{p.name: p.read_bytes() for p in (tmp_path / str(n) / "pictures").iterdir()} for n in (1, 2)]
    assert len(pictures[0]) == 3 and pictures[1] == pictures[0]
    trained = (runs[2] / "eval/epoch_2/submission.json").read_text()
    assert (tmp_path / "2/submission.json").read_text() == trained


def test_batch_statistics_of_process_zero_count_for_all(world, tmp_path):
    settings = ("training.epochs=1", "evaluation.batch_size=1")
    run = tmp_path / "run"
    result = world.run("train.py", "--work-dir", run, settings=settings, processes=2)
    assert result.status == 0, result.err
    arguments = ("--checkpoint", run / "latest.pt", "--out", tmp_path / "out")
    result = world.run("test.py", *arguments, settings=settings)
    assert result.status == 0, result.err
    assert (tmp_path / "out/submission.json").read_text() == (run / "eval/epoch_1/submission.json").read_text()


def test_an_epoch_has_as_many_steps_as_with_one_process(world):
    # Three frames in batches of two: one step, although each of two processes could make two of its own.
    config = load_config(CONFIG, [*world.settings, "data.train_split=synthetic_val"])
    for world_size in (1, 2):
        for rank in range(world_size):
            rank_info = RankInfo(rank, world_size, torch.device("cpu"))
            index = open_split(config.data, config.data.train_split)
            assert make_training_loader(config, index, rank_info)[1] == 1


def test_process_zero_says_what_is_wrong_once(world, tmp_path):
    settings = (f"data.root={tmp_path / 'nowhere'}", "data.synthetic=null")
    result = world.run("train.py", "--work-dir", tmp_path / "run", settings=settings, processes=2)
    assert result.status != 0
    said = [line for line in result.err.splitlines() if line.startswith("error")]
    assert said == [
        f"error: data.root {tmp_path / 'nowhere'} does not exist or is no folder; name the folder of the data set with "
        f"--set data.root=FOLDER"
    ]
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_shared(world, tmp_path):
    settings = ("training.batch_size=3",)
    result = world.run("train.py", "--work-dir", tmp_path / "run", settings=settings, processes=2)
    assert result.status != 0
    assert (
        "error: --set training.batch_size=3: training.batch_size: 3 is not a multiple of the 2 processes" in result.err
    )
