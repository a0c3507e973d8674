"""``visualize model``: frames of a configuration with the detections of one checkpoint or two, under failures."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmt_aqr.boxes import Detections, Targets
from cmt_aqr.build import build_detector, evaluation_dataset, open_split
from cmt_aqr.config import load_config, to_tree
from cmt_aqr.data.sample import collate
from cmt_aqr.inspection import inspect
from cmt_aqr.jobs import make_detect
from cmt_aqr.tools.model_frames import chosen_frames, load_detector, own_model
from cmt_aqr.tools.visualize import main
from cmt_aqr.training.checkpoint import save_checkpoint
from cmt_aqr.viz.shown_frame import count_outcomes
from tests.unit.viz.test_page import Page

WORLD = (
    "data.synthetic.train_scenes=1", "data.synthetic.val_scenes=1", "data.synthetic.samples_per_scene=2",
    "data.synthetic.image_size=[80,45]", "data.synthetic.lidar_columns=90", "data.synthetic.workers=1",
    "model.num_queries=40", "model.denoising.num_dn=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return [*WORLD, f"data.root={folder / 'world'}", f"data.index_dir={folder / 'index'}"]


@pytest.fixture(scope="module")
def checkpoints(settings, tmp_path_factory):
    """With AQR as bare weights, and a baseline as a checkpoint with its own configuration."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = load_config("synthetic_tiny", settings)
    plain = replace(config, model=replace(config.model, aqr=None))
    torch.manual_seed(0)
    save_file(build_detector(config.model).state_dict(), folder / "aqr.safetensors")
    save_checkpoint(folder / "plain.pt", {"config": to_tree(plain), "model": build_detector(plain.model).state_dict()})
    return folder / "aqr.safetensors", folder / "plain.pt"


def run(settings, out, *arguments) -> int:
    return main(["model", "synthetic_tiny", "--set", *settings, "--out", str(out), "--device", "cpu", *arguments])


def test_two_checkpoints_clean_and_under_a_failure(settings, checkpoints, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoints[0]), "--compare", str(checkpoints[1]), "--failure", "view_drop:FRONT"]
    assert (
        run(settings, tmp_path, *arguments, "--score", "0", "--count", "2", "--max-boxes", "5", "--queries", "1") == 0
    )
    printed = capsys.readouterr().out.split()
    config = load_config("synthetic_tiny", settings)
    tokens = open_split(config.data, config.data.val_split).tokens
    names = [f"{i:05d}_{tokens[i][:16]}{end}" for i in range(2) for end in ("", "_view_drop_FRONT")]
    files = [str(tmp_path / f"{name}{end}.jpg") for name in names for end in ("", "_attention_a")]
    assert printed[-9:] == [*files, str(tmp_path / "report.html")]  # the baseline has no bias to show
    page = Page((tmp_path / "report.html").read_text())
    assert [[image.shape[1] for image in section] for section in page.sections] == [[2738, 2698]] * 4
    clean, failing = (cv2.imread(str(tmp_path / f"{name}.jpg")).astype(int) for name in names[:2])
    front = np.s_[120:200, 600:800]
    assert clean[front].mean() > 30 > failing[front].mean()
    assert page.cells[:6] == ["detections", "hits", "false alarms", "missed", "precision", "recall"]
    rows = [page.cells[i : i + 6] for i in range(6, len(page.cells), 6)]
    ends = [f"{letter}: {'/'.join(path.parts[-2:])}" for letter, path in zip("AB", checkpoints, strict=True)]
    assert [row[0] for row in rows] == [
        f"{end}, {condition}" for condition in ("clean", "view_drop:FRONT") for end in ends
    ]
    for row in rows:
        hits, false_alarms, missed = map(int, row[1:4])
        assert hits + false_alarms > 100 and row[4] == f"{hits / (hits + false_alarms):.3f}"
        assert row[5] == f"{hits / (hits + missed):.3f}"


def test_detections_are_those_of_an_evaluation_with_the_weights_of_their_queries(settings, checkpoints):
    config = load_config("synthetic_tiny", settings)
    sample = evaluation_dataset(config, open_split(config.data, config.data.val_split))[0]
    batch = collate([sample])
    for path, own in zip(checkpoints, (config, own_model(config, checkpoints[1])), strict=True):
        loaded = load_detector(path, own, torch.device("cpu"))
        answer = loaded.answer(sample)
        (expected,) = make_detect(loaded.model, own, torch.device("cpu"))(batch.images, batch.points, batch.lidar2img)
        assert torch.equal(answer.detections.boxes, expected.boxes) and len(expected.scores) > 30
        if own.model.aqr is None:
            assert answer.weights is None
            continue
        weights = inspect(loaded.model, batch.images, batch.points, batch.lidar2img, with_attention=False).weights[0]
        known = [tuple(row) for row in weights.nan_to_num(9).tolist()]
        assert all(tuple(row) in known for row in answer.weights.nan_to_num(9).tolist())


def test_trust_needs_aqr(settings, checkpoints, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoints[0]), "--colour", "trust", "--score", "0", "--count", "1"]
    arguments += ["--queries", "0"]
    assert run(settings, tmp_path, *arguments) == 0
    assert run(settings, tmp_path, *arguments, "--compare", str(checkpoints[1])) == 2
    sentence = "plain.pt has no AQR (model.aqr is null); use outcome\n"
    error = capsys.readouterr().err
    assert error.startswith("error: --colour trust: ") and error.endswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--checkpoint", "none.pt"], "none.pt"),
        (["--checkpoint", "{}", "--compare", "none.pt"], "none.pt"),
        (["--checkpoint", "{}", "--failure", "view_dorp"], "view_dorp"),
        (["--checkpoint", "{}", "--tokens", "nothing"], "has no sample 'nothing'"),
        (["--checkpoint", "{}", "--split", "nothing"], "nothing"),
    ],
)
def test_sentences(settings, checkpoints, tmp_path, capsys, arguments, sentence):
    assert run(settings, tmp_path, *(argument.format(checkpoints[0]) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_frames_are_spread_or_chosen(settings):
    config = load_config("synthetic_tiny", settings)
    index = open_split(config.data, config.data.val_split)
    assert chosen_frames(index, None, 1) == [1] and chosen_frames(index, None, 9) == [0, 1]
    assert chosen_frames(index, [index.tokens[1], index.tokens[0]], 9) == [1, 0]


def test_outcomes_are_counted_above_the_score():
    boxes = torch.zeros(3, 9)
    boxes[:, 0] = torch.tensor([0.0, 10, 20])
    detections = Detections(boxes, torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0, 0, 0]))
    targets = Targets(boxes[[0, 2]], torch.tensor([0, 0]))
    assert count_outcomes(detections, targets, 0.5).tolist() == [1, 1, 1]
    assert count_outcomes(detections, targets, 0.1).tolist() == [2, 1, 0]
