"""The folder of a run: what it removes and what it leaves alone, and which checkpoints it resumes from."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from cmt_aqr.config import load_config, to_tree
from cmt_aqr.training.checkpoint import load_into, load_weights_and_config, save_checkpoint
from cmt_aqr.training.checkpoint_checks import CheckpointError
from cmt_aqr.training.optim import make_average
from cmt_aqr.training.run_folder import LATEST, find_checkpoint, remove_run, restore, save
from tests.e2e.faults.checkpoint_damage import BYTES, OTHER_FILES, RUN, WEIGHTS, damage

CONFIG = load_config(Path(__file__).parents[3] / "configs" / "synthetic_tiny.yaml", ["training.keep_checkpoints=2"])
STEPS_PER_EPOCH, TOTAL_STEPS = 3, 30


def make_run(precision="fp32"):
    """A small model, its optimizer after one step, and a scaler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[1:].parameters(), "lr": 1e-4}]
    )
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    scaler.scale(model(torch.randn(4, 7)).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    return model, optimizer, scaler


def write_run(folder, step=6, precision="fp32"):
    run = make_run(precision)
    save(folder, CONFIG, *run, step, STEPS_PER_EPOCH)
    return run


def resume(folder, run):
    """As train.py does."""
    state = find_checkpoint(folder, CONFIG, resume=True, overwrite=False)
    return restore(state, folder / LATEST, *run, total_steps=TOTAL_STEPS)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_is_restored(tmp_path, precision):
    model, optimizer, scaler = write_run(tmp_path, precision=precision)
    other = make_run(precision)
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.zero_()
            other[1].state[parameter]["exp_avg"].zero_()
    assert resume(tmp_path, other) == 6
    for name, tensor in model.state_dict().items():
        assert torch.equal(other[0].state_dict()[name], tensor), name
    expected, got = optimizer.state_dict(), other[1].state_dict()
    assert got["param_groups"] == expected["param_groups"]
    assert len(got["state"]) == 6
    for index, entry in expected["state"].items():
        assert all(torch.equal(got["state"][index][key], entry[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert other[2].state_dict() == scaler.state_dict()


def test_the_average_of_the_weights_is_restored_and_kept_at_the_end_of_an_epoch(tmp_path):
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, ema_decay=0.9))
    model, optimizer, scaler = make_run()
    average = make_average(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight += 1
        average.update_parameters(model)
    save(tmp_path, config, model, optimizer, scaler, 6, STEPS_PER_EPOCH, average.module)
    for name, key in (("latest.pt", "ema"), ("epoch_2.pt", "model")):
        kept = torch.load(tmp_path / name, weights_only=True)[key]["0.weight"]
        assert torch.equal(kept, average.module[0].weight), name
        weights, _ = load_weights_and_config(tmp_path / name)
        assert torch.equal(weights["0.weight"], kept) and not torch.equal(kept, model[0].weight)

    others = make_run()
    restored = make_average(others[0], 0.9)
    state = find_checkpoint(tmp_path, config, resume=True, overwrite=False)
    restore(state, tmp_path / LATEST, *others, restored, total_steps=TOTAL_STEPS)
    average.update_parameters(model)  # the next step's, which must not begin anew
    restored.update_parameters(others[0])
    for name, tensor in average.module.state_dict().items():
        assert torch.equal(restored.module.state_dict()[name], tensor), name


def test_a_checkpoint_without_the_average_that_the_settings_ask_for(tmp_path):
    write_run(tmp_path)
    state = torch.load(tmp_path / LATEST, weights_only=True)
    state["config"]["training"]["ema_decay"] = 0.9
    save_checkpoint(tmp_path / LATEST, {key: value for key, value in state.items() if key != "format"})
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, ema_decay=0.9))
    with pytest.raises(CheckpointError, match=r"latest\.pt: weights only, without ema: a run cannot resume from it"):
        find_checkpoint(tmp_path, config, resume=True, overwrite=False)
    with pytest.raises(CheckpointError, match=r"other settings: training\.ema_decay: 0\.9 against null"):
        find_checkpoint(tmp_path, CONFIG, resume=True, overwrite=False)


def test_only_epochs_with_a_number_are_removed(tmp_path):
    own = ["epoch_best.pt", "epoch_12_backup.pt", "epoch_007.pt", "epoch_-1.pt", "epoch_.pt", "my_epoch_1.pt"]
    for name in own:
        (tmp_path / name).write_text("mine")
    (tmp_path / "epoch_0.pt").mkdir()
    save_checkpoint(tmp_path / "epoch_99.pt", {"model": {}})  # later than the run
    for epoch in range(1, 13):
        write_run(tmp_path, step=3 * epoch)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {*own, "epoch_0.pt", "epoch_99.pt", "epoch_11.pt", "epoch_12.pt", LATEST}
    assert all((tmp_path / name).read_text() == "mine" for name in own)


def test_overwrite_removes_only_what_runs_write(tmp_path):
    write_run(tmp_path)
    evaluation = tmp_path / "eval" / "epoch_2"
    written = [
        *(evaluation / name for name in ("submission.json", "metrics.json", "pictures/00_abcdef0123456789.jpg")),
        tmp_path / "eval" / "epoch_4" / "metrics.json",
        tmp_path / "eval" / "epoch_4" / "pictures" / "01_0123.jpg",
    ]
    own = [
        tmp_path / "epoch_best.pt",
        tmp_path / "latest.pt.bak",
        tmp_path / "eval" / "notes.txt",
        tmp_path / "eval" / "epoch_final" / "metrics.json",
        evaluation / "pictures" / "for the talk.jpg",
        evaluation / "remarks.md",
    ]
    for path in (*written, *own):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    remove_run(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(own)
    assert not (tmp_path / "eval" / "epoch_4").exists()
    remove_run(tmp_path / "none")


def test_overwrite_leaves_no_empty_folder(tmp_path):
    write_run(tmp_path)
    (tmp_path / "eval" / "epoch_2" / "pictures").mkdir(parents=True)
    (tmp_path / "eval" / "epoch_2" / "metrics.json").write_text("{}")
    remove_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    write_run(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, CONFIG, resume=False, overwrite=False)
    assert str(caught.value) == (
        f"{tmp_path / LATEST}: this work dir holds a run at step 6; --resume continues it, --overwrite starts anew, "
        "--work-dir names another folder"
    )
    (tmp_path / "epoch_2.pt").rename(tmp_path / LATEST)
    with pytest.raises(CheckpointError, match="this work dir holds a run; --resume"):
        find_checkpoint(tmp_path, CONFIG, resume=False, overwrite=False)
    assert find_checkpoint(tmp_path, CONFIG, resume=False, overwrite=True) is None


def test_a_damaged_run_names_the_newest_weights(tmp_path):
    write_run(tmp_path, step=3)
    write_run(tmp_path, step=6)
    (tmp_path / LATEST).write_bytes((tmp_path / LATEST).read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        resume(tmp_path, make_run())
    assert str(caught.value).startswith(f"{tmp_path / LATEST}: damaged: ")
    assert str(caught.value).endswith(
        f"; training.init_from={tmp_path / 'epoch_2.pt'} starts a new run from its weights"
    )


def test_other_settings_are_refused(tmp_path):
    write_run(tmp_path)
    other = dataclasses.replace(CONFIG, seed=CONFIG.seed + 1)
    with pytest.raises(CheckpointError, match=f"seed: {CONFIG.seed} against {CONFIG.seed + 1}"):
        find_checkpoint(tmp_path, other, resume=True, overwrite=False)


def test_non_finite_weights_do_not_replace_the_checkpoint(tmp_path):
    write_run(tmp_path, step=3)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run = make_run()
    with torch.no_grad():
        run[0][2].bias[0] = float("nan")
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, CONFIG, *run, 6, STEPS_PER_EPOCH)
    assert str(caught.value) == (
        f"{tmp_path / 'epoch_2.pt'}: not saved: 1 of 9 tensors hold values that are not finite, the first is "
        "model.2.bias; the previous checkpoint is untouched"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def refuse(folder, content, *, weights_only):
    """Load a damaged checkpoint; returns the sentence, None when it was loaded."""
    (folder / LATEST).write_bytes(content)
    run = make_run()
    before = [tensor.clone() for tensor in run[0].state_dict().values()]
    try:
        if weights_only:
            weights, config = load_weights_and_config(folder / LATEST)
            assert config is not None and config["model"] == to_tree(CONFIG.model), "another model"
            load_into(run[0], weights, folder / LATEST)
        else:
            resume(folder, run)
    except CheckpointError as error:
        assert all(map(torch.equal, before, run[0].state_dict().values())), "refused, but partly loaded"
        sentence = str(error)
        assert sentence.startswith(f"{folder / LATEST}: ") and "\n" not in sentence and len(sentence) < 500
        assert "weights_only" not in sentence and "Traceback" not in sentence
        return sentence
    return None


CASES = [
    *(("bytes", kind) for kind in BYTES),
    *(("file", kind) for kind in OTHER_FILES),
    *(("content", kind) for kind in (*WEIGHTS, *RUN)),
]


@pytest.mark.parametrize(("group", "kind"), CASES)
def test_a_damaged_checkpoint_is_refused(tmp_path, group, kind):
    write_run(tmp_path)
    good = (tmp_path / LATEST).read_bytes()
    rng = random.Random(kind)
    for _ in range(3 if group == "bytes" else 1):
        content = damage(good, group, kind, rng)
        (tmp_path / "epoch_2.pt").unlink(missing_ok=True)
        assert refuse(tmp_path, content, weights_only=False) is not None


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("step a text", "step: expected a whole number from 0 to 1000000000000, got '7' (str)"),
        ("step 10**6", "step: expected a whole number from 0 to 30, got 1000000 (int)"),
        ("step -1", "step: expected a whole number from 0 to 1000000000000, got -1 (int)"),
        ("optimizer empty", "optimizer: expected the state of an optimizer, got a dict of 0 items"),
        ("optimizer state empty", "optimizer.state: expected one entry for each parameter, got none"),
        ("optimizer of another model", "optimizer.param_groups: expected groups of [2, 4] parameters, got [2]"),
        ("exp_avg NaN", "1 of 18 tensors hold values that are not finite, the first is optimizer.state.0.exp_avg"),
        (
            "exp_avg sparse",
            "optimizer.state[0].exp_avg: expected a dense tensor of real numbers, got a sparse_coo tensor",
        ),
        ("exp_avg_sq negative", "optimizer.state[0].exp_avg_sq: expected values of at least 0, got -1"),
        ("exp_avg missing", "optimizer.state[0]: expected step, exp_avg, exp_avg_sq, got step, exp_avg_sq"),
        ("scaler of another precision", "scaler: expected the keys [], got a dict of 2 items"),
        ("optimizer groups text", "expected groups of [2, 4] parameters, got 'groups' (str)"),
        ("a complex weight", "model.0.weight: expected a dense tensor of real numbers, got a complex64 tensor"),
        ("a meta weight", "model.0.weight: expected a dense tensor of real numbers, got a meta tensor, which has no"),
        ("a weight of integers", "0.weight: expected floating point, got int64"),
        ("a NaN weight", "1 of 9 tensors hold values that are not finite, the first is 0.weight"),
        ("a whole number as name", "model: expected text as names of tensors, got the key 3 (int)"),
        ("config missing", "config: expected a block of keys, got nothing"),
        ("a tensor in config", "config.model.num_queries: expected text, a number, true, false or null, got a int64"),
        ("a key of config.model missing", "model.num_queries: null against 250"),
    ],
)
def test_sentences_name_the_key_and_both_values(tmp_path, kind, sentence):
    write_run(tmp_path)
    content = damage((tmp_path / LATEST).read_bytes(), "content", kind, random.Random(0))
    assert sentence in refuse(tmp_path, content, weights_only=False)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_a_damaged_checkpoint_are_refused(tmp_path, kind):
    if kind in ("another value in config", "a key of config.model missing"):
        pytest.skip("test.py compares the configurations")
    write_run(tmp_path)
    content = damage((tmp_path / LATEST).read_bytes(), "content", kind, random.Random(0))
    assert refuse(tmp_path, content, weights_only=True) is not None


@pytest.mark.parametrize("kind", list(OTHER_FILES))
def test_another_file_has_no_weights(tmp_path, kind):
    write_run(tmp_path)
    content = damage((tmp_path / LATEST).read_bytes(), "file", kind, random.Random(0))
    assert refuse(tmp_path, content, weights_only=True) is not None


@pytest.mark.parametrize(
    "change",
    [{"scale": float("nan")}, {"scale": -1.0}, {"scale": 65536}, {"growth_interval": 2.5}, {"_growth_tracker": "1"}],
)
def test_numbers_of_the_loss_scaler(tmp_path, change):
    run = write_run(tmp_path, precision="fp16")
    state = find_checkpoint(tmp_path, CONFIG, resume=True, overwrite=False)
    state["scaler"] |= change
    with pytest.raises(CheckpointError, match=f"scaler.{next(iter(change))}: expected a number"):
        restore(state, tmp_path / LATEST, *run, total_steps=TOTAL_STEPS)
